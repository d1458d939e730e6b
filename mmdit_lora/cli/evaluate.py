"""`mmdit-lora evaluate`: is the layout obeyed? By our own metrics, or as a published benchmark's authors compute theirs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdit_lora.cli.options import (
    AdapterOption,
    BatchOption,
    CountOption,
    DtypeOption,
    GuidanceOption,
    JsonFlag,
    ScaleOption,
    SeedOption,
    SizeOption,
    StepsOption,
    StreamOption,
    WindowOption,
    base_is_there,
    number,
)
from mmdit_lora.cli.output import ProgressLines, emit, fidelity_table, say
from mmdit_lora.cli.sample import adapter_weights, open_with_adapters, sampling_config, sampling_inputs
from mmdit_lora.config.ranges import Range
from mmdit_lora.errors import InputError
from mmdit_lora.files import write_json, write_text
from mmdit_lora.outputs import Inputs, open_folder

if TYPE_CHECKING:
    from mmdit_lora.evaluation.evaluate import Evaluation

_MAX_ADAPTERS = 9
_SHEETS = ["base", "adapter", "text_only", "layout_only", "images", "ground_truth"]
_SHEETS += [f"adapter_{number}" for number in range(2, _MAX_ADAPTERS + 1)]
_WRITTEN = ["evaluate.json", "images/", "seen/", "report.html", "report.md", "report.json"]
_WRITTEN += [f"{condition}.png" for condition in _SHEETS]


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("evaluate")(evaluate)


def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the same call goes on where it was stopped.")],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Data set of layouts with images: a folder, shards or shapes://DOMAIN?count=N."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Pipeline folder or hub id, to sample with.", callback=base_is_there),
    ] = None,
    adapter: AdapterOption = None,
    stream: StreamOption = None,
    each: Annotated[
        bool, typer.Option("--each", help="Every --adapter is a side of its own; without it they act together.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of images that something else made of the layouts.")
    ] = None,
    detector: Annotated[
        str,
        typer.Option("--detector", help="Detects objects: shapes, torchvision:..., grounding-dino:..., owlv2:..."),
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
        bool, typer.Option("--ablations", help="Generate also without boxes, and without captions.")
    ] = False,
    variations: Annotated[
        int,
        number(
            Range(0, 1000, whole=True),
            "--variations",
            help="Other noises for the first 16 layouts: how different images get.",
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
                "scores images that are there, by a benchmark's own file",
                location="--protocol",
                hint="give --annotations and --images; without --images it writes OUT/layouts.jsonl for `sample --layout`",
            )
        _published(protocol, annotations, images, out, detector, judge, as_json=as_json)
        return
    if annotations is not None or judge is not None:
        raise InputError("is for --protocol", location="--annotations, --judge", hint="give --protocol NAME too")
    if data is None:
        raise InputError("is missing", location="--data", hint="give a data set folder, or --protocol NAME")
    if base is None and images is None:
        raise InputError("nothing to judge", hint="give --base, to sample with, or --images, a folder of images")
    if base is None and (adapter or ablations or variations):
        raise InputError("is for sampling", location="--adapter, --ablations, --variations", hint="give --base too")
    inputs: Inputs = sampling_inputs(base, adapter, data) | {"--data": data, "--images": images, "--stream": stream}
    with open_folder(out, verb="evaluate", names=_WRITTEN, inputs=inputs):
        # What is cheap to check comes before torch is imported, and that before the base is loaded.
        from mmdit_lora.data.sources import open_dataset

        records = list(open_dataset(data)[:count])
        from mmdit_lora.evaluation.cache import images_of
        from mmdit_lora.evaluation.clip import Clip
        from mmdit_lora.evaluation.detectors import open_detector
        from mmdit_lora.evaluation.evaluate import evaluate as run

        settings = sampling_config(steps, guidance, layout_scale, layout_window, size, batch_size)
        if each and len(adapter or []) > _MAX_ADAPTERS:
            hint = f"compare {_MAX_ADAPTERS} at most"
            raise InputError(f"holds {len(adapter or [])}", location="--adapter", hint=hint)
        if images is not None:
            images_of(images, records)
        opened = open_detector(detector)
        clip_model = None if clip is None else Clip(clip)
        with ProgressLines() as progress:
            result = run(
                None
                if base is None
                else open_with_adapters(base, adapter, dtype, settings, allow_same=each, stream=stream),
                records,
                settings,
                seed=seed,
                adapters=adapter_weights(adapter) if each and adapter else None,
                detector=opened,
                ablations=ablations,
                variations=variations,
                clip=clip_model,
                images=images,
                cache_dir=out,
                test_detector=True,
                on_progress=lambda name, done: progress(f"sample {name}", done, len(records), {}),
            )
        report = {
            "base_model": base,
            "adapters": adapter or [],
            "images_folder": None if images is None else str(images),
            "data": str(data),
        } | result.to_dict()
        _write(out, result, report)
        if result.detector is not None and result.detector.verdict != "trusted":
            say(f"warning: {result.detector}")
        say(fidelity_table(report, f"{len(records)} layouts"))
        for group, conditions in report["by_boxes"].items() if len(report["by_boxes"]) > 1 else ():
            say(fidelity_table(conditions, f"{group} boxes, {conditions['layouts']} layouts"))
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
    """Score images by a published benchmark; without images, write its layouts to generate them from."""
    from mmdit_lora.evaluation.detectors import open_detector, open_judge
    from mmdit_lora.evaluation.protocols import find_protocol
    from mmdit_lora.evaluation.protocols.runner import score_protocol, write_layouts

    if images is None:
        with open_folder(out, verb="evaluate", names=["layouts.jsonl"], inputs={"--annotations": annotations}):
            count = write_layouts(protocol, annotations, out / "layouts.jsonl")
        say(f"wrote {count} layouts to {out / 'layouts.jsonl'}; generate them by `sample --layout`, then give --images")
        return
    opened = open_detector(detector) if find_protocol(protocol).detector != "unused" else None
    opened_judge = open_judge(judge) if judge is not None else None
    with ProgressLines() as progress:
        report = score_protocol(
            protocol,
            annotations,
            images,
            out,
            opened,
            opened_judge,
            on_progress=lambda done: progress("look", done, 0, {}),
        )
    for name, share in report["scores"].items():
        say(f"{name:<28}{100 * share:>8.2f} %")
    say(f"look at {out / 'report.html'}, where the published figures stand beside")
    if as_json:
        emit(report)


def _write(out: Path, result: Evaluation, report: dict[str, Any]) -> None:
    from mmdit_lora.evaluation.report import markdown, page
    from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

    title = f"{Path(report['data']).name}, {report['layouts']} layouts"
    colors = phrase_colors(result.layouts)
    for name, condition in result.conditions.items():
        if name == "shuffled":
            continue  # the ground truth's images again
        pairs = zip(condition.images[:16], result.layouts, strict=False)
        save_png(contact_sheet([draw_boxes(image, item, colors=colors) for image, item in pairs]), out / f"{name}.png")
    write_text(out / "report.html", page(result, report, title=title))
    write_text(out / "report.md", markdown(report, title=title))
    write_json(out / "report.json", report)
