"""The checks before a run: every way to train nothing, to stop late or to write half a file that shows in seconds.

`prepare_run` already refuses what makes a run impossible to set up (no such target, zero gates, no data). A dry run of a few
forward and backward passes shows whether every weight that is to train gets a gradient and no other does, and what a step
costs; it puts back every bit that it changes. Its time and memory give forecasts of memory, time and disk. Settings that are
allowed but may mean something else than was intended get a line each.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
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
from mmdit_lora.data.records import Record
from mmdit_lora.data.sampler import seeded
from mmdit_lora.data.shards import ShardedRecords, Subset, spread
from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora.inject import with_adapter
from mmdit_lora.pipelines.sampling import long_texts
from mmdit_lora.training.checkpoint import Checkpoint, trainable_parameters
from mmdit_lora.training.loss import flow_matching_loss
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import Run
from mmdit_lora.training.throughput import peak_memory

_DIGITS = 12  # of a fingerprint that are shown
_TEXTS = 10_000  # records whose texts are counted
FEW_IMAGES = 1_000  # for a layout stream: CreatiLayout was trained on 2.7 million, the embedded bases on 4,000 and more
# Elsewhere no process has all of a weight.
_WHOLE = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Args:
        name: of the check; several lines may have the same.
        state: "failed" keeps the run from starting.
        found: the result, with its figures.
        hint: how to fix it; None where nothing is to be fixed.
        seconds: that it took; 0 for further lines of a check.
    """

    name: str
    state: Literal["ok", "warning", "failed"]
    found: str
    hint: str | None = None
    seconds: float = 0.0


# Lines of a check that is being made: its name is set when they are added to the report.
Lines = Iterator[Check]
_ok, _warning, _failed = (partial(Check, "", state) for state in ("ok", "warning", "failed"))


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
        if self.failed:
            first, *more = self.failed
            others = f"; {len(more)} more failed: {', '.join(check.name for check in more)}" if more else ""
            raise InputError(first.found + others, location=f"preflight, {first.name}", hint=first.hint)

    def add(self, name: str, lines: Iterable[Check], *, start: float | None = None) -> None:
        """Make a check; its first line gets the time (since `start`)."""
        start = time.perf_counter() if start is None else start
        made = [replace(line, name=name) for line in lines]
        self.checks += [replace(line, seconds=time.perf_counter() - start) for line in made[:1]] + made[1:]


def preflight(
    run: Run, *, checkpoint: Checkpoint | None = None, costly: bool = True, write_cache: bool = True
) -> Preflight:
    """All checks of a run that is set up and has not begun. Nothing of the run is changed, no generator's state either.

    Args:
        checkpoint: that the run will go on from.
        costly: also the dry run, and what is forecast from it.
        write_cache: whether what the dry run encodes may go into the cache on disk, as in the run itself.

    Returns:
        The same verdict in every process: a check that fails in one fails in all.
    """
    report, done = Preflight(), checkpoint.step if checkpoint is not None else 0
    report.add("data", _check_data(run))
    report.add("targets", _check_targets(run))
    report.add("settings", (_warning(found, hint) for found, hint in setting_warnings(run)))
    report.add("base", _check_base(run, checkpoint))
    dry: DryRun | None = None
    kind = run.accelerator.distributed_type
    if costly and kind not in _WHOLE:
        report.add("gradients", [_ok(f"not tried: {kind.value} spreads the weights over processes")])
    elif costly and not report.failed:
        start = time.perf_counter()
        dry = dry_run(run, write_cache=write_cache)
        report.add("gradients", _check_gradients(run, dry), start=start)
        if dry.out_of_memory or not dry.bad_samples:
            report.add("memory", _check_memory(run, dry))
        if not report.failed:
            report.add("time", _check_time(run, dry, done=done))
    report.add("disk", _check_disk(run, dry, done=done))
    report.add("tracker", check_tracker(run))
    if run.accelerator.num_processes > 1:  # what fails in one process fails in all: none waits for one that stopped
        known = {(check.name, check.found) for check in report.checks}
        for process, check in gather_object([(run.accelerator.process_index, check) for check in report.failed]):
            if (check.name, check.found) not in known:
                found = f"in process {process}: {check.found}"
                report.checks.append(Check(check.name, "failed", found, check.hint))
    return report


# --- data, targets, base ----------------------------------------------------------------------------------------------


def _check_data(run: Run) -> Lines:
    examples, held_out = run.examples, len(run.held_out.records) if run.held_out else 0
    images, boxes = len(examples.records), run.data_losses[0]["filter"]["boxes"]
    counts = examples.bucket_counts()
    sizes = f"{next(iter(counts))} px" if len(counts) == 1 else f"{len(counts)} sizes, most {next(iter(counts))} px"
    known = "" if boxes is None else f", {boxes:,} boxes"  # None: only reading every record would say
    data, batch = run.config.data, run.batches["train.batch_size"]
    by = f" by data.validation_share {data.validation_share:g}" if held_out and data.validation is None else ""
    text = f"{images:,} images to train on, {held_out:,} held out{by}{known}, {sizes}"
    warnings: list[tuple[str, str | None]] = [(line, None) for line in run.data_losses[1]]
    warnings += _long_texts(run)
    if boxes == 0:
        yield _failed(f"none of {images:,} images has a box", "see `mmdit-lora data check`, and data.filter")
    elif batch > images:
        yield _failed(
            f"a step takes {batch} images, and there are {images} to train on"
            + (f": {held_out} of {images + held_out} are held out{by}" if by else ""),
            "lower train.batch_size or train.gradient_accumulation, or give more images"
            + (", or hold none out: data.validation_share=0" if by else ""),
        )
    elif warnings:  # not "ok" in the first line, and the rest of it below
        found, hint = warnings.pop(0)
        yield _warning(f"{text}; {found}", hint)
    else:
        yield _ok(text)
    yield from (_warning(found, hint) for found, hint in warnings)


def _long_texts(run: Run) -> Iterator[tuple[str, str]]:
    """Captions and phrases of which an encoder reads the beginning only, of all records or of some spread over them."""
    sets: list[Sequence[Record]] = [run.examples.records, *([run.held_out.records] if run.held_out else [])]
    records: list[Record] = []
    for each in sets:
        if isinstance(each, ShardedRecords | Subset):
            records += spread(each, _TEXTS)
        else:
            records += [each[n * len(each) // _TEXTS] for n in range(_TEXTS)] if len(each) > _TEXTS else each
    total = sum(map(len, sets))
    of = "" if len(records) == total else f" (of {total:,} images, a sample)"
    phrases = dict.fromkeys(box.phrase for record in records for box in record.layout.boxes)
    captions = long_texts(run.pipe, [record.layout.caption for record in records], "captions")
    for found in (captions, long_texts(run.pipe, phrases, "phrases")):
        if found is not None:
            yield found + of, "shorten them, or put what matters first; `mmdit-lora data check` lists them"


def _check_targets(run: Run) -> Lines:
    report, start, details = run.trainable, run.start, run.trainable.details
    if not details:
        yield _ok(report.summary)
        return
    share = 100 * report.trainable_params / max(report.total_params, 1)
    ranks = sorted({run.config.lora.r, *run.config.lora.rank_pattern.values()})
    yield _ok(
        f"{len(details['targets'])} linears with LoRA of rank {', '.join(map(str, ranks))}: "
        f"{report.trainable_params:,} of {report.total_params:,} parameters ({share:.3g} %); "
        f"adapter {size_text(details['adapter_bytes'])}"
        + (f"; begins from {start.name}, {start.fingerprint[:_DIGITS]}" if start is not None else "")
    )
    if dead := details["dead_targets"]:
        hint = "name the modules without these in lora.targets, block by block where need be"
        yield _warning(f"no gradient ever reaches {listed(dead)}", hint)


def _check_base(run: Run, checkpoint: Checkpoint | None) -> Lines:
    yield _ok(f"{run.config.base} ({run.pipe.transformer.family}), {run.fingerprints['base'][:_DIGITS]}")
    if checkpoint is not None:
        try:
            run.check(checkpoint)
        except InputError as error:
            yield _failed(f"{error.what} ({error.location})", error.hint or "")


# --- settings ---------------------------------------------------------------------------------------------------------

# Keys -> the key that they act through, and whether they do at a value of it.
_ACT_THROUGH: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("flow.logit_mean flow.logit_std", "flow.timesteps", lambda v: v == "logit_normal"),
    ("flow.mode_scale", "flow.timesteps", lambda v: v == "mode"),
    ("flow.min_snr_gamma", "flow.weighting", lambda v: v == "min_snr"),
    ("lora.r lora.alpha lora.dropout lora.targets lora.rank_pattern", "method", lambda v: v == "lora"),
    ("lora.alpha_pattern lora.rslora lora.dora", "method", lambda v: v == "lora"),
    ("lora.init", "lora.start", lambda v: v is None),
    ("stream.parts", "method", lambda v: v == "layout_stream"),
    ("prior.count prior.batch_size prior.weight", "prior.layouts", lambda v: v is not None),
    ("tracking.project tracking.wandb_mode", "tracking.tracker", lambda v: v == "wandb"),
    ("tracking.run_name", "tracking.tracker", lambda v: v != "none"),
    ("train.sample_count sample.seed", "train.sample_every", lambda v: v > 0),
    ("train.keep_checkpoints", "train.checkpoint_every", lambda v: v > 0),
    ("data.validation_share", "data.validation", lambda v: v is None),
    ("data.resolution", "data.buckets.resolutions", lambda v: not v),
)


def setting_warnings(run: Run) -> Iterator[tuple[str, str]]:
    """Per warning: what is unusual, and how to change it."""
    config, train = run.config, run.config.train
    steps, held_out = train.max_steps, run.held_out is not None
    if train.warmup_steps >= steps:
        rates = zip(run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True)
        reached = max(base * factor(steps - 1) for base, factor in rates)
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
    if config.method == "layout_stream" and (images := len(run.examples.records)) < FEW_IMAGES:
        yield (
            f"a layout stream is to learn from {images:,} images: below some {FEW_IMAGES:,} it learns to obey few boxes",
            "let the base generate more (`mmdit-lora data synthesize`), and train an adapter on yours",
        )
    if train.ema_decay and steps < (horizon := round(1 / (1 - train.ema_decay))):
        ends = min(train.ema_decay, steps / (9 + steps))
        yield (
            f"train.ema_decay {train.ema_decay:g} averages over some {horizon:,} steps, and the run has {steps:,}: the decay "
            f"rises to {ends:.3g} only",
            "lower train.ema_decay, or leave it out",
        )
    validations = events(train, train.validate_every if held_out else 0, 0, last=True)
    if train.sample_every:  # fidelity of its images is a validation too
        validations = max(validations, steps // train.sample_every)
    hint = "lower train.validate_every" if held_out else "hold images out: data.validation_share=0.1"
    if train.final == "best" and validations < 2:
        plural = "s" * (validations != 1)
        yield f"train.final best has {validations} validation{plural} to choose from: it is the last", hint
    if train.early_stop and validations <= train.early_stop:
        yield f"train.early_stop {train.early_stop} never comes: the run is validated {validations} times", hint
    for key, cost in (
        ("sample_every", "no image is sampled"),
        ("validate_every", "the only validation is at the end"),
        ("checkpoint_every", "the only checkpoint is at the end, and a kill before it loses all"),
    ):
        if key in train.model_fields_set and (every := getattr(train, key)) > steps:
            found = f"train.{key} {every:,} is beyond max_steps {steps:,}: {cost}"
            yield found, f"set train.{key}={max(steps // 4, 1)}"
    if run.prior_layouts and config.prior.batch_size > len(run.prior_layouts):
        yield (
            f"prior.batch_size {config.prior.batch_size} is more than the {len(run.prior_layouts)} layouts of "
            "prior.layouts: a batch holds some of them twice",
            "lower prior.batch_size, or give more layouts",
        )
    if idle := list(idle_keys(config)):
        yield f"without effect here: {'; '.join(idle)}", "leave them out, or set what they act through"


def idle_keys(config: Config) -> Iterator[str]:
    """Keys that differ from their default, and can do nothing here: each with what it would act through."""

    def value_and_default(key: str) -> tuple[Any, Any]:
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = getattr(section, part)
        return getattr(section, name), type(section).model_fields[name].default

    for keys, through, acts in _ACT_THROUGH:
        given, _ = value_and_default(through)
        for key in keys.split() if not acts(given) else ():
            value, default = value_and_default(key)
            if value != default:
                yield f"{key} ({through} is {'null' if given is None else given})"
    data = config.data
    if data.cache_variants is not None and data.crop == "center" and not data.flip:
        yield "data.cache_variants (data.crop is center, and data.flip false)"
    if data.buckets.upscale and not data.buckets.has_sizes:
        yield "data.buckets.upscale (there are no buckets)"


# --- the dry run ------------------------------------------------------------------------------------------------------

_SEARCHED = 64  # batches that a large image with boxes is searched in
_MOST_TRIES = 4  # batches that a weight may need for its first gradient
_MOVE = 1e-3  # of the largest weight in the step of the dry run
_FP16_SCALE = 1024.0  # small gradients would be 0 in fp16; the run's own scaler is not to be touched


@dataclass
class DryRun:
    """What a few steps showed.

    Args:
        loss: of the first batch.
        bad_samples: `file:line` of those whose loss is NaN or infinite.
        outside: parameters that got a gradient and are not to train.
        still: parameters that were to get one, and got none or 0 throughout.
        unreached: parameters to train that the last batch had no part for, not even a gradient of 0: DDP takes none such.
        alive: how many got one.
        step_seconds: forward and backward of a batch, warm.
        data_seconds: of a batch whose images are encoded. encode_seconds: of encoding a batch, beside it.
        peak_bytes: most memory at any time so far.
        latents_bytes, text_bytes: of one image's latents and of one caption's embeddings.
        out_of_memory: it ended for want of memory.
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
    out_of_memory: bool = False


def dry_run(run: Run, *, write_cache: bool = True) -> DryRun:
    """Forward and backward on batches of the run, with small steps between; then all is put back, bit for bit.

    Args:
        write_cache: whether what is encoded may go into the cache on disk, as in the run itself.
    """
    dry = DryRun()
    try:
        with _put_back(run), nullcontext() if write_cache else run.examples.without_disk():
            _try_steps(run, dry)
    except torch.OutOfMemoryError:
        dry.out_of_memory = True
    dry.peak_bytes = peak_memory()
    return dry


def _try_steps(run: Run, dry: DryRun) -> None:
    model = run.pipe.transformer
    trainable = trainable_parameters(model)
    first, *others = _batches_with_boxes(run)
    dry.loss, dry.bad_samples = _backward(run, first, dry)
    if dry.bad_samples:
        return
    dry.outside = [n for n, p in model.named_parameters() if p.grad is not None and n not in trainable]
    # B first, A behind it: with B at 0 no gradient reaches A. So too with the gates of a new stream, its modulation behind them
    # and its time embedding behind that.
    waiting = _without_gradient(trainable)
    for positions in others[:_MOST_TRIES]:
        _move(trainable)
        _, bad = _backward(run, positions, dry)
        waiting = _without_gradient({name: trainable[name] for name in waiting})
        if bad or not waiting:
            break
    dry.still, dry.alive = waiting, len(trainable) - len(waiting)
    dry.unreached = [name for name, p in trainable.items() if p.grad is None]


def _backward(run: Run, positions: range, dry: DryRun) -> tuple[float, list[str]]:
    """One batch; gradients are those of this batch alone. Returns its loss, and the samples whose loss is not finite."""
    settings, device = run.config.train, run.accelerator.device
    run.pipe.transformer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    batch = run.examples.batch(positions)
    drawn = dry.data_seconds = time.perf_counter() - start
    if run.examples.variants is not None:  # its images are encoded now
        run.examples.batch(positions)
        dry.data_seconds = time.perf_counter() - start - drawn
    dry.encode_seconds = max(drawn - dry.data_seconds, 0.0)
    dry.latents_bytes = max(dry.latents_bytes, batch.x0[0].nbytes)
    dry.text_bytes = sum(value[0].nbytes for value in batch.texts.values())
    batch = batch.to(device)
    torch.manual_seed(seeded("dropout", settings.seed, positions[0]).initial_seed())
    _synchronize(device)
    start = time.perf_counter()
    # Not through DDP's wrapper: its hooks stand still as long as it was not called, so no process waits for another.
    with run.accelerator.autocast():
        losses = flow_matching_loss(run.pipe.transformer, batch, run.objective)
    (losses.mean() * (_FP16_SCALE if settings.mixed_precision == "fp16" else 1.0)).backward()
    _synchronize(device)
    dry.step_seconds = time.perf_counter() - start
    values = losses.detach().float().cpu()
    bad = [run.name_of(p) for p, finite in zip(positions, values.isfinite().tolist(), strict=True) if not finite]
    return values.mean().item(), bad


def _batches_with_boxes(run: Run) -> list[range]:
    """The first batches of this process that have boxes; that of the largest images among the next ones comes first."""
    size, world, examples = run.config.train.batch_size, run.accelerator.num_processes, run.examples
    starts = [(n * world + run.accelerator.process_index) * size for n in range(_SEARCHED)]
    own = [range(start, start + size) for start in starts]
    boxed = [each for each in own if any(examples.record_at(p).layout.boxes for p in each)] or own
    areas = [math.prod(examples.size_at(each[0])) for each in boxed]
    return ([boxed[areas.index(max(areas))]] if max(areas) > areas[0] else []) + boxed


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
    model, device = run.pipe.transformer, run.accelerator.device
    trainable = trainable_parameters(model)
    # Not on the GPU: with `method: full` it would hold the model twice.
    before = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
    python, numpy = random.getstate(), np.random.get_state()
    keys = getattr(model, "sample_keys", None)
    key_values = None if keys is None else keys.value
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.zero_grad(set_to_none=True)
        if keys is not None:
            keys.value = key_values
        with torch.no_grad():
            for name, parameter in trainable.items():
                parameter.copy_(before[name])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_gradients(run: Run, dry: DryRun) -> Lines:
    if dry.out_of_memory:
        yield _warning("not tried: memory ran out")
        return
    if dry.bad_samples:
        yield _failed(
            f"the loss is NaN or infinite at {listed(dry.bad_samples)}",
            "look at these images; train.mixed_precision=bf16 has the range that fp16 has not",
        )
        return
    if dry.unreached and run.accelerator.num_processes > 1:
        yield _failed(
            f"a step leaves out {listed(dry.unreached)}; with several processes DDP stops at the second step",
            "name the modules without these in lora.targets, or train with one process",
        )
    if dry.outside:
        yield _failed(
            f"{len(dry.outside)} parameters get a gradient that are not to train: {listed(dry.outside)}",
            "freeze the base before the adapter is added",
        )
    expected = _expected_still(run)
    still = [name for name in dry.still if name not in expected]
    seen = f"loss {dry.loss:.4f}, {dry.alive} of {dry.alive + len(dry.still)} tensors get a gradient"
    if not dry.alive or (still and run.config.method == "lora"):
        yield _failed(
            f"{len(still)} tensors that are to train get none in the first batches: {listed(still)}",
            "leave their modules out of lora.targets"
            if dry.alive
            else "see that the layout stream is trained and the layouts have boxes",
        )
    elif still:
        yield _warning(f"{seen}; none so far: {listed(still)}")
    else:
        seen += f" ({len(dry.still)} are read by nothing)" if dry.still else ""
        yield _ok(f"{seen}, nothing else does; a batch takes {_step_text(dry.step_seconds)}")


def _expected_still(run: Run) -> set[str]:
    """Parameters that are known to get no gradient: of dead targets, the place-holders of absent boxes, and the queries of
    tokens that leave the last block unread."""
    model = run.pipe.transformer
    last = [name for name, module in model.named_modules() if getattr(module, "context_pre_only", False)]
    unread = [f"{name}.{part}." for name in last for part in ("add_q_proj", "norm_added_q")]
    for target in run.trainable.details.get("dead_targets", ()):
        stem = with_adapter(f"{target}.lora_A.weight", "default").partition(".lora_A.")[0]
        unread.append(f"{stem}.lora_")
    names = [name for name, _ in model.named_parameters()]
    return {n for n in names if n.startswith(tuple(unread)) or n.rpartition(".")[2].startswith("null_")}


# --- resources --------------------------------------------------------------------------------------------------------

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


def _check_memory(run: Run, dry: DryRun) -> Lines:
    """The peak of the dry run and the optimizer's state against what is free."""
    device = run.accelerator.device
    if device.type == "cuda":
        there, location = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), "of the GPU"
    else:
        there, location = psutil.virtual_memory().available + psutil.Process().memory_info().rss, "of memory"
    need = dry.peak_bytes + run.trainable.trainable_params * _OPTIMIZER_BYTES[run.config.train.optimizer]
    text = f"about {size_text(need)} at the peak, {size_text(there)} {location} to be had"
    if dry.out_of_memory:
        yield _failed(f"a step does not fit into {size_text(there)} {location}", _LESS_MEMORY)
    elif need > there:
        yield _failed(text, _LESS_MEMORY)
    else:
        yield _warning(f"{text}: tight", _LESS_MEMORY) if need > _TIGHT * there else _ok(text)


def estimate_seconds(run: Run, dry: DryRun, *, done: int = 0) -> dict[str, float]:
    """Seconds of the steps that are left, of encoding, of validation and of sampled images.

    Args:
        done: steps that a resumed run has behind it.
    """
    settings, examples = run.config.train, run.examples
    batches = max(settings.max_steps - done, 0) * settings.gradient_accumulation
    size = settings.batch_size * run.accelerator.num_processes
    fresh = batches * size
    if examples.variants is not None:
        fresh = min(fresh, len(examples.records) * examples.variants)
    forward = dry.step_seconds * _FORWARD / settings.batch_size  # of one image
    held_out = min(len(run.held_out.records), _MOST_VALIDATED) if run.held_out else 0
    validations = events(settings, settings.validate_every, done, last=True) if held_out else 0
    images = min(settings.sample_count, len((run.held_out or examples).records))
    images *= events(settings, settings.sample_every, done, last=False)
    sample, stated = run.config.sample, run.pipe.config
    sampling_steps = sample.steps or int(stated.get("num_inference_steps") or 28)
    guidance = sample.guidance_scale if sample.guidance_scale is not None else stated.get("guidance_scale") or 7.0
    return {
        "steps": batches * (dry.step_seconds + dry.data_seconds),
        "encoding": fresh / size * dry.encode_seconds,
        "validation": (validations * _VALIDATION_DRAWS + (8 if held_out else 0)) * held_out * forward,
        "sampling": images * sampling_steps * (2 if guidance > 1 else 1) * forward,
    }


def _check_time(run: Run, dry: DryRun, *, done: int) -> Lines:
    seconds, left = estimate_seconds(run, dry, done=done), max(run.config.train.max_steps - done, 0)
    parts = [f"{name} {duration_text(value)}" for name, value in seconds.items() if value >= 1]
    detail = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    step = _step_text(seconds["steps"] / max(left, 1))
    yield _ok(f"about {duration_text(sum(seconds.values()))} for {left:,} steps of {step}{detail}")


def _check_disk(run: Run, dry: DryRun | None, *, done: int) -> Lines:
    """Bytes that the run will write against what is free: an error before the work, and no half-written file after it."""
    need, (disk, free) = _output_bytes(run, done=done), _free(run.folder)
    text = f"{size_text(need)} to be written, {size_text(free)} free at {disk}"
    hint = "free some space, give another output_dir, or lower train.keep_checkpoints"
    yield _failed(text, hint) if need > free else _ok(text)
    if run.config.data.cache is None or dry is None or not dry.latents_bytes:
        return
    cache, records = Path(run.config.data.cache), run.examples.records
    captions = len({record.layout.caption for record in records})
    most = len(records) * (run.examples.variants or 0) * dry.latents_bytes + captions * dry.text_bytes
    disk, free = _free(cache)
    text = f"cache: at most {size_text(most)}, {size_text(free)} free at {disk}"
    if most <= free:
        yield _ok(text)
    elif disk == cache.absolute():  # how much of it is there already, nobody has counted
        yield _warning(text, "free some space, or see `mmdit-lora data cache`")
    else:
        yield _failed(text, "free some space, or give another data.cache (null: keep what is encoded in memory)")


def _free(path: Path) -> tuple[Path, int]:
    """The nearest folder above (or at) `path` that is there, and the bytes free in it."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path, shutil.disk_usage(path).free


def _output_bytes(run: Run, *, done: int) -> int:
    settings = run.config.train
    weights = total = 4 * run.trainable.trainable_params
    if run.config.method != "lora":  # the whole pipeline is written
        parts = [part for part in run.pipe.components.values() if isinstance(part, nn.Module)]
        total = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    if settings.checkpoint_every:
        one = weights * (2 if settings.ema_decay else 1)
        one += run.trainable.trainable_params * _OPTIMIZER_BYTES[settings.optimizer]
        # Of those that are kept, of the best, and of the one that is being written before an old one goes.
        number = min(settings.keep_checkpoints + 1, math.ceil(settings.max_steps / settings.checkpoint_every)) + 1
        held = sum(f.stat().st_size for f in (run.folder / CHECKPOINTS).glob("step_*/*") if f.is_file())
        total += max(number * one - held, one)
    if settings.sample_every and settings.sample_count:
        # PNG of RGB at half its raw size; the tracker keeps a second copy.
        copies = 1 if run.config.tracking.tracker == "none" else 2
        images = events(settings, settings.sample_every, done, last=False) * settings.sample_count
        total += images * copies * math.prod(run.examples.size_at(0)) * 3 // 2
    return total


def check_tracker(run: Run) -> Lines:
    """Whether the tracker's package is there, and what it needs to start."""
    tracking = run.config.tracking
    name = tracking.tracker
    if name == "none":
        yield _ok("none")
    elif find_spec(name) is None:
        yield _failed(
            f"the package {name} is not installed", f"install it: `pip install {name}`, or tracking.tracker=none"
        )
    elif name == "tensorboard":
        yield _ok(f"tensorboard, in {run.folder / 'tensorboard'}")
    elif tracking.wandb_mode != "online":
        later = "; `wandb sync` uploads it later" if tracking.wandb_mode == "offline" else ""
        yield _ok(f"W&B, {tracking.wandb_mode}{later}")
    else:
        import wandb

        offline = "set tracking.wandb_mode=offline and upload later with `wandb sync`"
        if not wandb.login(prompt=False, verify=False):
            hint = f"run `wandb login`, set WANDB_API_KEY, or {offline}"
            yield _failed("W&B is to be online, and there is no API key", hint)
            return
        address = urlsplit(os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url)
        port = address.port or (80 if address.scheme == "http" else 443)
        try:
            socket.create_connection((address.hostname or "", port), timeout=_REACH_SECONDS).close()
            yield _ok(f"W&B, online at {address.hostname}")
        except OSError as error:
            yield _failed(f"W&B at {address.hostname} cannot be reached ({error})", offline)


def events(settings: TrainSection, every: int, done: int, *, last: bool) -> int:
    """How often something due every so many steps comes after step `done`; `last`: also after the last step."""
    if not every or done >= settings.max_steps:
        return 0
    return settings.max_steps // every - done // every + (last and settings.max_steps % every != 0)


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
    hours, rest = divmod(minutes, 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{hours} h {rest} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _step_text(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
