"""`study methods`: LoRA beside DoRA, (IA)^3, the layout MLPs, the whole layout stream and full fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdit_lora.analysis.studies.ia3 import ia3
from mmdit_lora.analysis.studies.plots import Canvas
from mmdit_lora.analysis.studies.setup import Arm, Claim, Scan, Setup, scaled
from mmdit_lora.analysis.studies.statistics import above
from mmdit_lora.analysis.studies.table import BASE, Decided, Table, measure_name
from mmdit_lora.evaluation.intervals import mean_interval

LORA, FULL = "LoRA", "full fine-tuning"
# Changes of the config, and factors of its learning rate, which is one for LoRA: whole weights want a far smaller one.
METHODS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    LORA: ({"method": "lora", "lora.dora": False}, (1 / 3, 1, 3)),
    "DoRA": ({"method": "lora", "lora.dora": True}, (1 / 3, 1, 3)),
    "(IA)^3": ({"method": ia3()}, (1, 3, 9)),
    "layout MLPs": ({"method": "layout_stream", "stream.parts": ["layout_mlp."]}, (0.04, 0.12, 0.36)),
    "layout stream": ({"method": "layout_stream", "stream.parts": []}, (0.04, 0.12, 0.36)),
    FULL: ({"method": "full"}, (0.04, 0.12, 0.36)),
}
_SHARE = 0.9


class MethodsStudy:
    """Each method on the same data, steps and batches, at the best learning rate of its own scan."""

    title = "Methods of adaptation"

    def methods(self, setup: Setup) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
        return {name: METHODS[name] for name in (LORA, FULL)} if setup.quick else METHODS

    def claims(self, setup: Setup) -> list[Claim]:
        claims = [
            Claim(
                "LoRA is about as good as full fine-tuning in the new domain.",
                f"Gain over the base by LoRA minus {_SHARE} of that by full fine-tuning, paired by seed and layout: held if "
                "the 95 % interval is above 0, did not hold if it is below 0.",
            )
        ]
        if setup.old is not None:
            claims.append(
                Claim(
                    "LoRA forgets less of the old domain than full fine-tuning.",
                    "Mean IoU of old layouts (where they cannot be read: minus the loss) by LoRA minus that by full "
                    "fine-tuning, paired by seed and layout: held if the 95 % interval is above 0, did not hold if it is "
                    "below 0.",
                )
            )
        return claims

    def scans(self, setup: Setup) -> list[Scan]:
        rate = setup.config.train.learning_rate
        return [Scan(name, scaled(rate, factors), changes) for name, (changes, factors) in self.methods(setup).items()]

    def arms(self, setup: Setup, rates: Mapping[str, float]) -> list[Arm]:
        return [
            Arm(BASE, 0, None),
            *(
                Arm(name, seed, {**changes, "train.learning_rate": rates[name]})
                for seed in setup.seeds
                for name, (changes, _) in self.methods(setup).items()
            ),
        ]

    def conclude(self, setup: Setup, table: Table) -> tuple[list[Decided], dict[str, Any]]:
        claims = self.claims(setup)
        lora, full = table.gains(LORA, table.main), table.gains(FULL, table.main)
        assert lora is not None
        assert full is not None
        margin = mean_interval(lora - _SHARE * full)
        decided = [
            Decided(
                claims[0].text,
                claims[0].rule,
                above(margin, 0),
                {
                    "measure": measure_name(table.main),
                    "gain_lora": mean_interval(lora),
                    "gain_full": mean_interval(full),
                    f"lora_minus_{_SHARE}_full": margin,
                },
            )
        ]
        if table.old is not None:
            by_lora, by_full = table.gains(LORA, table.old), table.gains(FULL, table.old)
            assert by_lora is not None
            assert by_full is not None
            less = mean_interval(by_lora - by_full)
            figures = {
                "measure": measure_name(table.old),
                "change_lora": mean_interval(by_lora),
                "change_full": mean_interval(by_full),
                "difference": less,
            }
            decided.append(Decided(claims[1].text, claims[1].rule, above(less, 0), figures))
        return decided, {}

    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        del extra
        labels = {name: f"{name}\n{table.of(name)[0]['trainable_params']:,}" for name in self.methods(setup)}
        measures = ["ious", *([table.old] if table.old else []), "loss"]
        canvas = Canvas(
            f"{self.title} (numbers: parameters that train)", rows=1, columns=len(measures), size=(4.4, 4.6)
        )
        for column, measure in enumerate(measures):
            canvas.dots(canvas.place(0, column), table, labels, measure)
        canvas.save(path)
