"""The config's base class for sections, and the sections that stand inside another: `data.filter`, `data.buckets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

from mmdit_lora.ranges import SIDE


class Section(BaseModel):
    """Strict: no unknown keys, no strings taken for numbers, no NaN; an int may stand where a float is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, str_max_length=4096)

    @field_validator("*")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no path and no name holds one: the system refuses it late
            raise ValueError("it should hold no NUL character")
        return value


class FilterSection(Section):
    min_area: float = Field(
        default=0.0, description="boxes that cover a smaller share of their picture are left out", ge=0, lt=1
    )
    max_boxes: int | None = Field(
        default=None, description="of a picture with more boxes the largest are kept; null = all", ge=1, le=1_000_000
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
    resolutions: list[Annotated[int, Field(ge=16, le=int(SIDE.high))]] = Field(
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


def bounds(field: FieldInfo) -> tuple[Any, ...]:
    """What bounds the numbers of a field, or those in its list, mapping or union: `annotated_types.Ge`, `Lt`, ..."""

    def found(metadata: Sequence[Any]) -> list[Any]:
        inner = [limit for item in metadata if isinstance(item, FieldInfo) for limit in item.metadata]
        return [limit for limit in (*metadata, *inner) if isinstance(limit, Ge | Gt | Le | Lt)]

    def inside(annotation: Any) -> list[Any]:
        own = found(getattr(annotation, "__metadata__", ()))
        return own or next((limits for part in get_args(annotation) if (limits := inside(part))), [])

    return tuple(found(field.metadata) or inside(field.annotation))


def limits_text(limits: Sequence[Any]) -> str:
    """E.g. "from 0 to below 1"."""
    words = {Ge: "from {}", Gt: "above {}", Le: "to {}", Lt: "to below {}"}
    values = [getattr(limit, type(limit).__name__.lower()) for limit in limits]
    texts = [f"{value:,}" if isinstance(value, int) else f"{value:g}" for value in values]
    return " ".join(words[type(limit)].format(text) for limit, text in zip(limits, texts, strict=True))
