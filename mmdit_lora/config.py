"""The typed config of a run: a YAML file and `key=value` overrides, checked before anything heavy is loaded.

Every field's description is one plain line; `init` prints them as comments, so this file is also the config's reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mmdit_lora.config_filter import FilterSection, Section, bounds, limits_text, nested
from mmdit_lora.config_sections import (
    DataSection,
    FlowSection,
    LoraSection,
    PriorSection,
    SampleSection,
    StreamSection,
    SubspaceSection,
    TrackingSection,
    TrainSection,
)
from mmdit_lora.config_version import VERSION, migrate
from mmdit_lora.config_yaml import dump_yaml, parse_yaml
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.files import read_text

log = logging.getLogger(__name__)

_MOST_BYTES = 2**20  # of a config file

# Pydantic's words for these speak of Python, not of YAML.
_MESSAGES = {
    "tuple_type": "it should be a list",
    "list_type": "it should be a list",
    "bool_type": "it should be true or false",
    "model_type": "it should be `key: value` lines",
}


class Config(Section):
    """A run. Paths are relative to the current directory.

    Raises:
        ValidationError (pydantic, a ValueError): from Python; `load_config` raises `InputError` instead.
    """

    version: int = Field(
        default=VERSION, description="of the config's form; `train` reads earlier ones too", ge=1, le=1000
    )
    base: str = Field(description="what is adapted: a diffusers pipeline folder or a hub id", min_length=1)
    method: Literal["lora", "layout_stream", "full", "ia3", "subspace"] = Field(
        default="lora",
        description="what is trained: lora (an adapter) | layout_stream (pretrain the stream) | full (everything); "
        "to compare with: ia3 (factors at lora.targets) | subspace (random directions)",
    )
    output_dir: str = Field(
        default="outputs/run", description="where checkpoints, pictures and the adapter go", min_length=1
    )
    license: str = Field(
        default="other", description="of the adapter, for its card: the hub's name of it", min_length=1
    )
    data: DataSection = Field(description="the data set")
    lora: LoraSection = Field(default=LoraSection(), description="the adapter (method lora)")
    stream: StreamSection = Field(
        default=StreamSection(), description="the layout stream of a base that has none; or a check of one that has it"
    )
    subspace: SubspaceSection = Field(default=SubspaceSection(), description="random directions (method subspace)")
    flow: FlowSection = Field(default=FlowSection(), description="the rectified-flow objective")
    train: TrainSection = Field(default=TrainSection(), description="the training loop")
    prior: PriorSection = Field(default=PriorSection(), description="prior preservation (method lora)")
    tracking: TrackingSection = Field(default=TrackingSection(), description="where the curves go")
    sample: SampleSection = Field(default=SampleSection(), description="how pictures are sampled while training")

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        train, data = self.train, self.data
        if self.method != "full" and train.layout_dropout > 0:
            raise InputError(
                f"is {train.layout_dropout} with method {self.method}: without a layout a frozen base trains nothing",
                where="train.layout_dropout",
                cure="set it to 0, or train with method full",
            )
        if self.method == "full" and train.quantization != "none":
            raise InputError(
                f"is {train.quantization} with method full: a quantised base stays frozen",
                where="train.quantization",
                cure="set it to none, or train with method lora or layout_stream",
            )
        if self.lora.start is not None and self.method != "lora":
            raise InputError(
                f"is given with method {self.method}, which trains no LoRA",
                where="lora.start",
                cure="set it to null, or train with method lora",
            )
        if data.validation is not None and _same_path(data.path, data.validation):
            raise InputError(
                f"is the training folder itself ({data.validation})",
                where="data.validation",
                cure="give another folder, or null and a validation_share",
            )
        if not all(0 <= beta < 1 for beta in train.adam_betas):
            raise InputError(
                f"is {list(train.adam_betas)}", where="train.adam_betas", cure="give two numbers in [0, 1)"
            )
        start, end = self.sample.layout_window
        if not 0 <= start < end <= 1:
            raise InputError(
                f"is {[start, end]}", where="sample.layout_window", cure="give [from, to] with 0 <= from < to <= 1"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved config, every default written out; `load_config` reads it back to an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))


SECTIONS: dict[str, type[Section]] = {
    "data": DataSection,
    "lora": LoraSection,
    "stream": StreamSection,
    "subspace": SubspaceSection,
    "flow": FlowSection,
    "train": TrainSection,
    "prior": PriorSection,
    "tracking": TrackingSection,
    "sample": SampleSection,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with overrides such as `train.max_steps=10` (the value is YAML too; the last one wins).

    Raises:
        InputError: no such file, no YAML, an unknown or missing key, a value of the wrong type or out of range; with file
            and line, or the override.
    """
    path = Path(path)
    cure = "`mmdit-lora init DATA --out FILE` writes one"
    text = read_text(path, what="config file", limit=_MOST_BYTES, cure=cure)
    data, lines = parse_yaml(text, where=str(path))
    if not isinstance(data, dict):
        raise InputError(
            f"holds {_kind(data)}, not `key: value` lines", where=str(path), cure="base and data are required"
        )
    places = {keys: f"{path}:{line}" for keys, line in lines.items()}
    data = {key: _section_as_mapping(key, value) for key, value in data.items()}
    data, moved = migrate(data, where=str(path))
    for line in moved:
        log.warning("%s: %s", path, line)
    for override in overrides:
        _apply_override(data, places, override)
    _refuse_unknown_keys(data, places, str(path))
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _as_input_error(error, places, str(path)) from None


def _section_as_mapping(key: Any, value: Any) -> Any:
    """`data: folder` is short for its path, and a section with every line commented out is one of defaults."""
    if key == "data" and isinstance(value, str):
        return {"path": value}
    return {} if value is None and key in SECTIONS else value


def _apply_override(data: dict[str, Any], places: dict[tuple[Any, ...], str], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    where = f"override {shown(override)}"
    if not equals or not all(keys):
        raise InputError("is not of the form key=value", where=where, cure="write for example train.max_steps=100")
    value, _ = parse_yaml(text, where=where, numbered=False)
    place: Any = data
    for depth, key in enumerate(keys[:-1]):
        if nested(Config, keys[: depth + 1]) is None:
            raise _unknown(keys[-1] if depth else key, keys[:depth], where)
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            name = ".".join(keys[: depth + 1])
            raise InputError(
                f"{name} is {_kind(place)}", where=_place(keys, places, where), cure=f"write keys below {name}"
            )
    place[keys[-1]] = _section_as_mapping(keys[0], value) if len(keys) == 1 else value
    places[keys] = where


def _refuse_unknown_keys(
    data: Mapping[Any, Any], places: Mapping[tuple[Any, ...], str], file: str, section: tuple[str, ...] = ()
) -> None:
    """Before pydantic does: its message does not know the nearest key."""
    known = nested(Config, section)
    assert known is not None
    for key, value in data.items():
        if key not in known.model_fields:
            raise _unknown(key, section, _place((*section, str(key)), places, file))
        if isinstance(value, Mapping) and nested(Config, (*section, key)):
            _refuse_unknown_keys(value, places, file, (*section, key))


def _unknown(key: Any, section: tuple[str, ...], where: str) -> InputError:
    model = nested(Config, section)
    assert model is not None
    elsewhere = [f"{name}.{key}" for name, model in SECTIONS.items() if key in model.model_fields]
    elsewhere += [key] if section and key in Config.model_fields else []
    elsewhere += [f"data.filter.{key}"] if key in FilterSection.model_fields and section != ("data", "filter") else []
    error = unknown_key(key, model.model_fields, where=": ".join((where, *section)))
    if elsewhere:
        error.cure = f"did you mean {elsewhere[0]!r}?"
    return error


def _as_input_error(error: ValidationError, places: Mapping[tuple[Any, ...], str], file: str) -> InputError:
    """The first thing that pydantic found, with its place in the file or the override, and the field's meaning as cure."""
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, InputError):
        keys = tuple((own.where or "").split("."))
        return own.at(_place(keys, places, file))
    # Behind the field's own name come places in a list, and the members of a union that were tried.
    keys = tuple(str(key) for key in first["loc"])
    keys = keys[: next((n for n in range(len(keys)) if nested(Config, keys[: n + 1]) is None), len(keys) - 1) + 1]
    name = ".".join(keys)
    if first["type"] == "missing":
        return InputError(f"{name!r} is missing", where=_place(keys[:-1], places, file), cure=_meaning(keys))
    message = _MESSAGES.get(first["type"]) or first["msg"].replace("Input should", "it should")
    message = message.removeprefix("Value error, ").replace("String should", "it should")
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        message += f'. In quotes it is one: "{first["input"]}"'
    return InputError(
        f"{name} is {shown(first['input'])}: {message}", where=_place(keys, places, file), cure=_meaning(keys)
    )


def _place(keys: tuple[str, ...], places: Mapping[tuple[Any, ...], str], file: str) -> str:
    found = (places[keys[:depth]] for depth in range(len(keys), 0, -1) if keys[:depth] in places)
    return next(found, file)


def _meaning(keys: tuple[str, ...]) -> str | None:
    model = nested(Config, keys[:-1]) if keys else None
    field = model.model_fields.get(keys[-1]) if model is not None else None
    if field is None:
        return None
    limits = bounds(field)
    return f"give {'.'.join(keys)}: {field.description}" + (f"; {limits_text(limits)}" if limits else "")


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _same_path(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
