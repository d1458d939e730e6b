"""`mmdit-lora data synthesize`: images with boxes that nobody had to make or to mark."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_lora.cli.options import (
    BaseOption,
    BatchOption,
    DtypeOption,
    GuidanceOption,
    JsonFlag,
    SeedOption,
    SizeOption,
    StepsOption,
    number,
)
from mmdit_lora.cli.output import ProgressLines, emit, say
from mmdit_lora.cli.sample import open_with_adapters, sampling_config
from mmdit_lora.config.ranges import COUNT, SHARE
from mmdit_lora.data.captions import open_captions
from mmdit_lora.data.images import load_image
from mmdit_lora.outputs import open_folder

if TYPE_CHECKING:
    from mmdit_lora.evaluation.synthesize import Synthesis

_WRITTEN = ["synthesize.json", "images/", "parts/", "metadata.jsonl", "report.json", "kept.png", "dropped.png"]


def synthesize(
    base: BaseOption,
    captions: Annotated[
        str,
        typer.Option(
            help="A .txt (a caption a line), .jsonl (caption and phrases) or .yaml of words to compose, or a data set."
        ),
    ],
    detector: Annotated[
        str, typer.Option(help="Finds the boxes: shapes, torchvision:..., grounding-dino:..., owlv2:...")
    ],
    out: Annotated[Path, typer.Option(help="Data set to write; the same call goes on where it was stopped.")],
    count: Annotated[
        int | None,
        number(COUNT, "--count", help="Images to generate; default: one of each caption. Needed for a .yaml of words."),
    ] = None,
    min_score: Annotated[
        float,
        number(SHARE, "--min-score", help="An image is dropped if a phrase of its caption is found less surely."),
    ] = 0.4,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    batch_size: BatchOption = 32,
    dtype: DtypeOption = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """Make a data set for a layout stream from captions alone: the base generates them, a detector finds the boxes.

    Several GPUs: `accelerate launch --num_processes N -m mmdit_lora data synthesize ...`.
    """
    chosen = open_captions(captions, count=count, seed=seed)
    settings = sampling_config(steps, guidance, 1.0, (0.0, 1.0), size, batch_size)
    inputs = {"--base": base, "--captions": captions}
    first = os.environ.get("RANK", "0") == "0"  # of those that accelerate launched; it writes what all have made
    with open_folder(out, verb="data synthesize", names=_WRITTEN, inputs=inputs) if first else nullcontext():
        from mmdit_lora.evaluation.detectors import open_detector
        from mmdit_lora.evaluation.synthesize import synthesize as run

        opened = open_detector(detector)
        pipe = open_with_adapters(base, None, dtype, settings)
        with ProgressLines() as progress:
            result = run(
                pipe,
                chosen,
                opened,
                out,
                settings,
                seed=seed,
                min_score=min_score,
                on_progress=lambda done: progress("generate", done, len(chosen), {}),
            )
        if first:
            _show(result, out)
    if first and as_json:
        emit({"out": str(out), "generated": len(chosen), **result.to_dict()})


def _show(result: Synthesis, out: Path) -> None:
    """Contact sheets and lines of what was kept and dropped."""
    from mmdit_lora.visual import contact_sheet, draw_boxes, save_png

    examples = dict(result.examples)
    kept = examples.pop("kept")
    doubtful = [(file, layout, reason) for reason, shown in examples.items() for file, layout in shown[:8]]
    for name, rows in (("kept.png", [(*each, "") for each in kept]), ("dropped.png", doubtful)):
        if rows:
            images = [draw_boxes(load_image(out / file), layout) for file, layout, _ in rows]
            titles = [": ".join(filter(None, (reason, layout.caption))) for _, layout, reason in rows]
            save_png(contact_sheet(images, captions=titles), out / name)
    dropped = sum(result.dropped.values())
    say(f"wrote {result.kept} images with {result.boxes} boxes to {out}; {dropped} were doubtful and dropped")
    for reason, times in result.dropped.items():
        say(f"  {times} x {reason}")
    say(f"look at {out / 'kept.png'}" + (f" and {out / 'dropped.png'}" if dropped else ""))
