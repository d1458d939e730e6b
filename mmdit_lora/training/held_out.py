"""The held-out images: their denoising loss, paired against the base, and what is sampled from their layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_lora.evaluation.intervals import mean_interval
from mmdit_lora.models import LayoutInputs
from mmdit_lora.training.encoding import EncodedDataset
from mmdit_lora.training.loss import Objective, flow_matching_loss

_MOST_IMAGES, _DRAWS, _PROBE_DRAWS = 64, 8, 2

Change = Callable[[LayoutInputs], LayoutInputs]


@dataclass(frozen=True)
class HeldOutLosses:
    """Denoising losses of held-out images, and the times that they were taken at; both (draws, images), fp32."""

    losses: Tensor
    times: Tensor

    @property
    def per_image(self) -> Tensor:
        """(images,)"""
        return self.losses.mean(0)

    def by_time(self, parts: int = 4) -> list[float]:
        """Mean loss in equal parts of the draws, from the clearest (t near 0) to the noisiest."""
        return [part.mean().item() for part in self.losses.flatten()[self.times.flatten().argsort()].chunk(parts)]


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    dataset: EncodedDataset,
    device: torch.device,
    *,
    batch_size: int = 32,
    draws: int = _DRAWS,
    change: Change = lambda layout: layout,
) -> HeldOutLosses:
    """Losses of the images of a data set whose stream is "held out", at most `_MOST_IMAGES` of them, at `draws` times and noises each.

    They are the same at every call, so that two sets of weights can be compared image by image.

    Args:
        change: what is done to the layouts of a batch before the model sees them.
    """
    records = len(dataset.records)
    count = min(records, _MOST_IMAGES)
    was_training = model.training
    model.eval()
    losses_, times = torch.zeros(draws, count), torch.zeros(draws, count)
    of_size: dict[tuple[int, int], list[int]] = {}
    for index in range(count):
        of_size.setdefault(dataset.size_of(index), []).append(index)
    parts = [each[at : at + batch_size] for each in of_size.values() for at in range(0, len(each), batch_size)]
    plan = [(draw, indices) for draw in range(draws) for indices in parts]
    positions = [[draw * records + index for index in indices] for draw, indices in plan]
    workers = 0 if all(map(dataset.knows, positions)) else None
    objective = Objective(guidance=dataset.guidance)
    for (draw, indices), batch in zip(plan, dataset.batches(positions, device, workers=workers), strict=True):
        batch = replace(batch, layout=change(batch.layout))
        times[draw, indices] = batch.t.cpu()
        losses_[draw, indices] = flow_matching_loss(model, batch, objective).cpu()
    model.train(was_training)
    return HeldOutLosses(losses_, times)


def layout_matters(model: nn.Module, dataset: EncodedDataset, device: torch.device) -> dict[str, float]:
    """What the layout is worth: the held-out loss with another image's layout, and without one, minus that with its own.

    Near 0, the model does not look at it, whatever else it learned.
    """

    def mean(change: Change) -> float:
        result = held_out_losses(model, dataset, device, draws=_PROBE_DRAWS, change=change)
        return result.losses.mean().item()

    true = mean(lambda layout: layout)
    return {
        "layout/shuffled_minus_true": mean(lambda layout: layout[torch.arange(len(layout)).roll(1)]) - true,
        "layout/dropped_minus_true": mean(lambda layout: replace(layout, mask=torch.zeros_like(layout.mask))) - true,
    }


@dataclass(frozen=True)
class PairedLoss:
    """Held-out loss of the base and of what was trained, on the same images, times and noises.

    Args:
        base, trained: mean losses.
        difference: trained - base; below 0 is better.
        interval: 95 % interval of the difference, from the spread over images (paired t); None for a single image.
        images: how many.
        differences: of each image, in order.
    """

    base: float
    trained: float
    difference: float
    interval: tuple[float, float] | None
    images: int
    differences: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For the report, which is for people: without the single images."""
        values = asdict(self)
        del values["differences"]
        return values


def compare_losses(base: Tensor, trained: Tensor) -> PairedLoss:
    """Paired comparison of the losses of the same images by two sets of weights, each (images,)."""
    difference = (trained - base).double()
    found, count = mean_interval(difference.numpy(force=True)[None]), len(difference)
    interval = (found.low, found.high) if count > 1 else None
    return PairedLoss(
        base.mean().item(), trained.mean().item(), found.mean, interval, count, tuple(difference.tolist())
    )
