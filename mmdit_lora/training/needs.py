"""What a run needs of the machine: memory, time, disk, a tracker. Forecasts from what the trial step measured."""

from __future__ import annotations

import math
import os
import shutil
import socket
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch

from mmdit_lora.config import TrainSection
from mmdit_lora.training.checks import Lines
from mmdit_lora.training.output import CHECKPOINTS
from mmdit_lora.training.run import Run
from mmdit_lora.training.trial import Trial

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
        there, where = free + torch.cuda.memory_reserved(run.accelerator.device), "of the GPU"
    else:
        own = psutil.Process().memory_info().rss
        there, where = psutil.virtual_memory().available + own, "of memory"
    need = trial.peak_bytes + state
    text = f"about {size_text(need)} at the peak, {size_text(there)} {where} to be had"
    if trial.out_of_memory:
        lines.fail(f"a step does not fit into {size_text(there)} {where}", _LESS_MEMORY)
    elif need > there:
        lines.fail(text, _LESS_MEMORY)
    elif need > _TIGHT * there:
        lines.warn(f"{text}: tight", _LESS_MEMORY)
    else:
        lines.ok(text)


def estimate_seconds(run: Run, trial: Trial, *, done: int = 0) -> dict[str, float]:
    """Seconds of the steps that are left, of encoding, of validation and of sampled pictures.

    Args:
        done: steps that a resumed run has behind it.
    """
    settings, examples = run.config.train, run.examples
    steps = max(settings.max_steps - done, 0)
    batches = steps * settings.gradient_accumulation
    world, size = run.accelerator.num_processes, settings.batch_size
    drawn = batches * size * world
    fresh = drawn if examples.variants is None else min(drawn, len(examples.records) * examples.variants)
    forward = trial.step_seconds * _FORWARD / size  # of one picture
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
    cure = "free some space, give another output_dir, or lower train.keep_checkpoints"
    if need > free:
        lines.fail(text, cure)
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
        pictures = events(settings, settings.sample_every, done, last=False) * settings.sample_count
        total += pictures * copies * height * width * 3 // 2
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
