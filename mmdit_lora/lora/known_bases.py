"""Where bases are on this machine: a note of its own, by fingerprint, so that no adapter has to say it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mmdit_lora.files import exists, write_json
from mmdit_lora.json_files import read_object

_MOST = 1_000  # the newest are kept


def note_file() -> Path:
    """`bases.json` in `$MMDIT_LORA_HOME`, by default the user's cache folder."""
    home = os.environ.get("MMDIT_LORA_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(cache).expanduser() / "mmdit-lora") / "bases.json"


def remember_base(fingerprint: object, base: object) -> None:
    """Note where the base of a fingerprint is, if it is a folder. A note that cannot be written is left out."""
    if not isinstance(fingerprint, str) or not isinstance(base, str) or not exists(Path(base, "model_index.json")):
        return
    with suppress(OSError, RuntimeError, ValueError):  # no home, or one that cannot be written to
        place = str(Path(base).absolute())
        known = _known()
        if known.pop(fingerprint, None) == place:
            return
        write_json(note_file(), dict([*known.items(), (fingerprint, place)][-_MOST:]))


def recall_base(fingerprint: object) -> Path | None:
    """Where the base of a fingerprint was, if it still is there."""
    return _first([_known().get(fingerprint)] if isinstance(fingerprint, str) else [])


def recall_named(name: str) -> Path | None:
    """The last base of this folder name, if it still is there: which one it is, its fingerprint must say."""
    return _first(place for place in reversed(_known().values()) if Path(place).name == name)


def _first(places: Iterable[str | None]) -> Path | None:
    return next((Path(place) for place in places if place and exists(Path(place, "model_index.json"))), None)


def _known() -> dict[str, str]:
    try:
        known = read_object(note_file())
    except (OSError, RuntimeError, ValueError):  # no home, no note, or none of ours
        return {}
    return {key: value for key, value in known.items() if isinstance(value, str)}
