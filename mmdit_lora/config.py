"""The typed config of a run: a YAML file and `key=value` overrides, checked before anything heavy is loaded.

Every field's description is one plain line; `init` prints them as comments, so this file is also the config's reference.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mmdit_lora.config_yaml import dump_yaml, parse_yaml
from mmdit_lora.errors import InputError, unknown_key

# YAML has lists only, and strict mode would refuse them where a tuple is meant.
Pair = Annotated[tuple[float, float], Field(strict=False)]

MAX_SEED = 2**32 - 1  # NumPy's limit, and Accelerate seeds NumPy too

# Pydantic's words for these speak of Python, not of YAML.
_MESSAGES = {
    "tuple_type": "it should be a list",
    "list_type": "it should be a list",
    "bool_type": "it should be true or false",
    "model_type": "it should be `key: value` lines",
}


class Section(BaseModel):
    """Strict: no unknown keys, no strings taken for numbers, no NaN; an int may stand where a float is meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSection(Section):
    path: str = Field(description="folder of the training pictures, with its metadata.jsonl", min_length=1)
    validation: str | None = Field(
        default=None, description="a second such folder to validate on; null = hold out a share of path"
    )
    validation_share: float = Field(
        default=0.1, description="share of path held out where validation is null", ge=0, lt=1
    )
    bbox_format: Literal["xyxy", "xywh", "cxcywh"] = Field(
        default="xyxy",
        description="how boxes are written: xyxy | xywh | cxcywh (a line of metadata.jsonl may say otherwise)",
    )
    bbox_units: Literal["relative", "pixel"] = Field(
        default="relative", description="relative (0 to 1 of the picture's sides) | pixel"
    )
    resolution: int | None = Field(
        default=None, description="side of the training pictures in pixels; null = the base's own", ge=16
    )
    crop: Literal["center", "random"] = Field(
        default="center", description="what is kept of an oblong picture: center | random"
    )
    flip: bool = Field(default=False, description="mirror half of the pictures, unless their text says left or right")
    cache: str | None = Field(
        default=None, description="folder for what the encoders make, shared by runs and data sets; null = memory only"
    )
    cache_variants: int | None = Field(
        default=None,
        description="a random crop or flip is one of so many a picture, which can be cached; null = a new one each time",
        ge=1,
    )

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


class LoraSection(Section):
    r: int = Field(default=16, description="rank of each adapter", ge=1)
    alpha: float = Field(
        default=32, description="strength: the update is scaled by alpha / r (alpha / sqrt(r) with rslora)", gt=0
    )
    dropout: float = Field(default=0.1, description="dropout before each adapter, in training only", ge=0, lt=1)
    targets: list[str] = Field(
        default=["layout_mlp.fc1", "layout_mlp.fc2"],
        description="name endings of the linears that get one",
        min_length=1,
    )
    rslora: bool = Field(default=False, description="rank-stabilised scaling")
    dora: bool = Field(default=False, description="DoRA: magnitude and direction are trained apart")


class StreamSection(Section):
    attention: Literal["siamese", "cross"] | None = Field(
        default=None,
        description="how image tokens read the layout: siamese | cross (cheaper); null = as the base has it, siamese in a new one",
    )
    init: Literal["copy_text", "copy_image", "random"] | None = Field(
        default=None, description="what a new stream starts from: copy_text | copy_image | random; null = copy_text"
    )
    seed: int | None = Field(
        default=None, description="seed of what is random in a new stream; null = train.seed", ge=0, le=MAX_SEED
    )
    single_blocks: bool | None = Field(
        default=None,
        description="a stream in the single-stream blocks too; null = as the base has it, false in a new one",
    )
    phrase_tokens: int | None = Field(
        default=None,
        description="text tokens that stand for a phrase; null = as the base has it, one pooled embedding in a new one",
        ge=1,
    )


class FlowSection(Section):
    timesteps: Literal["logit_normal", "mode", "uniform"] = Field(
        default="logit_normal", description="how t is drawn in training: logit_normal | mode | uniform"
    )
    logit_mean: float = Field(default=0.0, description="logit_normal: mean; above 0 draws noisier t")
    logit_std: float = Field(default=1.0, description="logit_normal: standard deviation", gt=0)
    mode_scale: float = Field(default=1.29, description="mode: weight of the middle of [0, 1]")
    shift: float = Field(
        default=1.0, description="moves t towards noise, as the scheduler's shift does (1 = off)", gt=0
    )
    inside_weight: float = Field(
        default=1.0, description="weight of the loss inside boxes, relative to outside (1 = off)", gt=0
    )
    guidance: float = Field(
        default=1.0,
        description="embedded guidance that a guidance-distilled base is trained with; others take 1.0",
        ge=0,
    )


class TrainSection(Section):
    max_steps: int = Field(default=1000, description="optimizer steps", ge=1)
    batch_size: int = Field(default=8, description="pictures per step and process", ge=1)
    gradient_accumulation: int = Field(default=1, description="batches per optimizer step", ge=1)
    learning_rate: float = Field(default=1e-4, description="peak learning rate of AdamW", gt=0)
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        default="cosine", description="after the warm-up: constant | cosine | linear (the last two fall to 0)"
    )
    warmup_steps: int = Field(default=0, description="steps over which the learning rate rises from 0", ge=0)
    weight_decay: float = Field(default=0.01, description="weight decay of AdamW", ge=0)
    adam_betas: Pair = Field(default=(0.9, 0.999), description="decay rates of AdamW's two moments, each in [0, 1)")
    max_grad_norm: float = Field(default=1.0, description="gradients are scaled down to this norm", gt=0)
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(default="no", description="no | fp16 | bf16")
    seed: int = Field(default=0, description="seed of everything that is drawn", ge=0, le=MAX_SEED)
    caption_dropout: float = Field(
        default=0.1, description="share of samples trained with an empty caption", ge=0, le=1
    )
    layout_dropout: float = Field(
        default=0.0, description="share of samples trained without their layout (method full only)", ge=0, le=1
    )
    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = Field(
        default=False, description="less memory, up to a third more time: false | true | k (every k-th block)"
    )
    attention_backend: str | None = Field(
        default=None, description="diffusers' name of an attention backend, e.g. _native_cudnn; null = its default"
    )
    compile: bool = Field(
        default=False, description="compile the blocks: minutes at the start, then faster steps; other draws of dropout"
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="the frozen base's linears: none | int8 (torchao) | nf4 (bitsandbytes, on a GPU); the stream stays as it is",
    )
    checkpoint_every: int = Field(
        default=500, description="steps between checkpoints that a run can resume from; 0 = none", ge=0
    )
    keep_checkpoints: int = Field(default=2, description="how many of them are kept", ge=1)
    validate_every: int = Field(default=250, description="steps between validation losses; 0 = none", ge=0)
    sample_every: int = Field(default=250, description="steps between sampled pictures; 0 = none", ge=0)
    sample_count: int = Field(default=8, description="pictures sampled each time", ge=0)
    log_every: int = Field(default=10, description="steps between log lines", ge=1)


class TrackingSection(Section):
    tracker: Literal["wandb", "tensorboard", "none"] = Field(default="none", description="wandb | tensorboard | none")
    project: str = Field(default="mmdit-lora", description="the tracker's project", min_length=1)
    run_name: str | None = Field(default=None, description="name of the run; null = the tracker's choice")
    wandb_mode: Literal["offline", "online", "disabled"] = Field(
        default="offline", description="offline | online | disabled; offline runs go up later with `wandb sync`"
    )


class SampleSection(Section):
    steps: int | None = Field(default=None, description="sampling steps; null = what the base states", ge=1)
    guidance_scale: float | None = Field(
        default=None, description="classifier-free guidance by the caption; null = what the base states", ge=0
    )
    layout_scale: float = Field(default=1.0, description="multiplier of the layout residual (1 = as trained, 0 = off)")
    layout_window: Pair = Field(
        default=(0.0, 1.0), description="part of the sampling steps where the layout is on, from and to"
    )
    seed: int = Field(default=0, description="seed of the sampled pictures", ge=0, le=MAX_SEED)


class Config(Section):
    """A run. Paths are relative to the current directory.

    Raises:
        ValidationError (pydantic, a ValueError): from Python; `load_config` raises `InputError` instead.
    """

    base: str = Field(description="what is adapted: a diffusers pipeline folder or a hub id", min_length=1)
    method: Literal["lora", "layout_stream", "full"] = Field(
        default="lora",
        description="what is trained: lora (an adapter) | layout_stream (pretrain the stream) | full (everything)",
    )
    output_dir: str = Field(
        default="outputs/run", description="where checkpoints, pictures and the adapter go", min_length=1
    )
    data: DataSection = Field(description="the data set")
    lora: LoraSection = Field(default=LoraSection(), description="the adapter (method lora)")
    stream: StreamSection = Field(
        default=StreamSection(), description="the layout stream of a base that has none; or a check of one that has it"
    )
    flow: FlowSection = Field(default=FlowSection(), description="the rectified-flow objective")
    train: TrainSection = Field(default=TrainSection(), description="the training loop")
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
    "flow": FlowSection,
    "train": TrainSection,
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
    if not path.is_file():
        raise InputError("no such config file", where=str(path), cure="`mmdit-lora init DATA --out FILE` writes one")
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"cannot be read as text ({error})", where=str(path)) from None
    data, lines = parse_yaml(text, where=str(path))
    if not isinstance(data, dict):
        raise InputError(
            f"holds {_kind(data)}, not `key: value` lines", where=str(path), cure="base and data are required"
        )
    places = {keys: f"{path}:{line}" for keys, line in lines.items()}
    data = {key: _section_as_mapping(key, value) for key, value in data.items()}
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
    where = f"override {reprlib.repr(override)}"
    if not equals or not all(keys):
        raise InputError("is not of the form key=value", where=where, cure="write for example train.max_steps=100")
    value, _ = parse_yaml(text, where=where, numbered=False)
    if len(keys) > 2 or (len(keys) == 2 and keys[0] not in SECTIONS):
        raise _unknown(keys[-1] if keys[0] in SECTIONS else keys[0], keys[:1] if keys[0] in SECTIONS else (), where)
    if len(keys) == 1:
        data[keys[0]] = _section_as_mapping(keys[0], value)
    else:
        section = data.setdefault(keys[0], {})
        if not isinstance(section, dict):
            raise InputError(
                f"{keys[0]} is {_kind(section)}", where=places.get(keys[:1]), cure=f"write keys below {keys[0]}"
            )
        section[keys[1]] = value
    places[keys] = where


def _refuse_unknown_keys(data: Mapping[Any, Any], places: Mapping[tuple[Any, ...], str], file: str) -> None:
    """Before pydantic does: its message does not know the nearest key."""
    for key, value in data.items():
        if key not in Config.model_fields:
            raise _unknown(key, (), places.get((str(key),), file))
        if key in SECTIONS and isinstance(value, Mapping):
            for inner in value:
                if inner not in SECTIONS[key].model_fields:
                    raise _unknown(inner, (key,), places.get((key, str(inner)), places.get((key,), file)))


def _unknown(key: Any, section: tuple[str, ...], where: str) -> InputError:
    known = SECTIONS[section[0]].model_fields if section else Config.model_fields
    elsewhere = [f"{name}.{key}" for name, model in SECTIONS.items() if key in model.model_fields]
    elsewhere += [key] if section and key in Config.model_fields else []
    error = unknown_key(key, known, where=": ".join((where, *section)))
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
    keys = tuple(str(key) for key in first["loc"][: 2 if first["loc"] and first["loc"][0] in SECTIONS else 1])
    name = ".".join(keys)
    if first["type"] == "missing":
        return InputError(f"{name!r} is missing", where=_place(keys[:-1], places, file), cure=_meaning(keys))
    message = _MESSAGES.get(first["type"]) or first["msg"].replace("Input should", "it should")
    return InputError(
        f"{name} is {reprlib.repr(first['input'])}: {message}", where=_place(keys, places, file), cure=_meaning(keys)
    )


def _place(keys: tuple[str, ...], places: Mapping[tuple[Any, ...], str], file: str) -> str:
    return places.get(keys) or places.get(keys[:1]) or file


def _meaning(keys: tuple[str, ...]) -> str | None:
    model: type[BaseModel] = SECTIONS[keys[0]] if len(keys) > 1 and keys[0] in SECTIONS else Config
    field = model.model_fields.get(keys[1] if model is not Config else keys[0])
    return f"give {'.'.join(keys[:2])}: {field.description}" if field is not None else None


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _same_path(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
