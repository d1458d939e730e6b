"""Callbacks of tests: a function for each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmdit_lora.training.callbacks import Callback
from mmdit_lora.training.preflight import Preflight
from mmdit_lora.training.step import StepRecord


class Calls(Callback):
    """Calls `step` with every record, `logged` with the step and scalars that were logged, `preflight` with the report."""

    def __init__(
        self,
        step: Callable[[StepRecord], Any] = lambda _: None,
        logged: Callable[[int, dict[str, float]], Any] = lambda *_: None,
        preflight: Callable[[Preflight], Any] = lambda _: None,
    ) -> None:
        self._step, self._logged, self._preflight = step, logged, preflight

    def on_step(self, record: StepRecord) -> None:
        self._step(record)
        if record.logged:
            self._logged(record.step, record.logged)

    def on_preflight(self, report: Preflight) -> None:
        self._preflight(report)
