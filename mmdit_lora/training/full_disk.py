"""A disk that fills up in the middle of a run: one message, and where to go on from."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmdit_lora.errors import Stopped
from mmdit_lora.files import space_error
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.run_dir import CHECKPOINTS


class DiskFull(Stopped):
    """A file could not be written for want of space. Nothing half-written has a final name."""


@contextmanager
def disk_full_as_error(folder: Path) -> Iterator[None]:
    """Within it, an error for want of space becomes `DiskFull`, with what is safe in the run's `folder`."""
    try:
        yield
    except Exception as error:
        number = space_error(error)
        if number is None:
            raise
        kept = checkpoints(folder / CHECKPOINTS)
        safe = (
            f"step {kept[-1].step} is saved: free some space, and `--resume latest` goes on from there"
            if kept
            else "there is no checkpoint yet: free some space and start again"
        )
        why = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file would be larger than is allowed"}
        raise DiskFull(f"{why.get(number, 'the disk is full')} at {folder}; {safe}") from error
