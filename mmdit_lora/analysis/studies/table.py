"""The figures of a study's runs by setting, and the rows that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmdit_lora.analysis.studies.runs import Figures
from mmdit_lora.analysis.studies.setup import BASE
from mmdit_lora.analysis.studies.statistics import Array
from mmdit_lora.evaluation.intervals import Interval, mean_interval

Measure = Literal["ious", "old_ious", "loss", "old_loss"]
_KEYS: dict[Measure, str] = {"loss": "loss_minus_base", "old_loss": "old_losses"}
MEASURES: dict[Measure, str] = {
    "ious": "mean IoU of held-out layouts",
    "loss": "held-out loss below the base's",
    "old_ious": "mean IoU of layouts of the old domain",
    "old_loss": "loss in the old domain below the base's",
}


class Table:
    """Figures of runs by setting, in the order in which they were run."""

    def __init__(self, runs: Sequence[Figures]) -> None:
        self.runs = list(runs)
        self.settings = list(dict.fromkeys(run["setting"] for run in runs))

    def of(self, setting: str) -> list[Figures]:
        return [run for run in self.runs if run["setting"] == setting]

    def values(self, setting: str, measure: Measure) -> Array | None:
        """(S, P), higher is better: mean IoU of each image, or held-out loss below the base's (of the old domain: minus
        the loss); None where not measured."""
        rows = [run.get(_KEYS.get(measure, measure)) for run in self.of(setting)]
        if not rows or any(row is None for row in rows):
            return None
        return np.array(rows, dtype=np.float64) * (-1 if measure in _KEYS else 1)

    def gains(self, setting: str, measure: Measure, base: str = BASE) -> Array | None:
        """(S, P), paired by image: `values` minus the base's."""
        own = self.values(setting, measure)
        if measure == "loss" or own is None:
            return own
        start = self.values(base, measure)
        return None if start is None else own - start

    @property
    def main(self) -> Measure:
        """What claims are decided on: images where they can be read, else the held-out loss."""
        return "ious" if all(run["ious"] is not None for run in self.runs) else "loss"

    @property
    def old(self) -> Measure | None:
        """As `main`, of the old domain; None where it was not measured."""
        if any(run.get("old_losses") is None for run in self.runs):
            return None
        return "old_ious" if all(run["old_ious"] is not None for run in self.runs) else "old_loss"

    def interval(self, setting: str, measure: Measure) -> Interval | None:
        values = self.values(setting, measure)
        return None if values is None else mean_interval(values)

    def gain(self, setting: str, measure: Measure) -> Interval | None:
        """Over the base (`base`, or `<label> base` where there are several), paired by image; None for a base itself."""
        bases = (run["setting"] for run in self.runs if run["learning_rate"] is None)
        base = next((name for name in bases if setting.startswith(name.removesuffix(BASE))), None)
        gains = None if base in (None, setting) else self.gains(setting, measure, base or BASE)
        return None if gains is None else mean_interval(gains)

    def rows(self) -> list[dict[str, Any]]:
        """One row a setting, for `study.json` and the table."""
        return [self._row(setting) for setting in self.settings]

    def _row(self, setting: str) -> dict[str, Any]:
        runs = self.of(setting)
        trained = [run for run in runs if run["learning_rate"] is not None]
        return {
            "setting": setting,
            "runs": len(runs),
            "trainable_params": runs[0]["trainable_params"],
            "bytes": runs[0]["bytes"],
            "learning_rate": runs[0]["learning_rate"],
            "miou": self.interval(setting, "ious"),
            "gain": self.gain(setting, "ious"),
            "over_boxes": _means([run["fidelity"] for run in runs]),
            "loss_minus_base": _negative(self.interval(setting, "loss")),
            "old_miou": self.interval(setting, "old_ious"),
            "old_change": self.gain(setting, "old_ious"),
            "old_loss_minus_base": _negative(self.gain(setting, "old_loss")),
            "train_seconds": _mean([run["train_seconds"] for run in trained]),
            "seconds": _mean([run["seconds"] for run in runs]),
            "peak_memory": max((run["peak_memory"] for run in trained), default=None),
        }


def _negative(interval: Interval | None) -> Interval | None:
    return None if interval is None else Interval(-interval.mean, -interval.high, -interval.low)


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 2) if values else None


def _means(values: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    return {key: sum(value[key] for value in known) / len(known) for key in known[0]} if known else None
