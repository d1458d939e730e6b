"""What a study is asked for, the runs that it is made of, and the claims that it decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_lora.analysis.studies.statistics import Verdict
from mmdit_lora.config.loading import Config
from mmdit_lora.training.trainable import FoldedMethod

if TYPE_CHECKING:
    from mmdit_lora.analysis.studies.table import Table

BASE = "base"  # the setting without any training
QUICK_IMAGES = 4


@dataclass(frozen=True)
class Setup:
    """A study as it was asked for.

    Args:
        config: an ordinary training config; every run is a variation of it.
        seeds: one run a setting for each.
        images: the number of held-out layouts that are sampled for fidelity, the first ones.
        quick: two settings and a few steps, to see that all works.
        old: data set of the base's old domain, where forgetting is measured; None = not measured.
        bases: for the intrinsic dimension, from small to large; empty = that of the config.
    """

    name: str
    config: Config
    out: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 64
    quick: bool = False
    old: str | None = None
    bases: tuple[str, ...] = ()

    @property
    def scan_seed(self) -> int:
        """Of the learning-rate scans: none of the study's own, so that what is reported was not chosen on its draws."""
        return max(self.seeds) + 1

    def to_dict(self) -> dict[str, Any]:
        """All that the results depend on."""
        config = self.config.model_dump(mode="json")
        del config["output_dir"]
        return {
            "study": self.name,
            "config": config,
            "seeds": list(self.seeds),
            "images": self.images,
            "quick": self.quick,
            "old": self.old,
            "bases": list(self.bases),
        }


@dataclass(frozen=True)
class Arm:
    """One run of a study.

    Args:
        setting: what it stands for in tables; together with the seed it is unique.
        changes: dotted key of the config -> value; "method" may be a `FoldedMethod`. None = nothing is trained: the base itself.
        base: instead of the config's. trial: of a scan: nothing is sampled, and it may diverge.
    """

    setting: str
    seed: int
    changes: Mapping[str, Any] | None = field(hash=False, default_factory=dict)
    base: str | None = None
    trial: bool = False

    @property
    def folded(self) -> FoldedMethod | None:
        """The method of training where the config has none of that name."""
        method = (self.changes or {}).get("method")
        return method if isinstance(method, FoldedMethod) else None

    @property
    def folder(self) -> str:
        """A name of it for files."""
        plain = "".join(c if c.isalnum() or c in "=.-" else "_" for c in self.setting)
        return f"{plain}_seed{self.seed}"

    def config(self, setup: Setup) -> Config:
        """Of its training: images and validation come at the end, and what is encoded is shared by all runs."""
        values = setup.config.model_dump(mode="json")
        steps = setup.config.train.max_steps
        changes = {
            "output_dir": str(setup.out / "runs" / self.folder),
            "data.cache": setup.config.data.cache or str(setup.out / "cache"),
            "train.seed": self.seed,
            "train.sample_every": 0,
            "train.validate_every": 0,
            "train.checkpoint_every": max(1, -(-steps // 3)),
            "train.keep_checkpoints": 1,
            "train.early_stop": 0,
            "train.final": "last",
            "train.preflight": False,
            "tracking.tracker": "none",
            **({} if self.base is None else {"base": self.base}),
            **(self.changes or {}),
            **({} if self.folded is None else {"method": "layout_stream", "stream.parts": []}),
        }
        for key, value in changes.items():
            *above, last = key.split(".")
            place = values
            for part in above:
                place = place[part]
            place[last] = value
        return Config.model_validate(values)


@dataclass(frozen=True)
class Scan:
    """Learning rates to try for a kind of run before the study itself, a third of the steps each, on a seed of its own.

    Args:
        kind: name of what the rate is for. rates: rising. changes, base: see `Arm`.
    """

    kind: str
    rates: Sequence[float]
    changes: Mapping[str, Any]
    base: str | None = None

    def arm(self, setup: Setup, rate: float) -> Arm:
        changes = {
            **self.changes,
            "train.learning_rate": rate,
            "train.max_steps": max(1, setup.config.train.max_steps // 3),
        }
        return Arm(f"scan {self.kind} {rate:.2g}", setup.scan_seed, changes, self.base, trial=True)


@dataclass(frozen=True)
class Claim:
    """A claim, and the rule by which it is decided; both are written before the first run.

    Args:
        decide: applies the rule to the runs: the verdict, and the figures that it was read from.
    """

    text: str
    rule: str
    decide: Callable[[Table], tuple[Verdict, dict[str, Any]]]


@dataclass(frozen=True)
class Decided:
    """A claim, decided."""

    text: str
    rule: str
    result: Verdict
    figures: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"claim": self.text, "result": self.result, "rule": self.rule, "figures": self.figures}


class Study:
    """What a study compares, and how that is judged and drawn."""

    title: str

    def variants(self, setup: Setup) -> Mapping[str, tuple[Mapping[str, Any], Sequence[float]]]:
        """Setting -> changes of the config, and factors of its learning rate to try."""
        raise NotImplementedError

    def claims(self, setup: Setup) -> list[Claim]:
        raise NotImplementedError

    def draw(self, setup: Setup, table: Table, extra: dict[str, Any], path: Path) -> None:
        """Write the plot. `extra`: what `extra` gave."""
        raise NotImplementedError

    def extra(self, setup: Setup, table: Table) -> dict[str, Any]:
        """What else goes into `study.json`."""
        del setup, table
        return {}

    def scans(self, setup: Setup) -> list[Scan]:
        rate = setup.config.train.learning_rate
        return [Scan(name, scaled(rate, factors), changes) for name, (changes, factors) in self.variants(setup).items()]

    def arms(self, setup: Setup, rates: Mapping[str, float]) -> list[Arm]:
        """All runs. `rates`: of each scan."""
        variants = self.variants(setup)
        return [Arm(BASE, 0, None)] + [
            Arm(name, seed, {**changes, "train.learning_rate": rates[name]})
            for seed in setup.seeds
            for name, (changes, _) in variants.items()
        ]

    def conclude(self, setup: Setup, table: Table) -> tuple[list[Decided], dict[str, Any]]:
        """The claims, decided, and `extra`."""
        decided = [Decided(claim.text, claim.rule, *claim.decide(table)) for claim in self.claims(setup)]
        return decided, self.extra(setup, table)


def scaled(rate: float, factors: Sequence[float]) -> list[float]:
    """Rates to try around the config's."""
    return [float(f"{rate * factor:.3g}") for factor in factors]
