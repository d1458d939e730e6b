"""Bootstrap intervals: what other images of the same kind would have given. Whole images are drawn, never boxes alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 2000
CONFIDENCE = 0.95


def value(sums: Table) -> float:
    """A figure from its sums (images, 2), see `judged.sums`."""
    return float(sums[:, 0].sum() / sums[:, 1].sum())


class Bootstrap:
    """Percentile intervals (Efron and Tibshirani 1993, chapter 13), 95 %, over `images`; the same at every call.

    Every figure sees the same resamples, so the difference of two on the same images is a paired one.
    """

    def __init__(self, images: int) -> None:
        # How often each image comes in a resample: all that a figure made of sums needs.
        shares = np.full(images, 1 / max(images, 1))
        self._times = np.random.default_rng(0).multinomial(images, shares, size=RESAMPLES).astype(np.float64)

    def interval(self, sums: Table) -> Interval | None:
        """Of a figure; None for fewer than two images that count."""
        return self._between(self._ratios(sums), sums)

    def difference(self, sums: Table, base: Table) -> Interval | None:
        """Of the figure less that of `base`, on the same images."""
        return self._between(self._ratios(sums) - self._ratios(base), sums)

    def _ratios(self, sums: Table) -> Table:
        above, below = (self._times @ sums).T
        return np.divide(above, below, out=np.full(RESAMPLES, np.nan), where=below > 0)

    @staticmethod
    def _between(ratios: Table, sums: Table) -> Interval | None:
        if np.count_nonzero(sums[:, 1]) < 2:
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(ratios, [tail, 100 - tail])
        return float(low), float(high)
