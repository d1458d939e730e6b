"""The checks before a run: every way to train nothing, to stop late or to write half a file that shows in seconds.

`prepare_run` already refuses what makes a run impossible to set up (no such target, zero gates, no data). Here two real
forward and backward passes are tried, after which weights, generators and gradients are as they were: every weight that is to
train gets a gradient, no other does, the loss is finite. From the time and memory of a step follow forecasts of what the run
needs: memory, time, disk, a tracker. Settings that are allowed but may mean something else than was intended get a line each.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import psutil
import torch
from accelerate.utils import DistributedType, gather_object
from torch import nn

from mmdit_lora.config.loading import Config, TrainSection
from mmdit_lora.config.schema import Section
from mmdit_lora.data.records import Record
from mmdit_lora.data.sampler import seeded
from mmdit_lora.data.shards import ShardedRecords, Subset, spread
from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora.inject import with_adapter
from mmdit_lora.pipelines.sampling import long_texts
from mmdit_lora.training.checkpoint import Checkpoint, trainable_parameters
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import Run
from mmdit_lora.training.step import Batch, flow_matching_loss
from mmdit_lora.training.throughput import peak_memory

CheckState = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: of the check; several lines may have the same.
        state: "failed" keeps the run from starting.
        found: what was found, with its figures.
        cure: how to mend it; None where nothing is to be mended.
        seconds: that it took; 0 for further lines of a check.
    """

    name: str
    state: CheckState
    found: str
    hint: str | None = None
    seconds: float = 0.0


@dataclass
class Preflight:
    """All checks, in the order in which they were made."""

    checks: list[Check] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """Those that keep the run from starting."""
        return [check for check in self.checks if check.state == "failed"]

    @property
    def seconds(self) -> float:
        """That all of them took."""
        return sum(check.seconds for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": not self.failed, "seconds": self.seconds, "checks": [asdict(check) for check in self.checks]}

    def refuse_failed(self) -> None:
        """Raises `InputError` with the first check that failed, and how many more did."""
        if not self.failed:
            return
        first, more = self.failed[0], len(self.failed) - 1
        others = f"; {more} more failed: {', '.join(check.name for check in self.failed[1:])}" if more else ""
        raise InputError(first.found + others, location=f"preflight, {first.name}", hint=first.hint)

    @contextmanager
    def timed(self, name: str) -> Iterator[Lines]:
        """Within it, lines of the check `name` are added; the first gets the time."""
        before, lines = time.perf_counter(), Lines(name)
        yield lines
        passed = time.perf_counter() - before
        for number, (state, found, hint) in enumerate(lines.added):
            self.checks.append(Check(name, state, found, hint, 0.0 if number else passed))


class Lines:
    """The lines of one check, while it is made."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.added: list[tuple[CheckState, str, str | None]] = []

    def ok(self, found: str) -> None:
        self.added.append(("ok", found, None))

    def warn(self, found: str, hint: str | None = None) -> None:
        self.added.append(("warning", found, hint))

    def fail(self, found: str, hint: str) -> None:
        self.added.append(("failed", found, hint))


# Bytes that an optimizer keeps of each fp32 weight (moments; Prodigy also its start and its sum).
_OPTIMIZER_BYTES = {"adamw": 8, "adamw_8bit": 2, "prodigy": 16}
_VALIDATION_DRAWS = 8 + 3 * 2  # of `held_out_losses` and `layout_matters`
_MOST_VALIDATED = 64
_FORWARD = 1 / 3  # of forward and backward
_TIGHT = 0.9  # of the memory that is there
_REACH_SECONDS = 3.0
_LESS_MEMORY = (
    "lower train.batch_size (and raise train.gradient_accumulation), or set train.gradient_checkpointing=true, "
    "train.mixed_precision=bf16 or train.quantization"
)


def check_memory(run: Run, trial: Trial, lines: Lines) -> None:
    """The peak of the trial and the optimizer's state against what is free."""
    state = run.trainable.trainable_params * _OPTIMIZER_BYTES[run.config.train.optimizer]
    if run.accelerator.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.accelerator.device)
        there, location = free + torch.cuda.memory_reserved(run.accelerator.device), "of the GPU"
    else:
        own = psutil.Process().memory_info().rss
        there, location = psutil.virtual_memory().available + own, "of memory"
    need = trial.peak_bytes + state
    text = f"about {size_text(need)} at the peak, {size_text(there)} {location} to be had"
    if trial.out_of_memory:
        lines.fail(f"a step does not fit into {size_text(there)} {location}", _LESS_MEMORY)
    elif need > there:
        lines.fail(text, _LESS_MEMORY)
    elif need > _TIGHT * there:
        lines.warn(f"{text}: tight", _LESS_MEMORY)
    else:
        lines.ok(text)


def estimate_seconds(run: Run, trial: Trial, *, done: int = 0) -> dict[str, float]:
    """Seconds of the steps that are left, of encoding, of validation and of sampled images.

    Args:
        done: steps that a resumed run has behind it.
    """
    settings, examples = run.config.train, run.examples
    steps = max(settings.max_steps - done, 0)
    batches = steps * settings.gradient_accumulation
    world, size = run.accelerator.num_processes, settings.batch_size
    drawn = batches * size * world
    fresh = drawn if examples.variants is None else min(drawn, len(examples.records) * examples.variants)
    forward = trial.step_seconds * _FORWARD / size  # of one image
    held_out = min(len(run.held_out.records), _MOST_VALIDATED) if run.held_out else 0
    validations = events(settings, settings.validate_every, done, last=True) if held_out else 0
    painted = events(settings, settings.sample_every, done, last=False) * min(
        settings.sample_count, len((run.held_out or examples).records)
    )
    sample, stated = run.config.sample, run.pipe.config
    paint_steps = sample.steps or int(stated.get("num_inference_steps") or 28)
    guidance = sample.guidance_scale if sample.guidance_scale is not None else stated.get("guidance_scale") or 7.0
    return {
        "steps": batches * (trial.step_seconds + trial.data_seconds),
        "encoding": fresh / (size * world) * trial.encode_seconds,
        "validation": (validations * _VALIDATION_DRAWS + (8 if held_out else 0)) * held_out * forward,
        "sampling": painted * paint_steps * (2 if guidance > 1 else 1) * forward,
    }


def check_time(run: Run, trial: Trial, lines: Lines, *, done: int = 0) -> None:
    """How long it will take."""
    seconds = estimate_seconds(run, trial, done=done)
    parts = [f"{name} {duration_text(value)}" for name, value in seconds.items() if value >= 1]
    settings = run.config.train
    step = seconds["steps"] / max(settings.max_steps - done, 1)
    detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    lines.ok(
        f"about {duration_text(sum(seconds.values()))} for {max(settings.max_steps - done, 0):,} steps of "
        f"{step_text(step)}{detail}"
    )


def check_disk(run: Run, trial: Trial | None, lines: Lines, *, done: int = 0) -> None:
    """Bytes that the run will write against what is free: an error before the work, and no half-written file after it."""
    folder = run.folder
    need = _output_bytes(run, done=done)
    disk = existing(folder)
    free = shutil.disk_usage(disk).free
    text = f"{size_text(need)} to be written, {size_text(free)} free at {disk}"
    hint = "free some space, give another output_dir, or lower train.keep_checkpoints"
    if need > free:
        lines.fail(text, hint)
    else:
        lines.ok(text)
    if run.config.data.cache is None or trial is None or not trial.latents_bytes:
        return
    examples = run.examples
    captions = len({record.layout.caption for record in examples.records})
    most = len(examples.records) * (examples.variants or 0) * trial.latents_bytes + captions * trial.text_bytes
    disk = existing(Path(run.config.data.cache))
    free = shutil.disk_usage(disk).free
    text = f"cache: at most {size_text(most)}, {size_text(free)} free at {disk}"
    if most <= free:
        lines.ok(text)
    elif disk == Path(run.config.data.cache).absolute():  # how much of it is there already, nobody has counted
        lines.warn(text, "free some space, or see `mmdit-lora data cache`")
    else:
        lines.fail(text, "free some space, or give another data.cache (null: keep what is encoded in memory)")


def check_tracker(run: Run, lines: Lines) -> None:
    """Whether the tracker's package is there, and what it needs to start."""
    tracking = run.config.tracking
    name = tracking.tracker
    if name == "none":
        lines.ok("none")
    elif find_spec(name) is None:
        lines.fail(
            f"the package {name} is not installed", f"install it: `pip install {name}`, or tracking.tracker=none"
        )
    elif name == "tensorboard":
        lines.ok(f"tensorboard, in {run.folder / 'tensorboard'}")
    elif tracking.wandb_mode != "online":
        later = "; `wandb sync` uploads it later" if tracking.wandb_mode == "offline" else ""
        lines.ok(f"W&B, {tracking.wandb_mode}{later}")
    else:
        _check_online(lines)


def _check_online(lines: Lines) -> None:
    import wandb

    offline = "set tracking.wandb_mode=offline and upload later with `wandb sync`"
    address = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)
    if not wandb.login(prompt=False, verify=False):
        lines.fail(
            "W&B is to be online, and there is no API key", f"run `wandb login`, set WANDB_API_KEY, or {offline}"
        )
        return
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        lines.fail(f"W&B at {address.hostname} cannot be reached ({error})", offline)
        return
    lines.ok(f"W&B, online at {address.hostname}")


def events(settings: TrainSection, every: int, done: int, *, last: bool) -> int:
    """How often something due every so many steps comes after step `done`; `last`: also after the last step."""
    if not every or done >= settings.max_steps:
        return 0
    return settings.max_steps // every - done // every + (last and settings.max_steps % every != 0)


def _output_bytes(run: Run, *, done: int) -> int:
    settings = run.config.train
    weights = 4 * run.trainable.trainable_params
    total = weights
    if run.config.method != "lora":  # the whole pipeline is written
        parts = [part for part in run.pipe.components.values() if isinstance(part, torch.nn.Module)]
        total = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    if settings.checkpoint_every:
        one = weights + run.trainable.trainable_params * _OPTIMIZER_BYTES[settings.optimizer]
        one += weights if settings.ema_decay else 0
        # Of those that are kept, of the best, and of the one that is being written before an old one goes.
        number = min(settings.keep_checkpoints + 1, math.ceil(settings.max_steps / settings.checkpoint_every)) + 1
        held = sum(f.stat().st_size for f in (run.folder / CHECKPOINTS).glob("step_*/*") if f.is_file())
        total += max(number * one - held, one)
    if settings.sample_every and settings.sample_count:
        height, width = run.examples.size_at(0)
        # PNG of RGB at half its raw size; the tracker keeps a second copy.
        copies = 1 if run.config.tracking.tracker == "none" else 2
        images = events(settings, settings.sample_every, done, last=False) * settings.sample_count
        total += images * copies * height * width * 3 // 2
    return total


def existing(path: Path) -> Path:
    """The nearest folder above (or at) `path` that is there."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def size_text(count: float) -> str:
    """E.g. "3.2 GB"; in powers of 1000, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration_text(seconds: float) -> str:
    """E.g. "45 s", "12 min", "3 h 20 min", "2 d 4 h"."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def step_text(seconds: float) -> str:
    """E.g. "35 ms", "1.2 s"."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


_LOOK_AHEAD = 64  # batches that a large image with boxes is looked for in
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
        data_seconds: of a batch whose images are encoded. encode_seconds: of encoding a batch, beside it.
        peak_bytes: most memory at any time so far.
        latents_bytes, text_bytes: of one image's latents and of one caption's embeddings.
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
        found = flow_matching_loss(model, batch, run.objective)
    scale = _FP16_SCALE if settings.mixed_precision == "fp16" else 1.0
    (found.mean() * scale).backward()
    _wait(device)
    trial.step_seconds = time.perf_counter() - before
    values = found.detach().float().cpu()
    names = [run.examples.record_at(position).location for position in positions]
    bad = [name for name, good in zip(names, values.isfinite().tolist(), strict=True) if not good]
    return _Pass(values.mean().item(), bad)


def _batches(run: Run) -> list[range]:
    """The first batches of this process that have boxes; that of the largest images among the next ones comes first."""
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


# Keys -> the key that they act through, and whether they do at a value of it.
_Acts = Callable[[Any], bool]
_ACT_THROUGH: tuple[tuple[tuple[str, ...], str, _Acts], ...] = (
    (("flow.logit_mean", "flow.logit_std"), "flow.timesteps", lambda v: v == "logit_normal"),
    (("flow.mode_scale",), "flow.timesteps", lambda v: v == "mode"),
    (("flow.min_snr_gamma",), "flow.weighting", lambda v: v == "min_snr"),
    (
        tuple(
            f"lora.{key}"
            for key in ("r", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern", "rslora", "dora")
        ),
        "method",
        lambda v: v == "lora",
    ),
    (("lora.init",), "lora.start", lambda v: v is None),
    (("stream.parts",), "method", lambda v: v == "layout_stream"),
    (("prior.count", "prior.batch_size", "prior.weight"), "prior.layouts", lambda v: v is not None),
    (("tracking.project", "tracking.wandb_mode"), "tracking.tracker", lambda v: v == "wandb"),
    (("tracking.run_name",), "tracking.tracker", lambda v: v != "none"),
    (("train.sample_count", "sample.seed"), "train.sample_every", lambda v: v > 0),
    (("train.keep_checkpoints",), "train.checkpoint_every", lambda v: v > 0),
    (("data.validation_share",), "data.validation", lambda v: v is None),
    (("data.resolution",), "data.buckets.resolutions", lambda v: not v),
)


def setting_warnings(run: Run) -> Iterator[tuple[str, str]]:
    """Per warning: what was found, and how to mend it."""
    config, train = run.config, run.config.train
    steps, given = train.max_steps, train.model_fields_set
    if train.warmup_steps >= steps:
        reached = max(
            base * factor(steps - 1)
            for base, factor in zip(run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True)
        )
        share = 100 * (steps - 1) / train.warmup_steps
        yield (
            f"train.warmup_steps {train.warmup_steps:,} is not below max_steps {steps:,}: the learning rate reaches "
            f"{reached:g} at most, {share:.2g} % of what is set",
            f"lower train.warmup_steps, e.g. to {steps // 20}, or raise train.max_steps",
        )
    if train.optimizer == "prodigy" and train.learning_rate < 0.1:
        yield (
            f"train.learning_rate {train.learning_rate:g} is a factor of the rate that prodigy finds by itself",
            "set it to 1.0",
        )
    if train.ema_decay and steps < (horizon := round(1 / (1 - train.ema_decay))):
        ends = min(train.ema_decay, steps / (9 + steps))
        yield (
            f"train.ema_decay {train.ema_decay:g} averages over some {horizon:,} steps, and the run has {steps:,}: the decay "
            f"rises to {ends:.3g} only",
            "lower train.ema_decay, or leave it out",
        )
    yield from _looks(run)
    for key, cost in (
        ("sample_every", "no image is painted"),
        ("validate_every", "the only validation is at the end"),
        ("checkpoint_every", "the only checkpoint is at the end, and a kill before it loses all"),
    ):
        if key in given and (every := getattr(train, key)) > steps:
            yield (
                f"train.{key} {every:,} is beyond max_steps {steps:,}: {cost}",
                f"set train.{key}={max(steps // 4, 1)}",
            )
    if run.prior_layouts and config.prior.batch_size > len(run.prior_layouts):
        yield (
            f"prior.batch_size {config.prior.batch_size} is more than the {len(run.prior_layouts)} layouts of "
            "prior.layouts: a batch holds some of them twice",
            "lower prior.batch_size, or give more layouts",
        )
    if idle := list(idle_keys(config)):
        yield f"without effect here: {'; '.join(idle)}", "leave them out, or set what they act through"


def _looks(run: Run) -> Iterator[tuple[str, str]]:
    """What waits for validations, where there are too few."""
    train = run.config.train
    every = train.validate_every if run.held_out is not None else 0
    count = (train.max_steps // every + (train.max_steps % every > 0)) if every else 0
    if train.sample_every:  # its images may be judged too
        count = max(count, train.max_steps // train.sample_every)
    hint = "lower train.validate_every" if run.held_out is not None else "hold images out: data.validation_share=0.1"
    if train.final == "best" and count < 2:
        yield f"train.final best has {count} validation{'s' * (count != 1)} to choose from: it is the last", hint
    if train.early_stop and count <= train.early_stop:
        yield f"train.early_stop {train.early_stop} never comes: the run is validated {count} times", hint


def idle_keys(config: Config) -> Iterator[str]:
    """Keys that differ from their default, and can do nothing here: each with what it would act through."""
    for keys, through, acts in _ACT_THROUGH:
        if acts(value := _value(config, through)):
            continue
        for key in keys:
            if _value(config, key) != _default(key):
                yield f"{key} ({through} is {'null' if value is None else value})"
    data = config.data
    if data.cache_variants is not None and data.crop == "center" and not data.flip:
        yield "data.cache_variants (data.crop is center, and data.flip false)"
    if data.buckets.upscale and not data.buckets.has_sizes:
        yield "data.buckets.upscale (there are no buckets)"


def _value(config: Section, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _default(key: str) -> Any:
    *sections, name = key.split(".")
    model: Any = Config
    for part in sections:
        model = model.model_fields[part].annotation
    return model.model_fields[name].default


_WHOLE = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
}  # elsewhere no process has all of a weight
_SHOWN_DIGITS = 12
_TEXTS = 10_000  # records whose texts are counted


def preflight(
    run: Run, *, checkpoint: Checkpoint | None = None, costly: bool = True, write_cache: bool = True
) -> Preflight:
    """All checks of a run that is set up and has not begun. Nothing of the run is changed, no generator's state either.

    Args:
        checkpoint: that the run will go on from.
        costly: also the two trial steps, and what is forecast from them.
        write_cache: whether what the trial encodes may go into the store on disk, as in the run itself.

    Returns:
        The same verdict in every process: a check that fails in one fails in all.
    """
    report = Preflight()
    done = checkpoint.step if checkpoint is not None else 0
    with report.timed("data") as lines:
        _check_data(run, lines)
    with report.timed("targets") as lines:
        _check_targets(run, lines)
    if odd := list(setting_warnings(run)):
        with report.timed("settings") as lines:
            for found, hint in odd:
                lines.warn(found, hint)
    with report.timed("base") as lines:
        _check_base(run, checkpoint, lines)
    trial = None
    whole = run.accelerator.distributed_type in _WHOLE
    if costly and not whole:
        with report.timed("gradients") as lines:
            lines.ok(f"not tried: {run.accelerator.distributed_type.value} spreads the weights over processes")
    if costly and whole and not report.failed:
        with report.timed("gradients") as lines:
            trial = try_steps(run, write_cache=write_cache)
            _check_gradients(run, trial, lines)
        if trial.out_of_memory or not trial.bad_samples:
            with report.timed("memory") as lines:
                check_memory(run, trial, lines)
        if not report.failed:
            with report.timed("time") as lines:
                check_time(run, trial, lines, done=done)
    with report.timed("disk") as lines:
        check_disk(run, trial, lines, done=done)
    with report.timed("tracker") as lines:
        check_tracker(run, lines)
    if run.accelerator.num_processes > 1:
        _agree(run, report)
    return report


def _check_data(run: Run, lines: Lines) -> None:
    examples, held_out = run.examples, len(run.held_out.records) if run.held_out else 0
    boxes = run.data_losses[0]["filter"]["boxes"]  # None: only reading every record would say
    counts = examples.bucket_counts()
    sizes = f"{next(iter(counts))} px" if len(counts) == 1 else f"{len(counts)} sizes, most {next(iter(counts))} px"
    known = "" if boxes is None else f", {boxes:,} boxes"
    data, total = run.config.data, len(examples.records) + held_out
    by = f" by data.validation_share {data.validation_share:g}" if held_out and data.validation is None else ""
    text = f"{len(examples.records):,} images to train on, {held_out:,} held out{by}{known}, {sizes}"
    warnings: list[tuple[str, str | None]] = [(line, None) for line in run.data_losses[1]]
    warnings += _long_texts(run)
    if boxes == 0:
        lines.fail(
            f"none of {len(examples.records):,} images has a box", "see `mmdit-lora data check`, and data.filter"
        )
    elif (batch := run.batches["train.batch_size"]) > len(examples.records):
        lines.fail(
            f"a step takes {batch} images, and there are {len(examples.records)} to train on"
            + (f": {held_out} of {total} are held out{by}" if by else ""),
            "lower train.batch_size or train.gradient_accumulation, or give more images"
            + (", or hold none out: data.validation_share=0" if by else ""),
        )
    elif warnings:  # not "ok" in the first line, and the rest of it below
        found, hint = warnings.pop(0)
        lines.warn(f"{text}; {found}", hint)
    else:
        lines.ok(text)
    for found, hint in warnings:
        lines.warn(found, hint)


def _long_texts(run: Run) -> Iterator[tuple[str, str]]:
    """Captions and phrases of which an encoder reads the beginning only, of all records or of some spread over them."""
    held_out: Sequence[Record] = run.held_out.records if run.held_out else []
    records = [*_spread(run.examples.records), *_spread(held_out)]
    total = len(run.examples.records) + len(held_out)
    of = "" if len(records) == total else f" (of {total:,} images, a sample)"
    phrases = dict.fromkeys(box.phrase for record in records for box in record.layout.boxes)
    captions = long_texts(run.pipe, [record.layout.caption for record in records], "captions")
    for found in (captions, long_texts(run.pipe, phrases, "phrases")):
        if found is not None:
            yield found + of, "shorten them, or put what matters first; `mmdit-lora data check` lists them"


def _spread(records: Sequence[Record]) -> Sequence[Record]:
    """At most `_TEXTS` of them."""
    if isinstance(records, ShardedRecords | Subset):
        return spread(records, _TEXTS)
    return [records[n * len(records) // _TEXTS] for n in range(_TEXTS)] if len(records) > _TEXTS else records


def _check_targets(run: Run, lines: Lines) -> None:
    report, start = run.trainable, run.start
    share = 100 * report.trainable_params / max(report.total_params, 1)
    text = f"{report.trainable_params:,} of {report.total_params:,} parameters ({share:.3g} %)"
    details = report.details
    if not details:
        lines.ok(report.summary)
        return
    lora = run.config.lora
    ranks = sorted({lora.r, *lora.rank_pattern.values()})
    lines.ok(
        f"{len(details['targets'])} linears with LoRA of rank {', '.join(map(str, ranks))}: {text}; "
        f"adapter {size_text(details['adapter_bytes'])}"
        + (f"; begins from {start.name}, {start.fingerprint[:_SHOWN_DIGITS]}" if start is not None else "")
    )
    dead = details["dead_targets"]
    if not dead:
        return
    found = f"no gradient ever reaches {listed(dead)}"
    hint = "name the modules without these in lora.targets, block by block where need be"
    lines.warn(found, hint)


def _check_base(run: Run, checkpoint: Checkpoint | None, lines: Lines) -> None:
    digest = run.fingerprints["base"]
    lines.ok(f"{run.config.base} ({run.pipe.transformer.family}), {digest[:_SHOWN_DIGITS]}")
    if checkpoint is None:
        return
    try:
        run.check(checkpoint)
    except InputError as error:
        lines.fail(f"{error.what} ({error.location})", error.hint or "")


def _check_gradients(run: Run, trial: Trial, lines: Lines) -> None:
    if trial.out_of_memory:
        lines.warn("not seen: memory ran out")
        return
    if trial.bad_samples:
        lines.fail(
            f"the loss is no finite number at {listed(trial.bad_samples)}",
            "look at these images; train.mixed_precision=bf16 has the range that fp16 has not",
        )
        return
    if trial.unreached and run.accelerator.num_processes > 1:
        lines.fail(
            f"a step leaves out {listed(trial.unreached)}; with several processes DDP stops at the second step",
            "name the modules without these in lora.targets, or train with one process",
        )
    if trial.outside:
        lines.fail(
            f"{len(trial.outside)} parameters get a gradient that are not to train: {listed(trial.outside)}",
            "freeze the base before the adapter is added",
        )
    still = [name for name in trial.still if name not in _expected_still(run)]
    seen = f"loss {trial.loss:.4f}, {trial.alive} of {trial.alive + len(trial.still)} tensors get a gradient"
    if not trial.alive or (still and run.config.method == "lora"):
        lines.fail(
            f"{len(still)} tensors that are to train get none in the first batches: {listed(still)}",
            "leave their modules out of lora.targets"
            if trial.alive
            else "see that the layout stream is trained and the layouts have boxes",
        )
    elif still:
        lines.warn(f"{seen}; none so far: {listed(still)}")
    else:
        seen += f" ({len(trial.still)} are read by nothing)" if trial.still else ""
        lines.ok(f"{seen}, nothing else does; a batch takes {step_text(trial.step_seconds)}")


def _expected_still(run: Run) -> set[str]:
    """Parameters that are known to get no gradient: of dead targets, the place-holders of absent boxes, and the queries of
    tokens that leave the last block unread."""
    model = run.pipe.transformer
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if name.rpartition(".")[2].startswith("null_")}
    for name, module in model.named_modules():
        if getattr(module, "context_pre_only", False):
            unread = (f"{name}.add_q_proj.", f"{name}.norm_added_q.")
            expected |= {parameter for parameter in names if parameter.startswith(unread)}
    for target in run.trainable.details.get("dead_targets", ()):
        stem = with_adapter(f"{target}.lora_A.weight", "default").partition(".lora_A.")[0]
        expected |= {name for name in names if name.startswith(f"{stem}.lora_")}
    return expected


def _agree(run: Run, report: Preflight) -> None:
    """What fails in one process fails in all: none goes on and waits for one that stopped."""
    mine = [(run.accelerator.process_index, check) for check in report.failed]
    known = {(check.name, check.found) for check in report.checks}
    for process, check in gather_object(mine):
        if (check.name, check.found) not in known:
            found = f"in process {process}: {check.found}"
            report.checks.append(Check(check.name, "failed", found, check.hint))
