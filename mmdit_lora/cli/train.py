"""The verbs that train: `quickstart`, `train`, `verify-resume`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import mmdit_lora
from mmdit_lora.cli.options import JsonFlag, number
from mmdit_lora.cli.output import ProgressLines, emit, fidelity_table, say
from mmdit_lora.config.loading import load_config
from mmdit_lora.config.ranges import Range
from mmdit_lora.errors import Stopped
from mmdit_lora.files import output_path
from mmdit_lora.outputs import check_open_folder

if TYPE_CHECKING:
    from mmdit_lora.training.verify_resume import Verdict

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.max_steps=100")]


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    for verb in (quickstart, train, verify_resume):
        app.command(verb.__name__.replace("_", "-"))(verb)


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("outputs/quickstart"),
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter on the embedded base, show before and after, export it. A few minutes on a CPU."""
    check_open_folder(out, verb="quickstart", names=())
    from mmdit_lora.cli.quickstart import quickstart as run

    with ProgressLines() as progress:
        report = run(out, on_progress=progress)
    say(fidelity_table(report, "held-out layouts of the new domain"))
    say(fidelity_table(report["old_domain"], "layouts of the old domain"))
    say(
        f"{report['trainable_params']:,} of {report['total_params']:,} parameters, {report['adapter_bytes'] / 1024:.0f} KiB"
    )
    say(f"look at {out / 'before_after.png'}; the adapter is {out / 'adapter'}")
    if as_json:
        emit(report)


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; `mmdit-lora init DATA` writes one.")],
    overrides: Overrides = None,
    resume: Annotated[Literal["latest"] | None, typer.Option(help="Go on from the newest checkpoint.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Look at everything that a run needs, train nothing, write nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter (or, by `method`, the layout stream, or everything)."""
    settings = load_config(config, overrides or ())
    output_path(settings.output_dir, folder=True)
    from mmdit_lora.cli.run_display import ShowRun
    from mmdit_lora.cli.run_display import check_only as run_preflight

    if check_only:
        run_preflight(settings, resume=resume is not None, as_json=as_json)
        return
    plan = settings.train
    pauses = {"validation": plan.validate_every, "images": plan.sample_every, "checkpoint": plan.checkpoint_every}
    with ProgressLines(pauses=pauses) as progress:
        show = ShowRun(progress, plan.max_steps)
        result = mmdit_lora.train(settings, resume=resume is not None, callbacks=[show])
    if not result.is_main:
        return
    loss = result.report["held_out_loss"]
    if loss:
        interval = "" if loss["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*loss["interval"])
        say(
            f"held-out loss: {loss['base']:.4f} -> {loss['trained']:.4f}, difference {loss['difference']:+.4f}{interval}"
        )
    if stats := result.report["cache"]:  # of the main process
        hits, made = (sum(stats[name].values()) for name in ("hits", "misses"))
        damaged = f", {n} damaged and made again" if (n := sum(stats["damaged"].values())) else ""
        say(f"cache {settings.data.cache}: {hits} entries read, {made} made{damaged}")
    trained = "adapter" if settings.method == "lora" else "stream" if (result.folder / "stream").is_dir() else "base"
    say(f"wrote {result.folder / trained}")
    if as_json:
        emit(result.report)


def verify_resume(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Overrides = None,
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
    """Train 2N steps, N + N steps, and 2N steps with kills, and compare the results bit by bit. Exit 0: equal; 1: not.

    Everything is in a temporary folder; nothing of your run is touched.
    """
    settings = load_config(config, overrides or ())
    from mmdit_lora.training.verify_resume import verify_resume as run

    with ProgressLines() as progress:
        verdict = run(settings, steps=steps, kills=kills, on_progress=progress)
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
