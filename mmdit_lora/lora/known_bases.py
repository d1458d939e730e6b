"""Where bases are on this machine: a note of its own, by fingerprint, so that no adapter has to say it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mmdit_lora.config.loading import parse_yaml
from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import exists, public_name, read_text, write_json
from mmdit_lora.hub import index_file
from mmdit_lora.json_files import read_object
from mmdit_lora.lora.reading import CONFIG_FILE, adapter_file, read_adapter_config, read_adapter_header
from mmdit_lora.models.stream_files import WEIGHTS
from mmdit_lora.resources import resource

_MOST = 1_000  # the newest are kept


def note_file() -> Path:
    """`bases.json` in `$MMDIT_LORA_HOME`, by default the user's cache folder."""
    home = os.environ.get("MMDIT_LORA_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(cache).expanduser() / "mmdit-lora") / "bases.json"


def remember_base(fingerprint: object, base: object) -> None:
    """Note where the base of a fingerprint is, if it is a folder. A note that cannot be written is left out."""
    if isinstance(fingerprint, str) and isinstance(base, str) and _is_base(base):
        _note(fingerprint, base)


def remember_stream(fingerprint: object, stream: str | Path | None) -> None:
    """Note where the generic layout stream is whose model has the fingerprint, as `remember_base` does."""
    if isinstance(fingerprint, str) and stream is not None:
        _note(_stream_key(fingerprint), stream)


def stream_of(adapter: str | Path) -> str | None:
    """Folder of the generic layout stream that an adapter names in its header; None where it names none.

    It is looked for where the run beside the adapter says, then where this machine last had it, then by its name in the current
    directory and the folders above the adapter.

    Raises:
        InputError: it names one that is not found.
    """
    header = read_adapter_header(adapter)
    name = header.get("stream")
    if not isinstance(name, str) or not name:
        return None
    here = list(adapter_file(adapter).resolve().parents)
    noted = _known().get(_stream_key(str(header.get("fingerprint"))))
    for place in (_of_run(here[1], "stream_weights"), noted, *(root / name for root in (Path(), *here[:3])), name):
        if place is not None and exists(Path(place, WEIGHTS)):
            return str(place)
    what = f"names its layout stream {clip(repr(name), 100)}, and no such folder is here"
    raise InputError(what, location=str(adapter), hint="give --stream FOLDER")


def _note(key: str, folder: str | Path) -> None:
    with suppress(OSError, RuntimeError, ValueError):  # no home, or one that cannot be written to
        place, known = str(Path(folder).absolute()), _known()
        if known.pop(key, None) != place:
            write_json(note_file(), dict([*known.items(), (key, place)][-_MOST:]))


def _stream_key(fingerprint: str) -> str:
    return f"stream of {fingerprint}"


def recall_base(fingerprint: object) -> Path | None:
    """Where the base of a fingerprint was, if it still is there."""
    return _first([_known().get(fingerprint)] if isinstance(fingerprint, str) else [])


def recall_named(name: str) -> Path | None:
    """The last base of this folder name, if it still is there: which one it is, its fingerprint must say."""
    return _first(place for place in reversed(_known().values()) if Path(place).name == name)


def base_of(adapter: str | Path) -> str:
    """The base that an adapter names in its header or PEFT config, where it is: a path (or hub id) that can be opened.

    Adapters name a folder by its name alone. It is looked for where the run beside the adapter says, then where this machine
    last had a base of its fingerprint (`remember_base`), then under this name in the current directory, its `data`, the
    folders above the adapter, then the base that the package brings along, then where there last was a base of this name. Whether it
    is the right one is for the fingerprint to say.

    Raises:
        InputError: it names none, or a folder that is not found.
    """
    file = adapter_file(adapter)
    header = read_adapter_header(adapter)
    name = header.get("base")
    if not name and (file.parent / CONFIG_FILE).is_file():
        name = read_adapter_config(file.parent).base_model_name_or_path
    if not isinstance(name, str) or not name:
        raise InputError("does not say which base it is for", location=str(adapter), hint="give --base")
    if _is_base(name):
        return name
    short = public_name(name)
    here = list(file.resolve().parents)
    run = _of_run(here[1], "base")
    beside = [run] if run is not None and public_name(run) == short else []
    roots = [Path(), Path("data"), *here[:3]]
    noted = recall_base(header.get("fingerprint"))
    packaged = resource(f"data/{short}")
    for folder in (*beside, noted, *(root / short for root in roots), packaged, recall_named(short)):
        if folder is not None and _is_base(folder):
            return str(folder)
    if "/" in short:
        return short  # a hub id
    raise InputError(
        f"names its base {clip(repr(short), 100)}, and no such folder is here",
        location=str(adapter),
        hint="give --base FOLDER",
    )


def _of_run(folder: Path, key: str) -> Path | None:
    """The folder that the config of a run in `folder` states."""
    try:
        file = folder / "config.yaml"
        return Path(parse_yaml(read_text(file, what="config", limit=2**20), location=str(file))[0][key])
    except (InputError, TypeError, KeyError):
        return None


def _is_base(folder: str | Path) -> bool:
    return index_file(folder) is not None


def _first(places: Iterable[str | None]) -> Path | None:
    return next((Path(place) for place in places if place and _is_base(place)), None)


def _known() -> dict[str, str]:
    try:
        known = read_object(note_file())
    except (OSError, RuntimeError, ValueError):  # no home, no note, or none of ours
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str)}
