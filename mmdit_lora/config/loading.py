"""A run's config from a YAML file and `key=value` overrides, checked before anything heavy is loaded.

Scalars follow YAML 1.2's core schema: in PyYAML's YAML 1.1, `1e-4` is a string, `no` is False, `010` is 8 and `1:30` is 90,
and each of them is a trap in a config (`mixed_precision: no`). Tags and repeated keys are errors; every key keeps its line.

ruamel.yaml would not replace this: its YAML 1.2 reads `2026-01-31` as a date (and 2026-13-45 is a ValueError without a line) and
`+.5e3` as a string, accepts `!!binary` and `!!timestamp`, and has no limit for aliases that multiply.

A file may say `version: N`; without it the version is 1.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from mmdit_lora.config.schema import (
    DataSection,
    FilterSection,
    FlowSection,
    LoraSection,
    PriorSection,
    SampleSection,
    Section,
    StreamSection,
    TrackingSection,
    TrainSection,
    bounds,
    limits_text,
    nested,
    optional,
)
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.files import read_text
from mmdit_lora.resources import here_or_packaged

_MOST_NODES = 10_000_000  # that a document stands for, where every alias is written out
Lines = dict[tuple[Any, ...], int]
_FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$")
_CORE = (
    ("null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    """The core schema alone: no bytes, dates, sets or pairs, and no tag that asks for one."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]  # not those of SafeLoader


_constructors: dict[Any, Any] = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "str", "seq", "map")
}
# SafeLoader's own read 010 as octal, and 1:30.5 as a number.
_constructors["tag:yaml.org,2002:int"] = lambda loader, node: int(loader.construct_scalar(node))
_constructors["tag:yaml.org,2002:float"] = lambda loader, node: float(
    re.sub(r"\.(inf|nan)", r"\1", loader.construct_scalar(node).lower())
)
_Loader.yaml_constructors = _constructors
for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML would misread: 'no' for readers of 1.1, '1e-4' for ours."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def dump_yaml(data: Any) -> str:
    """Plain data as YAML that this module and any other reader read alike, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


def parse_yaml(
    text: str, *, location: str, numbered: bool = True, unique: bool = True, loader: Any = _Loader
) -> tuple[Any, Lines]:
    """The value of `text`, and the line (from 1) of every key of its mappings, by its path of keys.

    Args:
        location: the text's name in errors. numbered: whether a line number follows it (a file) or not (an argument).
        unique: refuse a key that stands twice in one mapping.
        loader: a class of PyYAML's, for others' files; by default YAML 1.2's core schema.

    Raises:
        InputError: the text is not YAML; it holds a tag (`!!python/object` and its kin); its aliases stand for more than
            `_MOST_NODES` values; with the line.
    """
    lines: Lines = {}
    sizes: dict[int, float] = {}  # id of a node -> how many values it stands for

    def at(mark: Any) -> str:
        return f"{location}:{mark.line + 1}" if numbered and mark is not None else location

    def walk(node: yaml.Node, keys: tuple[Any, ...]) -> float:
        if id(node) not in sizes:
            sizes[id(node)] = math.inf  # until it is counted: a node that holds itself
            size = 1.0
            if isinstance(node, yaml.SequenceNode):
                size += sum(walk(item, (*keys, None)) for item in node.value)
            elif isinstance(node, yaml.MappingNode):
                here: dict[str, int] = {}
                for key, value in node.value:
                    size += walk(key, keys)
                    name, line = key.value if isinstance(key, yaml.ScalarNode) else "?", key.start_mark.line + 1
                    if unique and name in here and name != "<<":
                        what = f"the key {name!r} stands twice (first in line {here[name]})"
                        raise InputError(what, location=at(key.start_mark), hint="keep one of them")
                    here[name] = lines[(*keys, name)] = line
                    size += walk(value, (*keys, name))
            sizes[id(node)] = size
        if sizes[id(node)] > _MOST_NODES:
            what = f"its aliases (*name) stand for more than {_MOST_NODES:,} values"
            raise InputError(what, location=at(node.start_mark), hint="write the values out")
        return sizes[id(node)]

    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return None, lines
        walk(node, ())
        return reader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        place = at(error.problem_mark or error.context_mark)
        if isinstance(error, yaml.constructor.ConstructorError) and "tag" in str(error.problem):
            hint = "write plain values: no objects are made of tags"
            raise InputError(f"holds a YAML tag ({error.problem})", location=place, hint=hint) from None
        raise InputError(f"is not YAML: {error.problem or error.context}", location=place) from None
    except InputError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, KeyError) as error:  # KeyError: `!!bool x`
        raise InputError(f"is not YAML that can be read: {error}", location=location) from None


VERSION = 1
_MOST_BYTES = 2**20  # of a config file
_STUDY_METHODS = ("ia3", "subspace")  # earlier versions offered them

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

    version: int = optional(VERSION, "of the config's format", ge=1, le=1000)
    base: str = Field(description="what is adapted: a diffusers pipeline folder or a hub id", min_length=1)
    method: Literal["lora", "layout_stream", "full"] = optional(
        "lora", "what is trained: lora (an adapter) | layout_stream (pretrain the stream) | full (everything)"
    )
    stream_weights: str | None = optional(
        None,
        "folder of a generic layout stream that was trained on the base: `<output_dir>/stream` of such a run",
        min_length=1,
    )
    output_dir: str = optional("outputs/run", "where checkpoints, images and the adapter go", min_length=1)
    license: str = optional("other", "of the adapter, for its card: the hub's name of it", min_length=1)
    data: DataSection = Field(description="the data set")
    lora: LoraSection = optional(LoraSection(), "the adapter (method lora)")
    stream: StreamSection = optional(
        StreamSection(), "the layout stream of a base that has none; or a check of one that has it"
    )
    flow: FlowSection = optional(FlowSection(), "the rectified-flow objective")
    train: TrainSection = optional(TrainSection(), "the training loop")
    prior: PriorSection = optional(PriorSection(), "prior preservation (method lora)")
    tracking: TrackingSection = optional(TrackingSection(), "where the curves go")
    sample: SampleSection = optional(SampleSection(), "how images are sampled while training")

    @field_validator("base")
    @classmethod
    def _find_base(cls, value: str) -> str:
        return here_or_packaged(value)

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        train, data = self.train, self.data
        if self.method != "full" and train.layout_dropout > 0:
            raise InputError(
                f"is {train.layout_dropout} with method {self.method}: without a layout a frozen base trains nothing",
                location="train.layout_dropout",
                hint="set it to 0, or train with method full",
            )
        if self.method == "full" and train.quantization != "none":
            raise InputError(
                f"is {train.quantization} with method full: a quantised base stays frozen",
                location="train.quantization",
                hint="set it to none, or train with method lora or layout_stream",
            )
        if self.lora.start is not None and self.method != "lora":
            raise InputError(
                f"is given with method {self.method}, which trains no LoRA",
                location="lora.start",
                hint="set it to null, or train with method lora",
            )
        if data.validation is not None and os.path.realpath(data.path) == os.path.realpath(data.validation):
            raise InputError(
                f"is the training folder itself ({data.validation})",
                location="data.validation",
                hint="give another folder, or null and a validation_share",
            )
        if not all(0 <= beta < 1 for beta in train.adam_betas):
            raise InputError(
                f"is {list(train.adam_betas)}", location="train.adam_betas", hint="give two numbers in [0, 1)"
            )
        start, end = self.sample.layout_window
        if not 0 <= start < end <= 1:
            raise InputError(
                f"is {[start, end]}", location="sample.layout_window", hint="give [from, to] with 0 <= from < to <= 1"
            )
        return self

    def to_yaml(self) -> str:
        """The resolved config, every default written out; `load_config` reads it back to an equal `Config`."""
        return dump_yaml(self.model_dump(mode="json"))


SECTIONS = {name: section for name in Config.model_fields if (section := nested(Config, (name,)))}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file, with overrides such as `train.max_steps=10` (the value is YAML too; the last one wins).

    Raises:
        InputError: no such file, no YAML, an unknown or missing key, a value of the wrong type or out of range; with file
            and line, or the override.
    """
    path = Path(here_or_packaged(path))
    hint = "`mmdit-lora init DATA --out FILE` writes one"
    text = read_text(path, what="config file", limit=_MOST_BYTES, hint=hint)
    data, lines = parse_yaml(text, location=str(path))
    if not isinstance(data, dict):
        raise InputError(
            f"holds {'nothing' if data is None else type(data).__name__}, not `key: value` lines",
            location=str(path),
            hint="base and data are required",
        )
    places = {keys: f"{path}:{line}" for keys, line in lines.items()}
    data = {key: _section_as_mapping(key, value) for key, value in data.items()}
    for override in overrides:
        _apply_override(data, places, override)
    return _validated(data, places, str(path))


def as_config(config: Config | Mapping[str, Any] | str | Path) -> Config:
    """A config as it is, or from its values, or from the path of its YAML file. Raises `InputError` as `load_config` does."""
    if isinstance(config, Config):
        return config
    if not isinstance(config, Mapping | str | Path):
        raise InputError(
            f"is a {type(config).__name__}", location="config", hint="give a YAML file, a dict or a Config"
        )
    if not isinstance(config, Mapping):
        return load_config(config)
    return _validated({key: _section_as_mapping(key, value) for key, value in config.items()}, {}, "config")


def _validated(data: dict[str, Any], places: Mapping[tuple[Any, ...], str], file: str) -> Config:
    version = data.get("version", VERSION)
    if version != VERSION or type(version) is not int:
        what = f"version is {shown(version)}, and this mmdit-lora knows configs up to {VERSION}"
        later = "install a newer mmdit-lora, or write a new config with `mmdit-lora init`"
        is_later = type(version) is int and version > VERSION
        raise InputError(what, location=file, hint=later if is_later else "leave it out")
    if data.get("method") in _STUDY_METHODS:
        raise InputError(
            f"is {data['method']}, which only studies train",
            location=f"{_place(('method',), places, file)}: method",
            hint="give lora, layout_stream or full; `mmdit-lora study methods` and `study intrinsic` compare with it",
        )
    data.pop("subspace", None)  # configs that earlier versions wrote hold its defaults
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise _as_input_error(error, places, file) from None


def _section_as_mapping(key: Any, value: Any) -> Any:
    """`data: folder` is short for its path, and a section with every line commented out is one of defaults."""
    if key == "data" and isinstance(value, str):
        return {"path": value}
    if key in SECTIONS and (value is None or isinstance(value, dict)):
        return dict(value or {})  # overrides change it, and not what an alias shares with it
    return value


def _apply_override(data: dict[str, Any], places: dict[tuple[Any, ...], str], override: str) -> None:
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    location = f"override {shown(override)}"
    if not equals or not all(keys):
        raise InputError(
            "is not of the form key=value", location=location, hint="write for example train.max_steps=100"
        )
    value, _ = parse_yaml(text, location=location, numbered=False)
    place: Any = data
    for depth, key in enumerate(keys[:-1]):
        if nested(Config, keys[: depth + 1]) is None:
            raise _unknown(keys[-1] if depth else key, keys[:depth], location)
        if place.get(key) is None:
            place[key] = {}
        place = place[key]
        if not isinstance(place, dict):
            name = ".".join(keys[: depth + 1])
            raise InputError(
                f"{name} is {type(place).__name__}",
                location=_place(keys, places, location),
                hint=f"write keys below {name}",
            )
    place[keys[-1]] = _section_as_mapping(keys[0], value) if len(keys) == 1 else value
    places[keys] = location


def _unknown(key: Any, section: tuple[str, ...], location: str) -> InputError:
    model = nested(Config, section)
    assert model is not None
    elsewhere = [f"{name}.{key}" for name, model in SECTIONS.items() if key in model.model_fields]
    elsewhere += [key] if section and key in Config.model_fields else []
    elsewhere += [f"data.filter.{key}"] if key in FilterSection.model_fields and section != ("data", "filter") else []
    error = unknown_key(key, model.model_fields, location=": ".join((location, *section)))
    if elsewhere:
        error.hint = f"did you mean {elsewhere[0]!r}?"
    return error


def _as_input_error(error: ValidationError, places: Mapping[tuple[Any, ...], str], file: str) -> InputError:
    """The first error that pydantic reports, with its place in the file or the override, and the field's meaning as hint."""
    errors = error.errors()
    for unknown in errors:  # before all others
        if unknown["type"] in ("extra_forbidden", "invalid_key"):
            keys = tuple(map(str, unknown["loc"]))
            return _unknown(unknown["loc"][-1], keys[:-1], _place(keys, places, file))
    first = errors[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, InputError):
        keys = tuple((own.location or "").split("."))
        return own.at(_place(keys, places, file))
    # Behind the field's own name come places in a list, and the members of a union that were tried.
    keys = tuple(str(key) for key in first["loc"])
    keys = keys[: next((n for n in range(len(keys)) if nested(Config, keys[: n + 1]) is None), len(keys) - 1) + 1]
    name = ".".join(keys)
    if first["type"] == "missing":
        return InputError(f"{name!r} is missing", location=_place(keys[:-1], places, file), hint=_meaning(keys))
    message = _MESSAGES.get(first["type"]) or first["msg"].replace("Input should", "it should")
    message = message.removeprefix("Value error, ").replace("String should", "it should")
    if first["type"] == "string_type" and isinstance(first["input"], int | float):
        message += f'. In quotes it is one: "{first["input"]}"'
    return InputError(
        f"{name} is {shown(first['input'])}: {message}", location=_place(keys, places, file), hint=_meaning(keys)
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
