"""Verdicts by rules that are fixed beforehand, and the dimension that reaches 90 % of a gain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmdit_lora.evaluation.intervals import Interval

Verdict = Literal["held", "did not hold", "undecided"]
Array = NDArray[np.float64]

SHARE, DRAWS = 0.9, 4000


def above(interval: Interval, limit: float) -> Verdict:
    """Held: all of the interval is above the limit. Did not hold: all of it is below. Else undecided."""
    return "held" if interval.low > limit else "did not hold" if interval.high < limit else "undecided"


def below(interval: Interval, limit: float) -> Verdict:
    """The reverse of `above`."""
    return above(Interval(-interval.mean, -interval.high, -interval.low), -limit)


def all_of(verdicts: list[Verdict]) -> Verdict:
    """Of a claim about several things: one that does not hold is enough against it."""
    if "did not hold" in verdicts:
        return "did not hold"
    return "held" if verdicts and all(v == "held" for v in verdicts) else "undecided"


def d90(dimensions: list[int], gains: Array, full: float) -> float:
    """The smallest dimension that reaches 90 % of a gain (Li et al. 2018, section 2.2), interpolated in log d.

    Args:
        gains: (dimensions,) over the base; full: of training all.

    Returns:
        The smallest dimension tried where that is enough; infinity where none is, or training all gains nothing.
    """
    if full <= 0:
        return math.inf
    shares = gains / full
    for index, share in enumerate(shares):
        if share >= SHARE:
            if index == 0:
                return float(dimensions[0])
            before, now = math.log(dimensions[index - 1]), math.log(dimensions[index])
            part = (SHARE - shares[index - 1]) / (share - shares[index - 1])
            return math.exp(before + float(part) * (now - before))
    return math.inf


@dataclass(frozen=True)
class Curve:
    """Gains over the base: by dimension (dimensions, S, P), and of training all (S, P)."""

    dimensions: list[int]
    gains: Array
    full: Array

    def d90(self, seeds: NDArray[np.int64] | None = None, layouts: NDArray[np.int64] | None = None) -> float:
        """Of some seeds and layouts; None = all."""
        gains, full = self.gains, self.full
        if seeds is not None and layouts is not None:
            gains, full = gains[:, seeds][:, :, layouts], full[seeds][:, layouts]
        return d90(self.dimensions, gains.mean((1, 2)), float(full.mean()))


def bootstrap_d90(curve: Curve) -> tuple[Interval, Array]:
    """d90 with a 95 % interval, and (DRAWS,) resampled values: seeds and layouts are drawn with replacement, together."""
    draw = np.random.default_rng(0)
    _, seeds, layouts = curve.gains.shape
    resampled = [(draw.integers(seeds, size=(seeds,)), draw.integers(layouts, size=(layouts,))) for _ in range(DRAWS)]
    found = np.array([curve.d90(*drawn) for drawn in resampled])
    return Interval(curve.d90(), *_middle(found)), found


def log_ratio(large: tuple[Interval, Array], small: tuple[Interval, Array]) -> Interval:
    """log(d90 of one / d90 of the other), of two independent bootstraps.

    Where both are infinite in a resample their ratio may be anything: it counts as the lowest for the lower end and as the
    highest for the upper one.
    """
    with np.errstate(invalid="ignore"):
        drawn = np.log(large[1]) - np.log(small[1])
        mean = float(np.log(large[0].mean) - np.log(small[0].mean))
    unknown = np.isnan(drawn)
    low, high = (_middle(np.where(unknown, extreme, drawn))[end] for end, extreme in ((0, -math.inf), (1, math.inf)))
    return Interval(mean, low, high)


def _middle(drawn: Array) -> tuple[float, float]:
    """Ends of the middle 95 %, without interpolation: values may be infinite."""
    ordered = np.sort(drawn)
    out = round(0.025 * (len(ordered) - 1))
    return float(ordered[out]), float(ordered[-1 - out])


def plain(value: Any) -> Any:
    """For JSON: intervals as mappings, numbers that are not finite as None."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
