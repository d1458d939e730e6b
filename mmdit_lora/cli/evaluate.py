"""`mmdit-lora evaluate`: is the layout obeyed? By our own metrics, or as a published benchmark's authors compute theirs."""

from __future__ import annotations

from collections.abc import Callable
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
    WindowOption,
    base_is_there,
    folder_and_weight,
    number,
)
from mmdit_lora.cli.output import ProgressLines, emit, fidelity_table, say
from mmdit_lora.cli.sample import (
    adapter_weights,
    open_with_adapters,
    sampling_config,
    sampling_inputs,
)
from mmdit_lora.config.ranges import Range
from mmdit_lora.errors import InputError
from mmdit_lora.files import json_text, write_json, write_text
from mmdit_lora.outputs import Inputs, open_folder

if TYPE_CHECKING:
    from mmdit_lora.data.records import Record
    from mmdit_lora.evaluation.evaluate import Evaluation
    from mmdit_lora.evaluation.image_cache import ImageCache
    from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig
if TYPE_CHECKING:
    from mmdit_lora.evaluation.protocols import Case, PublishedProtocol, Seen
    from mmdit_lora.evaluation.protocols.runner import Judges, Looks

_WRITTEN: tuple[str, ...] = ("evaluate.json", "images/", "seen/", "report.html", "report.md", "report.json")
_SHEETS: tuple[str, ...] = ("base", "adapter", "text_only", "layout_only", "images", "ground_truth")
_SHEETS += tuple(f"adapter_{number}" for number in range(2, 10))
_WRITTEN += tuple(f"{side}.png" for side in _SHEETS)


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("evaluate")(evaluate)


def evaluate(
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the same call goes on where it was stopped.")],
    data: Annotated[Path | None, typer.Option("--data", help="Data set folder of layouts with images.")] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Pipeline folder or hub id, to paint with.", callback=base_is_there),
    ] = None,
    adapter: AdapterOption = None,
    each: Annotated[
        bool, typer.Option("--each", help="Every --adapter is a side of its own; without it they act together.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder of images that something else made of the layouts.")
    ] = None,
    detector: Annotated[
        str,
        typer.Option("--detector", help="What looks at images: shapes, torchvision:..., grounding-dino:..., owlv2:..."),
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
        raise InputError("nothing to judge", hint="give --base, to paint with, or --images, a folder of images")
    if base is None and (adapter or ablations or variations):
        raise InputError("is for painting", location="--adapter, --ablations, --variations", hint="give --base too")
    inputs: Inputs = sampling_inputs(base, adapter, data) | {"--data": data, "--images": images}
    with open_folder(out, verb="evaluate", names=_WRITTEN, inputs=inputs):
        from mmdit_lora.data.sources import open_dataset

        records = list(open_dataset(data)[:count])
        settings = sampling_config(steps, guidance, layout_scale, layout_window, size, batch_size)
        from mmdit_lora.evaluation.detectors import open_detector
        from mmdit_lora.evaluation.evaluate import ADAPTERS
        from mmdit_lora.evaluation.evaluate import evaluate as run
        from mmdit_lora.evaluation.image_cache import images_of

        if each and len(adapter or []) > len(ADAPTERS):
            raise InputError(
                f"holds {len(adapter or [])}", location="--adapter", hint=f"compare {len(ADAPTERS)} at most"
            )
        shown = images_of(images, records) if images is not None else None
        looks = open_detector(detector)
        scorer = None
        if clip is not None:
            from mmdit_lora.evaluation.clip import Clip

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
            say(fidelity_table(sides, f"{group} boxes, {sides['layouts']} layouts"))
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
    """Score images by a published benchmark; without images, write its layouts to paint them from."""

    if images is None:
        with open_folder(out, verb="evaluate", names=["layouts.jsonl"], inputs={"--annotations": annotations}):
            count = write_layouts(protocol, annotations, out / "layouts.jsonl")
        say(f"wrote {count} layouts to {out / 'layouts.jsonl'}; paint them by `sample --layout`, then give --images")
        return
    from mmdit_lora.evaluation.detectors import open_detector, open_judge
    from mmdit_lora.evaluation.protocols import find_protocol

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
    settings: SamplingConfig,
    *,
    base: str | None,
    adapters: list[str],
    each: bool,
    images: Path | None,
    seed: int,
    dtype: str,
) -> ImageCache:
    """Where painted images are kept, under all that they depend on."""
    import hashlib
    import json
    from dataclasses import asdict

    from mmdit_lora.evaluation.image_cache import ImageCache
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
    return ImageCache(out, plan)


def _digest(adapter: str) -> str:
    """SHA-256 of an adapter's weights."""
    import hashlib

    from mmdit_lora.lora import adapter_file

    return hashlib.sha256(adapter_file(folder_and_weight(adapter)[0]).read_bytes()).hexdigest()


def _write(out: Path, result: Evaluation, report: dict[str, Any]) -> None:
    from mmdit_lora.evaluation.report import markdown, page
    from mmdit_lora.files import write_json, write_text
    from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

    title = f"{Path(report['data']).name}, {report['layouts']} layouts"
    colors = phrase_colors(result.layouts)
    for name, side in result.sides.items():
        if name == "shuffled":
            continue  # the ground truth's images again
        drawn = [draw_boxes(p, item, colors=colors) for p, item in zip(side.images[:16], result.layouts, strict=False)]
        save_png(contact_sheet(drawn), out / f"{name}.png")
    write_text(out / "report.html", page(result, report, title=title))
    write_text(out / "report.md", markdown(report, title=title))
    write_json(out / "report.json", report)


# What is written, the files of all protocols' own tools among it.
_OF_PROTOCOLS: tuple[str, ...] = (
    "seen.jsonl",
    "report.json",
    "report.md",
    "report.html",
    "metric_mmdit_lora.json",
    "minicpm-vqa.json",
)
_OF_PROTOCOLS += (
    "minicpm-vqa-score.txt",
    "lgs_score_detailed.json",
    "lgs_score.txt",
    "simple/",
    "medium/",
    "hard/",
)
_OF_PROTOCOLS += tuple(f"detections_{split}_mmdit_lora_results.json" for split in ("train2017", "val2017"))
_OF_PROTOCOLS += tuple(f"instances_{split}_filtered.json" for split in ("train2017", "val2017"))


def score_protocol(
    name: str,
    annotations: str | Path,
    images_dir: str | Path,
    out: str | Path,
    detector: Looks | None = None,
    judge: Judges | None = None,
    published: bool = True,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a folder of images by a published protocol.

    Writes `out`/report.json, report.md and report.html, the files that the protocol's own tools write, and seen.jsonl:
    what was seen in each image, from which a run that was killed goes on.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. images_dir: the painted images.
        detector: has `detect(images, layouts)`; judge: has `ask(images, questions)`; see `evaluate.protocols.look`.
        published: put the published figures beside.
        on_progress: called with the number of images that are done.

    Returns:
        What report.json holds; `scores` are shares in [0, 1].

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; a detector or judge that it needs and has not;
            missing images (the first names, and how many). Nothing is written then.
    """
    from mmdit_lora.evaluation.protocols import find_protocol
    from mmdit_lora.evaluation.protocols.published import beside, to_dicts
    from mmdit_lora.evaluation.protocols.report import protocol_pages
    from mmdit_lora.evaluation.protocols.runner import find_images, look_at, require

    protocol = find_protocol(name)
    require(protocol, detector=detector is not None, judge=judge is not None)
    cases = protocol.read(annotations)
    pairs = find_images(protocol, cases, images_dir)
    out, inputs = Path(out), {"--annotations": annotations, "--images": images_dir}
    with open_folder(out, verb="evaluate", names=_OF_PROTOCOLS, inputs=inputs, logs=["seen.jsonl"]):
        seen = look_at(
            protocol,
            pairs,
            images_dir,
            detector=detector,
            judge=judge,
            kept=out / "seen.jsonl",
            on_progress=on_progress,
        )
        of_images = [case for case, _ in pairs]
        scores = protocol.score(of_images, seen)
        results = protocol.write_results(of_images, seen, out)
        rows = beside(name, scores) if published else []
        report = _report(protocol, cases, seen) | {
            "annotations": str(annotations),
            "images_folder": str(images_dir),
            "detector": _named(detector) if protocol.detector != "unused" else None,
            "judge": _named(judge) if protocol.judge != "unused" else None,
            "scores": scores,
            "results": [file.relative_to(out).as_posix() for file in results],
            "published": to_dicts(rows[1:]),
        }
        write_json(out / "report.json", report)
        for name, text in protocol_pages(protocol, report, rows).items():
            write_text(out / name, text)
        return report


def write_layouts(name: str, annotations: str | Path, out: str | Path) -> int:
    """Write a benchmark's layouts as a layout file, one a line, for `sample --layout`; returns their number.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. out: a .jsonl file.

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; `out` is no .jsonl.
    """

    from mmdit_lora.evaluation.protocols import find_protocol

    if Path(out).suffix != ".jsonl":
        raise InputError("is no .jsonl file", location=str(out), hint="many layouts stand in a .jsonl, one a line")
    cases = find_protocol(name).read(annotations)
    write_text(out, "".join(json_text(case.layout.to_dict()) + "\n" for case in cases))
    return len(cases)


def _named(one: object) -> str | None:
    name = getattr(one, "name", None)
    return None if one is None else name if isinstance(name, str) else type(one).__name__


def _report(protocol: PublishedProtocol, cases: list[Case], seen: list[Seen]) -> dict[str, Any]:
    answers = [answer for one in seen for answer in (one.answers or {}).values()]
    return {
        "protocol": protocol.name,
        "source": protocol.source,
        "deviations": list(protocol.deviations),
        "cases": len(cases),
        "images": len(seen),
        "boxes": sum(len(case.things) for case in cases),
        "questions": len(answers),
        "unanswered": sum(answer is None for answer in answers),
    }
