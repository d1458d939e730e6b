"""How a run ends before its last step: a signal, a loss that is NaN or infinite, a full disk."""

from __future__ import annotations

import errno
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from mmdit_lora.errors import Stopped
from mmdit_lora.files import space_error
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.run_dir import CHECKPOINTS


class Interrupted(Stopped):
    """A signal stopped the run; its state is saved.

    Args:
        signal_name: e.g. "SIGTERM". step: the checkpoint that was written; None where the run writes none.
        again: what goes on from there.
    """

    exit_code = 130

    def __init__(self, signal_name: str, step: int | None, *, again: str = "`--resume latest`") -> None:
        self.signal_name, self.step = signal_name, step
        saved = "" if step is None else f"; step {step} is saved, {again} goes on from there"
        super().__init__(f"stopped by {signal_name}{saved}")


class Diverged(Stopped):
    """A loss or the gradient is NaN or infinite. The last checkpoint is from before it."""


@contextmanager
def caught_signals() -> Iterator[Callable[[], str | None]]:
    """Within it, SIGTERM and Ctrl-C are noted, and the name of the one that came is given; a second one ends the process.

    Only the main thread can do that: in another one, nothing is noted.
    """
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before: dict[int, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[number])

    try:
        for caught in (signal.SIGTERM, signal.SIGINT):
            before[caught] = signal.signal(caught, note)
        yield lambda: came[0] if came else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_losses(
    losses: Tensor, names: Callable[[], Iterable[str]], *, step: int, checkpoint: Callable[[], str]
) -> None:
    """Stop at samples whose loss is NaN or infinite.

    Args:
        losses: (B,). names: of the B samples. checkpoint: what the run can go back to. These two are for the message, and
            called only then: a sample's name may lie in a shard, and checkpoints are listed from the disk.

    Raises:
        Diverged: with their names.
    """
    if losses.isfinite().all():
        return
    values = losses.tolist()
    bad = [f"{name} ({value})" for name, value in zip(names(), values, strict=True) if not math.isfinite(value)]
    raise Diverged(
        f"the loss is NaN or infinite in step {step + 1}, at {', '.join(bad[:4])}{' ...' if len(bad) > 4 else ''}. "
        f"{checkpoint()} Look at these images; a lower train.learning_rate or mixed_precision bf16 may help"
    )


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
        saved = checkpoints(folder / CHECKPOINTS)
        safe = (
            f"step {saved[-1].step} is saved: free some space, and `--resume latest` goes on from there"
            if saved
            else "there is no checkpoint yet: free some space and start again"
        )
        why = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file would be larger than is allowed"}
        raise DiskFull(f"{why.get(number, 'the disk is full')} at {folder}; {safe}") from error
