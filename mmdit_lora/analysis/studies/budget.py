"""`study budget`: the same number of parameters spent on one kind of matrix at a high rank, or on several at low ranks.

LoRA paper (arXiv 2106.09685), section 7.1 and table 5: "it is preferable to adapt more weight matrices than adapting a
single type of weights with a larger rank".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from mmdit_lora.analysis.studies.plots import dots, save
from mmdit_lora.analysis.studies.setup import Claim, Setup, Study
from mmdit_lora.analysis.studies.statistics import Verdict
from mmdit_lora.analysis.studies.subspace import subspace_linears
from mmdit_lora.analysis.studies.table import MEASURES, Table
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.training.load_base import open_encoders
from mmdit_lora.visual.charts import figure

ONE, OTHER, BOTH, ATTENTION, ALL = "fc1", "fc2", "fc1 + fc2", "attention q, v", "all linears"
_ATTENTION = (".to_q", ".to_v", ".add_q_proj", ".add_v_proj")
TOLERANCE, _MARGIN = 0.02, 0.05


def groups(shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Ways to spend -> names of linears. `shapes`: those of the layout stream, (out, in) by name."""
    ways = {
        ONE: [name for name in shapes if name.endswith("layout_mlp.fc1")],
        OTHER: [name for name in shapes if name.endswith("layout_mlp.fc2")],
        BOTH: [name for name in shapes if name.endswith(("layout_mlp.fc1", "layout_mlp.fc2"))],
        ATTENTION: [name for name in shapes if ".layout_stream.attn." in name and name.endswith(_ATTENTION)],
        ALL: list(shapes),
    }
    return {way: names for way, names in ways.items() if names}


def spend(budget: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Ranks for these linears whose LoRA has `budget` parameters, to within `TOLERANCE`: all the same, or one more in some;
    where that is more than a small matrix can have, its full rank.

    Raises:
        InputError: a rank of 1 is too much already, the full ranks are too little, or the sum cannot be met.
    """
    costs = {name: sum(shape) for name, shape in shapes.items()}

    def at(level: int) -> dict[str, int]:
        return {name: min(level, *shapes[name]) for name in shapes}

    def cost(ranks: Mapping[str, int]) -> int:
        return sum(costs[name] * rank for name, rank in ranks.items())

    levels = range(1, max(min(shape) for shape in shapes.values()) + 1)
    level = max((level for level in levels if cost(at(level)) <= budget), default=0)
    ranks = at(level)
    left = budget - cost(ranks)
    # The cheapest first, which comes nearest; and spread over the depth, not filled up from the first block on.
    for name in sorted(costs, key=lambda name: (costs[name], name[::-1])):
        if ranks[name] < min(shapes[name]) and costs[name] <= 2 * left:
            ranks[name] += 1
            left -= costs[name]
    if level < 1 or abs(left) > TOLERANCE * budget:
        raise InputError(
            f"gives a budget of {budget:,} parameters, which {len(shapes)} linears cannot have: {budget - left:,} is nearest",
            location="lora.r",
            hint="give a smaller rank" if level == levels[-1] else "give a larger rank",
        )
    return ranks


class BudgetStudy(Study):
    """The budget is that of the config's rank on fc1 and fc2; the ratio alpha / r is the config's everywhere."""

    title = "The same number of parameters, spent in different places"

    def ways(self, setup: Setup) -> dict[str, dict[str, int]]:
        """Ways to spend -> rank of each linear."""
        model = open_encoders(setup.config, torch.float32, texts=False).transformer
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in subspace_linears(model).items()}
        ways = groups(shapes)
        if setup.quick:
            ways = {way: ways[way] for way in (ONE, BOTH)}
        budget = setup.config.lora.r * sum(sum(shapes[name]) for name in groups(shapes)[BOTH])
        return {way: spend(budget, {name: shapes[name] for name in names}) for way, names in ways.items()}

    def variants(self, setup: Setup) -> Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]:
        return {way: (changes(setup, ranks), (1 / 3, 1, 3)) for way, ranks in self.ways(setup).items()}

    def claims(self, setup: Setup) -> list[Claim]:
        rule = (
            "The paired difference by seed and layout: held if its 95 % interval is above 0; did not hold if it is not and its "
            f"upper end is below {_MARGIN:.0%} of the gain over the base; else undecided. The best single one is the one "
            "with the best mean, which favours it."
        )
        claims = [
            Claim(
                "A budget is better spread over fc1 and fc2 than spent on the better one of them alone.",
                rule,
                partial(_better_spread, BOTH, (ONE, OTHER)),
            ),
            Claim(
                "A budget is better spread over all linears of the stream than spent on the best single kind.",
                rule,
                partial(_better_spread, ALL, (ONE, OTHER, ATTENTION)),
            ),
        ]
        return claims[:1] if setup.quick else claims

    @override
    def extra(self, setup: Setup, table: Table) -> dict[str, Any]:
        return {"ranks": self.ways(setup)}

    @override
    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        labels = {}
        for way, ranks in extra["ranks"].items():
            low, high = min(ranks.values()), max(ranks.values())
            rank = f"{low}" if low == high else f"{low}-{high}"
            labels[way] = f"{way}\n{table.of(way)[0]['trainable_params']:,} parameters, r {rank}"
        with figure(10.4, 4.6, ncols=2, sharey=True) as (drawn, (ious, loss)):
            dots(ious, table, labels, "ious")
            dots(loss, table, labels, "loss")
            save(drawn, self.title, path)


def changes(setup: Setup, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Of the config, for LoRA with these ranks."""
    ratio, lowest = setup.config.lora.alpha / setup.config.lora.r, min(ranks.values())
    more = {name: rank for name, rank in ranks.items() if rank != lowest}
    return {
        "method": "lora",
        "lora.r": lowest,
        "lora.alpha": ratio * lowest,
        "lora.targets": list(ranks),
        "lora.rank_pattern": more,
        "lora.alpha_pattern": {name: ratio * rank for name, rank in more.items()},
    }


def _better_spread(spread: str, singles: tuple[str, ...], table: Table) -> tuple[Verdict, dict[str, Any]]:
    gains = {way: table.gains(way, table.main) for way in (spread, *singles) if way in table.settings}
    known = {way: value for way, value in gains.items() if value is not None}
    best = max((way for way in known if way != spread), key=lambda way: known[way].mean())
    difference, gain = mean_interval(known[spread] - known[best]), mean_interval(known[spread])
    result: Verdict = "undecided"
    if difference.low > 0:
        result = "held"
    elif difference.high < _MARGIN * gain.mean:
        result = "did not hold"
    return result, {
        "measure": MEASURES[table.main],
        "spread": spread,
        "best_single": best,
        "difference": difference,
        "gain_of_spread": gain,
    }
