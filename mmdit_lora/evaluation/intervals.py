"""95 % intervals of metrics: bootstrap over images, and t intervals over seeds and images."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

Table = NDArray[np.float64]

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON; what is not finite is None."""
        return {key: value if math.isfinite(value) else None for key, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_interval(values: Table) -> Interval:
    """Mean over seeds and layouts of (S, P) values, both taken as random.

    A t interval whose variance is that of the seeds' means over S plus that of the layouts' means over P, with
    Satterthwaite's degrees of freedom. The part that belongs to neither is counted twice: too wide rather than too narrow.
    With one seed it is the paired t interval over layouts, and does not cover other seeds.
    """
    mean = float(values.mean())
    # (variance of the mean, degrees of freedom)
    parts = [
        (float(values.mean(1 - axis).var(ddof=1)) / count, count - 1)
        for axis, count in enumerate(values.shape)
        if count > 1
    ]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Interval(mean, mean, mean)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    margin = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Interval(mean, mean - margin, mean + margin)


def ratio(sums: Table) -> float:
    """A metric from its per-image numerators and denominators (images, 2), see `metrics.metric_sums`."""
    return float(sums[:, 0].sum() / sums[:, 1].sum())


class Bootstrap:
    """Percentile intervals (Efron and Tibshirani 1993, chapter 13) over `images`; whole images are drawn, never boxes alone.

    Every metric gets the same resamples, at every call, so the difference of two on the same images is a paired one.
    """

    def __init__(self, images: int) -> None:
        # How often each image comes in a resample: all that a ratio of sums needs.
        shares = np.full(images, 1 / max(images, 1))
        self._counts = np.random.default_rng(0).multinomial(images, shares, size=RESAMPLES).astype(np.float64)

    def interval(self, sums: Table) -> tuple[float, float] | None:
        """Of a metric; None for fewer than two images that count."""
        return self._between(self._ratios(sums), sums)

    def difference(self, sums: Table, base: Table) -> tuple[float, float] | None:
        """Of the metric less that of `base`, on the same images."""
        return self._between(self._ratios(sums) - self._ratios(base), sums)

    def _ratios(self, sums: Table) -> Table:
        above, below = (self._counts @ sums).T
        return np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)

    @staticmethod
    def _between(ratios: Table, sums: Table) -> tuple[float, float] | None:
        if np.count_nonzero(sums[:, 1]) < 2:
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(ratios, [tail, 100 - tail])
        return float(low), float(high)
