"""Two real forward and backward passes before a run, after which everything is as it was: weights, generators, gradients.

What nothing but a trial shows: that every weight which is to train gets a gradient, that no other does, that the loss is a
number, and what a step takes of time and memory.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from mmdit_lora.data.order import seeded
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.meter import peak_memory
from mmdit_lora.training.run import Run
from mmdit_lora.training.step import Batch, losses

_LOOK_AHEAD = 64  # batches that a large picture with boxes is looked for in
_MOST_TRIES = 4  # batches that a weight may need for its first gradient
_MOVE = 1e-3  # of the largest weight in the trial step
_FP16_SCALE = 1024.0  # small gradients would be 0 in fp16; the run's own scaler is not to be touched


@dataclass
class Trial:
    """What the trial found.

    Args:
        loss: of the first batch.
        bad_samples: `file:line` of those whose loss is no finite number.
        outside: parameters that got a gradient and are not to train.
        still: parameters that were to get one, and got none or 0 throughout.
        unreached: parameters to train that the last batch had no part for, not even a gradient of 0: DDP takes none such.
        alive: how many got one.
        step_seconds: forward and backward of a batch, warm.
        data_seconds: of a batch whose pictures are encoded. encode_seconds: of encoding a batch, beside it.
        peak_bytes: most memory at any time so far.
        latents_bytes, text_bytes: of one picture's latents and of one caption's embeddings.
        side: (h, w) of the latents.
        out_of_memory: the trial ended for want of memory.
    """

    loss: float = float("nan")
    bad_samples: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    still: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    alive: int = 0
    step_seconds: float = 0.0
    data_seconds: float = 0.0
    encode_seconds: float = 0.0
    peak_bytes: int = 0
    latents_bytes: int = 0
    text_bytes: int = 0
    side: tuple[int, int] = (0, 0)
    out_of_memory: bool = False


def try_steps(run: Run, *, write_cache: bool = True) -> Trial:
    """Forward and backward on batches of the run, with a small step between; then all is put back, bit for bit.

    Args:
        write_cache: whether what is encoded may go into the store on disk, as in the run itself.
    """
    trial = Trial()
    encoder = run.examples.encoder
    store = encoder.store
    if not write_cache:
        encoder.store = None
    try:
        with _put_back(run):
            _try(run, trial)
    except torch.OutOfMemoryError:
        trial.out_of_memory = True
    finally:
        encoder.store = store
    trial.peak_bytes = peak_memory()
    return trial


def _try(run: Run, trial: Trial) -> None:
    model = run.pipe.transformer
    trainable = trainable_parameters(model)
    places = _batches(run)
    first = _backward(run, places[0], trial)
    trial.loss = first.loss
    trial.bad_samples = first.bad
    if first.bad:
        return
    trial.outside = [n for n, p in model.named_parameters() if p.grad is not None and n not in trainable]
    # B first, A behind it: with B at 0 no gradient reaches A. So too with the gates of a new stream.
    waiting = _without_gradient(trainable)
    _move(trainable)
    for place in places[1 : _MOST_TRIES + 1]:
        done = _backward(run, place, trial)
        waiting = _without_gradient({name: trainable[name] for name in waiting})
        if done.bad or not waiting:
            break
    trial.still = waiting
    trial.unreached = [name for name, p in trainable.items() if p.grad is None]
    trial.alive = len(trainable) - len(waiting)


@dataclass(frozen=True)
class _Pass:
    loss: float
    bad: list[str]


def _backward(run: Run, positions: range, trial: Trial) -> _Pass:
    """One batch; gradients are those of this batch alone."""
    model, settings, device = run.pipe.transformer, run.config.train, run.accelerator.device
    for parameter in model.parameters():
        parameter.grad = None
    before = time.perf_counter()
    batch = run.examples.training_batch(positions)
    drawn = time.perf_counter() - before
    before = time.perf_counter()
    if run.examples.variants is not None:  # encoded now
        run.examples.training_batch(positions)
    trial.data_seconds = time.perf_counter() - before if run.examples.variants is not None else drawn
    trial.encode_seconds = max(drawn - trial.data_seconds, 0.0)
    _note_sizes(trial, batch)
    batch = batch.to(device)
    torch.manual_seed(seeded("dropout", settings.seed, positions[0]).initial_seed())
    _wait(device)
    before = time.perf_counter()
    # Not through DDP's wrapper: its hooks stand still as long as it was not called, so no process waits for another.
    with run.accelerator.autocast():
        found = losses(model, batch, run.objective)
    scale = _FP16_SCALE if settings.mixed_precision == "fp16" else 1.0
    (found.mean() * scale).backward()
    _wait(device)
    trial.step_seconds = time.perf_counter() - before
    values = found.detach().float().cpu()
    names = [run.examples.record_at(position).where for position in positions]
    bad = [name for name, good in zip(names, values.isfinite().tolist(), strict=True) if not good]
    return _Pass(values.mean().item(), bad)


def _batches(run: Run) -> list[range]:
    """The first batches of this process that have boxes; that of the largest pictures among the next ones comes first."""
    size, world = run.config.train.batch_size, run.accelerator.num_processes
    starts = [(n * world + run.accelerator.process_index) * size for n in range(_LOOK_AHEAD)]
    own = [range(start, start + size) for start in starts]
    with_boxes = [each for each in own if any(run.examples.record_at(p).layout.boxes for p in each)] or own
    largest = max(with_boxes, key=lambda each: _area(run, each[0]))
    if _area(run, largest[0]) > _area(run, with_boxes[0][0]):
        with_boxes.insert(0, largest)
    return with_boxes


def _area(run: Run, position: int) -> int:
    height, width = run.examples.size_at(position)
    return height * width


def _note_sizes(trial: Trial, batch: Batch) -> None:
    trial.latents_bytes = max(trial.latents_bytes, batch.x0[0].nbytes)
    trial.text_bytes = batch.prompt_embeds[0].nbytes + batch.pooled[0].nbytes
    trial.side = max(trial.side, (batch.x0.shape[-2], batch.x0.shape[-1]))


def _without_gradient(trainable: dict[str, nn.Parameter]) -> list[str]:
    return [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]


@torch.no_grad()
def _move(trainable: dict[str, nn.Parameter]) -> None:
    for parameter in trainable.values():
        if parameter.grad is not None and (most := parameter.grad.abs().max()) > 0:
            parameter.sub_(parameter.grad, alpha=_MOVE / most.item())


@contextmanager
def _put_back(run: Run) -> Iterator[None]:
    """Weights, gradients and the states of all generators are afterwards what they are now."""
    model = run.pipe.transformer
    trainable = trainable_parameters(model)
    # Not on the GPU: with `method: full` it would hold the model twice.
    before = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
    python, numpy = random.getstate(), np.random.get_state()
    keys = getattr(model, "sample_keys", None)
    key_values = None if keys is None else keys.value
    device = run.accelerator.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for parameter in model.parameters():
            parameter.grad = None
        if keys is not None:
            keys.value = key_values
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(before[name])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
