"""The config's base class for sections, and the sections that stand inside another: `data.filter`, `data.buckets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Strict: no unknown keys, no strings taken for numbers, no NaN; an int may stand where a float is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FilterSection(Section):
    min_area: float = Field(
        default=0.0, description="boxes that cover a smaller share of their picture are left out", ge=0, lt=1
    )
    max_boxes: int | None = Field(
        default=None, description="of a picture with more boxes the largest are kept; null = all", ge=1
    )
    include_phrases: list[str] = Field(
        default=[],
        description="boxes whose phrase holds none of these are left out (regular expressions, any case); [] = all stay",
    )
    exclude_phrases: list[str] = Field(
        default=[], description="boxes whose phrase holds one of these are left out (regular expressions, any case)"
    )


class BucketsSection(Section):
    ratios: list[str] = Field(
        default=[],
        description='shapes that pictures are trained in, width:height, e.g. ["1:1", "4:3", "3:4"]; [] = square',
    )
    resolutions: list[Annotated[int, Field(ge=16)]] = Field(
        default=[], description="a bucket of resolution r has about r x r pixels; [] = data.resolution alone"
    )
    upscale: bool = Field(
        default=False, description="enlarge small pictures to their bucket; false = they get a smaller one"
    )
    group_boxes: bool = Field(
        default=False,
        description="batches of layouts with about as many boxes: less padding where the numbers vary much",
    )

    @property
    def has_sizes(self) -> bool:
        """Whether pictures are trained in more than the one square."""
        return bool(self.ratios or self.resolutions)


def nested(model: type[BaseModel], keys: Sequence[Any]) -> type[BaseModel] | None:
    """The section that `keys` name below `model`; None where one of them names none."""
    for key in keys:
        field = model.model_fields.get(str(key))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return None
        model = field.annotation
    return model


def without_empty_sections(model: type[BaseModel], value: Any) -> Any:
    """`filter:` with every line below it commented out is a section of defaults."""
    if not isinstance(value, Mapping):
        return value
    return {k: {} if v is None and nested(model, (k,)) else v for k, v in value.items()}
