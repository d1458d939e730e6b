"""The verb `study`: what the LoRA papers measured, on one's own base and data."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mmdit_lora.cli.options import JsonFlag, number
from mmdit_lora.cli.output import emit, say
from mmdit_lora.config.ranges import SEED, Range
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import check_open_folder


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("study")(study)


def study(
    name: Annotated[
        Literal["intrinsic-dimension", "budget", "rank", "methods"],
        typer.Argument(
            help="intrinsic-dimension: how few random directions are enough. budget: where to spend parameters. rank: "
            "fidelity by rank, shared subspaces. methods: LoRA, DoRA, IA3, layout MLPs, stream, everything."
        ),
    ],
    config: Annotated[Path, typer.Argument(help="YAML file of a training, e.g. configs/study.yaml.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; start again with the same to go on.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.max_steps=100")] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Numbers with commas between: one run a setting for each.")
    ] = "0,1,2",
    images: Annotated[
        int | None,
        number(Range(2, 1_000_000, whole=True), "--images", help="Held-out layouts to sample; default 64 (quick: 4)."),
    ] = None,
    old: Annotated[
        Path | None, typer.Option("--old", help="Data set of the base's old domain: measure what is forgotten.")
    ] = None,
    bases: Annotated[
        str | None,
        typer.Option(
            "--bases", help="intrinsic-dimension: bases with commas between, small to large; default: the config's."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two settings, three steps: to see that it works.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Run a study: many short trainings, each in a folder of its own, a plot, a table and a verdict."""
    if bases is not None and name != "intrinsic-dimension":
        raise InputError("is for intrinsic-dimension", location="--bases", hint="give base=... to the others")
    numbers = _seeds(seeds)
    check_open_folder(out, verb="study", names=())
    from mmdit_lora.config.loading import load_config

    settings = load_config(
        config, [*(overrides or ()), *(("train.max_steps=3", "train.batch_size=4") if quick else ())]
    )
    from mmdit_lora.analysis.studies.setup import QUICK_IMAGES, Setup
    from mmdit_lora.analysis.studies.study import run_study

    setup = Setup(
        name=name,
        config=settings,
        out=out,
        seeds=numbers,
        images=images or (QUICK_IMAGES if quick else 64),
        quick=quick,
        old=None if old is None else str(old),
        bases=() if bases is None else tuple(base.strip() for base in bases.split(",")),
    )
    results = run_study(setup, command=shlex.join(["mmdit-lora", *sys.argv[1:]]), on_progress=_show_progress)
    for verdict in results["verdicts"]:
        say(f"{verdict['result']}: {verdict['claim']}")
    say(f"wrote {out / 'study.md'}, {out / 'study.png'}, {out / 'study.json'}, {out / 'verdict.json'}")
    if as_json:
        emit(results)


def _show_progress(what: str, done: int, total: int, figures: dict[str, Any]) -> None:
    fidelity, loss = figures["fidelity"], figures["loss_minus_base"]
    parts = [] if fidelity is None else [f"mIoU {fidelity['miou']:.3f}"]
    parts += [] if loss is None else [f"loss {sum(loss) / len(loss):+.4f}"]
    say(f"{done}/{total} {what}: {', '.join(parts)} ({figures['seconds']:.0f} s)")


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or len(set(numbers)) < len(numbers) or not all(n in SEED for n in numbers):
        raise InputError(f"is {text!r}", location="--seeds", hint=f"give different ones, each {SEED}, e.g. 0,1,2")
    return numbers
