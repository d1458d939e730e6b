"""`study intrinsic-dimension`: how few numbers, moving all of the layout stream in random directions, are enough.

d90 is the smallest d that reaches 90 % of what training the whole stream gains (Li et al. 2018, arXiv 1804.08838), by plain
random directions (DID) and with a learned scale for each block, counted in d (SAID; Aghajanyan et al. 2020, arXiv
2012.13255).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmdit_lora.analysis.studies.plots import Canvas
from mmdit_lora.analysis.studies.setup import Arm, Claim, Scan, Setup, scaled
from mmdit_lora.analysis.studies.statistics import Curve, all_of, below, bootstrap_d90, log_ratio
from mmdit_lora.analysis.studies.subspace import subspace, subspace_linears
from mmdit_lora.analysis.studies.table import Decided, Table, measure_name
from mmdit_lora.evaluation.intervals import Interval
from mmdit_lora.training.load_base import open_encoders

KINDS = {"DID": False, "SAID": True}
_DIMENSIONS, _QUICK = (64, 256, 1024, 4096, 16384, 65536), (16, 64)
_LOW = 0.01
_FULL_RATES, _SUBSPACE_RATES = (0.04, 0.12, 0.36), (0.18, 0.54, 1.62)


class IntrinsicDimensionStudy:
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
        claims = []
        for kind in self.kinds(setup):
            claims.append(
                Claim(
                    f"The intrinsic dimension ({kind}) of adapting a layout stream is low.",
                    f"d90 below {_LOW:.0%} of the weights of the stream's linears: held if the 95 % bootstrap interval over "
                    "seeds and layouts is below that on every base, did not hold if it is above on one, else undecided.",
                )
            )
        for kind in self.kinds(setup) if len(self.bases(setup)) > 1 else ():
            claims.append(
                Claim(
                    f"The larger base has the smaller intrinsic dimension ({kind}).",
                    "log(d90 of the largest base / d90 of the smallest): held if its 95 % bootstrap interval is below 0, did "
                    "not hold if it is above 0, else undecided, so also where neither reaches 90 %.",
                )
            )
        return claims

    def scans(self, setup: Setup) -> list[Scan]:
        rate, middle = setup.config.train.learning_rate, self.dimensions(setup)[len(self.dimensions(setup)) // 2]
        scans = []
        for label, base in self.bases(setup).items():
            scans.append(Scan(f"{label} stream", scaled(rate, _FULL_RATES), self._stream(), base))
            for kind, structured in self.kinds(setup).items():
                changes = self._subspace(middle, structured)
                scans.append(Scan(f"{label} {kind}", scaled(rate, _SUBSPACE_RATES), changes, base))
        return scans

    def arms(self, setup: Setup, rates: Mapping[str, float]) -> list[Arm]:
        arms = []
        for label, base in self.bases(setup).items():
            arms.append(Arm(f"{label} base", 0, None, base))
            for seed in setup.seeds:
                rate = {"train.learning_rate": rates[f"{label} stream"]}
                arms.append(Arm(f"{label} stream", seed, {**self._stream(), **rate}, base))
                for kind, structured in self.kinds(setup).items():
                    rate = {"train.learning_rate": rates[f"{label} {kind}"]}
                    arms += [
                        Arm(f"{label} {kind} d={d}", seed, {**self._subspace(d, structured), **rate}, base)
                        for d in self.dimensions(setup)
                    ]
        return arms

    def _stream(self) -> dict[str, Any]:
        return {"method": "layout_stream", "stream.parts": []}

    def _subspace(self, dimension: int, structured: bool) -> dict[str, Any]:
        return {"method": subspace(dimension, structured=structured)}

    def _curve(
        self, setup: Setup, table: Table, label: str, kind: str, measure: Literal["ious", "loss"]
    ) -> Curve | None:
        dimensions = list(self.dimensions(setup))
        found = [table.gains(f"{label} {kind} d={d}", measure, f"{label} base") for d in dimensions]
        full = table.gains(f"{label} stream", measure, f"{label} base")
        known = [values for values in found if values is not None]
        if full is None or len(known) < len(found):
            return None
        return Curve(dimensions, np.stack(known), full)

    def conclude(self, setup: Setup, table: Table) -> tuple[list[Decided], dict[str, Any]]:
        bases, kinds = self.bases(setup), self.kinds(setup)
        sizes = {label: self._weights(setup, base) for label, base in bases.items()}
        found: dict[tuple[str, str, str], Any] = {}
        curves: dict[str, Any] = {}
        for label in bases:
            for kind in kinds:
                for measure in ("ious", "loss"):
                    curve = self._curve(setup, table, label, kind, measure)
                    if curve is not None:
                        found[label, kind, measure] = bootstrap_d90(curve)
                        shares = curve.gains.mean((1, 2)) / curve.full.mean()
                        curves.setdefault(measure, {}).setdefault(label, {})[kind] = shares.tolist()
        claims = iter(self.claims(setup))
        decided = []
        for kind in kinds:
            claim = next(claims)
            intervals = {label: found[label, kind, table.main][0] for label in bases}
            # Where 90 % were not reached, d90 is known to be beyond the largest d that was tried, and no more.
            largest = float(self.dimensions(setup)[-1])
            known = {label: replace(one, low=min(one.low, largest)) for label, one in intervals.items()}
            verdicts = [below(known[label], _LOW * sizes[label]) for label in bases]
            figures: dict[str, Any] = {"measure": measure_name(table.main)}
            figures |= {
                label: {"d90": intervals[label], "weights": sizes[label], "share": intervals[label].mean / sizes[label]}
                for label in bases
            }
            decided.append(Decided(claim.text, claim.rule, all_of(verdicts), figures))
        if len(bases) > 1:
            small, *_, large = bases
            for kind in kinds:
                claim = next(claims)
                ratio = log_ratio(found[large, kind, table.main], found[small, kind, table.main])
                figures = {"log_ratio": ratio, large: found[large, kind, table.main][0]}
                figures |= {small: found[small, kind, table.main][0], "measure": measure_name(table.main)}
                decided.append(Decided(claim.text, claim.rule, below(ratio, 0), figures))
        every: dict[str, dict[str, dict[str, Interval]]] = {}
        for (label, kind, measure), (interval, _) in found.items():
            every.setdefault(label, {}).setdefault(kind, {})[measure] = interval
        return decided, {"d90": every, "weights": sizes, "dimensions": list(self.dimensions(setup)), "shares": curves}

    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        del table
        canvas = Canvas(self.title, rows=1, columns=2, size=(5.4, 4.4))
        for column, measure in enumerate(("ious", "loss")):
            curves = {
                f"{label}, {kind}": values
                for label, kinds in extra["shares"].get(measure, {}).items()
                for kind, values in kinds.items()
            }
            d90 = {
                f"{label}, {kind}": extra["d90"][label][kind][measure].mean
                for label in self.bases(setup)
                for kind in self.kinds(setup)
                if measure in extra["d90"].get(label, {}).get(kind, {})
            }
            canvas.shares(canvas.place(0, column), extra["dimensions"], curves, d90, measure)  # type: ignore[arg-type]
        canvas.save(path)

    def _weights(self, setup: Setup, base: str) -> int:
        """Weights of the layout stream's linears."""
        model = open_encoders(setup.config.model_copy(update={"base": base}), torch.float32, texts=False).transformer
        return sum(linear.weight.numel() for linear in subspace_linears(model).values())
