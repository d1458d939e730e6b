"""What trains, by `method`: the adapter, the layout stream, or everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
from torch import Tensor, nn

from mmdit_lora.config.loading import Config, LoraSection
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


@dataclass(frozen=True)
class FoldedMethod:
    """A method that no config names, which moves frozen weights by parameters of its own: studies compare with such.

    Args:
        name: for the report.
        add: freezes the model, adds the parameters that train, and returns one line that says what they are.
        fold: writes what moved into the plain weights and takes the parameters off; name of parameter -> its new value, fp32.
    """

    name: str
    add: Callable[[nn.Module, Config], str]
    fold: Callable[[nn.Module], dict[str, Tensor]]


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


def set_trainable(model: nn.Module, config: Config, method: FoldedMethod | None = None) -> TrainableReport:
    """Freeze and unfreeze `model` for `config.method`; the method lora adds the adapter "default".

    Args:
        method: instead of the config's.

    Raises:
        InputError: a target or part that does not exist; or the gates of the layout stream are zero, so that nothing would
            train.
    """
    total = sum(p.numel() for p in model.parameters())
    if method is None and config.method == "lora":
        report = add_layout_lora(model, lora_config(config.lora))
        refuse_zero_gates(report)
        transformer: Any = model
        transformer.sample_keys = use_sample_dropout(model)
        return TrainableReport(str(report), report.trainable_params, total, report.to_dict())
    if method is not None:
        what = method.add(model, config)
    else:
        parts = config.stream.parts if config.method == "layout_stream" else []
        stream = [name for name, _ in model.named_parameters() if "layout" in name]
        if unknown := [part for part in parts if not any(part in name for name in stream)]:
            raise InputError(f"{unknown[0]!r} is in no name of the layout stream", location="stream.parts")
        chosen = {name for name in stream if not parts or any(part in name for part in parts)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(config.method == "full" or name in chosen)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        what = "everything trains" if config.method == "full" else "the layout stream trains"
        what = what.replace(" trains", f", of it {', '.join(parts)}, trains") if parts else what
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return TrainableReport(f"{what}: {trainable:,} of {total:,} parameters", trainable, total, {})


def refuse_frozen(model: nn.Module, report: TrainableReport) -> None:
    """Stop where something froze what was set to train, or unfroze more, before an optimizer is made of it.

    Raises:
        InputError: the parameters that require a gradient are not those of the report.
    """
    now = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    strange = [name for name in now if report.details.get("targets") and "lora_" not in name]
    if sum(now.values()) != report.trainable_params or strange:
        what = f"{sum(now.values()):,} parameters would train, not the {report.trainable_params:,} that were set to"
        what += f", among them {strange[0]}" if strange else ""
        raise InputError(
            what if now else "everything is frozen: nothing would train",
            location="targets",
            hint="freeze the base first and add the adapter after it: what is frozen later takes the adapter with it",
        )
