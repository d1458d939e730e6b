"""The optimizer and its schedule, by config: PyTorch, bitsandbytes, prodigyopt, PEFT's LoRA+ and diffusers' schedules."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from mmdit_lora.config.loading import Config, TrainSection
from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import trainable_parameters


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of `config.train` over all that requires grad, in the model's order.

    Raises:
        InputError: a package or a GPU is missing, or LoRA+ is asked for where no LoRA trains.
    """
    train = config.train
    check_optimizer(train)
    kind, options = _class_and_options(train)
    options |= {"lr": train.learning_rate, "betas": train.adam_betas}
    if train.lora_plus == 1.0:
        plain: torch.optim.Optimizer = kind(
            list(trainable_parameters(model).values()), weight_decay=train.weight_decay, **options
        )
        return plain
    for wrong, what, hint in (
        (train.optimizer == "prodigy", "prodigy, which takes one learning rate", "set it to 1.0, or take adamw"),
        (config.method != "lora", f"method {config.method}, which trains no LoRA", "set it to 1.0"),
    ):
        if wrong:
            raise InputError(f"is {train.lora_plus:g} with {what}", location="train.lora_plus", hint=hint)
    # Hayou et al. 2024, arXiv 2402.12354: B learns faster than A.
    optimizer = create_loraplus_optimizer(
        model, kind, loraplus_lr_ratio=train.lora_plus, loraplus_weight_decay=train.weight_decay, **options
    )
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    return optimizer


def make_schedule(optimizer: torch.optim.Optimizer, train: TrainSection) -> torch.optim.lr_scheduler.LambdaLR:
    """diffusers' schedule of that name: one step of it is one of the optimizer. The rate is a function of (step, max_steps)."""
    # diffusers' "constant" knows no warm-up, and leaves it out without a word.
    schedule: Any = get_scheduler(
        "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=train.max_steps,
    )
    return schedule


def check_optimizer(train: TrainSection) -> None:
    """Whether `train.optimizer` works on this machine.

    Raises:
        InputError: a package is missing, or a GPU that it needs.
    """
    location = "train.optimizer"
    if train.optimizer == "adamw_8bit" and not torch.cuda.is_available():
        raise InputError("is adamw_8bit, which needs a CUDA GPU", location=location, hint="set it to adamw")
    package = {"adamw_8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(train.optimizer)
    if package is not None and find_spec(package) is None:
        raise InputError(
            f"is {train.optimizer}, which needs the package {package}",
            location=location,
            hint=f"install it: `uv sync --extra optim`, or `pip install {package}`",
        )


def _class_and_options(train: TrainSection) -> tuple[Any, dict[str, Any]]:
    if train.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # As its authors advise for diffusion models (Mishchenko and Defazio 2023, arXiv 2306.06101).
        return Prodigy, {"use_bias_correction": True, "safeguard_warmup": train.warmup_steps > 0}
    if train.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit, {}
    return torch.optim.AdamW, {"fused": True} if torch.cuda.is_available() else {}
