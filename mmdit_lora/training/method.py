"""What trains, by `method`: the adapter, the layout stream, or everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
from torch import nn

from mmdit_lora.config import Config, LoraSection
from mmdit_lora.errors import InputError
from mmdit_lora.lora import add_layout_lora, refuse_zero_gates
from mmdit_lora.lora.dropout import use_sample_dropout


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
        InputError: a target that does not exist; or the gates of the layout stream are zero, so that nothing would train.
    """
    total = sum(p.numel() for p in model.parameters())
    if config.method == "lora":
        report = add_layout_lora(model, lora_config(config.lora))
        refuse_zero_gates(report)
        transformer: Any = model
        transformer.sample_keys = use_sample_dropout(model)
        return TrainableReport(str(report), report.trainable_params, total, report.to_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.method == "full" or "layout" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    what = "everything" if config.method == "full" else "the layout stream"
    return TrainableReport(f"{what} trains: {trainable:,} of {total:,} parameters", trainable, total, {})


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
    cure = "freeze the base first and add the adapter after it: what is frozen later takes the adapter with it"
    if not now:
        raise InputError("everything is frozen: nothing would train", where="targets", cure=cure)
    raise InputError(
        f"{sum(now.values()):,} parameters would train, not the {report.trainable_params:,} that were set to"
        + (f", among them {strange[0]}" if strange else ""),
        where="targets",
        cure=cure,
    )
