"""What trains, by `method`: the adapter, the layout stream, everything, or what these are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
from torch import Tensor, nn

from mmdit_lora.config.loading import Config, LoraSection
from mmdit_lora.errors import InputError
from mmdit_lora.lora import add_layout_lora, refuse_zero_gates
from mmdit_lora.lora.dropout import use_sample_dropout
from mmdit_lora.lora.ia3 import add_ia3, fold_ia3
from mmdit_lora.lora.subspace import add_subspace, fold_subspace


@dataclass(frozen=True)
class TrainableReport:
    """What was set to train: one line for people, and the figures."""

    summary: str
    trainable_params: int
    total_params: int
    details: dict[str, Any]


def lora_config(section: LoraSection) -> peft.LoraConfig:
    """PEFT's config of our `lora` section."""
    return peft.LoraConfig(
        r=section.r,
        lora_alpha=section.alpha,  # PEFT computes with it and takes fractions
        lora_dropout=section.dropout,
        bias="none",
        target_modules=list(section.targets),
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        init_lora_weights="gaussian" if section.init == "gaussian" else True,
        use_rslora=section.rslora,
        use_dora=section.dora,
    )


def set_trainable(model: nn.Module, config: Config) -> TrainableReport:
    """Freeze and unfreeze `model` for `config.method`; the method lora adds the adapter "default".

    Raises:
        InputError: a target or part that does not exist; or the gates of the layout stream are zero, so that nothing would
            train.
    """
    total = sum(p.numel() for p in model.parameters())
    if config.method == "lora":
        report = add_layout_lora(model, lora_config(config.lora))
        refuse_zero_gates(report)
        transformer: Any = model
        transformer.sample_keys = use_sample_dropout(model)
        return TrainableReport(str(report), report.trainable_params, total, report.to_dict())
    if config.method in ("ia3", "subspace"):
        return _set_folded(model, config, total)
    parts = config.stream.parts if config.method == "layout_stream" else []
    for part in parts:
        if not any("layout" in name and part in name for name, _ in model.named_parameters()):
            raise InputError(f"{part!r} is in no name of the layout stream", location="stream.parts")
    for name, parameter in model.named_parameters():
        chosen = not parts or any(part in name for part in parts)
        parameter.requires_grad_(config.method == "full" or ("layout" in name and chosen))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "everything" if config.method == "full" else "the layout stream"
    what += f", of it {', '.join(parts)}," if parts else ""
    return TrainableReport(f"{what} trains: {trainable:,} of {total:,} parameters", trainable, total, {})


def fold(model: nn.Module) -> dict[str, Tensor]:
    """After training, write what moved frozen weights (factors, random directions) into them, and take it off.

    Returns:
        Name of parameter -> its new value, fp32. Empty for methods that train weights themselves or an adapter.
    """
    return fold_ia3(model) | fold_subspace(model)


def _set_folded(model: nn.Module, config: Config, total: int) -> TrainableReport:
    if config.method == "ia3":
        details = add_ia3(model, config.lora.targets)
        what = f"a factor for each output or input of {details['linears']} linears trains"
    else:
        chosen = config.subspace
        seed = config.train.seed if chosen.seed is None else chosen.seed
        details = add_subspace(model, chosen.dimension, structured=chosen.structured, seed=seed)
        what = f"{chosen.dimension:,} numbers move {details['weights']:,} weights"
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainableReport(f"{what}: {trainable:,} of {total:,} parameters", trainable, total, {})


def refuse_frozen(model: nn.Module, report: TrainableReport) -> None:
    """Stop where something froze what was set to train, or unfroze more, before an optimizer is made of it.

    Raises:
        InputError: the parameters that require a gradient are not those of the report.
    """
    now = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    adapter = set(report.details.get("targets", ()))
    strange = [name for name in now if adapter and "lora_" not in name]
    if sum(now.values()) == report.trainable_params and not strange:
        return
    hint = "freeze the base first and add the adapter after it: what is frozen later takes the adapter with it"
    if not now:
        raise InputError("everything is frozen: nothing would train", location="targets", hint=hint)
    raise InputError(
        f"{sum(now.values()):,} parameters would train, not the {report.trainable_params:,} that were set to"
        + (f", among them {strange[0]}" if strange else ""),
        location="targets",
        hint=hint,
    )
