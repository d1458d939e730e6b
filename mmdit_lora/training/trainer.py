"""A training run from its config to what it leaves behind: the steps, and what comes between them (log, validate, save, stop).

What is drawn comes from (seed, position) alone: a run that was killed and resumed makes the same draws as one that was not,
and two processes those of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from mmdit_lora.config.loading import Config, as_config
from mmdit_lora.errors import InputError, shown
from mmdit_lora.files import write_json, write_text
from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.training.callbacks import Callback
from mmdit_lora.training.checkpoint import Checkpoint, checkpoints, prune_checkpoints, trainable_parameters
from mmdit_lora.training.held_out import PairedLoss, held_out_losses
from mmdit_lora.training.isolation import isolated
from mmdit_lora.training.preflight import preflight
from mmdit_lora.training.prior_preservation import without_adapter
from mmdit_lora.training.result import save_result
from mmdit_lora.training.resumable_tracker import resumable
from mmdit_lora.training.run_dir import CHECKPOINTS, CONFIG, REPORT, run_folder
from mmdit_lora.training.setup import EMA_FILE, Run, prepare_run, restore_dtype
from mmdit_lora.training.sharding import full_tensor, reshard
from mmdit_lora.training.step import train_step, training_batches
from mmdit_lora.training.stopping import Interrupted, caught_signals, disk_full_as_error
from mmdit_lora.training.throughput import Throughput
from mmdit_lora.training.tracking import NullTracker, Tracker, make_tracker
from mmdit_lora.training.trainable import FoldedMethod
from mmdit_lora.training.validation import compare, is_due, validate

__all__ = ["Callback", "TrainResult", "prepare_run", "train"]


@dataclass
class TrainResult:
    """What a finished run leaves. `report` is what `report.json` holds."""

    pipe: LayoutPipeline
    folder: Path
    report: dict[str, Any]
    is_main: bool = True  # of several processes, the one that writes
    comparison: PairedLoss | None = None


def train(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    method: FoldedMethod | None = None,
) -> TrainResult:
    """Train what `config.method` names, and leave `<output_dir>/adapter` (or `base`) and `report.json`.

    What a run sets for the whole process (Accelerate's state, generators, os.environ, ...) is afterwards what it was.

    Args:
        config: a config, its values as a mapping, or the path of its YAML file.
        resume: go on from the newest checkpoint of `output_dir`; without one, start.
        callbacks: called as the run goes on, see `Callback`.
        method: instead of the config's, which must be layout_stream; for comparisons, see `FoldedMethod`.

    Raises:
        InputError: the base, the data, the machine or the output folder do not allow the run; nothing is written then.
        Diverged: the loss or the gradient is NaN or infinite. Interrupted: SIGTERM or Ctrl-C came; the run is saved.
        DiskFull: the disk is full; the last checkpoint is whole.
    """
    config = as_config(config)
    if wrong := [callback for callback in callbacks if not isinstance(callback, Callback)]:
        raise InputError(
            f"holds {shown(wrong[0])}", location="callbacks", hint="give objects of subclasses of Callback"
        )
    with isolated(), run_folder(config, resume=resume), disk_full_as_error(Path(config.output_dir)):
        run = prepare_run(config, resume=resume, method=method)
        saved = checkpoints(run.folder / CHECKPOINTS) if resume else []
        checkpoint = saved[-1] if saved else None
        report = preflight(run, checkpoint=checkpoint, costly=config.train.preflight)
        if run.accelerator.is_main_process:
            for callback in callbacks:
                callback.on_preflight(report)
        report.refuse_failed()
        return _Trainer(run, callbacks).train(checkpoint, resume=resume)


class _Trainer:
    """One run.

    Args:
        run: set up, with nothing written yet.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks = run, callbacks
        self.is_main = run.accelerator.is_main_process
        self.takes_part = self.is_main or run.is_sharded  # in what needs the whole model
        self.tracker: Tracker = NullTracker()

    def train(self, checkpoint: Checkpoint | None, *, resume: bool) -> TrainResult:
        """Begin, take the steps, save the result."""
        run, config = self.run, self.run.config
        if self.is_main:
            write_text(run.folder / CONFIG, config.to_yaml())
        run.start_prior()
        if run.held_out is not None:
            # A new adapter changes nothing; one that was trained before is off for the base's own losses.
            with nullcontext() if run.start is None else without_adapter(run.pipe.transformer):
                base = held_out_losses(run.pipe.transformer, run.held_out, run.accelerator.device)
            run.base_losses = base.per_image
        reshard(run.pipe.transformer)
        if checkpoint is not None:
            run.load(checkpoint)
            if self.is_main:
                prune_checkpoints(run.folder / CHECKPOINTS, config.train.keep_checkpoints, run.state.best_step)
        if self.is_main:
            self.tracker = _make_tracker(run, resume=resume)
        run.state.tracker_run_id = self.tracker.run_id
        try:
            self.take_steps()
            result = self.finish()
        except BaseException as error:
            self.tracker.finish(failed=not isinstance(error, Interrupted))
            raise
        self.tracker.finish()
        return result

    def take_steps(self) -> None:
        """Every step up to `train.max_steps`, or to an early stop. Raises `Diverged`, `Interrupted`."""
        run, settings, state = self.run, self.run.config.train, self.run.state
        meter = Throughput()
        measured = saved = state.step  # every process counts: what is on the disk depends on when it reads
        with caught_signals() as signal_name, closing(training_batches(run)) as batches:
            # A run may have been killed after its early stop was saved: it trains no further.
            while state.step < settings.max_steps and not (settings.early_stop and state.stale >= settings.early_stop):
                logs = (state.step + 1) % settings.log_every == 0 or state.step + 1 == settings.max_steps
                record, more = train_step(run, batches, meter, with_norms=logs and self.takes_part)
                state.step += 1
                if logs:
                    speed = meter.read((state.step - measured) * run.batches["train.batch_size"])
                    measured = state.step
                    scalars = {name: getattr(record, name) for name in ("loss", "learning_rate", "grad_norm")}
                    scalars |= more | {f"speed/{name}": value for name, value in speed.items()}
                    self.tracker.log(state.step, scalars)
                    record = replace(record, logged=scalars if self.is_main else {})
                for callback in self.callbacks:
                    callback.on_step(record)
                with meter.phase("pause"):
                    better = is_due(run) and self.validate()
                    stops = self._agree(signal_name() is not None)
                    due = settings.checkpoint_every and (state.step % settings.checkpoint_every == 0 or better or stops)
                    if due:
                        self.save()
                        saved = state.step
                if stops:
                    raise Interrupted(signal_name() or "a signal", state.step if settings.checkpoint_every else None)
        # A run that ended may go on with more steps, from where it ended.
        if settings.checkpoint_every and saved != state.step:
            self.save()

    def validate(self) -> bool:
        """Validate and sample in the main process; whether this is the best so far, known to all."""
        run, state = self.run, self.run.state
        if self.takes_part:
            metrics, score = validate(run, self.tracker)
            self._on_validation(metrics)
            if score is not None and (state.best is None or score > state.best):
                state.best_step, state.best, state.stale = state.step, score, 0
            elif score is not None:
                state.stale += 1
        if run.accelerator.num_processes > 1:
            shared = [(state.best_step, state.best, state.stale)]
            broadcast_object_list(shared)
            state.best_step, state.best, state.stale = shared[0]
        return state.best_step == state.step

    def save(self) -> None:
        """Write a checkpoint in the main process; where parameters are spread over processes, all take part."""
        if self.takes_part:
            self._on_save(self.run.save().folder)

    def finish(self) -> TrainResult:
        """Save the weights that were chosen, the report, and what the tracker gets at the end."""
        run, config = self.run, self.run.config
        self._choose_weights()
        comparison = self._compare() if self.takes_part else None
        trained = trainable_parameters(run.bare_model)
        weights = {name: full_tensor(parameter) for name, parameter in trained.items()} if run.is_sharded else None
        run.accelerator.wait_for_everyone()
        run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        report = _report(run, comparison)
        if self.is_main:
            folder = save_result(
                run.pipe, config, report, weights, fold=None if run.method is None else run.method.fold
            )
            restore_dtype(run)
            write_json(run.folder / REPORT, report)
            self._on_save(folder)
            if config.method == "lora":
                self.tracker.artifact(folder, report)
            self.tracker.summary({key: value for key, value in report.items() if isinstance(value, int | float | str)})
        return TrainResult(run.pipe, run.folder, report, self.is_main, comparison)

    def _on_validation(self, metrics: Mapping[str, float]) -> None:
        if metrics:
            self.tracker.log(self.run.state.step, metrics)
        if metrics and self.is_main:
            for callback in self.callbacks:
                callback.on_validation(self.run.state.step, metrics)

    def _on_save(self, folder: Path) -> None:
        for callback in self.callbacks if self.is_main else ():
            callback.on_save(folder)

    def _agree(self, asked: bool) -> bool:
        """Whether any process was asked to stop: all stop after the same step."""
        accelerator = self.run.accelerator
        if accelerator.num_processes == 1:
            return asked
        if asked:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())

    def _choose_weights(self) -> None:
        """Put what is to be saved into the model: the moving average, and of the best step where that is asked for.

        Raises:
            InputError: the best step has no checkpoint.
        """
        run, best = self.run, self.run.state.best_step
        if run.config.train.final == "best" and best is not None and best != run.state.step:
            saved = {checkpoint.step: checkpoint for checkpoint in checkpoints(run.folder / CHECKPOINTS)}
            if best not in saved:
                raise InputError(
                    f"is best, and the checkpoint of the best step, {best}, is gone",
                    location="train.final",
                    hint="set it to last",
                )
            saved[best].state()  # whole, or refused
            saved[best].load_weights(run.bare_model)
            if run.ema is not None:
                run.ema.load(saved[best].folder / EMA_FILE)
            run.compared = None
        if run.ema is not None:
            run.ema.copy_to_model()

    def _compare(self) -> PairedLoss | None:
        """What is saved against the base, on the held-out images."""
        run = self.run
        if run.compared is not None and run.compared[0] == run.state.step:
            return run.compared[1]
        run.ema = None  # its weights are in the model
        compared = compare(run)
        if compared is None:
            return None
        paired = compared[1]
        self._on_validation({"held_out/loss": paired.trained, "held_out/loss_minus_base": paired.difference})
        return paired


def _make_tracker(run: Run, *, resume: bool) -> Tracker:
    tracking = run.config.tracking
    return resumable(
        run.folder,
        tracking.tracker,
        lambda run_id: make_tracker(
            tracking.tracker,
            project=tracking.project,
            run_name=tracking.run_name,
            mode=tracking.wandb_mode,
            folder=run.folder,
            run_id=run_id,
            config=run.config.model_dump(mode="json") | {"fingerprints": run.fingerprints},
        ),
        run_id=run.state.tracker_run_id,
        step=run.state.step,
        resume=resume,
    )


def _report(run: Run, comparison: PairedLoss | None) -> dict[str, Any]:
    state = run.state
    return {
        "method": run.config.method if run.method is None else run.method.name,
        "base": run.config.base,
        "family": run.pipe.transformer.family,
        "fingerprints": run.fingerprints,
        "start": None if run.start is None else run.start.to_dict(),
        "steps": state.step,
        "best_step": state.best_step,
        "adapter_step": state.best_step if run.config.train.final == "best" and state.best_step else state.step,
        "samples_a_step": run.batches["train.batch_size"],
        "fidelity": run.fidelity,
        "seconds": run.seconds,
        "trainable_params": run.trainable.trainable_params,
        "total_params": run.trainable.total_params,
        "images": len(run.examples.records),
        "buckets": run.examples.bucket_counts(),
        **run.data_losses[0],
        "cache": None if (cache := run.examples.encoder.cache).root is None else cache.stats.to_dict(),
        "held_out_loss": comparison.to_dict() if comparison else None,
    }
