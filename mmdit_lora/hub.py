"""Bases as folders or hub ids: checks and downloads that need no heavy import."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants

from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import decode_text, exists, nearest, read_bytes, require_file, written_as_path
from mmdit_lora.json_files import parse_object
from mmdit_lora.resources import here_or_packaged

_HUB_ID = re.compile(r"([\w-][\w.-]*/)?[\w.-]+")
# What diffusers writes into the folder of a pipeline, and into that of a modular one (FLUX.3).
INDEX, MODULAR_INDEX = "model_index.json", "modular_model_index.json"
HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")
_NEEDED = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")


def local_copy(source: str | Path, *, location: str, allow: Sequence[str], ignore: Sequence[str] = ()) -> Path:
    """`source` itself if it exists; else a hub id's files, downloaded or from the cache of huggingface_hub.

    Args:
        source: a path, a hub id OWNER/NAME, or a folder or file in it: OWNER/NAME/PATH.
        allow, ignore: patterns of the files that are needed, relative to OWNER/NAME or PATH.

    Returns:
        The path, or the folder of that snapshot in the cache, or PATH in it.

    Raises:
        InputError: it does not exist and cannot be downloaded, e.g. without a connection or a login.
    """
    text, path = str(source), Path(source)
    if exists(path):
        return path
    owner, _, rest = text.partition("/")
    name, _, inside = rest.partition("/")
    repository = f"{owner}/{name}"
    location = f"{location} {clip(text)}"
    if not name or not _HUB_ID.fullmatch(repository) or ".." in inside.split("/"):
        raise InputError("no such file or folder", location=location, hint="give a path, or a hub id: OWNER/NAME")
    head = f"{inside}/" if inside else ""
    wanted = [*([inside] if inside else []), *(head + pattern for pattern in allow)]
    unwanted = [head + pattern for pattern in ignore]
    try:
        folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))
    except Exception as error:  # the hub's client and its HTTP library raise types of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = f"`hf download {repository}` where there is a connection; `hf auth login` where it asks for a licence"
        what = f"is not here, and as a hub id it is neither in the cache nor to be had ({clip(first)})"
        raise InputError(what, location=location, hint=hint) from None
    if not (folder / inside).exists():
        held = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        hint = f"it holds {', '.join(held[:8])}" if held else f"`hf download {repository} {inside}` first"
        raise InputError(f"{repository} holds no {inside}", location=location, hint=hint)
    return folder / inside


def index_file(folder: str | Path) -> Path | None:
    """The index of a pipeline's folder; None where it is no such folder."""
    return next((file for name in (INDEX, MODULAR_INDEX) if exists(file := Path(folder, name))), None)


def pipeline_index(base: str, **options: Any) -> dict[str, Any]:
    """The index of a base, a folder or hub id: the pipeline's class, its parts as [library, class], and its settings.

    Args:
        options: keys of `HUB_OPTIONS`.

    Raises:
        OSError: there is none.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    try:
        found: Any = DiffusionPipeline.load_config(base, **options)
    except OSError as error:
        try:
            found = ModularPipeline.load_config(base, **options)
        except OSError:
            raise error from None
    return {name: _part(value) for name, value in found.items()}


def _part(value: Any) -> Any:
    """A part of a modular pipeline, [library, class, where it lies], as other pipelines state theirs."""
    if not (isinstance(value, list | tuple) and len(value) == 3 and isinstance(value[2], dict)):
        return value
    library, kind, source = value
    hint = source.get("type_hint")
    return [library, kind] if library is not None or hint is None else list(hint)


def opened_folder(base: str) -> Path:
    """The folder of a base that has been opened: its own, or that of a hub id's files in the cache."""
    return Path(base) if Path(base).is_dir() else Path(huggingface_hub.snapshot_download(base, local_files_only=True))


def no_such_base(base: str) -> InputError:
    """The error for a base that is neither a folder nor a hub id that can be reached; it names the nearest folder."""
    near = None if exists(base) else nearest(base)
    what = "there is no such folder"
    if not written_as_path(base):
        what += ", nor a hub id of this name that is cached or can be reached"
    hint = "give a diffusers pipeline folder (model_index.json beside transformer/, vae/, ...) or a hub id"
    return InputError(what, location=base, hint=f"did you mean {near}?" if near is not None and near.is_dir() else hint)


def require_base(base: str, *, whole: bool = True) -> str:
    """`base`, or the packaged base of this name; checked as far as is possible before anything heavy is imported.

    Args:
        whole: a folder must be a pipeline, not a transformer alone.

    Raises:
        InputError: a folder is no pipeline; a path is not there; offline, a hub id is not in the cache.
    """
    base = here_or_packaged(base)
    if exists(base):
        if whole and Path(base).is_dir():
            check_base_folder(Path(base))
    elif written_as_path(base):
        raise no_such_base(base)
    else:
        cached = Path(constants.HF_HUB_CACHE) / f"models--{base.replace('/', '--')}"
        if not _HUB_ID.fullmatch(base) or (constants.HF_HUB_OFFLINE and not exists(cached)):
            raise no_such_base(base)
    return base


def check_base_folder(folder: Path) -> None:
    """Whether a folder is a diffusers pipeline with all its parts; no weight is opened.

    Raises:
        InputError: it is not.
    """
    index = index_file(folder)
    if index is None or not index.is_file():
        hint = "give a diffusers pipeline folder: model_index.json beside transformer/, vae/, text_encoder/, ..."
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: give it as --adapter, and the base it was trained on as --base"
        raise InputError("is not a base: it has no model_index.json", location=str(folder), hint=hint)
    content = {name: _part(value) for name, value in read_base_config(index).items()}
    if index.name == MODULAR_INDEX:  # what else it names (FLUX.3's prompt upsampler) may lie elsewhere, and is not used
        content = {name: value for name, value in content.items() if name.startswith(("_class_name", *_NEEDED))}
    if "_class_name" not in content:
        raise InputError("is no pipeline description: it has no _class_name", location=str(index))
    # transformers makes an empty tokenizer of a folder that is not there.
    # A part is [library, class], a missing one [null, null]; a setting may be a list as well, as Krea 2's of layers.
    parts = [
        part for part, source in content.items() if isinstance(source, list) and source and isinstance(source[0], str)
    ]
    absent = [part for part in parts if not (folder / part).is_dir() or not any((folder / part).iterdir())]
    if absent:
        what = f"lacks {', '.join(absent)}, which {index.name} names"
        raise InputError(what, location=str(folder), hint="copy it whole")
    for file in (file for part in parts for file in sorted((folder / part).iterdir())):
        if not file.is_dir():
            require_file(file, what="file of a base")  # reading a FIFO waits for ever
        if file.name.endswith("config.json"):
            read_base_config(file)


def read_base_config(file: Path) -> dict[str, Any]:
    """A JSON object of a base, as diffusers and transformers will read it.

    Raises:
        InputError: it is none, or begins with a byte order mark, which they refuse; see `json_files.read_object`.
    """
    content = read_bytes(file, what="config", limit=64 * 2**20)
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        what = "begins with a byte order mark, and diffusers reads a base's files as UTF-8 without one"
        raise InputError(what, location=str(file), hint="save it as UTF-8 without BOM")
    return parse_object(decode_text(content, location=str(file)), location=str(file))
