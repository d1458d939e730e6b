"""The training run: Accelerate does devices and processes; what is drawn comes from (seed, position) alone.

So a run that was killed and resumed makes the same draws as one that was not, see `examples`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from mmdit_lora.config import Config
from mmdit_lora.data.cache import DiskCache
from mmdit_lora.data.order import seeded
from mmdit_lora.errors import InputError
from mmdit_lora.evaluate import measure, readable
from mmdit_lora.evaluate.draw import contact_sheet, draw_boxes, save_png
from mmdit_lora.files import write_json, write_text
from mmdit_lora.pipelines import LayoutPipeline, PaintSettings, paint
from mmdit_lora.training.checkpoint import (
    Checkpoint,
    checkpoints,
    save_checkpoint,
    trainable_parameters,
)
from mmdit_lora.training.encode import Encoder
from mmdit_lora.training.encode_store import EncodingStore
from mmdit_lora.training.examples import Examples
from mmdit_lora.training.held_out import PairedLoss, compare_losses, held_out_losses
from mmdit_lora.training.method import TrainableReport, set_trainable
from mmdit_lora.training.opening import DTYPES, open_base
from mmdit_lora.training.output import CHECKPOINTS, CONFIG, REPORT, check_output
from mmdit_lora.training.result import save_result
from mmdit_lora.training.run_data import read_data
from mmdit_lora.training.split import fingerprint_records
from mmdit_lora.training.step import losses
from mmdit_lora.training.switches import apply_switches
from mmdit_lora.training.tracking import Tracker, make_tracker

Progress = Callable[[int, dict[str, float]], None]


@dataclass
class TrainResult:
    """What a finished run leaves. `report` is what `report.json` holds."""

    pipe: LayoutPipeline
    folder: Path
    report: dict[str, Any]
    is_main: bool = True  # of several processes, the one that writes


@dataclass
class Run:
    """Everything that the loop reads, set up by `prepare_run`."""

    config: Config
    accelerator: Accelerator
    pipe: LayoutPipeline
    model: nn.Module
    trainable: TrainableReport
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LambdaLR
    examples: Examples
    held_out: Examples | None
    fingerprints: dict[str, str]
    dtype: torch.dtype
    data_losses: tuple[dict[str, Any], list[str]]
    step: int = 0
    tracker_run_id: str | None = None
    base_losses: Tensor | None = None
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def size(self) -> tuple[int, int]:
        return self.examples.size

    @property
    def settings(self) -> PaintSettings:
        sample = self.config.sample
        return PaintSettings(
            steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            layout_scale=sample.layout_scale,
            layout_window=sample.layout_window,
            size=self.size,
        )

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def train(config: Config, *, resume: bool = False, on_progress: Progress | None = None) -> TrainResult:
    """Train what `config.method` names, and leave `<output_dir>/adapter` (or `base`) and `report.json`.

    Args:
        resume: go on from the newest checkpoint of `output_dir`; without one, start.
        on_progress: called with the step and its scalars, every `train.log_every` steps.

    Raises:
        InputError: the base, the data or the output folder do not allow the run; nothing is written then.
    """
    run = prepare_run(config, resume=resume)
    main = run.accelerator.is_main_process
    if main:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_text(run.folder / CONFIG, config.to_yaml())
    if run.held_out is not None:
        run.base_losses = held_out_losses(run.pipe.transformer, run.held_out, run.accelerator.device)
    if resume and (found := checkpoints(run.folder / CHECKPOINTS)):
        _load(run, found[-1])
    tracker = _make_tracker(run) if main else None
    run.tracker_run_id = tracker.run_id if tracker else None
    try:
        _loop(run, tracker, on_progress or (lambda *_: None))
        comparison = _validate(run, tracker) if main else None
        run.accelerator.wait_for_everyone()
        run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        report = _report(run, comparison)
        if main:
            save_result(run.pipe, config, report)
            _settle(run)
            write_json(run.folder / REPORT, report)
        if tracker is not None:
            tracker.summary({key: value for key, value in report.items() if isinstance(value, int | float | str)})
    except BaseException:
        if tracker is not None:
            tracker.finish(failed=True)
        raise
    if tracker is not None:
        tracker.finish()
    return TrainResult(run.pipe, run.folder, report, main)


def prepare_run(config: Config, *, resume: bool = False) -> Run:
    """Everything up to the first step; writes nothing. What `--check-only` does.

    Raises:
        InputError: see `train`.
    """
    folder = Path(config.output_dir)
    check_output(folder, config, resume)
    precision = config.train.mixed_precision
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    # Without the hint, Accelerate takes several CPU processes for as many lone ones, which would all write the run.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    dtype = DTYPES[precision]
    data = read_data(config)
    pipe, base_fingerprint = open_base(config, dtype)
    size = picture_size(config, pipe)
    _check_guidance(config, pipe)
    fingerprints = {"base": base_fingerprint, "data": fingerprint_records(data.records)}
    pipe.to(accelerator.device)

    torch.manual_seed(config.train.seed)  # the adapter's initial weights
    trainable = set_trainable(pipe.transformer, config)
    pipe.transformer.train()
    # Every process opened the same files: DDP need not send the frozen part around, and cannot where it is quantised.
    frozen = [name for name, parameter in pipe.transformer.named_parameters() if not parameter.requires_grad]
    pipe.transformer._ddp_params_and_buffers_to_ignore = frozen
    settings = config.train
    apply_switches(pipe.transformer, settings, device=accelerator.device, dtype=dtype)
    optimizer = torch.optim.AdamW(
        trainable_parameters(pipe.transformer).values(),
        lr=settings.learning_rate,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
    )
    schedule = get_scheduler(
        settings.lr_schedule,
        optimizer,
        num_warmup_steps=settings.warmup_steps,
        num_training_steps=settings.max_steps,
    )
    cache = config.data.cache
    encoder = Encoder(pipe, EncodingStore(DiskCache(cache), pipe, config.base) if cache is not None else None)
    slots = pipe.transformer.config.layout_slots
    model, optimizer = accelerator.prepare(pipe.transformer, optimizer)
    return Run(
        config=config,
        accelerator=accelerator,
        pipe=pipe,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        schedule=schedule,
        examples=Examples(data.records, encoder, config, size=size, slots=slots),
        held_out=Examples(data.held_out, encoder, config, size=size, slots=slots) if data.held_out else None,
        fingerprints=fingerprints,
        dtype=dtype,
        data_losses=data.losses(config, size),
    )


def _settle(run: Run) -> None:
    """What trained in fp32 goes back to the dtype of the rest, so that the pipeline can be used as it is."""
    if run.config.method != "lora":
        for parameter in trainable_parameters(run.pipe.transformer).values():
            parameter.data = parameter.data.to(run.dtype)


def _loop(run: Run, tracker: Tracker | None, on_progress: Progress) -> None:
    settings = run.config.train
    last = settings.max_steps
    while run.step < last:
        scalars = _step(run)
        run.step += 1
        if tracker is None:
            continue
        if run.step % settings.log_every == 0 or run.step == last:
            tracker.log(run.step, scalars)
            on_progress(run.step, scalars)
        if settings.validate_every and run.step % settings.validate_every == 0 and run.step < last:
            _validate(run, tracker)
        if settings.sample_every and run.step % settings.sample_every == 0:
            _show(run, tracker)
        if settings.checkpoint_every and run.step % settings.checkpoint_every == 0:
            _save(run)


def _step(run: Run) -> dict[str, float]:
    """One optimizer step: draw, loss, backward, clip, update."""
    settings, accelerator = run.config.train, run.accelerator
    per_process, world = settings.batch_size, accelerator.num_processes
    total = 0.0
    for micro in range(settings.gradient_accumulation):
        first = ((run.step * settings.gradient_accumulation + micro) * world + accelerator.process_index) * per_process
        batch = run.examples.training_batch(range(first, first + per_process)).to(accelerator.device)
        # The adapter's dropout draws from the global generator: put it where it would be in an undisturbed run.
        torch.manual_seed(seeded("dropout", settings.seed, first).initial_seed())
        is_last = micro == settings.gradient_accumulation - 1
        with nullcontext() if is_last else accelerator.no_sync(run.model), accelerator.autocast():
            flow = run.config.flow
            loss = losses(run.model, batch, inside=flow.inside_weight, guidance=flow.guidance).mean()
        value = loss.item()
        if not math.isfinite(value):
            names = [str(run.examples.record_at(p).image) for p in range(first, first + per_process)]
            raise RuntimeError(f"the loss is {value} at step {run.step}, on {', '.join(names)}")
        accelerator.backward(loss / settings.gradient_accumulation)
        total += value / settings.gradient_accumulation
    norm = accelerator.clip_grad_norm_(run.model.parameters(), settings.max_grad_norm)
    rate = float(run.schedule.get_last_lr()[0])
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad()
    if world > 1:
        total = accelerator.reduce(torch.tensor(total, device=accelerator.device), "mean").item()
    return {"loss": total, "learning_rate": rate, "grad_norm": torch.as_tensor(norm).item()}


def _validate(run: Run, tracker: Tracker | None) -> PairedLoss | None:
    if run.held_out is None or run.base_losses is None:
        return None
    # Not through DDP's wrapper: only the main process comes here, and the wrapper would wait for the others.
    now = held_out_losses(run.pipe.transformer, run.held_out, run.accelerator.device)
    comparison = compare_losses(run.base_losses, now)
    if tracker is not None:
        tracker.log(run.step, {"held_out/loss": comparison.trained, "held_out/loss_minus_base": comparison.difference})
    return comparison


def _show(run: Run, tracker: Tracker) -> None:
    """Paint the first held-out layouts, always from the same noise; where the reader can judge them, their fidelity."""
    source = run.held_out or run.examples
    layouts = [record.layout for record in source.records[: run.config.train.sample_count]]
    if not layouts:
        return
    run.pipe.transformer.eval()
    with run.accelerator.autocast():  # the prepared model answers in fp32, which the VAE would not take
        pictures = paint(run.pipe, layouts, run.settings, seed=run.config.sample.seed)
    run.pipe.transformer.train()
    boxed = [draw_boxes(picture, layout) for picture, layout in zip(pictures, layouts, strict=True)]
    save_png(contact_sheet(boxed), run.folder / "samples" / f"step_{run.step:07d}.png")
    tracker.pictures(run.step, "samples", pictures, layouts)
    if readable(layouts):
        fidelity = measure(pictures, layouts).to_dict()
        tracker.log(run.step, {f"fidelity/{name}": float(fidelity[name]) for name in fidelity if name != "boxes"})


def _make_tracker(run: Run) -> Tracker:
    tracking = run.config.tracking
    return make_tracker(
        tracking.tracker,
        project=tracking.project,
        run_name=tracking.run_name,
        mode=tracking.wandb_mode,
        folder=run.folder,
        run_id=run.tracker_run_id,
        config=run.config.model_dump(mode="json") | {"fingerprints": run.fingerprints},
    )


def _save(run: Run) -> None:
    scaler = run.accelerator.scaler
    state = {
        "config": run.config.model_dump(mode="json"),
        "fingerprints": run.fingerprints,
        "schedule_step": run.schedule.last_epoch,
        "scaler": scaler.state_dict() if scaler is not None else None,
        "tracker_run_id": run.tracker_run_id,
        "seconds": run.seconds,
    }
    model = run.accelerator.unwrap_model(run.model)
    save_checkpoint(
        run.folder / CHECKPOINTS, run.step, model, run.optimizer, state, keep=run.config.train.keep_checkpoints
    )


def _load(run: Run, checkpoint: Checkpoint) -> None:
    state = checkpoint.state()
    for what, digest in run.fingerprints.items():
        if state["fingerprints"][what] != digest:
            raise InputError(
                f"the {what} is not the one that this run was started with",
                where=str(checkpoint.folder),
                cure="start a new run",
            )
    model = run.accelerator.unwrap_model(run.model)
    checkpoint.load(model, run.optimizer)
    run.schedule.last_epoch = state["schedule_step"]
    for group, base, factor in zip(
        run.optimizer.param_groups, run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(run.schedule.last_epoch)
    run.schedule._last_lr = [group["lr"] for group in run.optimizer.param_groups]
    if state["scaler"] and run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.tracker_run_id = checkpoint.step, state["tracker_run_id"]
    run.seconds_before = state["seconds"]


def picture_size(config: Config, pipe: LayoutPipeline) -> tuple[int, int]:
    """(height, width) of the training pictures in pixels.

    Raises:
        InputError: the base cannot have this size.
    """
    side = config.data.resolution or pipe.default_side
    try:
        pipe.check_side(side)
    except InputError as error:
        raise InputError(error.what, where="data.resolution", cure=error.cure) from None
    return side, side


def _check_guidance(config: Config, pipe: LayoutPipeline) -> None:
    if config.flow.guidance != 1.0 and not getattr(pipe.transformer.config, "guidance_embeds", False):
        raise InputError(
            f"is {config.flow.guidance:g}, and {config.base} has no such input: it is not guidance-distilled",
            where="flow.guidance",
            cure="leave it at 1.0; sample.guidance_scale is the guidance of sampling",
        )


def _report(run: Run, comparison: PairedLoss | None) -> dict[str, Any]:
    return {
        "method": run.config.method,
        "base": run.config.base,
        "family": run.pipe.transformer.family,
        "fingerprints": run.fingerprints,
        "steps": run.step,
        "seconds": run.seconds,
        "trainable_params": run.trainable.trainable_params,
        "total_params": run.trainable.total_params,
        "pictures": len(run.examples.records),
        **run.data_losses[0],
        "held_out_loss": comparison.to_dict() if comparison else None,
    }
