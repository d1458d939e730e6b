"""The steps of a run, and what happens between them: log, validate, sample, save, stop.

What is drawn comes from (seed, position) alone, see `examples`: a run that was killed and resumed makes the same draws as
one that was not, and two processes those of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor

from mmdit_lora.data.sampler import seeded
from mmdit_lora.training.checkpoint import checkpoints, trainable_parameters
from mmdit_lora.training.prior_preservation import prior_losses
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import Run
from mmdit_lora.training.sharding import whole
from mmdit_lora.training.step import Batch, flow_matching_loss
from mmdit_lora.training.stopping import Diverged, Interrupted, caught_signals, check_losses
from mmdit_lora.training.throughput import Throughput
from mmdit_lora.training.tracking import NullTracker, Tracker
from mmdit_lora.training.validation import gradient_norms, is_due, watch

_AHEAD = 2  # batches of this process that are read ahead

Progress = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class StepRecord:
    """What a step saw and did, for those who compare runs (`verify-resume`).

    Args:
        step: counted from 1.
        samples: of this process, `file:line` of their records.
        times: (B,) that they were noised to. losses: (B,) theirs.
        loss, learning_rate, grad_norm: of the step.
    """

    step: int
    samples: tuple[str, ...]
    times: Tensor
    losses: Tensor
    loss: float
    learning_rate: float
    grad_norm: float


OnStep = Callable[[StepRecord], None]


def train_loop(run: Run, tracker: Tracker | None, on_progress: Progress, on_step: OnStep | None = None) -> None:
    """Every step up to `train.max_steps`, or to an early stop.

    Args:
        tracker: of the main process; None in the others.
        on_progress: called with the step and its scalars, every `train.log_every` steps, in the main process.
        on_step: called after every step, in every process.

    Raises:
        Diverged: a loss is no finite number. Interrupted: SIGTERM or Ctrl-C came; the run is saved.
    """
    settings, state = run.config.train, run.state
    meter = Throughput()
    measured = state.step
    saved = state.step  # every process counts it: what is on the disk depends on when a process looks
    with caught_signals() as signal_name:
        # A run may have been killed after its early stop was saved: it trains no further.
        while state.step < settings.max_steps and not (settings.early_stop and state.stale >= settings.early_stop):
            logged = (state.step + 1) % settings.log_every == 0 or state.step + 1 == settings.max_steps
            takes_part = tracker is not None or run.is_sharded
            record, norms = _step(run, meter, with_norms=logged and takes_part, with_samples=on_step is not None)
            state.step += 1
            if on_step is not None:
                on_step(record)
            if logged:
                speed = meter.read((state.step - measured) * run.batches["train.batch_size"])
                measured = state.step
                if tracker is not None:
                    scalars = {
                        "loss": record.loss,
                        "learning_rate": record.learning_rate,
                        "grad_norm": record.grad_norm,
                    }
                    tracker.log(state.step, scalars | norms | {f"speed/{name}": value for name, value in speed.items()})
                    on_progress(state.step, scalars | speed)
            with meter.phase("pause"):
                better = is_due(run) and _look(run, tracker)
            stopped = _agreed(run, signal_name() is not None)
            if settings.checkpoint_every and (state.step % settings.checkpoint_every == 0 or better or stopped):
                with meter.phase("pause"):
                    if takes_part:
                        run.save()
                saved = state.step
            if stopped:
                raise Interrupted(signal_name() or "a signal", state.step if settings.checkpoint_every else None)
        # A run that ended may go on with more steps, from where it ended.
        if settings.checkpoint_every and saved != state.step and (tracker is not None or run.is_sharded):
            run.save()


def _step(run: Run, meter: Throughput, *, with_norms: bool, with_samples: bool) -> tuple[StepRecord, dict[str, float]]:
    """One optimizer step: draw, loss, backward, clip, update."""
    settings, accelerator, step = run.config.train, run.accelerator, run.state.step
    per_process, world = settings.batch_size, accelerator.num_processes
    samples: list[str] = []
    times, each_loss, prior_loss = [], [], torch.zeros((), device=accelerator.device)
    for micro in range(settings.gradient_accumulation):
        first = ((step * settings.gradient_accumulation + micro) * world + accelerator.process_index) * per_process
        positions = range(first, first + per_process)
        with meter.phase("data"):
            batch = run.examples.training_batch(positions).to(accelerator.device)
            stride = per_process * world
            run.examples.read_ahead([p + n * stride for n in range(1, 1 + _AHEAD) for p in positions])
        # The adapter's dropout draws from the samples' keys. Whatever else in a base may draw does so from here.
        torch.manual_seed(seeded("dropout", settings.seed, first).initial_seed())
        is_last = micro == settings.gradient_accumulation - 1
        if not settings.compile:  # the counter sees into no compiled graph
            meter.count(tuple(batch.x0.shape), partial(_once, run, batch))
        syncs = is_last and run.prior is None  # processes exchange gradients in the last backward of a step
        accelerator.sync_gradients = is_last  # by it DeepSpeed's engine, which steps within `backward`, knows when
        with meter.phase("compute"), nullcontext() if syncs else accelerator.no_sync(run.model):
            with accelerator.autocast():
                found = flow_matching_loss(run.model, batch, run.objective)
            names = partial(_names, run, positions)
            check_losses(found.detach(), names, step=step, checkpoint=partial(_safe, run))
            accelerator.backward(found.mean() / settings.gradient_accumulation)
        if run.prior is not None:
            number = step * settings.gradient_accumulation + micro
            with meter.phase("data"):
                old = run.prior.batch(number, world, accelerator.process_index).to(accelerator.device)
            with meter.phase("compute"), nullcontext() if is_last else accelerator.no_sync(run.model):
                with accelerator.autocast():
                    moved = prior_losses(run.model, run.pipe.transformer, old, run.objective).mean()
                accelerator.backward(run.config.prior.weight * moved / settings.gradient_accumulation)
            prior_loss += moved.detach() / settings.gradient_accumulation
        if with_samples:
            samples += names()
        times.append(batch.t)
        each_loss.append(found.detach())
    norms = gradient_norms(run.bare_model) if with_norms else {}
    with meter.phase("optimizer"):
        norm = whole(torch.as_tensor(accelerator.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm)))
        if accelerator.scaler is None and not norm.isfinite():  # a scaler expects some, and skips the step
            raise Diverged(f"a gradient is no finite number in step {step + 1}. {_safe(run)}")
        rate = float(run.schedule.get_last_lr()[0])
        run.optimizer.step()
        run.schedule.step()
        run.optimizer.zero_grad()
        if run.average is not None:
            run.average.update()
        total = torch.stack([torch.cat(each_loss).mean(), prior_loss])
        if world > 1:
            total = accelerator.reduce(total, "mean")
    loss, moved_by = total.tolist()
    record = StepRecord(step + 1, tuple(samples), torch.cat(times), torch.cat(each_loss), loss, rate, norm.item())
    return record, norms if run.prior is None else norms | {"prior_loss": moved_by}


def _names(run: Run, positions: Sequence[int]) -> list[str]:
    return [run.examples.record_at(position).location for position in positions]


def _once(run: Run, batch: Batch) -> None:
    """Forward and backward without a trace: no gradient is kept, and no other process is asked."""
    with run.accelerator.autocast():
        loss = flow_matching_loss(run.pipe.transformer, batch, run.objective).mean()
    torch.autograd.grad(loss, list(trainable_parameters(run.pipe.transformer).values()), allow_unused=True)


def _look(run: Run, tracker: Tracker | None) -> bool:
    """Validate and paint in the main process; whether this is the best so far, known to all."""
    state = run.state
    if tracker is not None or run.is_sharded:
        good = watch(run, tracker or NullTracker())
        if good is not None and (state.best is None or good > state.best):
            state.best_step, state.best, state.stale = state.step, good, 0
        elif good is not None:
            state.stale += 1
    if run.accelerator.num_processes > 1:
        shared = [(state.best_step, state.best, state.stale)]
        broadcast_object_list(shared)
        state.best_step, state.best, state.stale = shared[0]
    return state.best_step == state.step


def _agreed(run: Run, asked: bool) -> bool:
    """Whether any process was asked to stop: all stop after the same step."""
    if run.accelerator.num_processes == 1:
        return asked
    if asked:
        run.accelerator.set_trigger()
    return bool(run.accelerator.check_trigger())


def _safe(run: Run) -> str:
    found = checkpoints(run.folder / CHECKPOINTS)
    return f"{found[-1].folder} is from before." if found else "There is no checkpoint yet."
