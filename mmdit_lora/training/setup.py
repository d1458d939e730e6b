"""Setting up a run: base, data, adapter, optimizer, everything that the loop reads. Nothing is written yet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mmdit_lora.config.loading import Config
from mmdit_lora.config.schema import FilterSection
from mmdit_lora.data.buckets import Buckets, make_buckets, one_size, parse_ratio
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.data.check import quick_check
from mmdit_lora.data.dataset import loader_workers
from mmdit_lora.data.filters import Filtered, crop_loss, filter_records
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.shards import ShardedRecords, Subset, is_sharded, open_shards, spread
from mmdit_lora.data.sources import open_dataset
from mmdit_lora.data.split import MOST_HELD_OUT, RULE, fingerprint_records, split_records
from mmdit_lora.errors import InputError, listed
from mmdit_lora.layout import Layout
from mmdit_lora.lora import load_adapter, lora_state_dict, remove_adapter
from mmdit_lora.lora.inject import with_adapter
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig
from mmdit_lora.training.checkpoint import Checkpoint, State, checkpoints, save_checkpoint, trainable_parameters
from mmdit_lora.training.deepspeed import open_whole, set_engine
from mmdit_lora.training.ema import EMA
from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
from mmdit_lora.training.fingerprints import fingerprint_encoders, fingerprint_layouts, first_change
from mmdit_lora.training.held_out import PairedLoss
from mmdit_lora.training.load_base import DTYPES, load_base
from mmdit_lora.training.loss import Objective
from mmdit_lora.training.optim import make_optimizer, make_schedule
from mmdit_lora.training.performance import apply_performance
from mmdit_lora.training.prior_preservation import FOLDER, generate_prior, prior_layouts
from mmdit_lora.training.run_dir import CHECKPOINTS, check_output
from mmdit_lora.training.sharding import check_sharding, shards_parameters
from mmdit_lora.training.trainable import FoldedMethod, TrainableReport, refuse_frozen, set_trainable

_OWN, _START = "default", "start"


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter that a run began from, as the trained one names it: no path of this machine.

    Args:
        name: of the adapter's folder; of the run's where that is called "adapter".
        fingerprint: SHA-256 over the names, shapes and values of its tensors.
    """

    name: str
    fingerprint: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def load_initial_adapter(model: nn.Module, adapter: str, *, base_fingerprint: str | None = None) -> InitialAdapter:
    """Give the new adapter of `model` the weights of another one. Optimizer and schedule know nothing of that.

    Args:
        model: with the adapter "default"; changed in place.
        base_fingerprint: of `model`; compared with the one that the other adapter was trained on.

    Raises:
        InputError: it is no adapter, is of another base, or its targets, ranks or strengths are not those of the config:
            both are named.
    """
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        load_adapter(model, adapter, adapter_name=_START, expect_fingerprint=base_fingerprint)
    except InputError as error:
        raise error.at("lora.start") from None
    wanted, found = _targets(model, _OWN), _targets(model, _START)
    if wanted != found:
        raise _misfit(adapter, wanted, found)
    tensors = lora_state_dict(model, _START)
    own, digest = dict(model.named_parameters()), hashlib.sha256()
    with torch.no_grad():
        for name in sorted(tensors):
            own[with_adapter(name, _OWN)].copy_(tensors[name])
            value = tensors[name].detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{name} {tuple(value.shape)}\n".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
    remove_adapter(model, _START)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before)
    path = Path(adapter).resolve()
    return InitialAdapter(path.parent.name if path.name == "adapter" else path.name, digest.hexdigest())


Targets = dict[str, tuple[int, float, bool]]  # name of a linear -> (rank, factor of its update, whether DoRA)


def _targets(model: nn.Module, adapter: str) -> Targets:
    """As PEFT applies them."""
    return {
        name: (int(layer.r[adapter]), round(float(layer.scaling[adapter]), 6), adapter in layer.lora_magnitude_vector)
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }


def _misfit(adapter: str, wanted: Targets, found: Targets) -> InputError:
    missing, more = ([name for name in one if name not in other] for one, other in ((wanted, found), (found, wanted)))
    odd = [name for name in wanted if name in found and wanted[name] != found[name]]
    parts = [f"{len(missing)} targets of the config are not in it ({listed(missing[:2])})"] if missing else []
    parts += [f"{len(more)} of its targets are not in the config ({listed(more[:2])})"] if more else []
    parts += [f"{len(odd)} targets differ, {odd[0]} for one"] if odd else []

    def described(targets: Targets) -> str:
        ranks, factors, dora = (sorted(set(values)) for values in zip(*targets.values(), strict=True))
        endings = sorted({".".join(name.split(".")[-2:]) for name in targets})
        return (
            f"{len(targets)} targets ({listed(endings)}) of rank {listed(ranks)}, "
            f"scaled by {listed(f'{factor:g}' for factor in factors)}{', DoRA' if any(dora) else ''}"
        )

    return InputError(
        f"{adapter} does not fit this config: it has {described(found)}; the config asks for {described(wanted)}; "
        + "; ".join(parts),
        location="lora.start",
        hint="give lora.r, lora.alpha, lora.targets, patterns, rslora and dora as the adapter was trained with (its "
        "adapter_config.json states them), or leave lora.start out",
    )


_CHECKED, _CROPS = 64, 1000  # records of shards that are read before a run: their bytes, and their sizes


@dataclass(frozen=True)
class RunData:
    """Records to train on and records held out, and what `data.filter` took of them.

    Args:
        training: what the filter left of `data.path`. validation: of `data.validation`; None where a share of the former
            is held out. remarks: lines for people, from reading them.
    """

    records: Sequence[Record]
    held_out: Sequence[Record]
    training: Filtered
    validation: Filtered | None
    remarks: tuple[str, ...] = ()

    def losses(self, config: Config, buckets: Buckets) -> tuple[dict[str, Any], list[str]]:
        """What filter and centre crop cost: counts for the report, and lines for people.

        Raises:
            InputError: a file is no image, or one is too small for any bucket.
        """
        records = self.records
        looked_at = spread(records, _CROPS) if isinstance(records, ShardedRecords | Subset) else records
        crop = crop_loss(looked_at, buckets, min_visible=config.data.min_visible)
        counts: dict[str, Any] = {"filter": self.training.to_dict(), "center_crop": crop.to_dict()}
        lines = [*self.remarks, self.training.summary, crop.summary]
        if self.validation is not None:
            counts["filter_validation"] = self.validation.to_dict()
            summary = self.validation.summary
            lines.append(summary and f"{config.data.validation}: {summary}")
        return counts, [line for line in lines if line]


def read_data(config: Config) -> RunData:
    """Raises `InputError`: a folder is no data set, the filter leaves nothing, or too little to hold a share out."""
    data = config.data

    remarks: list[str] = []

    def read(path: str) -> Filtered:
        if is_sharded(path):
            found = _read_shards(path, config)
            remarks.extend(found.remarks)
            return Filtered(found, [], {}, found.boxes)
        records = open_dataset(
            path, bbox_format=data.bbox_format, bbox_units=data.bbox_units, on_warning=remarks.append
        )
        quick_check(records)
        return filter_records(records, data.filter)

    training = read(data.path)
    if data.validation is not None:
        validation = read(data.validation)
        return RunData(training.records, validation.records, training, validation, tuple(remarks))
    sides = split_records(training.records, data.validation_share, most=MOST_HELD_OUT)
    return RunData(*sides, training, None, tuple(remarks))


def _read_shards(path: str, config: Config) -> ShardedRecords:
    """The index knows every layout's and header's state as of when it was made; a few records are read all the same."""
    if config.data.filter != FilterSection():
        raise InputError(
            f"does not act on shards, and {path} is some",
            location="data.filter",
            hint="filter when the shards are written: `mmdit-lora data shard D --out S --filter ...`",
        )
    records = open_shards(path, bbox_format=config.data.bbox_format, bbox_units=config.data.bbox_units)
    for record in spread(records, _CHECKED):
        record.read_bytes()
    return records


def run_buckets(config: Config, pipe: LayoutPipeline) -> Buckets:
    """The sizes of the training images.

    Raises:
        InputError: the base cannot have a resolution, or a ratio is none.
    """
    data, chosen = config.data, config.data.buckets
    key = "data.buckets.resolutions" if chosen.resolutions else "data.resolution"
    resolutions = chosen.resolutions or [data.resolution or pipe.default_side]
    for side in resolutions:
        try:
            pipe.check_side(side)
        except InputError as error:
            raise InputError(error.what, location=key, hint=error.hint) from None
    if not chosen.has_sizes:
        return one_size((resolutions[0],) * 2)
    try:
        ratios = [parse_ratio(text) for text in chosen.ratios] or [1.0]
    except InputError as error:
        raise InputError(error.what, location="data.buckets.ratios", hint=error.hint) from None
    transformer, cell = pipe.transformer, pipe.vae_scale_factor
    most = transformer.max_latent_side
    return make_buckets(
        resolutions,
        ratios,
        multiple=cell * transformer.latent_multiple,
        largest_side=None if most is None else most * cell,
        upscale=chosen.upscale,
    )


EMA_FILE = "average.safetensors"


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
    examples: EncodedDataset
    held_out: EncodedDataset | None
    fingerprints: dict[str, str]
    dtype: torch.dtype
    data_losses: tuple[dict[str, Any], list[str]]
    ema: EMA | None = None
    start: InitialAdapter | None = None  # the adapter that it began from
    method: FoldedMethod | None = None  # instead of the config's
    prior: EncodedDataset | None = None
    prior_layouts: list[Layout] = field(default_factory=list)
    state: State = field(default_factory=State)
    base_losses: Tensor | None = None
    compared: tuple[int, PairedLoss] | None = None  # the newest validation, and its step
    fidelity: dict[str, Any] | None = None  # of the images sampled last
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
    def settings(self) -> SamplingConfig:
        return SamplingConfig(**self.config.sample.model_dump(exclude={"seed"}))

    def name_of(self, position: int) -> str:
        """`file:line` of the record that comes at a position of the run."""
        return self.examples.record_at(position).location

    def last_saved(self) -> str:
        """The newest checkpoint, for messages."""
        saved = checkpoints(self.folder / CHECKPOINTS)
        return f"{saved[-1].folder} is from before." if saved else "There is no checkpoint yet."

    @property
    def seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self.started

    @property
    def bare_model(self) -> nn.Module:
        """The transformer without Accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def start_prior(self) -> None:
        """Generate the old domain's images by the base, in the main process; training batches have some of them beside their own.

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
                generate_prior(self.pipe, self.prior_layouts, folder, settings, seed=config.train.seed)
            self.pipe.transformer.train()
        self.accelerator.wait_for_everyone()
        plain = config.data.model_copy(update={"crop": "center", "flip": False, "box_jitter": 0.0})
        self.prior = EncodedDataset(
            read_dataset(folder),
            self.examples.encoder,
            config.model_copy(update={"data": plain}),
            buckets=one_size((side, side)),
            batch=self.batches["prior.batch_size"],
            stream="prior",
            workers=min(1, self.examples.workers),
        )

    @property
    def is_sharded(self) -> bool:
        """Whether a forward of the model needs every process."""
        return shards_parameters(self.accelerator.distributed_type)

    def save(self) -> Checkpoint:
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
        return save_checkpoint(
            self.folder / CHECKPOINTS,
            self.state.step,
            self.bare_model,
            self.optimizer,
            state,
            extra={} if self.ema is None else {EMA_FILE: self.ema.state()},
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
        if changed := first_change(saved["fingerprints"], self.fingerprints, location=str(checkpoint.folder)):
            raise changed
        for key, size in self.batches.items():
            before = saved["batches"].get(key, size)
            if size != before:
                raise InputError(
                    f"{key}: a step has {size} samples over all processes, and had {before} when the run was started",
                    location=str(checkpoint.folder),
                    hint="batch_size x gradient_accumulation x processes must be the same",
                )
        return saved

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on where a checkpoint was written.

        Raises:
            InputError: see `check`; or it is of another set of trainable parameters.
        """
        saved = self.check(checkpoint)
        checkpoint.load(self.bare_model, self.optimizer)
        if self.ema is not None:
            self.ema.load(checkpoint.folder / EMA_FILE)
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


def prepare_run(config: Config, *, resume: bool = False, method: FoldedMethod | None = None) -> Run:
    """Everything up to the first step; writes nothing. What `--check-only` does.

    Raises:
        InputError: the base, the data or the output folder do not allow the run.
    """
    check_output(Path(config.output_dir), config, resume)
    settings = config.train
    # Its state is the process's: an earlier run, or the caller, may have another precision, and keeps it.
    AcceleratorState._shared_state = {}
    # Without the hint, Accelerate takes several CPU processes for as many lone ones, which would all write the run.
    accelerator = Accelerator(mixed_precision=settings.mixed_precision, cpu=not torch.accelerator.is_available())
    dtype = DTYPES[settings.mixed_precision]
    check_sharding(accelerator.distributed_type, config)
    data = read_data(config)
    layouts = prior_layouts(config)
    open_whole(accelerator)
    pipe, base_fingerprint = load_base(config, dtype)
    buckets = run_buckets(config, pipe)
    _check_guidance(config, pipe)
    fingerprints = {
        "base": base_fingerprint,
        "encoders": fingerprint_encoders(pipe),
        "data": fingerprint_records(data.records),
    }
    if data.held_out:
        fingerprints["validation"] = fingerprint_records(data.held_out)
        if data.validation is None:
            fingerprints["split"] = RULE
    if layouts:
        fingerprints["prior"] = fingerprint_layouts(layouts)
    pipe.to(accelerator.device)

    torch.manual_seed(settings.seed)  # the adapter's initial weights
    trainable = set_trainable(pipe.transformer, config, method)
    start = _start(config, pipe, base_fingerprint, resume)
    if start is not None:
        fingerprints["start"] = start.fingerprint
    refuse_frozen(pipe.transformer, trainable)
    pipe.transformer.train()
    # Every process opened the same files: DDP need not send what does not train around, and cannot where it is quantised.
    named = (*pipe.transformer.named_parameters(), *pipe.transformer.named_buffers())
    pipe.transformer._ddp_params_and_buffers_to_ignore = [n for n, tensor in named if not tensor.requires_grad]
    apply_performance(pipe.transformer, settings, device=accelerator.device, dtype=dtype)
    optimizer = make_optimizer(pipe.transformer, config)
    schedule = make_schedule(optimizer, settings)
    encoder = LayoutEncoder(
        pipe, EncodingCache(config.data.cache), base=config.base, slots=pipe.transformer.layout_slots
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        set_engine(accelerator, config)
    model, optimizer = accelerator.prepare(pipe.transformer, optimizer)
    # Only now: sharding puts other parameters in the place of those that were.
    ema = EMA(accelerator.unwrap_model(model), settings.ema_decay) if settings.ema_decay else None
    batch = settings.batch_size * settings.gradient_accumulation * accelerator.num_processes
    workers = loader_workers(config.data.workers, accelerator.device, accelerator.num_processes)
    encoded = partial(EncodedDataset, encoder=encoder, config=config, buckets=buckets, workers=workers)
    examples = encoded(data.records, batch=batch)
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
        held_out=encoded(data.held_out, stream="held out") if data.held_out else None,
        fingerprints=fingerprints,
        dtype=dtype,
        data_losses=(counts, [*warnings, *examples.bucket_warnings()]),
        ema=ema,
        start=start,
        method=method,
        prior_layouts=layouts,
    )


def restore_dtype(run: Run) -> None:
    """What trained in fp32 goes back to the dtype of the rest, so that the pipeline can be used as it is."""
    if run.config.method != "lora":
        for parameter in trainable_parameters(run.pipe.transformer).values():
            parameter.data = parameter.data.to(run.dtype)
    if run.method is not None:  # the linears that it moved
        for name, parameter in run.pipe.transformer.named_parameters():
            if "layout" in name:
                parameter.data = parameter.data.to(run.dtype)


def _start(config: Config, pipe: LayoutPipeline, base_fingerprint: str, resume: bool) -> InitialAdapter | None:
    """Begin from `lora.start`. A run that goes on has its weights in the checkpoint: there it need no longer be at hand."""
    adapter = config.lora.start
    if adapter is None:
        return None
    found = checkpoints(Path(config.output_dir) / CHECKPOINTS) if resume else []
    if found and not Path(adapter).exists() and (saved := found[-1].state().get("start")):
        return InitialAdapter(**saved)
    return load_initial_adapter(pipe.transformer, adapter, base_fingerprint=base_fingerprint)


def _check_guidance(config: Config, pipe: LayoutPipeline) -> None:
    if config.flow.guidance != 1.0 and not getattr(pipe.transformer.config, "guidance_embeds", False):
        raise InputError(
            f"is {config.flow.guidance:g}, and {config.base} has no such input: it is not guidance-distilled",
            location="flow.guidance",
            hint="leave it at 1.0; sample.guidance_scale is the guidance of sampling",
        )
