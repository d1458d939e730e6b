"""A run set up: base, data, adapter, optimizer, everything that the loop reads. Nothing is written yet."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mmdit_lora.config import Config
from mmdit_lora.data.buckets import one_size
from mmdit_lora.data.cache import DiskCache
from mmdit_lora.data.records import read_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, PaintSettings
from mmdit_lora.training.averaging import Averaged
from mmdit_lora.training.checkpoint import Checkpoint, State, checkpoints, save_checkpoint, trainable_parameters
from mmdit_lora.training.encode import Encoder
from mmdit_lora.training.encode_store import EncodingStore
from mmdit_lora.training.examples import Examples
from mmdit_lora.training.fingerprints import fingerprint_encoders, fingerprint_layouts, first_change
from mmdit_lora.training.held_out import PairedLoss
from mmdit_lora.training.method import TrainableReport, refuse_frozen, set_trainable
from mmdit_lora.training.opening import DTYPES, open_base
from mmdit_lora.training.optim import make_optimizer, make_schedule
from mmdit_lora.training.output import CHECKPOINTS, check_output
from mmdit_lora.training.prior import FOLDER, Prior, paint_prior, prior_layouts
from mmdit_lora.training.run_data import read_data, run_buckets
from mmdit_lora.training.sharding import check_sharding, is_sharded
from mmdit_lora.training.split import fingerprint_records
from mmdit_lora.training.start import Start, begin_from
from mmdit_lora.training.step import Objective
from mmdit_lora.training.switches import apply_switches
from mmdit_lora.training.zero import open_whole, set_engine

AVERAGE = "average.safetensors"


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
    average: Averaged | None = None
    start: Start | None = None  # the adapter that it began from
    prior: Prior | None = None
    prior_layouts: list[Layout] = field(default_factory=list)
    state: State = field(default_factory=State)
    base_losses: Tensor | None = None
    compared: tuple[int, PairedLoss] | None = None  # the newest validation, and its step
    fidelity: dict[str, Any] | None = None  # of the pictures painted last
    started: float = field(default_factory=time.perf_counter)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def batches(self) -> dict[str, int]:
        """Samples of an optimizer step over all processes: of the data set, and of the old domain."""
        train, prior = self.config.train, self.config.prior
        times = train.gradient_accumulation * self.accelerator.num_processes
        return {
            "train.batch_size": train.batch_size * times,
            "prior.batch_size": prior.batch_size * times if prior.layouts is not None else 0,
        }

    @property
    def objective(self) -> Objective:
        flow = self.config.flow
        return Objective(flow.inside_weight, flow.guidance, flow.weighting, flow.min_snr_gamma)

    @property
    def settings(self) -> PaintSettings:
        sample = self.config.sample
        return PaintSettings(
            steps=sample.steps,
            guidance_scale=sample.guidance_scale,
            layout_scale=sample.layout_scale,
            layout_window=sample.layout_window,
        )

    @property
    def seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    @property
    def bare_model(self) -> nn.Module:
        """The transformer without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def start_prior(self) -> None:
        """Paint the old domain with the base, in the main process, and have it beside the training samples.

        Raises:
            InputError: see `read_dataset`.
        """
        if not self.prior_layouts:
            return
        config, folder = self.config, self.folder / FOLDER
        side = config.data.resolution or self.pipe.default_side
        if self.accelerator.is_main_process:
            settings = replace(self.settings, size=(side, side))
            self.pipe.transformer.eval()
            with self.accelerator.autocast():
                paint_prior(self.pipe, self.prior_layouts, folder, settings, seed=config.train.seed)
            self.pipe.transformer.train()
        self.accelerator.wait_for_everyone()
        plain = config.data.model_copy(update={"crop": "center", "flip": False, "box_jitter": 0.0})
        size = config.prior.batch_size
        examples = Examples(
            read_dataset(folder),
            self.examples.encoder,
            config.model_copy(update={"data": plain}),
            buckets=one_size((side, side)),
            slots=self.examples.slots,
            batch=self.batches["prior.batch_size"],
            draws="prior",
        )
        self.prior = Prior(examples, size)

    @property
    def is_sharded(self) -> bool:
        """Whether a forward of the model needs every process."""
        return is_sharded(self.accelerator.distributed_type)

    def save(self) -> None:
        """Write a checkpoint, and prune: the newest `train.keep_checkpoints` stay, and the best.

        In the main process; where parameters are spread over processes, all of them call it, and the main one writes.
        """
        scaler = self.accelerator.scaler
        state = {
            "config": self.config.model_dump(mode="json"),
            "fingerprints": self.fingerprints,
            "start": None if self.start is None else self.start.to_dict(),
            "batches": self.batches,
            "schedule_step": self.schedule.last_epoch,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "run": asdict(self.state) | {"seconds": self.seconds},
        }
        save_checkpoint(
            self.folder / CHECKPOINTS,
            self.state.step,
            self.bare_model,
            self.optimizer,
            state,
            extra={} if self.average is None else {AVERAGE: self.average.state()},
            keep=self.config.train.keep_checkpoints,
            best=self.state.best_step,
            write=self.accelerator.is_main_process,
        )

    def check(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a checkpoint holds, if this run can go on from it.

        Raises:
            InputError: it is damaged, or of another base or data set, or of steps of another number of samples.
        """
        saved = checkpoint.state()
        if changed := first_change(saved["fingerprints"], self.fingerprints, where=str(checkpoint.folder)):
            raise changed
        for key, size in self.batches.items():
            before = saved["batches"].get(key, size)
            if size != before:
                raise InputError(
                    f"{key}: a step has {size} samples over all processes, and had {before} when the run was started",
                    where=str(checkpoint.folder),
                    cure="batch_size x gradient_accumulation x processes must be the same",
                )
        return saved

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written.

        Raises:
            InputError: see `check`; or it is of another set of trainable parameters.
        """
        saved = self.check(checkpoint)
        checkpoint.load(self.bare_model, self.optimizer)
        if self.average is not None:
            self.average.load(checkpoint.folder / AVERAGE)
        # The rate is a function of the step reached and of this config, whose max_steps may be another one.
        self.schedule.last_epoch = saved["schedule_step"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.schedule.last_epoch)
        self.schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if saved.get("scaler") and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.state = State(**saved["run"])


def prepare_run(config: Config, *, resume: bool = False) -> Run:
    """Everything up to the first step; writes nothing. What `--check-only` does.

    Raises:
        InputError: the base, the data or the output folder do not allow the run.
    """
    check_output(Path(config.output_dir), config, resume)
    settings = config.train
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    # Without the hint, Accelerate takes several CPU processes for as many lone ones, which would all write the run.
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=not torch.accelerator.is_available())
    dtype = DTYPES[settings.mixed_precision]
    check_sharding(accelerator.distributed_type, config)
    data = read_data(config)
    layouts = prior_layouts(config)
    open_whole(accelerator)
    pipe, base_fingerprint = open_base(config, dtype)
    buckets = run_buckets(config, pipe)
    _check_guidance(config, pipe)
    fingerprints = {
        "base": base_fingerprint,
        "encoders": fingerprint_encoders(pipe),
        "data": fingerprint_records(data.records),
    }
    if data.held_out:
        fingerprints["validation"] = fingerprint_records(data.held_out)
    if layouts:
        fingerprints["prior"] = fingerprint_layouts(layouts)
    pipe.to(accelerator.device)

    torch.manual_seed(settings.seed)  # the adapter's initial weights
    trainable = set_trainable(pipe.transformer, config)
    start = _start(config, pipe, base_fingerprint, resume)
    if start is not None:
        fingerprints["start"] = start.fingerprint
    refuse_frozen(pipe.transformer, trainable)
    pipe.transformer.train()
    # Every process opened the same files: DDP need not send what does not train around, and cannot where it is quantised.
    named = (*pipe.transformer.named_parameters(), *pipe.transformer.named_buffers())
    pipe.transformer._ddp_params_and_buffers_to_ignore = [n for n, tensor in named if not tensor.requires_grad]
    apply_switches(pipe.transformer, settings, device=accelerator.device, dtype=dtype)
    optimizer = make_optimizer(pipe.transformer, config)
    schedule = make_schedule(optimizer, settings)
    cache = config.data.cache
    encoder = Encoder(pipe, EncodingStore(DiskCache(cache), pipe, config.base) if cache is not None else None)
    slots = pipe.transformer.config.layout_slots
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_engine(accelerator, config)
    model, optimizer = accelerator.prepare(pipe.transformer, optimizer)
    # Only now: sharding puts other parameters in the place of those that were.
    average = Averaged(accelerator.unwrap_model(model), settings.ema_decay) if settings.ema_decay else None
    batch = settings.batch_size * settings.gradient_accumulation * accelerator.num_processes
    examples = Examples(data.records, encoder, config, buckets=buckets, slots=slots, batch=batch)
    counts, warnings = data.losses(config, buckets)
    return Run(
        config=config,
        accelerator=accelerator,
        pipe=pipe,
        model=model,
        trainable=trainable,
        optimizer=optimizer,
        schedule=schedule,
        examples=examples,
        held_out=Examples(data.held_out, encoder, config, buckets=buckets, slots=slots) if data.held_out else None,
        fingerprints=fingerprints,
        dtype=dtype,
        data_losses=(counts, [*warnings, *examples.bucket_warnings()]),
        average=average,
        start=start,
        prior_layouts=layouts,
    )


def settle(run: Run) -> None:
    """What trained in fp32 goes back to the dtype of the rest, so that the pipeline can be used as it is."""
    if run.config.method != "lora":
        for parameter in trainable_parameters(run.pipe.transformer).values():
            parameter.data = parameter.data.to(run.dtype)
    if run.config.method == "subspace":  # the linears that it moved
        for name, parameter in run.pipe.transformer.named_parameters():
            if "layout" in name:
                parameter.data = parameter.data.to(run.dtype)


def _start(config: Config, pipe: LayoutPipeline, base_fingerprint: str, resume: bool) -> Start | None:
    """Begin from `lora.start`. A run that goes on has its weights in the checkpoint: there it need no longer be at hand."""
    adapter = config.lora.start
    if adapter is None:
        return None
    found = checkpoints(Path(config.output_dir) / CHECKPOINTS) if resume else []
    if found and not Path(adapter).exists() and (saved := found[-1].state().get("start")):
        return Start(**saved)
    return begin_from(pipe.transformer, adapter, base_fingerprint=base_fingerprint)


def _check_guidance(config: Config, pipe: LayoutPipeline) -> None:
    if config.flow.guidance != 1.0 and not getattr(pipe.transformer.config, "guidance_embeds", False):
        raise InputError(
            f"is {config.flow.guidance:g}, and {config.base} has no such input: it is not guidance-distilled",
            where="flow.guidance",
            cure="leave it at 1.0; sample.guidance_scale is the guidance of sampling",
        )
