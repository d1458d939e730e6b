"""What the package brings along: the embedded base, the configs, published figures.

A wheel holds them in `mmdit_lora/_resources`, under the names that they have in the repository.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path, PurePath

from mmdit_lora.files import exists

NAMES = ("data/tiny_base", "data/benchmarks/published.json", "configs")
_ROOTS = (Path(__file__).parent / "_resources", Path(__file__).parent.parent)
log = logging.getLogger(__name__)


def resource(name: str | Path) -> Path | None:
    """The packaged file or folder of this name, e.g. "data/tiny_base"; None if the package has none."""
    relative = PurePath(name)
    known = ".." not in relative.parts and any(relative.is_relative_to(known) for known in NAMES)
    return next((root / relative for root in _ROOTS if known and exists(root / relative)), None)


def here_or_packaged(path: str | Path) -> str:
    """`path` if it exists or the package has nothing of this name; else the packaged one, with a warning, once."""
    found = None if exists(path) else resource(path)
    return str(path) if found is None else _packaged(str(path), found)


@functools.cache
def _packaged(name: str, found: Path) -> str:
    log.warning("%s does not exist here; using the one that is installed with mmdit-lora: %s", name, found)
    return str(found)
