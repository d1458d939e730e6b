"""`study rank`: fidelity by rank, and what the subspaces of adapters have in common (LoRA paper, sections 7.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from mmdit_lora.analysis.studies.plots import curve, heat_map, save
from mmdit_lora.analysis.studies.setup import Arm, Claim, Setup, Study
from mmdit_lora.analysis.studies.similarity import Which, adapter_directions, compare, random_pairs
from mmdit_lora.analysis.studies.statistics import Array, Verdict, above
from mmdit_lora.analysis.studies.table import MEASURES, Table
from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.visual.charts import figure

_RANKS, _SMALL, _MIDDLE = (1, 2, 4, 8, 16, 64), 4, 8
_QUICK = (2, 4)


class RankStudy(Study):
    """Every rank at the config's targets and its ratio alpha / r.

    The ratio stays, as it is what a step of the optimizer is multiplied with: with a fixed alpha a large rank would train
    with a smaller step, and rank and step could not be separated. The learning rate is searched for each rank all the same.
    """

    title = "Fidelity by rank, and shared subspaces"

    def ranks(self, setup: Setup) -> tuple[int, ...]:
        return _QUICK if setup.quick else _RANKS

    def variants(self, setup: Setup) -> Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]:
        ratio = setup.config.lora.alpha / setup.config.lora.r
        plain = {"method": "lora", "lora.rank_pattern": {}, "lora.alpha_pattern": {}}
        return {
            f"r={rank}": (plain | {"lora.r": rank, "lora.alpha": ratio * rank}, (1 / 3, 1, 3))
            for rank in self.ranks(setup)
        }

    def claims(self, setup: Setup) -> list[Claim]:
        small, middle, large = _roles(setup)
        return [
            Claim(
                f"A very small rank is enough: r = {small} is about as good as r = {large}.",
                f"Gain over the base at r = {small} minus 0.9 of that at r = {large}, paired by seed and layout: held if "
                "the 95 % interval is above 0, did not hold if it is below 0.",
                partial(_enough, small, large),
            ),
            Claim(
                f"The top direction of the update is the same at r = {middle} and r = {large}.",
                "phi(1, 1) of the updates B A (input side) of one seed, over modules and seeds: held if the 95 % interval is "
                "above 0.5, did not hold if it is below 0.5.",
                partial(_same_top, setup),
            ),
            Claim(
                f"Two seeds learn the same directions at r = {large}, more than random subspaces share.",
                f"phi(k, k) at k = {middle} of the updates B A of every two seeds minus that of Gaussian matrices, over "
                "modules and pairs: held if the 95 % interval is above 0, did not hold if it is below 0. Needs two seeds.",
                partial(_shared_by_seeds, setup, middle - 1),
            ),
        ]

    @override
    def extra(self, setup: Setup, table: Table) -> dict[str, Any]:
        kinds: tuple[Which, ...] = ("BA", "A")
        return {
            "similarity": {
                which: {name: np.round(phi.mean((0, 1)), 4).tolist() for name, phi in _maps(setup, which).items()}
                for which in kinds
            }
        }

    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        maps = extra["similarity"]
        names = list(maps["BA"])
        half = len(names) // 2
        mosaic = [["ious"] * half + ["loss"] * half, *([f"{which} {name}" for name in names] for which in maps)]
        with figure(3.4 * len(names), 10, mosaic=mosaic) as (drawn, axes):
            places = dict(zip(self.variants(setup), self.ranks(setup), strict=True))
            curve(axes["ious"], table, places, "ious", "rank r")
            curve(axes["loss"], table, places, "loss", "rank r")
            for which, text in (("BA", "update B A"), ("A", "A alone, as in the paper")):
                for name in names:
                    heat_map(axes[f"{which} {name}"], np.array(maps[which][name]), f"{text}\n{name}")
            save(drawn, self.title, path)


def _roles(setup: Setup) -> tuple[int, int, int]:
    """The small rank of the first claim, the middle one of the second, the largest."""
    return (_QUICK[0], _QUICK[0], _QUICK[-1]) if setup.quick else (_SMALL, _MIDDLE, _RANKS[-1])


def _maps(setup: Setup, which: Which) -> dict[str, Array]:
    """Similarities (pairs, modules, i, j) by what is compared, each followed by that of random subspaces."""
    _, middle, large = _roles(setup)
    smaller, larger = (
        [
            adapter_directions(setup.out / "runs" / Arm(f"r={rank}", seed).folder / "adapter", which)
            for seed in setup.seeds
        ]
        for rank in (middle, large)
    )
    one_seed, same_rank = list(zip(smaller, larger, strict=True)), list(zip(larger, larger, strict=True))
    maps = {
        f"r={middle} and r={large}": compare(one_seed),
        f"Gaussian, {middle} and {large}": compare(random_pairs(one_seed)),
    }
    if len(setup.seeds) > 1:
        maps[f"two seeds, r={large}"] = compare(combinations(larger, 2))
        maps[f"Gaussian, {large} and {large}"] = compare(random_pairs(same_rank))
    return {name: phi.numpy() for name, phi in maps.items()}


def _enough(small: int, large: int, table: Table) -> tuple[Verdict, dict[str, Any]]:
    less, most = table.gains(f"r={small}", table.main), table.gains(f"r={large}", table.main)
    assert less is not None
    assert most is not None
    margin = mean_interval(less - 0.9 * most)
    return above(margin, 0), {
        "measure": MEASURES[table.main],
        "gain_small": mean_interval(less),
        "gain_large": mean_interval(most),
        "small_minus_0.9_large": margin,
    }


def _same_top(setup: Setup, _table: Table) -> tuple[Verdict, dict[str, Any]]:
    phi, random, *_ = (values[:, :, 0, 0] for values in _maps(setup, "BA").values())
    first = mean_interval(phi)
    return above(first, 0.5), {"phi_1_1": first, "gaussian": float(random.mean())}


def _shared_by_seeds(setup: Setup, k: int, _table: Table) -> tuple[Verdict, dict[str, Any]]:
    if len(setup.seeds) < 2:
        return "undecided", {}
    _, _, phi, random = (values[:, :, k, k] for values in _maps(setup, "BA").values())
    more = mean_interval(phi - random.mean(0))  # by module
    return above(more, 0), {"phi_k_k": mean_interval(phi), "gaussian": float(random.mean(0).mean()), "difference": more}
