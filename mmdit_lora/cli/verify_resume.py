"""The verb `verify-resume`: whether a resumed run of one's own config is the undisturbed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_lora.cli.options import JsonFlag, number
from mmdit_lora.cli.output import emit, say
from mmdit_lora.config.ranges import Range
from mmdit_lora.errors import Stopped

if TYPE_CHECKING:
    from mmdit_lora.training.verify_resume import Verdict


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("verify-resume")(verify_resume)


def verify_resume(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.batch_size=4")] = None,
    steps: Annotated[
        int | None,
        number(
            Range(1, 1_000_000, whole=True),
            "--steps",
            help="N; default: enough for the warm-up and an epoch's end, at most 40.",
        ),
    ] = None,
    kills: Annotated[
        int, number(Range(0, 1000, whole=True), "--kills", help="SIGKILLs in the third run; 0 = no third run.")
    ] = 2,
    as_json: JsonFlag = False,
) -> None:
    """Train 2N steps, N + N steps, and 2N steps with kills, and compare them bit by bit. Exit 0: equal; 1: not.

    Everything is in a temporary folder; nothing of your run is touched.
    """
    from mmdit_lora.config.loading import load_config

    settings = load_config(config, overrides or ())
    from mmdit_lora.cli.output import ProgressLines
    from mmdit_lora.training.verify_resume import verify_resume as run

    with ProgressLines() as tell:
        verdict = run(settings, steps=steps, kills=kills, tell=tell)
    for line in _lines(verdict):
        say(line)
    if as_json:
        emit(verdict.to_dict())
    if not verdict.equal:
        raise Stopped(_why(verdict))


def _lines(verdict: Verdict) -> list[str]:
    lines = [f"{2 * verdict.steps} steps; within them: {', '.join(verdict.crossed) or 'no more than steps'}"]
    lines += [f"not within them: {what}" for what in verdict.not_crossed]
    lines.append(f"  {'undisturbed':<16} {verdict.seconds:6.1f} s  sha256 {verdict.sha256[:16]}")
    for trial in verdict.trials:
        what = "equal: every step, weights, optimizer, state" if trial.differs is None else f"differs: {trial.differs}"
        lines.append(f"  {trial.name:<16} {trial.seconds:6.1f} s  {what}")
    if verdict.kills:
        lines.append(f"  killed after the steps {', '.join(map(str, verdict.kills))}")
    if verdict.equal:
        lines.append("a resumed run of this config is the undisturbed one, to the bit")
    return lines


def _why(verdict: Verdict) -> str:
    if verdict.undisturbed_differs is not None:
        return (
            "not resume: two undisturbed runs differ too, so kernels on this machine do not give the same bits twice\n"
            f"  {verdict.undisturbed_differs}"
        )
    bad = next(trial for trial in verdict.trials if trial.differs is not None)
    return f"a resumed run of this config is another run ({bad.name}); two undisturbed runs are equal\n  {bad.differs}"
