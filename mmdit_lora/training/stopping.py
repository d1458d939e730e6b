"""How a run ends before its last step: a signal, a loss that is no number."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import Tensor

from mmdit_lora.errors import Stopped


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
    """A loss or a gradient that is no finite number. The last checkpoint is from before it."""


@contextmanager
def caught_signals() -> Iterator[Callable[[], str | None]]:
    """Within it, SIGTERM and Ctrl-C are noted, and the name of the one that came is given; a second one ends the process.

    Only the main thread can do that: in another one, nothing is noted.
    """
    came: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before: dict[signal.Signals, Any] = {}

    def note(number: int, _: FrameType | None) -> None:
        came.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for one in (signal.SIGTERM, signal.SIGINT):
            before[one] = signal.signal(one, note)
        yield lambda: came[0] if came else None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def check_losses(
    losses: Tensor, names: Callable[[], Sequence[str]], *, step: int, checkpoint: Callable[[], str]
) -> None:
    """Stop at samples whose loss is no finite number.

    Args:
        losses: (B,). names: of the B samples. checkpoint: what the run can go back to. These two are for the message, and
            asked for only then: the name of a sample may lie in a store, and checkpoints are looked for on the disk.

    Raises:
        Diverged: with their names.
    """
    finite = losses.isfinite().tolist()
    if all(finite):
        return
    bad = [f"{name} ({value})" for name, value, good in zip(names(), losses.tolist(), finite, strict=True) if not good]
    raise Diverged(
        f"the loss is no finite number in step {step + 1}, at {', '.join(bad[:4])}{' ...' if len(bad) > 4 else ''}. "
        f"{checkpoint()} Look at these images; a lower train.learning_rate or mixed_precision bf16 may help"
    )
