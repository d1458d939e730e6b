"""One optimizer step of a run, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from mmdit_lora.data.sampler import micro_batches, seeded
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.loss import Batch, flow_matching_loss
from mmdit_lora.training.prior_preservation import prior_losses
from mmdit_lora.training.setup import Run
from mmdit_lora.training.sharding import full_tensor
from mmdit_lora.training.stopping import Diverged, check_losses
from mmdit_lora.training.throughput import Throughput
from mmdit_lora.training.validation import gradient_norms

Micro = tuple[Sequence[int], Batch, Batch | None]  # positions in the run, their batch, that of the old domain


@dataclass(frozen=True)
class StepRecord:
    """What a step read and did.

    Args:
        step: counted from 1.
        positions: of this process's samples in the run.
        times: (B,) that these were noised to. losses: (B,) theirs.
        loss, learning_rate, grad_norm: of the step, over all processes.
        name: of the sample at a position, `file:line` of its record.
        logged: what the tracker gets at this step: every `train.log_every` steps, in the main process; else empty.
    """

    step: int
    positions: Sequence[int]
    times: Tensor
    losses: Tensor
    loss: float
    learning_rate: float
    grad_norm: float
    name: Callable[[int], str] = field(repr=False)
    logged: dict[str, float] = field(default_factory=dict)

    @property
    def samples(self) -> tuple[str, ...]:
        """Names of this process's samples."""
        return tuple(map(self.name, self.positions))


def train_step(
    run: Run, batches: Iterator[Micro], meter: Throughput, *, with_norms: bool = False
) -> tuple[StepRecord, dict[str, float]]:
    """Accumulate loss and gradients, clip, update, average.

    Args:
        batches: see `training_batches`.
        with_norms: also the gradient norms of the blocks, before clipping.

    Returns:
        The record of the step, and further scalars for the tracker.

    Raises:
        Diverged: a loss or the gradient is NaN or infinite.
    """
    settings, accelerator, step = run.config.train, run.accelerator, run.state.step
    places: list[int] = []
    times, each_loss, prior_loss = [], [], torch.zeros((), device=accelerator.device)
    for micro in range(settings.gradient_accumulation):
        is_last = micro + 1 == settings.gradient_accumulation
        accelerator.sync_gradients = is_last  # DeepSpeed's engine, which steps within `backward`, reads it
        with meter.phase("data"):
            positions, batch, old = next(batches)
        if not settings.compile:  # the counter sees into no compiled graph
            meter.count(tuple(batch.x0.shape), partial(_forward_and_backward, run, batch))
        # The adapter's dropout draws from the samples' keys. Whatever else in a base may draw does so from here.
        torch.manual_seed(seeded("dropout", settings.seed, positions[0]).initial_seed())
        with meter.phase("compute"), _exchange(run, is_last and old is None):
            with accelerator.autocast():
                losses = flow_matching_loss(run.model, batch, run.objective)
            check_losses(losses.detach(), partial(map, run.name_of, positions), step=step, checkpoint=run.last_saved)
            accelerator.backward(losses.mean() / settings.gradient_accumulation)
        if old is not None:
            with meter.phase("compute"), _exchange(run, is_last):
                with accelerator.autocast():
                    moved = prior_losses(run.model, run.pipe.transformer, old, run.objective).mean()
                accelerator.backward(run.config.prior.weight * moved / settings.gradient_accumulation)
            prior_loss += moved.detach() / settings.gradient_accumulation
        places += positions
        times.append(batch.t)
        each_loss.append(losses.detach())
    norms = gradient_norms(run.bare_model) if with_norms else {}
    with meter.phase("optimizer"):
        norm = full_tensor(torch.as_tensor(accelerator.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm)))
        if accelerator.scaler is None and not norm.isfinite():  # a scaler expects some, and skips the step
            raise Diverged(f"the gradient is NaN or infinite in step {step + 1}. {run.last_saved()}")
        rate = float(run.schedule.get_last_lr()[0])
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
        if run.ema is not None:
            run.ema.update()
        means = torch.stack([torch.cat(each_loss).mean(), prior_loss])
        loss, prior = (accelerator.reduce(means, "mean") if accelerator.num_processes > 1 else means).tolist()
    record = StepRecord(
        step + 1, places, torch.cat(times), torch.cat(each_loss), loss, rate, norm.item(), name=run.name_of
    )
    return record, norms if run.prior is None else norms | {"prior_loss": prior}


def training_batches(run: Run) -> Generator[Micro]:
    """This process's micro-batches from the step that the run has reached to its last one, on its device."""
    train, accelerator = run.config.train, run.accelerator
    numbers = range(run.state.step * train.gradient_accumulation, train.max_steps * train.gradient_accumulation)
    own = partial(micro_batches, numbers=numbers, world=accelerator.num_processes, process=accelerator.process_index)
    batches = run.examples.batches(own(train.batch_size), accelerator.device)
    old: Iterator[Batch | None] = repeat(None)
    if run.prior is not None:
        old = run.prior.batches(own(run.config.prior.batch_size), accelerator.device)
    yield from zip(own(train.batch_size), batches, old, strict=False)


def _exchange(run: Run, exchanges: bool) -> AbstractContextManager[None]:
    """Processes exchange gradients in the last backward of a step, and in no other."""
    return nullcontext() if exchanges else run.accelerator.no_sync(run.model)


def _forward_and_backward(run: Run, batch: Batch) -> None:
    """To count FLOPs: no gradient is kept, and no other process is asked."""
    with run.accelerator.autocast():
        loss = flow_matching_loss(run.pipe.transformer, batch, run.objective).mean()
    torch.autograd.grad(loss, list(trainable_parameters(run.pipe.transformer).values()), allow_unused=True)
