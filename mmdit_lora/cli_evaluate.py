"""`mmdit-lora evaluate`: is the layout obeyed? By our own figures, or as a published benchmark counts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_lora.cli_data import JsonFlag, emit, say
from mmdit_lora.cli_model import (
    AdapterOption,
    BatchOption,
    CountOption,
    DtypeOption,
    GuidanceOption,
    ScaleOption,
    SeedOption,
    SizeOption,
    StepsOption,
    WindowOption,
    adapter_weights,
    base_is_there,
    fidelity_table,
    open_with_adapters,
    paint_settings,
    painting_inputs,
)
from mmdit_lora.cli_numbers import number
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import Inputs, open_folder
from mmdit_lora.ranges import Range

if TYPE_CHECKING:
    from mmdit_lora.data.records import Record
    from mmdit_lora.evaluate.picture_store import PictureStore
    from mmdit_lora.evaluate.sides import Evaluation
    from mmdit_lora.pipelines import LayoutPipeline, PaintSettings


_WRITTEN: tuple[str, ...] = ("evaluate.json", "pictures/", "seen/", "report.html", "report.md", "report.json")
_SHEETS: tuple[str, ...] = ("base", "adapter", "text_only", "layout_only", "images", "ground_truth")
_SHEETS += tuple(f"adapter_{number}" for number in range(2, 10))
_WRITTEN += tuple(f"{side}.png" for side in _SHEETS)


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("evaluate")(evaluate)


def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the same call goes on where it was stopped.")],
    data: Annotated[Path | None, typer.Option("--data", help="Data set folder of layouts with pictures.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Pipeline folder or hub id, to paint with.", callback=base_is_there),
    ] = None,
    adapter: AdapterOption = None,
    each: Annotated[
        bool, typer.Option("--each", help="Every --adapter is a side of its own; without it they act together.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of pictures that something else made of the layouts.")
    ] = None,
    detector: Annotated[
        str,
        typer.Option(
            "--detector", help="What looks at pictures: shapes, torchvision:..., grounding-dino:..., owlv2:..."
        ),
    ] = "shapes",
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="Score --images as a published benchmark does: coco, coco-mig, layoutsam-eval, denselayout, overlaybench.",
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option("--annotations", help="With --protocol: the benchmark's own file or folder.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="With --protocol: what answers questions: transformers:..., openai:URL#MODEL."),
    ] = None,
    clip: Annotated[str | None, typer.Option("--clip", help="CLIP model, folder or hub id, for CLIP scores.")] = None,
    ablations: Annotated[
        bool, typer.Option("--ablations", help="Paint also without boxes, and without captions.")
    ] = False,
    variations: Annotated[
        int,
        number(
            Range(0, 1000, whole=True),
            "--variations",
            help="Other noises for the first 16 layouts: how different pictures get.",
        ),
    ] = 0,
    count: CountOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    layout_scale: ScaleOption = 1.0,
    layout_window: WindowOption = (0.0, 1.0),
    size: SizeOption = None,
    batch_size: BatchOption = 32,
    dtype: DtypeOption = "fp32",
    as_json: JsonFlag = False,
) -> None:
    """Measure how well layouts are obeyed, without and with the adapter, beside a ceiling and a floor."""
    if protocol is not None:
        if annotations is None or base is not None or data is not None:
            raise InputError(
                "scores pictures that are there, by a benchmark's own file",
                where="--protocol",
                cure="give --annotations and --images; without --images it writes OUT/layouts.jsonl for `sample --layout`",
            )
        _published(protocol, annotations, images, out, detector, judge, as_json=as_json)
        return
    if annotations is not None or judge is not None:
        raise InputError("is for --protocol", where="--annotations, --judge", cure="give --protocol NAME too")
    if data is None:
        raise InputError("is missing", where="--data", cure="give a data set folder, or --protocol NAME")
    if base is None and images is None:
        raise InputError("nothing to judge", cure="give --base, to paint with, or --images, a folder of pictures")
    if base is None and (adapter or ablations or variations):
        raise InputError("is for painting", where="--adapter, --ablations, --variations", cure="give --base too")
    inputs: Inputs = painting_inputs(base, adapter, data) | {"--data": data, "--images": images}
    with open_folder(out, verb="evaluate", names=_WRITTEN, inputs=inputs):
        from mmdit_lora.data.records import read_dataset

        records = read_dataset(data)[:count]
        settings = paint_settings(steps, guidance, layout_scale, layout_window, size, batch_size)
        from mmdit_lora.cli_progress import ProgressLines
        from mmdit_lora.evaluate.detectors import open_detector
        from mmdit_lora.evaluate.picture_store import pictures_of
        from mmdit_lora.evaluate.sides import ADAPTERS
        from mmdit_lora.evaluate.sides import evaluate as run

        if each and len(adapter or []) > len(ADAPTERS):
            raise InputError(f"holds {len(adapter or [])}", where="--adapter", cure=f"compare {len(ADAPTERS)} at most")
        shown = pictures_of(images, records) if images is not None else None
        looks = open_detector(detector)
        scorer = None
        if clip is not None:
            from mmdit_lora.evaluate.clip import Clip

            scorer = Clip(clip)
        pipe = open_with_adapters(base, adapter, dtype, settings, allow_same=each) if base is not None else None
        store = _store(
            out,
            pipe,
            records,
            settings,
            base=base,
            adapters=adapter or [],
            each=each,
            images=images,
            seed=seed,
            dtype=dtype,
        )
        with ProgressLines() as tell:
            result = run(
                pipe,
                records,
                settings,
                seed=seed,
                detector=looks,
                clip=scorer,
                each=adapter_weights(adapter) if each and adapter else None,
                ablations=ablations,
                variations=variations,
                images=shown,
                store=store,
                test_detector=True,
                on_progress=lambda side, done: tell(f"paint {side}", done, len(records), {}),
            )
        report = {
            "base_model": base,
            "adapters": adapter or [],
            "images_folder": None if images is None else str(images),
            "data": str(data),
        } | result.to_dict()
        store.begin()
        _write(out, result, report)
        if result.detector is not None and result.detector.verdict != "trusted":
            say(f"warning: {result.detector}")
        say(fidelity_table(report, f"{len(records)} layouts"))
        for group, sides in report["by_boxes"].items() if len(report["by_boxes"]) > 1 else ():
            say(fidelity_table(sides, f"{group} boxes, {sides['pictures']} layouts"))
        say(f"look at {out / 'report.html'}")
        if as_json:
            emit(report)


def _published(
    protocol: str,
    annotations: Path,
    images: Path | None,
    out: Path,
    detector: str,
    judge: str | None,
    *,
    as_json: bool,
) -> None:
    """Score pictures by a published benchmark; without pictures, write its layouts to paint them from."""
    from mmdit_lora.cli_protocols import score_protocol, write_layouts

    if images is None:
        with open_folder(out, verb="evaluate", names=["layouts.jsonl"], inputs={"--annotations": annotations}):
            count = write_layouts(protocol, annotations, out / "layouts.jsonl")
        say(f"wrote {count} layouts to {out / 'layouts.jsonl'}; paint them by `sample --layout`, then give --images")
        return
    from mmdit_lora.cli_progress import ProgressLines
    from mmdit_lora.evaluate.detectors import open_detector, open_judge
    from mmdit_lora.evaluate.protocols import find_protocol

    known = find_protocol(protocol)
    looks = open_detector(detector) if known.detector != "unused" else None
    judges = open_judge(judge) if judge is not None else None
    with ProgressLines() as tell:
        report = score_protocol(
            protocol, annotations, images, out, looks, judges, on_progress=lambda done: tell("look", done, 0, {})
        )
    for name, share in report["scores"].items():
        say(f"{name:<28}{100 * share:>8.2f} %")
    say(f"look at {out / 'report.html'}, where the published figures stand beside")
    if as_json:
        emit(report)


def _store(
    out: Path,
    pipe: LayoutPipeline | None,
    records: list[Record],
    settings: PaintSettings,
    *,
    base: str | None,
    adapters: list[str],
    each: bool,
    images: Path | None,
    seed: int,
    dtype: str,
) -> PictureStore:
    """Where painted pictures are kept, under all that they depend on."""
    import hashlib
    import json
    from dataclasses import asdict

    from mmdit_lora.evaluate.picture_store import PictureStore
    from mmdit_lora.lora import base_fingerprint

    layouts = json.dumps([record.layout.to_dict() for record in records], ensure_ascii=False)
    plan: dict[str, Any] = {
        "base": base,
        # With its adapters: their weights are parameters of the transformer.
        "weights": None if pipe is None else base_fingerprint(pipe.transformer),
        "adapters": {given: _digest(given) for given in adapters},
        "each": each,
        "layouts": hashlib.sha256(layouts.encode()).hexdigest(),
        "images": None if images is None else str(images),
        "settings": asdict(settings),
        "dtype": dtype,
        "seed": seed,
    }
    return PictureStore(out, plan)


def _digest(adapter: str) -> str:
    """SHA-256 of an adapter's weights."""
    import hashlib

    from mmdit_lora.cli_model import folder_and_weight
    from mmdit_lora.lora import adapter_file

    return hashlib.sha256(adapter_file(folder_and_weight(adapter)[0]).read_bytes()).hexdigest()


def _write(out: Path, result: Evaluation, report: dict[str, Any]) -> None:
    from mmdit_lora.evaluate.draw import contact_sheet, draw_boxes, phrase_colors, save_png
    from mmdit_lora.evaluate.report import markdown, page
    from mmdit_lora.files import write_json, write_text

    title = f"{Path(report['data']).name}, {report['pictures']} layouts"
    colors = phrase_colors(result.layouts)
    for name, side in result.sides.items():
        if name == "shuffled":
            continue  # the ground truth's pictures again
        drawn = [
            draw_boxes(p, item, colors=colors) for p, item in zip(side.pictures[:16], result.layouts, strict=False)
        ]
        save_png(contact_sheet(drawn), out / f"{name}.png")
    write_text(out / "report.html", page(result, report, title=title))
    write_text(out / "report.md", markdown(report, title=title) + "\n")
    write_json(out / "report.json", report)
