"""The base of a run: opened with the layout stream that the config asks for, its linears quantised if it says so."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.hub import opened_folder, pipeline_index
from mmdit_lora.lora import base_fingerprint
from mmdit_lora.models.families import stored_transformer, stream_changes
from mmdit_lora.models.generic_stream import StreamModel, add_layout_stream
from mmdit_lora.models.stream_files import read_stream_config
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet
from mmdit_lora.pipelines.generic import generic_on_meta
from mmdit_lora.pipelines.loading import is_generic_base

# Parts of module names. What is trained or carries an adapter keeps its weights: a LoRA then merges exactly.
NEVER_QUANTISED = ("layout_stream", "layout_processor")

# `train.mixed_precision` -> dtype of the frozen weights.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_GENERIC_KEYS = {"attention": "layout_attention", "width": "layout_width"}
# Keys of the config's section `stream` and of the transformer.
_STREAM_KEYS = {
    "attention": "layout_attention",
    "single_blocks": "layout_single_blocks",
    "phrase_tokens": "phrase_tokens",
}


def load_base(config: Config, dtype: torch.dtype) -> tuple[LayoutPipeline, str]:
    """The pipeline of `config.base`, and the fingerprint of its transformer as it is stored, not quantised.

    An adapter that was trained on a quantised base so fits the base itself.

    Raises:
        InputError: no such base; the section `stream` contradicts it; or it cannot be quantised here.
    """
    kind = config.train.quantization
    check_quantization(kind)
    options = stream_options(config)
    pipe = load_pipeline(config.base, dtype=dtype, **options)
    fingerprint = base_fingerprint(pipe.transformer)
    if isinstance(pipe.transformer, StreamModel) and config.method == "layout_stream":
        pipe.stock_fingerprint = base_fingerprint(pipe.transformer, with_stream=False)
    if kind != "none":
        _quantise(pipe, config, dtype, options)
    return pipe, fingerprint


def open_encoders(config: Config, dtype: torch.dtype, *, texts: bool = True) -> LayoutPipeline:
    """Load everything but the transformer's weights; the transformer is built on the meta device.

    Args:
        texts: with the text encoders; without them it still says which sizes it takes.

    Raises:
        InputError: no such base, or the section `stream` contradicts it.
    """
    components: dict[str, Any] = {}
    if not texts:
        index = pipeline_index(config.base)
        components |= dict.fromkeys(name for name in index if name.startswith(("text_encoder", "tokenizer")))
    if is_generic(config):
        components["transformer"] = generic_on_meta(config.base, **stream_options(config))
        return load_pipeline(config.base, dtype=dtype, components=components, generic=True)
    transformer_class: Any
    transformer_class, stored = stored_transformer(config.base)
    options = {key: value for key, value in stream_options(config).items() if key in _STREAM_KEYS.values()}
    with torch.device("meta"):
        transformer = transformer_class.from_config({**stored, **options})
    components["transformer"] = transformer
    return load_pipeline(config.base, dtype=dtype, components=components)


def stream_options(config: Config) -> dict[str, Any]:
    """The section `stream` as options of the transformer's `from_pretrained`.

    Raises:
        InputError: the base has a stream already, and another one than the config says; or its family knows no such thing.
    """
    stream = config.stream
    options: dict[str, Any] = {"layout_seed": config.train.seed if stream.seed is None else stream.seed}
    if is_generic(config):
        return _generic_options(config, options)
    if stream.init is not None:
        options["layout_init"] = stream.init
    wanted = {own: value for key, own in _STREAM_KEYS.items() if (value := getattr(stream, key)) is not None}
    if not wanted and stream.init is None and stream.seed is None:
        return options
    try:
        transformer, stored = stored_transformer(config.base)
    except InputError:
        return options  # no base of ours: `load_pipeline` says so better
    has_stream = stored["_class_name"] == transformer.__name__
    start = "set it to null, or start from a base without a layout stream"
    options |= stream_changes(
        transformer,
        stored,
        wanted,
        has_stream=has_stream,
        base=config.base,
        location={own: f"stream.{key}" for key, own in _STREAM_KEYS.items()},
        hint="set it to null",
        conflict_hint=start,
    )
    for key in ("init", "seed"):
        if has_stream and getattr(stream, key) is not None:
            raise InputError(
                f"is {getattr(stream, key)}, and {config.base} has a layout stream already: none is started",
                location=f"stream.{key}",
                hint=start,
            )
    return options


def is_generic(config: Config) -> bool:
    """Whether the run's layout stream is a generic one, beside the base: it is asked for, or the family has no other."""
    if config.stream_weights is not None or config.stream.kind == "generic" or config.stream.width is not None:
        return True
    return is_generic_base(config.base)


def _generic_options(config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """The sections `stream` and `stream_weights` as options of `load_pipeline`.

    Raises:
        InputError: they contradict one another, or a generic stream knows no such thing.
    """
    stream = config.stream
    if config.method == "full":
        raise InputError(
            "is full, and a generic layout stream lies beside its base",
            location="method",
            hint="give lora or layout_stream",
        )
    unknown = [key for key in ("single_blocks", "phrase_tokens") if getattr(stream, key) is not None]
    unknown += ["init"] if stream.init not in (None, "random") else []
    unknown += ["kind"] if stream.kind == "built-in" else []
    if unknown:
        raise InputError(
            f"is {getattr(stream, unknown[0])}, and the layout stream of this run is a generic one, which has no such choice",
            location=f"stream.{unknown[0]}",
            hint="set it to null",
        )
    if config.stream_weights is None:
        wanted = {own: getattr(stream, key) for key, own in _GENERIC_KEYS.items()}
        return options | {"generic": True} | {key: value for key, value in wanted.items() if value is not None}
    stored = read_stream_config(config.stream_weights)
    for key in ("attention", "width"):
        if (value := getattr(stream, key)) is not None and value != stored[key]:
            raise InputError(
                f"is {value}, and the stream of {config.stream_weights} has {stored[key]}",
                location=f"stream.{key}",
                hint="set it to null",
            )
    return {"stream": config.stream_weights}


def check_quantization(kind: str) -> None:
    """Whether `train.quantization: kind` works on this machine.

    Raises:
        InputError: a package is missing, or a GPU that it needs.
    """
    if kind == "nf4" and not torch.cuda.is_available():
        raise InputError("is nf4, which needs a CUDA GPU", location="train.quantization", hint="set it to int8 or none")
    package = {"int8": "torchao", "nf4": "bitsandbytes"}.get(kind)
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"is {kind}, which needs the package {package}",
            location="train.quantization",
            hint=f"install it: `uv sync --extra quant`, or `pip install {package}`",
        )


def quantization_config(kind: str, dtype: torch.dtype) -> Any:
    """diffusers' config for its `from_pretrained`: every linear but those of the layout stream."""
    keep = list(NEVER_QUANTISED)
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return diffusers.TorchAoConfig(Int8WeightOnlyConfig(version=2), modules_to_not_convert=keep)
    return diffusers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=keep
    )


def stored_dtype(base: str) -> torch.dtype:
    """The dtype of the transformer's weights in the files of a base; fp32 where they cannot be read."""
    folder = opened_folder(base)
    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    for file in sorted((folder / "transformer").glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                return names.get(tensors.get_slice(key).get_dtype(), torch.float32)
    return torch.float32


def _quantise(pipe: LayoutPipeline, config: Config, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Open the transformer once more, quantised, with the stream that it has now.

    A new stream may be a copy of the base's weights, which must be those before they are quantised.
    """
    stream = {name: value for name, value in pipe.transformer.state_dict().items() if "layout" in name}
    transformer_class: Any = type(pipe.transformer)
    built = pipe.transformer.stream_config if isinstance(pipe.transformer, StreamModel) else None
    if built is not None:
        transformer_class = getattr(diffusers, transformer_class.__name__)
        options = {}
    else:
        options = options | {"layout_init": "random"}
    pipe.transformer = None  # not two copies at a time
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()  # it warns about int8 in fp32, which is slower and as right
    try:
        with quiet():
            transformer = transformer_class.from_pretrained(
                config.base,
                subfolder="transformer",
                dtype=dtype,
                quantization_config=quantization_config(config.train.quantization, dtype),
                **options,
            )
    finally:
        diffusers.utils.logging.set_verbosity(verbosity)
    if built is not None:
        add_layout_stream(transformer, attention=built.attention, width=built.width)
    own = transformer.state_dict()
    with torch.no_grad():
        for name, value in stream.items():
            own[name].copy_(value)
    pipe.transformer = transformer.eval()
