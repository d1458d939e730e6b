"""`study rank`: fidelity by rank, and what the subspaces of adapters have in common (LoRA paper, sections 7.2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmdit_lora.analysis.studies import similarity as sim
from mmdit_lora.analysis.studies.plots import Canvas
from mmdit_lora.analysis.studies.setup import Arm, Claim, Scan, Setup, scaled
from mmdit_lora.analysis.studies.statistics import above
from mmdit_lora.analysis.studies.table import BASE, Decided, Table, measure_name
from mmdit_lora.evaluation.intervals import mean_interval

_RANKS, _SMALL, _MIDDLE = (1, 2, 4, 8, 16, 64), 4, 8
_QUICK = (2, 4)


class RankStudy:
    """Every rank at the config's targets and its ratio alpha / r.

    The ratio stays, as it is what a step of the optimizer is multiplied with: with a fixed alpha a large rank would train
    with a smaller step, and rank and step could not be told apart. The learning rate is searched for each rank all the same.
    """

    title = "Fidelity by rank, and shared subspaces"

    def ranks(self, setup: Setup) -> tuple[int, ...]:
        return _QUICK if setup.quick else _RANKS

    def _roles(self, setup: Setup) -> tuple[int, int, int]:
        """The small rank of the first claim, the middle one of the second, the largest."""
        ranks = self.ranks(setup)
        return (ranks[0], ranks[0], ranks[-1]) if setup.quick else (_SMALL, _MIDDLE, ranks[-1])

    def _changes(self, setup: Setup, rank: int) -> dict[str, Any]:
        ratio = setup.config.lora.alpha / setup.config.lora.r
        return {
            "method": "lora",
            "lora.r": rank,
            "lora.alpha": ratio * rank,
            "lora.rank_pattern": {},
            "lora.alpha_pattern": {},
        }

    def claims(self, setup: Setup) -> list[Claim]:
        small, middle, large = self._roles(setup)
        return [
            Claim(
                f"A very small rank is enough: r = {small} is about as good as r = {large}.",
                f"Gain over the base at r = {small} minus 0.9 of that at r = {large}, paired by seed and layout: held if "
                "the 95 % interval is above 0, did not hold if it is below 0.",
            ),
            Claim(
                f"The top direction of the update is the same at r = {middle} and r = {large}.",
                "phi(1, 1) of the updates B A (input side) of one seed, over modules and seeds: held if the 95 % interval is "
                "above 0.5, did not hold if it is below 0.5.",
            ),
            Claim(
                f"Two seeds learn the same directions at r = {large}, more than random subspaces share.",
                f"phi(k, k) at k = {middle} of the updates B A of every two seeds minus that of Gaussian matrices, over "
                "modules and pairs: held if the 95 % interval is above 0, did not hold if it is below 0. Needs two seeds.",
            ),
        ]

    def scans(self, setup: Setup) -> list[Scan]:
        rates = scaled(setup.config.train.learning_rate, (1 / 3, 1, 3))
        return [Scan(f"r={rank}", rates, self._changes(setup, rank)) for rank in self.ranks(setup)]

    def arms(self, setup: Setup, rates: Mapping[str, float]) -> list[Arm]:
        return [
            Arm(BASE, 0, None),
            *(
                Arm(f"r={r}", seed, {**self._changes(setup, r), "train.learning_rate": rates[f"r={r}"]})
                for seed in setup.seeds
                for r in self.ranks(setup)
            ),
        ]

    def _maps(self, setup: Setup, which: sim.Which) -> dict[str, Any]:
        """Similarities (pairs, modules, i, j) by what is compared."""
        _, middle, large = self._roles(setup)

        def of(rank: int) -> list[dict[str, Any]]:
            folders = [setup.out / "runs" / Arm(f"r={rank}", seed).folder / "adapter" for seed in setup.seeds]
            return [sim.adapter_directions(folder, which) for folder in folders]

        smaller, larger = of(middle), of(large)
        maps = {
            f"r={middle} and r={large}": sim.between(smaller, larger),
            f"Gaussian, {middle} and {large}": sim.random_like(smaller, larger),
        }
        if len(setup.seeds) > 1:
            maps |= {
                f"two seeds, r={large}": sim.between_seeds(larger),
                f"Gaussian, {large} and {large}": sim.random_like(larger, larger),
            }
        return {name: value.numpy() for name, value in maps.items()}

    def conclude(self, setup: Setup, table: Table) -> tuple[list[Decided], dict[str, Any]]:
        small, middle, large = self._roles(setup)
        enough, top, seeds = self.claims(setup)
        less, most = table.gains(f"r={small}", table.main), table.gains(f"r={large}", table.main)
        assert less is not None
        assert most is not None
        margin = mean_interval(less - 0.9 * most)
        maps = self._maps(setup, "BA")
        names = list(maps)
        first = mean_interval(maps[names[0]][:, :, 0, 0])
        decided = [
            Decided(
                enough.text,
                enough.rule,
                above(margin, 0),
                {
                    "measure": measure_name(table.main),
                    "gain_small": mean_interval(less),
                    "gain_large": mean_interval(most),
                    "small_minus_0.9_large": margin,
                },
            ),
            Decided(
                top.text,
                top.rule,
                above(first, 0.5),
                {"phi_1_1": first, "gaussian": float(maps[names[1]][:, :, 0, 0].mean())},
            ),
        ]
        if len(names) > 2:
            k = middle - 1
            random = maps[names[3]][:, :, k, k].mean(0)  # by module
            more = mean_interval(maps[names[2]][:, :, k, k] - random)
            figures = {
                "phi_k_k": mean_interval(maps[names[2]][:, :, k, k]),
                "gaussian": float(random.mean()),
                "difference": more,
            }
            decided.append(Decided(seeds.text, seeds.rule, above(more, 0), figures))
        else:
            decided.append(Decided(seeds.text, seeds.rule, "undecided", {}))
        means = {
            which: {name: np.round(value.mean((0, 1)), 4).tolist() for name, value in self._maps(setup, which).items()}
            for which in ("BA", "A")
        }
        return decided, {"similarity": means}

    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        ranks = self.ranks(setup)
        maps = extra["similarity"]
        canvas = Canvas(self.title, rows=3, columns=len(maps["BA"]), size=(3.4, 3.2))
        half, settings = len(maps["BA"]) // 2, [f"r={r}" for r in ranks]
        canvas.curve(canvas.place(0, slice(0, half)), table, ranks, settings, "ious", "rank r (log scale)")
        canvas.curve(canvas.place(0, slice(half, None)), table, ranks, settings, "loss", "rank r (log scale)")
        for row, (which, text) in enumerate((("BA", "update B A"), ("A", "A alone, as in the paper")), start=1):
            for column, (name, values) in enumerate(maps[which].items()):
                canvas.heat(canvas.place(row, column), np.array(values), f"{text}\n{name}")
        canvas.save(path)
