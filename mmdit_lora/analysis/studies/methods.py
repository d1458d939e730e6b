"""`study methods`: LoRA beside DoRA, (IA)^3, the layout MLPs, the whole layout stream and full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from mmdit_lora.analysis.studies.ia3 import ia3
from mmdit_lora.analysis.studies.plots import dots, save
from mmdit_lora.analysis.studies.setup import Claim, Setup, Study
from mmdit_lora.analysis.studies.statistics import Array, Verdict, above
from mmdit_lora.analysis.studies.table import MEASURES, Measure, Table
from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.visual.charts import figure

LORA, FULL = "LoRA", "full fine-tuning"
_USUAL, _LOWER = (
    (1 / 3, 1, 3),
    (0.04, 0.12, 0.36),
)  # the config's rate is one for LoRA: whole weights want a far smaller one
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    LORA: ({"method": "lora", "lora.dora": False}, _USUAL),
    "DoRA": ({"method": "lora", "lora.dora": True}, _USUAL),
    "(IA)^3": ({"method": ia3()}, (1, 3, 9)),
    "layout MLPs": ({"method": "layout_stream", "stream.parts": ["layout_mlp."]}, _LOWER),
    "layout stream": ({"method": "layout_stream", "stream.parts": []}, _LOWER),
    FULL: ({"method": "full"}, _LOWER),
}
_SHARE = 0.9


class MethodsStudy(Study):
    """Each method on the same data, steps and batches, at the best learning rate of its own scan."""

    title = "Methods of adaptation"

    def variants(self, setup: Setup) -> Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]:
        return {name: METHODS[name] for name in (LORA, FULL)} if setup.quick else METHODS

    def claims(self, setup: Setup) -> list[Claim]:
        good = Claim(
            "LoRA is about as good as full fine-tuning in the new domain.",
            f"Gain over the base by LoRA minus {_SHARE} of that by full fine-tuning, paired by seed and layout: held if "
            "the 95 % interval is above 0, did not hold if it is below 0.",
            _as_good,
        )
        forgets = Claim(
            "LoRA forgets less of the old domain than full fine-tuning.",
            "Mean IoU of old layouts (where they cannot be read: minus the loss) by LoRA minus that by full "
            "fine-tuning, paired by seed and layout: held if the 95 % interval is above 0, did not hold if it is "
            "below 0.",
            _forgets_less,
        )
        return [good] if setup.old is None else [good, forgets]

    @override
    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        labels = {name: f"{name}\n{table.of(name)[0]['trainable_params']:,}" for name in self.variants(setup)}
        measures: list[Measure] = ["ious", *([table.old] if table.old else []), "loss"]
        with figure(4.4 * len(measures), 5, ncols=len(measures), sharey=True) as (drawn, axes):
            for panel, measure in zip(axes, measures, strict=True):
                dots(panel, table, labels, measure)
            save(drawn, f"{self.title} (numbers: parameters that train)", path)


def _gains(table: Table, measure: Measure) -> tuple[Array, Array]:
    by_lora, by_full = table.gains(LORA, measure), table.gains(FULL, measure)
    assert by_lora is not None
    assert by_full is not None
    return by_lora, by_full


def _as_good(table: Table) -> tuple[Verdict, dict[str, Any]]:
    by_lora, by_full = _gains(table, table.main)
    margin = mean_interval(by_lora - _SHARE * by_full)
    return above(margin, 0), {
        "measure": MEASURES[table.main],
        "gain_lora": mean_interval(by_lora),
        "gain_full": mean_interval(by_full),
        f"lora_minus_{_SHARE}_full": margin,
    }


def _forgets_less(table: Table) -> tuple[Verdict, dict[str, Any]]:
    assert table.old is not None
    by_lora, by_full = _gains(table, table.old)
    less = mean_interval(by_lora - by_full)
    return above(less, 0), {
        "measure": MEASURES[table.old],
        "change_lora": mean_interval(by_lora),
        "change_full": mean_interval(by_full),
        "difference": less,
    }
