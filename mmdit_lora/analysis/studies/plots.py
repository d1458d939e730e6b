"""The panels of a study's plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mmdit_lora.analysis.studies.setup import BASE
from mmdit_lora.analysis.studies.statistics import SHARE, Array
from mmdit_lora.analysis.studies.table import Measure, Table
from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.visual import charts
from mmdit_lora.visual.charts import SERIES, SOFT

_NAMES: dict[Measure, str] = {
    "ious": "mean IoU, new domain",
    "old_ious": "mean IoU, old domain",
    "loss": "held-out loss below the base's",
    "old_loss": "loss in the old domain below the base's",
}
_BARS = "bars: 95 % interval of the gain over the base"


def save(drawn: Figure, title: str, path: Path) -> None:
    drawn.suptitle(title, fontsize=13)
    charts.save(drawn, path)


def curve(axes: Any, table: Table, x: Mapping[str, float], measure: Measure, x_name: str) -> None:
    """A measure by setting on a logarithmic axis: each seed a dot, their mean with the interval of its gain.

    Args:
        x: setting -> its place on the axis.
    """
    _log_axis(axes, x.values(), x_name)
    axes.set_ylabel(_NAMES[measure])
    means = _dots(axes, table, x, measure, across=True)
    axes.plot(list(x.values())[: len(means)], means, "-", color=SERIES[0], zorder=1)


def dots(axes: Any, table: Table, labels: Mapping[str, str], measure: Measure) -> None:
    """A measure of each setting in a row of its own: each seed a dot, their mean with the interval of its gain.

    Args:
        labels: setting -> text of its row.
    """
    axes.set_yticks(range(len(labels)), labels.values())
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlabel(_NAMES[measure])
    _dots(axes, table, {setting: row for row, setting in enumerate(labels)}, measure, across=False)


def _dots(axes: Any, table: Table, places: Mapping[str, float], measure: Measure, *, across: bool) -> list[float]:
    """Draw settings at their places on one axis, and a line at the base; the means. `across`: places lie on the x axis."""
    if any(table.values(setting, measure) is None for setting in places):
        axes.text(0.5, 0.5, "not measured:\nthe phrases cannot be read", ha="center", transform=axes.transAxes)
        return []
    on_base = None if "loss" in measure else table.values(BASE, measure)
    base, means = 0.0 if on_base is None else float(on_base.mean()), []
    for setting, place in places.items():
        gains = table.gains(setting, measure)
        assert gains is not None
        # Set on the base's mean: so the bars are of the paired difference, not of how much layouts differ in difficulty.
        values = gains + base
        interval = mean_interval(values)
        ends = [[interval.mean - interval.low], [interval.high - interval.mean]]
        seeds, at = values.mean(1), [place] * len(values)
        style: dict[str, Any] = {"fmt": "s", "color": SERIES[0], "capsize": 4, "markersize": 5, "zorder": 3}
        if across:
            axes.plot(at, seeds, "o", color=SERIES[5], markersize=4, zorder=2)
            axes.errorbar(place, interval.mean, yerr=ends, **style)
        else:
            axes.plot(seeds, at, "o", color=SERIES[5], markersize=4, zorder=2)
            axes.errorbar(interval.mean, place, xerr=ends, **style)
        means.append(interval.mean)
    (axes.axhline if across else axes.axvline)(base, color=SOFT, linestyle="--", linewidth=1, label="base")
    axes.legend(loc="best")
    axes.set_title(_BARS)
    return means


def heat_map(axes: Any, values: Array, title: str) -> None:
    """phi(i, j) in [0, 1], i down, j across, counted from 1."""
    extent = (0.5, values.shape[1] + 0.5, values.shape[0] + 0.5, 0.5)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent)
    axes.set(title=title, xlabel="j", ylabel="i")
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(image, ax=axes, shrink=0.85)


def shares(
    axes: Any,
    dimensions: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    d90: Mapping[str, float],
    measure: Measure,
) -> None:
    """Shares of the whole gain by dimension, and where they cross 90 %."""
    _log_axis(axes, dimensions, "d, numbers that train", rotation=30)
    axes.set(ylabel="share of the whole stream's gain", title=_NAMES[measure])
    axes.axhline(SHARE, color=SOFT, linestyle="--", linewidth=1)
    for number, (name, values) in enumerate(curves.items()):
        color, reached = SERIES[number % len(SERIES)], d90[name]
        text = f"{name}: d90 {reached:,.0f}" if math.isfinite(reached) else f"{name}: d90 not reached"
        axes.plot(list(dimensions), list(values), "os^Dv*"[number % 6] + "-", color=color, label=text)
        if math.isfinite(reached):
            axes.plot([reached], [SHARE], "x", color=color, markersize=9, markeredgewidth=2)
    if curves:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _log_axis(axes: Any, ticks: Iterable[float], name: str, **options: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), [f"{value:,.10g}" for value in ticks], **options)
    axes.minorticks_off()
    axes.set_xlabel(f"{name} (log scale)")
