"""The look before a run: every way to train nothing, to stop late or to write half a file that can be seen in seconds.

What makes a run impossible to set up (no such target, zero gates, no data) `prepare_run` refuses already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from accelerate.utils import DistributedType, gather_object

from mmdit_lora.data.records import Record
from mmdit_lora.data.shards import ShardedRecords, Subset, spread
from mmdit_lora.errors import InputError, listed
from mmdit_lora.lora.adapt import with_adapter
from mmdit_lora.pipelines.texts import long_texts
from mmdit_lora.training.checkpoint import Checkpoint
from mmdit_lora.training.checks import Check, Lines, Preflight
from mmdit_lora.training.needs import check_disk, check_memory, check_time, check_tracker, size_text, step_text
from mmdit_lora.training.run import Run
from mmdit_lora.training.setting_warnings import setting_warnings
from mmdit_lora.training.trial import Trial, try_steps

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
            for found, cure in odd:
                lines.warn(found, cure)
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
    text = f"{len(examples.records):,} pictures to train on, {held_out:,} held out{by}{known}, {sizes}"
    warnings: list[tuple[str, str | None]] = [(line, None) for line in run.data_losses[1]]
    warnings += _long_texts(run)
    if boxes == 0:
        lines.fail(
            f"none of {len(examples.records):,} pictures has a box", "see `mmdit-lora data check`, and data.filter"
        )
    elif (batch := run.batches["train.batch_size"]) > len(examples.records):
        lines.fail(
            f"a step takes {batch} pictures, and there are {len(examples.records)} to train on"
            + (f": {held_out} of {total} are held out{by}" if by else ""),
            "lower train.batch_size or train.gradient_accumulation, or give more pictures"
            + (", or hold none out: data.validation_share=0" if by else ""),
        )
    elif warnings:  # not "ok" in the first line, and the rest of it below
        found, cure = warnings.pop(0)
        lines.warn(f"{text}; {found}", cure)
    else:
        lines.ok(text)
    for found, cure in warnings:
        lines.warn(found, cure)


def _long_texts(run: Run) -> Iterator[tuple[str, str]]:
    """Captions and phrases of which an encoder reads the beginning only, of all records or of some spread over them."""
    held_out: Sequence[Record] = run.held_out.records if run.held_out else []
    records = [*_spread(run.examples.records), *_spread(held_out)]
    total = len(run.examples.records) + len(held_out)
    of = "" if len(records) == total else f" (of {total:,} pictures, a sample)"
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
    cure = "name the modules without these in lora.targets, block by block where need be"
    lines.warn(found, cure)


def _check_base(run: Run, checkpoint: Checkpoint | None, lines: Lines) -> None:
    digest = run.fingerprints["base"]
    lines.ok(f"{run.config.base} ({run.pipe.transformer.family}), {digest[:_SHOWN_DIGITS]}")
    if checkpoint is None:
        return
    try:
        run.check(checkpoint)
    except InputError as error:
        lines.fail(f"{error.what} ({error.where})", error.cure or "")


def _check_gradients(run: Run, trial: Trial, lines: Lines) -> None:
    if trial.out_of_memory:
        lines.warn("not seen: memory ran out")
        return
    if trial.bad_samples:
        lines.fail(
            f"the loss is no finite number at {listed(trial.bad_samples)}",
            "look at these pictures; train.mixed_precision=bf16 has the range that fp16 has not",
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
            report.checks.append(Check(check.name, "failed", found, check.cure))
