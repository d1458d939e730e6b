"""`resize`: the same adapter at a smaller rank, the best one in the Frobenius norm (Eckart and Young, 1936)."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import peft
import torch

from mmdit_lora import __version__
from mmdit_lora.analysis.spectrum import rank_holding
from mmdit_lora.analysis.updates import ADAPTER, Update, open_adapter, updates
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.files import public_name
from mmdit_lora.lora import (
    CARD,
    CONFIG_FILE,
    DIFFUSERS_FILE,
    WEIGHTS_FILE,
    describe_lora,
    lora_state_dict,
    read_card,
    remove_adapter,
    save_adapter,
)
from mmdit_lora.lora.inject import inject
from mmdit_lora.outputs import MARKER, check_new_folder
from mmdit_lora.pipelines import SamplingConfig
from mmdit_lora.visual.pages import code_markdown

_SECTION = re.compile(r"\n## Resized\n.*?(?=\n## |\Z)", re.DOTALL)


@dataclass(frozen=True)
class ResizedModule:
    """One linear: `rank` to `new_rank`, and `error` ||dW - dW'||_F / ||dW||_F of the update as it is applied (0 of a zero one)."""

    name: str
    rank: int
    new_rank: int
    error: float


@dataclass(frozen=True)
class Resized:
    """What `resize` did.

    Args:
        error: sqrt(sum ||dW - dW'||_F^2 / sum ||dW||_F^2) over the linears.
        parameters, new_parameters: numbers in the adapter.
        fidelity: `base`, `before` and `after`, where a data set was given.
    """

    adapter: str
    out: str
    base: str
    modules: list[ResizedModule]
    error: float
    parameters: int
    new_parameters: int
    fidelity: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def resize_adapter(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | None = None,
    stream: str | Path | None = None,
    records: Sequence[Record] | None = None,
    settings: SamplingConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    on_progress: Callable[[str, int], None] | None = None,
) -> Resized:
    """Write the adapter with fewer ranks to `out`, a PEFT folder, all or nothing.

    The scale alpha / r (alpha / sqrt(r), if rank-stabilised) of each linear stays, so alpha falls with the rank; B and A are
    balanced, B' = U sqrt(S / scale), A' = sqrt(S / scale) V^T. DoRA keeps its magnitudes: they are the norms of the rows,
    whatever their direction.

    Args:
        rank: of every linear; those stored at less keep theirs. Or
        energy: in (0, 1]: each linear gets the smallest rank that holds this share of its sum of squared singular values.
        base: folder or hub id; None = the one that the adapter names.
        stream: folder of a generic layout stream; None = the one that the adapter names, if any.
        records: a data set on which fidelity is measured before and after.
        settings, seed, on_progress: of that, see `mmdit_lora.evaluation.evaluate.evaluate`; the progress names "before" and "after".

    Raises:
        InputError: it is no adapter or of another base; every linear is stored at less than `rank`; `out` is the adapter
            itself or no adapter folder; the exact reader does not know the phrases of `records`.
    """
    adapter, out = Path(adapter), Path(out)
    if (rank is None) == (energy is None):
        raise InputError("give a rank or an energy" if rank is None else "a rank and an energy are given")
    check_new_folder(out, verb="resize", inputs={"adapter": adapter, "base": base, "stream": stream})
    opened = open_adapter(adapter, base=base, stream=stream, dtype=dtype, to_sample=records is not None)
    model = opened.pipe.transformer
    model.peft_config[ADAPTER].base_model_name_or_path = None  # PEFT would look for that base, on the hub too
    before = list(opened.updates())
    largest = max(update.rank for update in before)
    if rank is not None and rank > largest:
        raise InputError(
            f"is {rank}, and {adapter} is stored at rank {largest}: a larger rank would hold nothing more",
            location="--rank",
            hint=f"give a rank below {largest}",
        )
    after = [_smaller(update, rank, energy) for update in before]

    def fidelity(condition: str) -> dict[str, dict[str, float]]:
        def progress(name: str, done: int) -> None:
            if on_progress is not None:
                on_progress(condition if name == "adapter" else name, done)

        opened.pipe.to(device)
        result = evaluate(
            opened.pipe, records or (), settings or SamplingConfig(), seed=seed, on_progress=progress
        ).conditions
        opened.pipe.to("cpu")
        return {"base": dict(result["base"].fidelity), condition: dict(result["adapter"].fidelity)}

    figures = None if records is None else fidelity("before")
    config = _config(opened.config, before, after)
    state = lora_state_dict(model) | {
        f"{update.name}.lora_{side}.weight": value
        for update in after
        for side, value in (("A", update.down), ("B", update.up))
    }
    remove_adapter(model, ADAPTER)
    # A data-driven initialisation would ask for its data; the weights are replaced at once.
    plain = copy.deepcopy(config)
    plain.init_lora_weights, plain.inference_mode = True, True
    inject(model, plain, ADAPTER)
    outcome: Any = peft.set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
    if outcome.unexpected_keys:
        raise RuntimeError(f"PEFT did not take {', '.join(outcome.unexpected_keys[:8])}")
    model.peft_config[ADAPTER] = config  # as it is saved
    applied = list(updates(model))  # by PEFT's own scales, so that a wrong alpha shows as an error
    norms = [update.directions()[0] for update in before]
    errors = [old.difference(new) for old, new in zip(before, applied, strict=True)]
    if figures is not None:
        figures["after"] = fidelity("after")["after"]
    report = Resized(
        adapter=str(adapter),
        out=str(out),
        base=opened.base,
        modules=[
            ResizedModule(old.name, old.rank, new.rank, error / norm if norm else 0.0)
            for old, new, error, norm in zip(before, applied, errors, norms, strict=True)
        ],
        error=math.hypot(*errors) / math.hypot(*norms) if any(norms) else 0.0,
        parameters=sum(update.up.numel() + update.down.numel() for update in before),
        new_parameters=sum(update.up.numel() + update.down.numel() for update in applied),
        fidelity=figures,
    )
    how = f"rank {rank}" if rank is not None else f"{energy:.4g} of the energy"
    stored = opened.config
    resized = {"by": how, "error": report.error, "r": stored.r, "alpha": stored.lora_alpha, "version": __version__}
    if figures is not None:
        resized["fidelity"] = figures
    now = {"lora": describe_lora(config), "r": config.r, "alpha": config.lora_alpha, "resized": resized}
    save_adapter(
        model,
        out,
        metadata={"base": opened.base} | opened.header | now,
        card=_card(adapter, report, how),
        beside={
            file.name: file.read_bytes()
            for file in (sorted(adapter.iterdir()) if adapter.is_dir() else ())
            if file.is_file() and file.name not in (CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE, CARD, MARKER)
        },
        verb="resize",
    )
    return report


def _smaller(update: Update, rank: int | None, energy: float | None) -> Update:
    low = update.low_rank()
    rank = max(1, rank_holding(low.values, energy or 1.0)) if rank is None else min(rank, update.rank)
    low = low.first(rank)
    # A width below the rank has fewer directions than ranks: the rest are zeros.
    root = (low.values / abs(update.scale)).sqrt() if update.scale else 0 * low.values
    up = torch.zeros(update.up.shape[0], rank, dtype=torch.float64)
    down = torch.zeros(rank, update.down.shape[1], dtype=torch.float64)
    up[:, : len(root)] = low.left * root * (1 if update.scale > 0 else -1)
    down[: len(root)] = (low.right * root).T
    return replace(update, up=up.float(), down=down.float())


def _config(config: peft.LoraConfig, before: Sequence[Update], after: Sequence[Update]) -> peft.LoraConfig:
    """The config with ranks and alphas by linear: the commonest ones for all, the others in the patterns, by full name."""
    new = copy.deepcopy(config)
    new.base_model_name_or_path = None  # `save_adapter` writes it
    ranks = {update.name: update.rank for update in after}
    factor = {update.name: (update.rank**0.5 if config.use_rslora else update.rank) for update in after}
    alphas = {update.name: _without_rounding(update.scale * factor[update.name]) for update in before}
    new.r = Counter(ranks.values()).most_common(1)[0][0]
    new.lora_alpha = cast(int, Counter(alphas.values()).most_common(1)[0][0])  # PEFT takes fractions
    new.rank_pattern = {_exact(name, ranks): rank for name, rank in ranks.items() if rank != new.r}
    new.alpha_pattern = {
        _exact(name, alphas): cast(int, value) for name, value in alphas.items() if value != new.lora_alpha
    }
    return new


def _exact(name: str, names: Iterable[str]) -> str:
    """A name as a pattern. PEFT matches at the end of names, behind a dot: one that ends another's is held to the start."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in names) else name


def _without_rounding(value: float) -> float:
    """8 for 8.000000000000002, which a scale of alpha / r gives back."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-12 * max(abs(value), 1) else value


def _card(adapter: Path, report: Resized, how: str) -> str:
    """The adapter's card with a section about the resizing, in the place of an earlier one."""
    text = read_card(adapter)
    if text is None:
        text = f"# Layout LoRA for {code_markdown(public_name(report.base))}\n"
    old, new = ([module.rank for module in report.modules], [module.new_rank for module in report.modules])
    section = (
        "\n## Resized\n\n"
        f"From rank {_range(old)} to {_range(new)}, by {how}: {report.parameters:,} to "
        f"{report.new_parameters:,} parameters; relative error of the update {report.error:.2e}. What else stands here about rank, "
        "alpha, parameters and figures is of the adapter before.\n"
    )
    if report.fidelity is not None:
        section += "".join(
            f"\n{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in side.items()) + "\n"
            for name, side in report.fidelity.items()
        )
    return _SECTION.sub("", text).rstrip("\n") + "\n" + section


def _range(ranks: Sequence[int]) -> str:
    return f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
