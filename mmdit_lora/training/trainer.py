"""A training run from its config to what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.files import write_json, write_text
from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.training.checkpoint import Checkpoint, checkpoints, prune_checkpoints, trainable_parameters
from mmdit_lora.training.full_disk import disk_full_as_error
from mmdit_lora.training.held_out import PairedLoss, held_out_losses
from mmdit_lora.training.loop import OnStep, Progress, train_loop
from mmdit_lora.training.preflight import Preflight, preflight
from mmdit_lora.training.prior_preservation import without_adapter
from mmdit_lora.training.result import save_result
from mmdit_lora.training.resumable_tracker import resumable
from mmdit_lora.training.run_dir import CHECKPOINTS, CONFIG, REPORT, run_folder
from mmdit_lora.training.setup import AVERAGE, Run, prepare_run, settle
from mmdit_lora.training.sharding import parted, whole
from mmdit_lora.training.stopping import Interrupted
from mmdit_lora.training.tracking import Tracker, make_tracker
from mmdit_lora.training.trainable import FoldedMethod
from mmdit_lora.training.validation import validate

__all__ = ["TrainResult", "prepare_run", "train"]


@dataclass
class TrainResult:
    """What a finished run leaves. `report` is what `report.json` holds."""

    pipe: LayoutPipeline
    folder: Path
    report: dict[str, Any]
    is_main: bool = True  # of several processes, the one that writes
    comparison: PairedLoss | None = None


def train(
    config: Config,
    *,
    resume: bool = False,
    on_progress: Progress | None = None,
    on_step: OnStep | None = None,
    on_preflight: Callable[[Preflight], None] | None = None,
    method: FoldedMethod | None = None,
) -> TrainResult:
    """Train what `config.method` names, and leave `<output_dir>/adapter` (or `base`) and `report.json`.

    Args:
        resume: go on from the newest checkpoint of `output_dir`; without one, start.
        on_progress, witness: see `train_loop`.
        on_preflight: called with what the look before the run found, in the main process.
        method: instead of the config's, which must be layout_stream; for comparisons, see `FoldedMethod`.

    Raises:
        InputError: the base, the data, the machine or the output folder do not allow the run; nothing is written then.
        Diverged, Interrupted: see `train_loop`. DiskFull: the last checkpoint is whole.
    """
    with run_folder(config, resume=resume), disk_full_as_error(Path(config.output_dir)):
        run = prepare_run(config, resume=resume, method=method)
        found = checkpoints(run.folder / CHECKPOINTS) if resume else []
        looked = preflight(run, checkpoint=found[-1] if found else None, costly=config.train.preflight)
        if run.accelerator.is_main_process and on_preflight is not None:
            on_preflight(looked)
        looked.refuse_failed()
        return _train(run, found[-1] if found else None, resume, on_progress or (lambda *_: None), on_step)


def _train(
    run: Run, checkpoint: Checkpoint | None, resume: bool, on_progress: Progress, on_step: OnStep | None
) -> TrainResult:
    config, main = run.config, run.accelerator.is_main_process
    if main:
        write_text(run.folder / CONFIG, config.to_yaml())
    run.start_prior()
    if run.held_out is not None:
        # A new adapter changes nothing; one that was trained before is off for the base's own losses.
        alone = nullcontext() if run.start is None else without_adapter(run.pipe.transformer)
        with alone:
            found = held_out_losses(run.pipe.transformer, run.held_out, run.accelerator.device)
        run.base_losses = found.per_image
    parted(run.pipe.transformer)
    if checkpoint is not None:
        run.load(checkpoint)
        if main:
            prune_checkpoints(run.folder / CHECKPOINTS, config.train.keep_checkpoints, run.state.best_step)
    tracker = _make_tracker(run, resume) if main else None
    run.state.tracker_run_id = tracker.run_id if tracker else None
    try:
        train_loop(run, tracker, on_progress, on_step)
        _choose_weights(run)
        comparison = _compare(run, tracker) if main or run.is_sharded else None
        trained = trainable_parameters(run.bare_model)
        weights = {name: whole(parameter) for name, parameter in trained.items()} if run.is_sharded else None
        run.accelerator.wait_for_everyone()
        run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
        report = _report(run, comparison)
        if main:
            result = save_result(
                run.pipe, config, report, weights, fold=None if run.method is None else run.method.fold
            )
            settle(run)
            write_json(run.folder / REPORT, report)
        if tracker is not None:
            if config.method == "lora":
                tracker.artifact(result, report)
            tracker.summary({key: value for key, value in report.items() if isinstance(value, int | float | str)})
    except BaseException as error:
        if tracker is not None:
            tracker.finish(failed=not isinstance(error, Interrupted))
        raise
    if tracker is not None:
        tracker.finish()
    return TrainResult(run.pipe, run.folder, report, main, comparison)


def _choose_weights(run: Run) -> None:
    """Put what is to be saved into the model: the moving average, and of the best step where that is asked for.

    Raises:
        InputError: the best step has no checkpoint.
    """
    best = run.state.best_step
    if run.config.train.final == "best" and best is not None and best != run.state.step:
        found = [c for c in checkpoints(run.folder / CHECKPOINTS) if c.step == best]
        if not found:
            raise InputError(
                f"is best, and the checkpoint of the best step, {best}, is gone",
                location="train.final",
                hint="set it to last",
            )
        found[0].state()  # whole, or refused
        found[0].load_weights(run.bare_model)
        if run.average is not None:
            run.average.load(found[0].folder / AVERAGE)
        run.compared = None
    if run.average is not None:
        run.average.put()


def _compare(run: Run, tracker: Tracker | None) -> PairedLoss | None:
    if run.compared is not None and run.compared[0] == run.state.step:
        return run.compared[1]
    run.average = None  # its weights are in the model
    comparison = validate(run)
    if comparison is not None and tracker is not None:
        tracker.log(
            run.state.step, {"held_out/loss": comparison.trained, "held_out/loss_minus_base": comparison.difference}
        )
    return comparison


def _make_tracker(run: Run, resume: bool) -> Tracker:
    tracking = run.config.tracking
    make = partial(
        make_tracker,
        tracking.tracker,
        project=tracking.project,
        run_name=tracking.run_name,
        mode=tracking.wandb_mode,
        folder=run.folder,
        config=run.config.model_dump(mode="json") | {"fingerprints": run.fingerprints},
    )
    return resumable(
        run.folder,
        tracking.tracker,
        lambda run_id: make(run_id=run_id),
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
        "cache": None if (store := run.examples.encoder.store) is None else store.cache.stats.to_dict(),
        "held_out_loss": comparison.to_dict() if comparison else None,
    }
