"""`study intrinsic-dimension`: how few numbers, moving all of the layout stream in random directions, are enough.

d90 is the smallest d that reaches 90 % of what training the whole stream gains (Li et al. 2018, arXiv 1804.08838), by plain
random directions (DID) and with a learned scale for each block, counted in d (SAID; Aghajanyan et al. 2020, arXiv
2012.13255).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from mmdit_lora.analysis.studies.plots import save, shares
from mmdit_lora.analysis.studies.setup import Arm, Claim, Scan, Setup, Study, scaled
from mmdit_lora.analysis.studies.statistics import Array, Curve, Verdict, all_of, below, bootstrap_d90, log_ratio
from mmdit_lora.analysis.studies.subspace import subspace, subspace_linears
from mmdit_lora.analysis.studies.table import MEASURES, Measure, Table
from mmdit_lora.evaluation.intervals import Interval
from mmdit_lora.training.load_base import open_encoders
from mmdit_lora.visual.charts import figure

KINDS = {"DID": False, "SAID": True}
_DIMENSIONS, _QUICK = (64, 256, 1024, 4096, 16384, 65536), (16, 64)
_LOW = 0.01
_MEASURES: tuple[Measure, ...] = ("ious", "loss")
_STREAM: dict[str, Any] = {"method": "layout_stream", "stream.parts": []}
_FULL_RATES, _SUBSPACE_RATES = (0.04, 0.12, 0.36), (0.18, 0.54, 1.62)


class IntrinsicDimensionStudy(Study):
    """For each base, from small to large: the whole stream trained, and random subspaces of it."""

    title = "Intrinsic dimension of the layout stream"

    def bases(self, setup: Setup) -> dict[str, str]:
        """Label -> base. The label is the folder's name."""
        bases = setup.bases or (setup.config.base,)
        labels = [Path(base).name for base in bases]
        return dict(zip(labels if len(set(labels)) == len(labels) else bases, bases, strict=True))

    def dimensions(self, setup: Setup) -> tuple[int, ...]:
        return _QUICK if setup.quick else _DIMENSIONS

    def kinds(self, setup: Setup) -> dict[str, bool]:
        return {"SAID": True} if setup.quick else KINDS

    def claims(self, setup: Setup) -> list[Claim]:
        kinds = self.kinds(setup)
        low = [
            Claim(
                f"The intrinsic dimension ({kind}) of adapting a layout stream is low.",
                f"d90 below {_LOW:.0%} of the weights of the stream's linears: held if the 95 % bootstrap interval over "
                "seeds and layouts is below that on every base, did not hold if it is above on one, else undecided.",
                partial(self._is_low, setup, kind),
            )
            for kind in kinds
        ]
        smaller = [
            Claim(
                f"The larger base has the smaller intrinsic dimension ({kind}).",
                "log(d90 of the largest base / d90 of the smallest): held if its 95 % bootstrap interval is below 0, did "
                "not hold if it is above 0, else undecided, so also where neither reaches 90 %.",
                partial(self._is_smaller, setup, kind),
            )
            for kind in kinds
        ]
        return low + smaller if len(self.bases(setup)) > 1 else low

    def scans(self, setup: Setup) -> list[Scan]:
        rate, middle = setup.config.train.learning_rate, self.dimensions(setup)[len(self.dimensions(setup)) // 2]
        scans = []
        for label, base in self.bases(setup).items():
            scans.append(Scan(f"{label} stream", scaled(rate, _FULL_RATES), _STREAM, base))
            for kind, structured in self.kinds(setup).items():
                changes = _subspace(middle, structured)
                scans.append(Scan(f"{label} {kind}", scaled(rate, _SUBSPACE_RATES), changes, base))
        return scans

    def arms(self, setup: Setup, rates: Mapping[str, float]) -> list[Arm]:
        arms = []
        for label, base in self.bases(setup).items():
            arms.append(Arm(f"{label} base", 0, None, base))
            for seed in setup.seeds:
                rate = {"train.learning_rate": rates[f"{label} stream"]}
                arms.append(Arm(f"{label} stream", seed, {**_STREAM, **rate}, base))
                for kind, structured in self.kinds(setup).items():
                    rate = {"train.learning_rate": rates[f"{label} {kind}"]}
                    arms += [
                        Arm(f"{label} {kind} d={d}", seed, {**_subspace(d, structured), **rate}, base)
                        for d in self.dimensions(setup)
                    ]
        return arms

    def _is_low(self, setup: Setup, kind: str, table: Table) -> tuple[Verdict, dict[str, Any]]:
        figures: dict[str, Any] = {"measure": MEASURES[table.main]}
        verdicts, dimensions = [], self.dimensions(setup)
        for label, base in self.bases(setup).items():
            d90, weights = _bootstrap(table, label, kind, dimensions, table.main)[0], self._weights(setup, base)
            # Where 90 % were not reached, d90 is known to be beyond the largest d that was tried, and no more.
            verdicts.append(below(replace(d90, low=min(d90.low, float(dimensions[-1]))), _LOW * weights))
            figures[label] = {"d90": d90, "weights": weights, "share": d90.mean / weights}
        return all_of(verdicts), figures

    def _is_smaller(self, setup: Setup, kind: str, table: Table) -> tuple[Verdict, dict[str, Any]]:
        small, *_, large = self.bases(setup)
        ones = [_bootstrap(table, label, kind, self.dimensions(setup), table.main) for label in (large, small)]
        ratio = log_ratio(*ones)
        figures = {"log_ratio": ratio, large: ones[0][0], small: ones[1][0], "measure": MEASURES[table.main]}
        return below(ratio, 0), figures

    def extra(self, setup: Setup, table: Table) -> dict[str, Any]:
        bases, dimensions = self.bases(setup), self.dimensions(setup)
        d90: dict[str, Any] = {}
        gained: dict[str, Any] = {}
        for label, kind, measure in product(bases, self.kinds(setup), _MEASURES):
            curve = _curve(table, label, kind, dimensions, measure)
            if curve is not None:
                interval, _ = _bootstrap(table, label, kind, dimensions, measure)
                d90.setdefault(label, {}).setdefault(kind, {})[measure] = interval
                part = curve.gains.mean((1, 2)) / curve.full.mean()
                gained.setdefault(measure, {}).setdefault(label, {})[kind] = part.tolist()
        weights = {label: self._weights(setup, base) for label, base in bases.items()}
        return {"d90": d90, "weights": weights, "dimensions": list(dimensions), "shares": gained}

    def _weights(self, setup: Setup, base: str) -> int:
        """Weights of the layout stream's linears."""
        model = open_encoders(setup.config.model_copy(update={"base": base}), torch.float32, texts=False).transformer
        return sum(linear.weight.numel() for linear in subspace_linears(model).values())

    @override
    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        with figure(10.8, 4.8, ncols=2) as (drawn, panels):
            for panel, measure in zip(panels, _MEASURES, strict=True):
                curves = {
                    f"{label}, {kind}": values
                    for label, kinds in extra["shares"].get(measure, {}).items()
                    for kind, values in kinds.items()
                }
                d90 = {
                    f"{label}, {kind}": of_measures[measure].mean
                    for label, kinds in extra["d90"].items()
                    for kind, of_measures in kinds.items()
                    if measure in of_measures
                }
                shares(panel, extra["dimensions"], curves, d90, measure)
            save(drawn, self.title, path)


def _subspace(dimension: int, structured: bool) -> dict[str, Any]:
    return {"method": subspace(dimension, structured=structured)}


@lru_cache(maxsize=64)
def _curve(table: Table, label: str, kind: str, dimensions: tuple[int, ...], measure: Measure) -> Curve | None:
    gains = [table.gains(f"{label} {kind} d={d}", measure, f"{label} base") for d in dimensions]
    full = table.gains(f"{label} stream", measure, f"{label} base")
    known = [values for values in gains if values is not None]
    return None if full is None or len(known) < len(gains) else Curve(list(dimensions), np.stack(known), full)


@lru_cache(maxsize=64)
def _bootstrap(
    table: Table, label: str, kind: str, dimensions: tuple[int, ...], measure: Measure
) -> tuple[Interval, Array]:
    curve = _curve(table, label, kind, dimensions, measure)
    assert curve is not None
    return bootstrap_d90(curve)
