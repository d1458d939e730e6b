"""What `train` shows on stderr: the checks before the run as a table, and its progress; and `train --check-only`."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmdit_lora.cli.output import emit
from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.training.callbacks import Callback, OnProgress
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.preflight import Preflight, preflight
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import prepare_run
from mmdit_lora.training.step import StepRecord

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


class ShowProgress(Callback):
    """Progress of the phase "train".

    Args:
        progress: to show it by. steps: in all.
    """

    def __init__(self, progress: OnProgress, steps: int) -> None:
        self._progress, self._steps = progress, steps

    def on_step(self, record: StepRecord) -> None:
        if record.logged:
            scalars = {name.removeprefix("speed/"): value for name, value in record.logged.items()}
            self._progress("train", record.step, self._steps, scalars)


class ShowRun(ShowProgress):
    """The checks before a run, then its progress."""

    def on_preflight(self, report: Preflight) -> None:
        show_preflight(report)


def show_preflight(report: Preflight) -> None:
    """Print the table: one line a check, and below what is wrong how to mend it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    before = None
    for check in report.checks:
        found = Text(check.found)
        if check.hint:
            found.append(f"\nhint: {check.hint}", style="dim")
        state = Text("FAILED" if check.state == "failed" else check.state, style=_STYLES[check.state])
        table.add_row("" if check.name == before else check.name, state, found)
        before = check.name
    console = Console(stderr=True, highlight=False)
    console.print(table)
    failed, warned = len(report.failed), sum(check.state == "warning" for check in report.checks)
    verdict = f"{failed} failed" if failed else "ready to train"
    warnings = f", {warned} warning{'s' if warned != 1 else ''}" if warned else ""
    console.print(Text(f"{verdict}{warnings}; looked for {report.seconds:.1f} s"))


def check_only(config: Config, *, resume: bool, as_json: bool) -> None:
    """Set a run up and check it; train nothing, write nothing.

    Raises:
        InputError: the run could not start. With `as_json`, the object is printed before that.
    """
    try:
        run = prepare_run(config, resume=resume)
    except InputError as error:
        if as_json:
            found = f"{error.location}: {error.what}" if error.location else error.what
            check = {"name": "set-up", "state": "failed", "found": found, "hint": error.hint, "seconds": 0.0}
            emit({"ok": False, "checks": [check]})
        raise
    kept = checkpoints(run.folder / CHECKPOINTS) if resume else []
    report = preflight(run, checkpoint=kept[-1] if kept else None, write_cache=False)
    if run.accelerator.is_main_process:
        show_preflight(report)
        if as_json:
            held_out = len(run.held_out.records) if run.held_out else 0
            images = {"images": len(run.examples.records), "held_out": held_out}
            emit(report.to_dict() | {"trainable": run.trainable.details, **images, **run.data_losses[0]})
    report.refuse_failed()
