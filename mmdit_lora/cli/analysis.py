"""The verbs that look into adapters: `inspect`, `resize`, `attribute`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmdit_lora.cli.options import (
    AdapterArgument,
    AdapterOption,
    BaseOption,
    BatchOption,
    CountOption,
    DtypeOption,
    GuidanceOption,
    JsonFlag,
    OwnBase,
    OwnStream,
    ScaleOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StreamOption,
    WindowOption,
    adapter_is_there,
    number,
)
from mmdit_lora.cli.output import ProgressLines, emit, say
from mmdit_lora.cli.sample import (
    open_with_adapters,
    sampling_config,
    sampling_inputs,
    torch_dtype,
)
from mmdit_lora.config.ranges import Range
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.sources import open_layouts
from mmdit_lora.errors import InputError
from mmdit_lora.files import write_json, write_text
from mmdit_lora.outputs import check_new_folder, new_folder
from mmdit_lora.visual import phrase_colors, save_png

if TYPE_CHECKING:
    from mmdit_lora.analysis.resize import Resized


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    for verb in (inspect, resize, attribute):
        app.command(verb.__name__)(verb)


def inspect(
    adapter: AdapterArgument,
    base: OwnBase = None,
    stream: OwnStream = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="A second adapter on the same base, whose directions are compared.",
            callback=adapter_is_there,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for inspect.json and inspect.html.")] = None,
    dtype: DtypeOption = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """What an adapter changes: norms, spectrum, ranks that hold it, and what it amplifies, linear by linear."""
    inputs = {"ADAPTER": adapter, "--base": base, "--stream": stream, "--against": against}
    if out is not None:
        check_new_folder(out, verb="inspect", inputs=inputs)
    from mmdit_lora.analysis.inspect_page import lines, page
    from mmdit_lora.analysis.inspection import inspect_adapter

    inspection = inspect_adapter(adapter, base=base, stream=stream, against=against, dtype=torch_dtype(dtype))
    for line in lines(inspection):
        say(line)
    if out is not None:
        with new_folder(out, verb="inspect", inputs=inputs) as temporary:
            write_text(temporary / "inspect.html", page(inspection))
            write_json(temporary / "inspect.json", inspection.to_dict())
        say(f"wrote {out / 'inspect.html'} and inspect.json")
    if as_json:
        emit(inspection.to_dict())


def resize(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    rank: Annotated[
        int | None, number(Range(1, 100_000, whole=True), "--rank", help="The new rank of every linear.")
    ] = None,
    energy: Annotated[
        float | None,
        number(
            Range(0, 1, above=True),
            "--energy",
            help="Or the share of its energy that each linear keeps, above 0, e.g. 0.99.",
        ),
    ] = None,
    base: OwnBase = None,
    stream: OwnStream = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data set folder: fidelity is measured on it, before and after.")
    ] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    dtype: DtypeOption = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter at a smaller rank: the nearest one, by SVD of its updates."""
    if (rank is None) == (energy is None):
        what = "give --rank or --energy" if rank is None else "--rank and --energy are given"
        raise InputError(what, hint="give one of the two; `mmdit-lora inspect ADAPTER` suggests a rank")
    check_new_folder(
        out, verb="resize", inputs={"ADAPTER": adapter, "--base": base, "--stream": stream, "--data": data}
    )
    records = None if data is None else read_dataset(data)
    import torch

    from mmdit_lora.analysis.resize import resize_adapter
    from mmdit_lora.pipelines import SamplingConfig

    with ProgressLines() as progress:
        report = resize_adapter(
            adapter,
            out,
            rank=rank,
            energy=energy,
            base=base,
            stream=stream,
            records=records,
            settings=SamplingConfig(steps=steps),
            seed=seed,
            dtype=torch_dtype(dtype),
            device="cuda" if torch.cuda.is_available() else "cpu",
            on_progress=lambda condition, done: progress(f"sample {condition}", done, len(records or ()), {}),
        )
    for line in _resized_lines(report):
        say(line)
    if as_json:
        emit(report.to_dict())


def attribute(
    base: BaseOption,
    layout: Annotated[Path, typer.Option("--layout", help="A .json layout, a .jsonl of many, or a data set folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    adapter: AdapterOption = None,
    stream: StreamOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    layout_scale: ScaleOption = 1.0,
    layout_window: WindowOption = (0.0, 1.0),
    size: SizeOption = None,
    batch_size: BatchOption = 8,
    dtype: DtypeOption = "fp32",
    count: CountOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Which box moved which part of the image: each box left out once, and the image's attention to it, drawn."""
    inputs = sampling_inputs(base, adapter, layout) | {"--stream": stream}
    check_new_folder(out, verb="attribute", inputs=inputs)
    layouts = open_layouts(layout)[:count]
    bare = next((number for number, each in enumerate(layouts, start=1) if not each.boxes), None)
    if bare is not None:
        raise InputError(f"layout {bare} has no boxes", location=str(layout), hint="give layouts with boxes")
    settings = sampling_config(steps, guidance, layout_scale, layout_window, size, batch_size)
    from mmdit_lora.analysis.attribute import attribute as run
    from mmdit_lora.analysis.attribute import sheet

    with new_folder(out, verb="attribute", inputs=inputs) as temporary:
        pipe = open_with_adapters(base, adapter, dtype, settings, stream=stream)
        sheets = []
        with ProgressLines() as progress:
            for number, each in enumerate(layouts):
                total, name = len(each.boxes) + 1, f"sample layout {number + 1} of {len(layouts)}"
                on_progress = partial(progress, name, total=total, scalars={})
                sheets.append(run(pipe, each, settings, seed=seed + number, on_progress=on_progress))
        report = {
            "base": base,
            "adapters": adapter or [],
            "settings": asdict(settings),
            "layouts": [
                {
                    "file": f"{number:04d}.png",
                    "seed": seed + number,
                    "caption": each.layout.caption,
                    "boxes": [box.to_dict() for box in each.boxes],
                }
                for number, each in enumerate(sheets)
            ],
        }
        colors = phrase_colors(layouts)
        for number, drawn in enumerate(sheets):
            save_png(sheet(drawn, colors), temporary / f"{number:04d}.png")
        write_json(temporary / "attribution.json", report)
    say(f"{'share inside the box / its area':<40} {'change':>9} {'attention':>10}")
    for drawn in sheets:
        for box in drawn.boxes:
            say(f"  {box.phrase[:38]:<38} {_lift(box.change_lift):>9} {_lift(box.attention_lift):>10}")
    say(f"wrote {len(sheets)} sheet{'s' if len(sheets) > 1 else ''} to {out}; look at {out / '0000.png'}")
    if as_json:
        emit(report | {"out": str(out)})


def _lift(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _resized_lines(report: Resized) -> list[str]:
    width = max(len(module.name) for module in report.modules)
    lines = [f"{'':<{width}} {'r':>4} {'new':>4} {'relative error':>15}"]
    lines += [f"{m.name:<{width}} {m.rank:>4} {m.new_rank:>4} {m.error:>15.2e}" for m in report.modules]
    for name, side in (report.fidelity or {}).items():
        lines.append(f"{name:<7} " + "  ".join(f"{key} {value:.3f}" for key, value in side.items() if key != "boxes"))
    size = f"{report.parameters:,} to {report.new_parameters:,} parameters, relative error {report.error:.2e}"
    return [*lines, f"wrote {report.out}: {size}"]
