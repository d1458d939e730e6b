"""The held-out pictures: their denoising loss, paired against the base, and what is painted from their layouts."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor, nn

from mmdit_lora.training.examples import Examples
from mmdit_lora.training.step import losses

_MOST_PICTURES, _DRAWS = 64, 8


@torch.no_grad()
def held_out_losses(model: nn.Module, examples: Examples, device: torch.device, *, batch_size: int = 32) -> Tensor:
    """Denoising loss of each held-out picture, (pictures,) fp32: the mean over `_DRAWS` times and noises.

    They are the same at every call, so that two sets of weights can be compared picture by picture. At most
    `_MOST_PICTURES` pictures.
    """
    count = min(len(examples.records), _MOST_PICTURES)
    was_training = model.training
    model.eval()
    out = torch.zeros(count)
    of_size: dict[tuple[int, int], list[int]] = {}
    for index in range(count):
        of_size.setdefault(examples.size_of(index), []).append(index)
    parts = [each[at : at + batch_size] for each in of_size.values() for at in range(0, len(each), batch_size)]
    for draw in range(_DRAWS):
        for indices in parts:
            batch = examples.held_out_batch(indices, draw)
            out[indices] += losses(model, batch.to(device), guidance=examples.config.flow.guidance).cpu() / _DRAWS
    model.train(was_training)
    return out


@dataclass(frozen=True)
class PairedLoss:
    """Held-out loss of the base and of what was trained, on the same pictures, times and noises.

    Args:
        base, trained: mean losses.
        difference: trained - base; below 0 is better.
        interval: 95 % interval of the difference, from the spread over pictures (paired t); None for a single picture.
        pictures: how many.
    """

    base: float
    trained: float
    difference: float
    interval: tuple[float, float] | None
    pictures: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_losses(base: Tensor, trained: Tensor) -> PairedLoss:
    """Paired comparison of two results of `held_out_losses`, each (pictures,)."""
    difference = (trained - base).double()
    mean, count = difference.mean().item(), len(difference)
    interval = None
    if count > 1:
        margin = float(stdtrit(count - 1, 0.975)) * difference.std().item() / math.sqrt(count)
        interval = (mean - margin, mean + margin)
    return PairedLoss(base.mean().item(), trained.mean().item(), mean, interval, count)
