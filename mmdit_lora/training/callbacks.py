"""What a caller can do during a run: `train(config, callbacks=[...])`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmdit_lora.training.preflight import Preflight
from mmdit_lora.training.step import StepRecord

OnProgress = Callable[[str, int, int, dict[str, Any]], None]  # what runs, done, of how many, scalars to show


class Callback:
    """Subclass it, and override what you need; the methods here do nothing.

    Callbacks are called in the order in which they were given. At one step `on_step` comes first, then `on_validation`, then
    `on_save`. An exception in one ends the run as any error does: what the last checkpoint holds is safe, and
    `train(config, resume=True)` goes on from there. A resumed run calls `on_step` from the step after the checkpoint on.
    """

    def on_preflight(self, report: Preflight) -> None:
        """The checks before the run are made, failed ones too, and nothing is written yet. In the main process."""

    def on_step(self, record: StepRecord) -> None:
        """An optimizer step is done. In every process."""

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """The model was validated after `step`: held-out losses and fidelity, as the tracker gets them. In the main process."""

    def on_save(self, folder: Path) -> None:
        """A checkpoint, or at the end the adapter (or base), is on the disk, whole. In the main process."""
