"""The sections of a run's config, field by field, and the base class of all of them.

Every field's description is one plain line; `init` prints them as comments, so this file is also the config's reference.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from mmdit_lora.config.ranges import BATCH, GUIDANCE, LAYOUT_SCALE, SEED, SIDE, STEPS
from mmdit_lora.errors import clip


def optional(default: Any, description: str, **limits: Any) -> Any:
    """A key of the config that may be left out.

    Args:
        description: one plain line. limits: of pydantic's `Field`: ge, le, min_length, ...
    """
    return Field(default=default, description=description, **limits)


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
    min_area: float = optional(0.0, "boxes that cover a smaller share of their image are left out", ge=0, lt=1)
    max_boxes: int | None = optional(
        None, "of an image with more boxes the largest are kept; null = all", ge=1, le=1_000_000
    )
    include_phrases: list[str] = optional(
        [], "boxes whose phrase holds none of these are left out (regular expressions, any case); [] = all stay"
    )
    exclude_phrases: list[str] = optional(
        [], "boxes whose phrase holds one of these are left out (regular expressions, any case)"
    )


class BucketsSection(Section):
    ratios: list[str] = optional(
        [], 'shapes that images are trained in, width:height, e.g. ["1:1", "4:3", "3:4"]; [] = square'
    )
    resolutions: list[Annotated[int, Field(ge=16, le=int(SIDE.high))]] = optional(
        [], "a bucket of resolution r has about r x r pixels; [] = data.resolution alone"
    )
    upscale: bool = optional(False, "enlarge small images to their bucket; false = they get a smaller one")
    group_boxes: bool = optional(
        False, "batches of layouts with about as many boxes: less padding where the numbers vary much"
    )

    @property
    def has_sizes(self) -> bool:
        """Whether images are trained in more than the one square."""
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


Share = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only, and strict mode would refuse them where a tuple is meant.
Pair = Annotated[tuple[Share, Share], Field(strict=False)]

# Every number has a lower and an upper bound (`tests/test_config.py` holds that): beyond them it is a slip of the pen, and
# would end in an overflow or in a run that trains nothing.
MAX_STEPS = 9_999_999  # a checkpoint's name has seven digits
MAX_RANK = 16_384
MAX_BATCH, MAX_SIDE, MAX_SEED = int(BATCH.high), int(SIDE.high), int(SEED.high)


class DataSection(Section):
    path: str = Field(
        description="folder of the training images, with its metadata.jsonl; or shards (tar, parquet): a folder, pattern or "
        "URL; or scenes that are generated: shapes://page?count=2000&seed=11",
        min_length=1,
    )
    validation: str | None = optional(None, "a second such folder to validate on; null = hold out a share of path")
    validation_share: float = optional(0.1, "share of path held out where validation is null", ge=0, lt=1)
    bbox_format: Literal["xyxy", "xywh", "cxcywh"] = optional(
        "xyxy", "how boxes are written: xyxy | xywh | cxcywh (a line of metadata.jsonl may say otherwise)"
    )
    bbox_units: Literal["relative", "pixel", "permille"] = optional(
        "relative",
        "relative (0 to 1 of the image's sides) | pixel | permille (0 to 1000, as vision-language models answer)",
    )
    resolution: int | None = optional(
        None, "side of the square training images in pixels; null = the base's own", ge=16, le=MAX_SIDE
    )
    crop: Literal["center", "random"] = optional("center", "what is kept of an oblong image: center | random")
    flip: bool = optional(False, "mirror half of the images, unless their text says left or right")
    min_visible: float = optional(
        0.25, "a box of which the crop leaves a smaller share is dropped with its phrase", ge=0, le=1
    )
    box_jitter: float = optional(
        0.0, "each side of a box moves by up to this share of the box's size (training)", ge=0, lt=0.5
    )
    workers: int | None = optional(
        None,
        "processes that read, decode and resize ahead; 0 = none; null = up to 4 with a GPU, none without",
        ge=0,
        le=256,
    )
    cache: str | None = optional(
        None, "folder for what the encoders make, shared by runs and data sets; null = memory only"
    )
    cache_variants: int | None = optional(
        None,
        "a random crop or flip is one of so many an image, which can be cached; null = a new one each time",
        ge=1,
        le=1_000_000,
    )
    filter: FilterSection = optional(FilterSection(), "which boxes are used at all")
    buckets: BucketsSection = optional(
        BucketsSection(), "aspect buckets: images keep their shape instead of being cut square"
    )

    @model_validator(mode="before")
    @classmethod
    def _folder_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else without_empty_sections(cls, value)


class LoraSection(Section):
    r: int = optional(16, "rank of each adapter", ge=1, le=MAX_RANK)
    alpha: float = optional(
        32.0, "strength: the update is scaled by alpha / r (alpha / sqrt(r) with rslora)", ge=1e-6, le=1e6
    )
    dropout: float = optional(0.1, "dropout before each adapter, in training only", ge=0, lt=1)
    targets: list[str] = optional(
        ["layout_mlp.fc1", "layout_mlp.fc2"], "name endings of the linears that get one", min_length=1
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=MAX_RANK)]] = optional(
        {}, "another rank for some of them, e.g. {layout_processor.layout_mlp.fc1: 4}"
    )
    alpha_pattern: dict[str, Annotated[float, Field(ge=1e-6, le=1e6)]] = optional({}, "another alpha for some")
    init: Literal["default", "gaussian"] = optional(
        "default", "of lora_A: default (Kaiming uniform) | gaussian; lora_B is 0, so a new adapter changes nothing"
    )
    rslora: bool = optional(False, "rank-stabilised scaling")
    dora: bool = optional(False, "DoRA: magnitude and direction are trained apart")
    start: str | None = optional(
        None,
        "an adapter that training begins from, of the same base, ranks, alphas and targets; null = a new one",
        min_length=1,
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern in value:  # PEFT reads them as regular expressions
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"{clip(repr(pattern))} is no name of a module, nor a regular expression ({error})"
                ) from None
        return value


class StreamSection(Section):
    kind: Literal["built-in", "generic"] | None = optional(
        None,
        "built-in (compatible with CreatiLayout) | generic (a file of its own); null = built-in where the base's family has it",
    )
    width: int | None = optional(None, "of a new generic stream; null = the base's, at most 1024", ge=8, le=16384)
    attention: Literal["siamese", "cross"] | None = optional(
        None,
        "how image tokens read the layout: siamese | cross (cheaper); null = as the base has it, siamese in a new one",
    )
    init: Literal["copy_text", "copy_image", "random"] | None = optional(
        None, "what a new stream starts from: copy_text | copy_image | random; null = copy_text"
    )
    seed: int | None = optional(None, "seed of what is random in a new stream; null = train.seed", ge=0, le=MAX_SEED)
    single_blocks: bool | None = optional(
        None, "a stream in the single-stream blocks too; null = as the base has it, false in a new one"
    )
    phrase_tokens: int | None = optional(
        None,
        "text tokens that stand for a phrase; null = as the base has it, one pooled embedding in a new one",
        ge=1,
        le=4096,
    )
    parts: list[str] = optional(
        [], "method layout_stream: only what has one of these in its name trains, e.g. [layout_mlp]; [] = all"
    )


class FlowSection(Section):
    timesteps: Literal["logit_normal", "mode", "uniform"] = optional(
        "logit_normal", "how t is drawn in training: logit_normal | mode | uniform"
    )
    logit_mean: float = optional(0.0, "logit_normal: mean; above 0 draws noisier t", ge=-10, le=10)
    logit_std: float = optional(1.0, "logit_normal: standard deviation", ge=1e-3, le=10)
    # Beyond these t is no rising function of the number that is drawn, and leaves [0, 1] (arXiv 2403.03206, eq. 20).
    mode_scale: float = optional(1.29, "mode: weight of the middle of [0, 1]", ge=-1, le=1.75)
    shift: float = optional(1.0, "moves t towards noise, as the scheduler's shift does (1 = off)", ge=1e-3, le=1000)
    scheduler_shift: bool = optional(
        False,
        "shift also as the base's scheduler does: by a constant, or by the image's number of tokens",
    )
    weighting: Literal["none", "min_snr", "sigma_sqrt", "cosmap"] = optional(
        "none", "weight of the loss over t: none | min_snr | sigma_sqrt | cosmap"
    )
    min_snr_gamma: float = optional(5.0, "min_snr: where the signal-to-noise ratio is cut", ge=1e-3, le=1e6)
    inside_weight: float = optional(
        1.0, "weight of the loss inside boxes, relative to outside (1 = off)", ge=1e-3, le=1000
    )
    guidance: float = optional(
        1.0, "embedded guidance that a guidance-distilled base is trained with; others take 1.0", ge=0, le=1000
    )


class TrainSection(Section):
    max_steps: int = optional(1000, "optimizer steps", ge=1, le=MAX_STEPS)
    batch_size: int = optional(8, "images per step and process", ge=1, le=MAX_BATCH)
    gradient_accumulation: int = optional(1, "batches per optimizer step", ge=1, le=MAX_BATCH)
    optimizer: Literal["adamw", "adamw_8bit", "prodigy"] = optional(
        "adamw", "adamw | adamw_8bit (bitsandbytes, on a GPU) | prodigy (finds its rate: learning_rate 1.0)"
    )
    learning_rate: float = optional(1e-4, "peak learning rate", ge=1e-10, le=1000)
    lora_plus: float = optional(
        1.0, "LoRA+: learning rate of lora_B relative to that of lora_A (1 = off)", ge=1, le=10_000
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = optional(
        "cosine", "after the warm-up: constant | cosine | linear (the last two fall to 0)"
    )
    warmup_steps: int = optional(0, "steps over which the learning rate rises from 0", ge=0, le=MAX_STEPS)
    weight_decay: float = optional(0.01, "weight decay", ge=0, le=100)
    adam_betas: Pair = optional((0.9, 0.999), "decay rates of the two moments, each in [0, 1)")
    max_grad_norm: float = optional(1.0, "gradients are scaled down to this norm", ge=1e-6, le=1e9)
    mixed_precision: Literal["no", "fp16", "bf16"] = optional("no", "no | fp16 | bf16")
    seed: int = optional(0, "seed of everything that is drawn", ge=0, le=MAX_SEED)
    caption_dropout: float = optional(0.1, "share of samples trained with an empty caption", ge=0, le=1)
    layout_dropout: float = optional(
        0.0, "share of samples trained without their layout (method full only)", ge=0, le=1
    )
    box_dropout: float = optional(0.0, "share of boxes left out of a training layout; one always stays", ge=0, le=1)
    phrase_dropout: float = optional(0.0, "share of boxes trained with an empty phrase", ge=0, le=1)
    gradient_checkpointing: bool | Annotated[int, Field(ge=1, le=1000)] = optional(
        False, "less memory, up to a third more time: false | true | k (every k-th block)"
    )
    attention_backend: str | None = optional(
        None, "diffusers' name of an attention backend, e.g. _native_cudnn; null = its default"
    )
    compile: bool = optional(
        False, "compile the blocks: minutes at the start, then faster steps; other draws of dropout"
    )
    quantization: Literal["none", "int8", "nf4"] = optional(
        "none",
        "the frozen base's linears: none | int8 (torchao) | nf4 (bitsandbytes, on a GPU); the stream stays as it is",
    )
    ema_decay: float = optional(
        0.0,
        "moving average of what trains: validated, sampled and saved in its place (0 = off, e.g. 0.999)",
        ge=0,
        lt=1,
    )
    final: Literal["last", "best"] = optional(
        "last", "what becomes the adapter: the last weights | the best validated (by fidelity, else held-out loss)"
    )
    early_stop: int = optional(0, "stop after so many validations without a better one; 0 = never", ge=0, le=MAX_STEPS)
    checkpoint_every: int = optional(
        500, "steps between checkpoints that a run can resume from, and one at its end; 0 = none", ge=0, le=MAX_STEPS
    )
    keep_checkpoints: int = optional(2, "how many of them are kept, beside the best", ge=1, le=MAX_STEPS)
    validate_every: int = optional(
        250, "steps between validation losses, and one at the end; 0 = none", ge=0, le=MAX_STEPS
    )
    sample_every: int = optional(250, "steps between sampled images; 0 = none", ge=0, le=MAX_STEPS)
    sample_count: int = optional(8, "images sampled each time", ge=0, le=10_000)
    preflight: bool = optional(True, "two trial steps before the first: gradients, memory, time, disk (a few seconds)")
    log_every: int = optional(10, "steps between log lines", ge=1, le=MAX_STEPS)


class PriorSection(Section):
    layouts: str | None = optional(
        None, "against forgetting: layouts of the old domain (data set folder, .json or .jsonl); null = off"
    )
    count: int = optional(
        200, "how many of them are used; the base samples images of them before step 1", ge=1, le=10_000_000
    )
    batch_size: int = optional(8, "of them, beside the images of each step and process", ge=1, le=MAX_BATCH)
    weight: float = optional(1.0, "weight of the change of the base's own predictions on them", ge=1e-6, le=1e6)


class TrackingSection(Section):
    tracker: Literal["wandb", "tensorboard", "none"] = optional("none", "wandb | tensorboard | none")
    project: str = optional("mmdit-lora", "the tracker's project", min_length=1)
    run_name: str | None = optional(None, "name of the run; null = the tracker's choice")
    wandb_mode: Literal["offline", "online", "disabled"] = optional(
        "offline", "offline | online | disabled; offline runs go up later with `wandb sync`"
    )


class SampleSection(Section):
    steps: int | None = optional(None, "sampling steps; null = what the base states", ge=1, le=int(STEPS.high))
    guidance_scale: float | None = optional(
        None, "classifier-free guidance by the caption; null = what the base states", ge=0, le=GUIDANCE.high
    )
    layout_scale: float = optional(
        1.0, "multiplier of the layout residual (1 = as trained, 0 = off)", ge=LAYOUT_SCALE.low, le=LAYOUT_SCALE.high
    )
    layout_window: Pair = optional((0.0, 1.0), "part of the sampling steps where the layout is on, from and to")
    seed: int = optional(0, "seed of the sampled images", ge=0, le=MAX_SEED)
