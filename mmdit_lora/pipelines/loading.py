"""Opening a base, with one clear message where it is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download

from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import exists, written_as_path
from mmdit_lora.hub import INDEX, check_base_folder, index_file, no_such_base, pipeline_index
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.models.stream_files import read_stream_config
from mmdit_lora.models.weight_files import refuse_pickled_weights, shard_names
from mmdit_lora.pipelines.base import LayoutPipeline
from mmdit_lora.pipelines.flux import LayoutFluxPipeline
from mmdit_lora.pipelines.generic import generic_pipeline
from mmdit_lora.pipelines.stable_diffusion_3 import LayoutStableDiffusion3Pipeline
from mmdit_lora.resources import here_or_packaged

# The families: what `load_pipeline` opens.
PIPELINES: tuple[type[LayoutPipeline], ...] = (LayoutStableDiffusion3Pipeline, LayoutFluxPipeline)

_OF_BAD_FILES = (OSError, ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError)
_LIBRARIES = ("builtins", "safetensors_rust", "safetensors", "huggingface_hub")


def load_pipeline(
    base: str,
    *,
    dtype: torch.dtype | None = None,
    components: Mapping[str, Any] | None = None,
    stream: str | Path | None = None,
    generic: bool = False,
    torch_dtype: torch.dtype | None = None,
    **transformer_options: Any,
) -> LayoutPipeline:
    """The pipeline of a folder or hub id, in evaluation mode, its progress bar off. The family is the one that its
    model_index.json or modular_model_index.json names.

        pipe = load_pipeline("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)

    Args:
        dtype: of the weights; default fp32. torch_dtype: the same, by diffusers' older name.
        components: to be used instead of those in the folder; None for one that is not needed.
        stream: folder of a generic layout stream, as `train` with `method: layout_stream` or `save_layout_stream` writes it.
        generic: give the base a new generic stream where its family has a built-in one too (SD3 and FLUX.1).
        transformer_options: for the transformer's `from_pretrained`: `layout_init`, `layout_seed`, `layout_attention`,
            `quantization_config`, ...

    Raises:
        InputError: there is no such folder or repository, it is no pipeline folder, of another family, or its weights
            are not those of its config.
    """
    if not isinstance(base, str | Path) or not str(base):
        raise InputError(f"is {shown(base)}", location="base", hint="give a pipeline folder or a hub id")
    given = {name: value for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)) if value is not None}
    for name, value in given.items():
        if not isinstance(value, torch.dtype):
            raise InputError(f"is {shown(value)}", location=name, hint="give a torch.dtype, such as torch.bfloat16")
    if len(set(given.values())) > 1:
        raise InputError("say two things", location="dtype and torch_dtype", hint="give one of them")
    dtype = next(iter(given.values()), torch.float32)
    if stream is not None:
        read_stream_config(stream)  # before the base is opened, which takes longer
    base = here_or_packaged(base)
    folder = Path(base)
    if exists(folder):
        check_base_folder(folder)
        for shards in folder.glob("*/*.index.json"):
            shard_names(shards)  # diffusers would follow a name out of the folder
    elif written_as_path(base):
        raise no_such_base(base)
    try:
        with quiet():
            try:
                index = pipeline_index(base)
            except OSError as error:
                if not exists(folder):
                    raise no_such_base(base) from error
                raise
            name = index["_class_name"]
            pipeline = pipeline_class(name, generic=generic or stream is not None)
            if pipeline is not None:
                if stream is not None:
                    transformer_options["stream"] = str(stream)
                pipe = pipeline.from_pretrained(
                    base, dtype=dtype, transformer_options=transformer_options, **(components or {})
                )
    except InputError:
        raise
    except Exception as error:
        # safetensors and huggingface_hub raise types of their own for torn files and bad names.
        if not isinstance(error, _OF_BAD_FILES) and type(error).__module__.split(".")[0] not in _LIBRARIES:
            raise
        if not exists(folder):
            _check_cached(base)
        first_line = next(iter(str(error).strip().splitlines()), "")
        raise InputError(
            f"cannot be opened as a base: {type(error).__name__}" + (f": {first_line}" if first_line else ""),
            location=base,
            hint="give a diffusers pipeline folder (model_index.json beside transformer/, vae/, ...) or a hub id that is cached",
        ) from error
    if pipeline is None and pipeline_class(name) is not None:
        raise InputError(
            "has a built-in layout stream, and a generic one lies beside a plain base",
            location=base,
            hint="leave the generic stream out (--stream, stream_weights, stream.kind, stream.width), or give the plain base",
        )
    if pipeline is None:
        raise InputError(
            f"is a {name}; known are {', '.join(known_pipelines())}",
            location=str(index_file(folder) or folder / INDEX) if exists(folder) else base,
            hint="give a base of one of these families",
        )
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval()
    return pipe


def pipeline_class(name: str, *, generic: bool = False) -> type[LayoutPipeline] | None:
    """The class that opens a base whose index names the pipeline `name`; None where no family knows it.

    Args:
        generic: the one with a generic stream, also where there is one with a built-in stream.
    """
    built_in = {opened: pipeline for pipeline in PIPELINES for opened in pipeline.opens}
    return (None if generic else built_in.get(name)) or generic_pipeline(name)


def is_generic_base(base: str) -> bool:
    """Whether a base is of a family that has a generic stream and no built-in one; False where it cannot be read."""
    with suppress(OSError, ValueError):
        name = pipeline_index(here_or_packaged(base)).get("_class_name")
        pipeline = pipeline_class(str(name))
        return pipeline is not None and pipeline not in PIPELINES
    return False


def known_pipelines() -> list[str]:
    """Names of the pipelines that `load_pipeline` opens."""
    built_in = [name for pipeline in PIPELINES for name in pipeline.opens]
    return list(dict.fromkeys([*built_in, *(name for family in STREAM_FAMILIES.values() for name in family.pipelines)]))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers: a bar for every component of a base says nothing."""
    loggings = [
        module for module in (diffusers.utils.logging, transformers.utils.logging) if module.is_progress_bar_enabled()
    ]
    for module in loggings:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in loggings:
            module.enable_progress_bar()


def _check_cached(base: str) -> None:
    """Whether what is cached of a hub id are pickles: diffusers says only that it finds no safetensors."""
    with suppress(OSError, ValueError):  # nothing is
        folder = Path(snapshot_download(base, local_files_only=True))
        for part in sorted(folder.iterdir()):
            refuse_pickled_weights(part)
