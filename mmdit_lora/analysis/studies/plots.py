"""The plot of a study. Palette: Okabe and Ito's, which is told apart with every common colour blindness."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.analysis.studies.statistics import SHARE, Array
from mmdit_lora.analysis.studies.table import BASE, Measure, Table
from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.files import atomic_file

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_NAMES: dict[Measure, str] = {
    "ious": "mean IoU, new domain",
    "old_ious": "mean IoU, old domain",
    "loss": "held-out loss below the base's",
    "old_loss": "loss in the old domain below the base's",
}
_BARS = "bars: 95 % interval of the gain over the base"


class Canvas:
    """A figure with a grid of panels.

    Args:
        size: of one panel in inches, (width, height).
    """

    def __init__(self, title: str, *, rows: int, columns: int, size: tuple[float, float]) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(columns * size[0], rows * size[1] + 0.4), dpi=110, layout="constrained")
        self.figure.suptitle(title, fontsize=13)
        self._grid = self.figure.add_gridspec(rows, columns)

    def place(self, row: int, column: int | slice) -> Any:
        return self.figure.add_subplot(self._grid[row, column])

    def save(self, path: Path) -> None:
        with atomic_file(path) as temporary:
            self.figure.savefig(temporary)

    def curve(
        self, axes: Any, table: Table, x: Sequence[float], settings: Sequence[str], measure: Measure, x_name: str
    ) -> None:
        """A measure by setting on a logarithmic axis: each seed a dot, their mean with the interval of its gain."""
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(x), [f"{value:g}" for value in x])
        axes.set_xlabel(x_name)
        if self._nothing(axes, table, settings, measure):
            return
        means = []
        for value, setting in zip(x, settings, strict=True):
            values = _shown(table, setting, measure)
            interval = mean_interval(values)
            means.append(interval.mean)
            axes.plot([value] * len(values), values.mean(1), "o", color=COLORS[5], markersize=4, zorder=2)
            axes.errorbar(
                value, interval.mean, [[interval.mean - interval.low], [interval.high - interval.mean]],
                fmt="s", color=COLORS[0], capsize=4, markersize=5, zorder=3,
            )  # fmt: skip
        axes.plot(list(x), means, "-", color=COLORS[0], zorder=1)
        axes.set_title(_BARS, fontsize=9)
        _base_line(axes, table, measure, vertical=False)
        axes.set_ylabel(_NAMES[measure])
        axes.grid(alpha=0.3)

    def dots(self, axes: Any, table: Table, labels: Mapping[str, str], measure: Measure) -> None:
        """A measure of each setting in a row of its own: each seed a dot, their mean with the interval of its gain."""
        rows = list(range(len(labels)))[::-1]
        first = axes.get_subplotspec().colspan.start == 0
        axes.set_yticks(rows, list(labels.values()) if first else [""] * len(rows), fontsize=9)
        axes.set_ylim(-0.6, len(labels) - 0.4)
        if self._nothing(axes, table, list(labels), measure):
            return
        for row, setting in zip(rows, labels, strict=True):
            values = _shown(table, setting, measure)
            interval = mean_interval(values)
            axes.plot(values.mean(1), [row - 0.15] * len(values), "o", color=COLORS[5], markersize=4)
            axes.errorbar(
                interval.mean, row, xerr=[[interval.mean - interval.low], [interval.high - interval.mean]],
                fmt="s", color=COLORS[0], capsize=4, markersize=5,
            )  # fmt: skip
        _base_line(axes, table, measure, vertical=True)
        axes.set_xlabel(_NAMES[measure])
        axes.set_title(_BARS, fontsize=9)
        axes.grid(alpha=0.3)

    def heat(self, axes: Any, values: Array, title: str) -> None:
        """phi(i, j) in [0, 1], i down, j across, counted from 1."""
        rows, columns = values.shape
        image = axes.imshow(
            values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=(0.5, columns + 0.5, rows + 0.5, 0.5)
        )
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("j")
        axes.set_ylabel("i")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        self.figure.colorbar(image, ax=axes, shrink=0.85)

    def shares(
        self,
        axes: Any,
        dimensions: Sequence[int],
        curves: Mapping[str, Sequence[float]],
        d90: Mapping[str, float],
        measure: Measure,
    ) -> None:
        """Shares of the whole gain by dimension, and where they cross 90 %."""
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(dimensions), [f"{d:,}" for d in dimensions], rotation=30)
        axes.set_xlabel("d, numbers that train (log scale)")
        axes.set_ylabel("share of the whole stream's gain")
        axes.set_title(_NAMES[measure], fontsize=10)
        axes.axhline(SHARE, color="grey", linestyle="--", linewidth=1)
        axes.grid(alpha=0.3)
        for number, (name, values) in enumerate(curves.items()):
            color, found = COLORS[number % len(COLORS)], d90[name]
            text = f"{name}: d90 {found:,.0f}" if math.isfinite(found) else f"{name}: d90 not reached"
            axes.plot(list(dimensions), list(values), "os^Dv*"[number % 6] + "-", color=color, label=text)
            if math.isfinite(found):
                axes.plot([found], [SHARE], "x", color=color, markersize=9, markeredgewidth=2)
        if curves:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)

    def _nothing(self, axes: Any, table: Table, settings: Sequence[str], measure: Measure) -> bool:
        if all(table.values(setting, measure) is not None for setting in settings):
            return False
        axes.text(0.5, 0.5, "not measured:\nthe phrases cannot be read", ha="center", transform=axes.transAxes)
        return True


def _shown(table: Table, setting: str, measure: Measure) -> Array:
    """(S, P) gains over the base, set on the base's mean: so the bars are of the paired difference, not of how much
    layouts differ in difficulty."""
    gains = table.gains(setting, measure)
    assert gains is not None
    base = table.values(BASE, measure)
    return gains if "loss" in measure or base is None else gains + base.mean()


def _base_line(axes: Any, table: Table, measure: Measure, *, vertical: bool) -> None:
    values = None if "loss" in measure else table.values(BASE, measure)
    base = 0.0 if values is None else float(values.mean())
    line = axes.axvline if vertical else axes.axhline
    line(base, color="grey", linestyle="--", linewidth=1, label="base")
    axes.legend(fontsize=8, loc="best")
