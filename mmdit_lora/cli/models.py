"""The verbs that work with models: `quickstart`, `train`, `sample`, `export`, `verify`."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmdit_lora.cli.options import JsonFlag, number
from mmdit_lora.cli.output import emit, say
from mmdit_lora.config.ranges import (
    ADAPTER_WEIGHT,
    BATCH,
    COUNT,
    GUIDANCE,
    LAYOUT_SCALE,
    SEED,
    SHARE,
    SIDE,
    STEPS,
    check_window,
)
from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import exists, nearest, output_path
from mmdit_lora.hub import require_base
from mmdit_lora.outputs import check_new_folder, check_open_folder, new_folder

if TYPE_CHECKING:
    import torch

    from mmdit_lora.layout import Layout
    from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig

_FIGURES = ("miou", "iou50", "color_acc", "shape_acc", "ap", "relations", "clip_box")

# -- what options are checked by as they are read, before anything heavy is imported


def _size(text: str) -> tuple[int, int]:
    """(height, width) of "1024" or "1184x880", which is width x height."""
    match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
    if match is None or not all(int(side) in SIDE for side in match.groups(default="1")):
        raise InputError(
            f"is {text!r}",
            location="--size",
            hint=f"give a side in pixels, {SIDE}, or WIDTHxHEIGHT, e.g. 1024 or 1184x880",
        )
    width = int(match[1])
    return int(match[2] or width), width


def folder_and_weight(text: str) -> tuple[str, float]:
    """`FOLDER` or `FOLDER=WEIGHT`.

    Raises:
        InputError: the weight is no number in `ADAPTER_WEIGHT`.
    """
    folder, equals, weight = text.rpartition("=")
    if not equals or exists(text):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        raise InputError(
            f"{weight!r} is no weight",
            location=f"--adapter {text}",
            hint=f"write FOLDER or FOLDER=WEIGHT, {ADAPTER_WEIGHT}, e.g. FOLDER=0.8",
        ) from None
    return folder, ADAPTER_WEIGHT.check(value, f"the weight in --adapter {text}")


def _adapters_are_there(adapters: list[str] | None) -> list[str] | None:
    for given in adapters or ():
        folder, _ = folder_and_weight(given)
        if not exists(folder):
            raise _no_such_adapter(folder, f"--adapter {folder}")
    return adapters


def _no_such_adapter(path: str, location: str) -> InputError:
    near = nearest(path)
    hint = f"did you mean {near}?" if near else "give an adapter as `mmdit-lora train` or `mmdit-lora export` wrote it"
    return InputError("no such file or folder", location=location, hint=hint)


def adapter_is_there(adapter: str | None) -> str | None:
    """The `callback` of an option or argument that is an adapter."""
    if adapter is not None and not exists(adapter):
        raise _no_such_adapter(adapter, adapter)
    return adapter


def base_is_there(base: str | None) -> str | None:
    """The `callback` of an option that is a base to be opened."""
    return None if base is None else require_base(base)


def _check_size(text: str | None) -> str | None:
    if text is not None:
        _size(text)
    return text


# -- options that several verbs have

BaseOption = Annotated[str, typer.Option("--base", help="Pipeline folder or hub id.", callback=base_is_there)]
OwnBase = Annotated[
    str | None, typer.Option("--base", help="Its base; default: the one that it names.", callback=base_is_there)
]
AdapterArgument = Annotated[str, typer.Argument(help="Adapter folder or file.", callback=adapter_is_there)]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Adapter folder; FOLDER=WEIGHT to weigh it, from -100 to 100; may be given again.",
        callback=_adapters_are_there,
    ),
]
StepsOption = Annotated[int | None, number(STEPS, "--steps", help="Sampling steps; default: what the base states.")]
GuidanceOption = Annotated[
    float | None, number(GUIDANCE, "--guidance", help="Classifier-free guidance; default: what the base states.")
]
ScaleOption = Annotated[float, number(LAYOUT_SCALE, "--layout-scale", help="Factor of the layout residual; 0 = off.")]
WindowOption = Annotated[
    tuple[float, float],
    number(
        SHARE,
        "--layout-window",
        help="Part of the steps where the layout acts: START END.",
        then=partial(check_window, location="--layout-window"),
    ),
]
DtypeOption = Annotated[
    Literal["fp32", "bf16"],
    typer.Option("--dtype", help="Of the weights that are loaded; bf16 needs half the memory."),
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="SIDE|WIDTHxHEIGHT",
        help="In pixels, e.g. 1024 or 1184x880; default: the base's own.",
        callback=_check_size,
    ),
]
BatchOption = Annotated[int, number(BATCH, "--batch-size", help="Images at a time.")]
SeedOption = Annotated[int, number(SEED, "--seed", help="Image i starts from the noise of SEED + i.")]
CountOption = Annotated[int | None, number(COUNT, "--count", help="The first COUNT layouts only.")]


def register(app: typer.Typer) -> None:
    """Add this file's verbs to the app."""
    for verb in (quickstart, train, sample, export, verify):
        app.command(verb.__name__)(verb)


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("outputs/quickstart"),
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter on the embedded base, show before and after, export it. A few minutes on a CPU."""
    check_open_folder(out, verb="quickstart", names=())
    from mmdit_lora.cli.output import ProgressLines
    from mmdit_lora.cli.quickstart import quickstart as run

    with ProgressLines() as tell:
        report = run(out, tell=tell)
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
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, e.g. train.max_steps=100")] = None,
    resume: Annotated[Literal["latest"] | None, typer.Option(help="Go on from the newest checkpoint.")] = None,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Look at everything that a run needs, train nothing, write nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train an adapter (or, by `method`, the layout stream, or everything)."""
    from mmdit_lora.config.loading import load_config

    settings = load_config(config, overrides or ())
    output_path(settings.output_dir, folder=True)
    from mmdit_lora.cli.output import ProgressLines
    from mmdit_lora.cli.preflight import check_only as look
    from mmdit_lora.cli.preflight import show_preflight
    from mmdit_lora.training import trainer

    if check_only:
        look(settings, resume=resume is not None, as_json=as_json)
        return
    last, plan = settings.train.max_steps, settings.train
    pauses = {"validation": plan.validate_every, "images": plan.sample_every, "checkpoint": plan.checkpoint_every}
    with ProgressLines(pauses=pauses) as tell:
        result = trainer.train(
            settings,
            resume=resume is not None,
            on_progress=lambda step, scalars: tell("train", step, last, scalars),
            on_preflight=show_preflight,
        )
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
    say(f"wrote {result.folder / ('adapter' if settings.method == 'lora' else 'base')}")
    if as_json:
        emit(result.report)


def sample(
    base: BaseOption,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")],
    layout: Annotated[
        Path | None, typer.Option("--layout", help="A .json layout, a .jsonl of many, or a data set folder.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Instead of --layout: the caption of one.")] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="LEFT,TOP,RIGHT,BOTTOM=PHRASE",
            help='With --prompt: a box, its numbers from 0 to 1, e.g. "0.1,0.1,0.5,0.5=a red circle"; may be given again.',
        ),
    ] = None,
    box_format: Annotated[
        Literal["xyxy", "xywh", "cxcywh"], typer.Option("--box-format", help="What the numbers of --box are.")
    ] = "xyxy",
    box_units: Annotated[
        Literal["relative", "pixel", "permille"],
        typer.Option("--box-units", help="Units of --box: relative (0 to 1), permille (0 to 1000), pixel (of --size)."),
    ] = "relative",
    adapter: AdapterOption = None,
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
    """Paint layouts: images, the same with their boxes, a contact sheet, and a JSON of all settings."""
    from dataclasses import asdict

    inputs = sampling_inputs(base, adapter, layout)
    check_new_folder(out, verb="sample", inputs=inputs)
    layouts = given_layouts(layout, prompt, box, box_format, box_units, size)[:count]
    settings = sampling_config(steps, guidance, layout_scale, layout_window, size, batch_size)
    from mmdit_lora.cli.output import ProgressLines
    from mmdit_lora.files import write_json
    from mmdit_lora.pipelines import generate
    from mmdit_lora.visual.draw import contact_sheet, draw_boxes, phrase_colors, save_png

    with new_folder(out, verb="sample", inputs=inputs) as temporary:
        pipe = open_with_adapters(base, adapter, dtype, settings)
        with ProgressLines() as tell:
            images = generate(
                pipe, layouts, settings, seed=seed, on_progress=lambda done: tell("paint", done, len(layouts), {})
            )
        colors = phrase_colors(layouts)
        boxed = [draw_boxes(image, item, colors=colors) for image, item in zip(images, layouts, strict=True)]
        record = {
            "base": base,
            "adapters": adapter or [],
            "settings": asdict(settings)
            | {
                "steps": settings.steps or pipe.config.num_inference_steps,
                "guidance_scale": pipe.config.guidance_scale if guidance is None else guidance,
                "dtype": dtype,
            },
            "images": [
                {"file": f"{n:04d}.png", "boxes_file": f"{n:04d}_boxes.png", "seed": seed + n, "layout": item.to_dict()}
                for n, item in enumerate(layouts)
            ],
        }
        for number, (image, drawn) in enumerate(zip(images, boxed, strict=True)):
            save_png(image, temporary / f"{number:04d}.png")
            save_png(drawn, temporary / f"{number:04d}_boxes.png")
        save_png(contact_sheet(boxed, captions=[item.caption for item in layouts]), temporary / "contact_sheet.png")
        write_json(temporary / "sample.json", record)
    say(f"wrote {len(images)} images to {out}; look at {out / 'contact_sheet.png'}")
    if as_json:
        emit(record | {"out": str(out)})


def export(
    adapter: Annotated[
        str,
        typer.Argument(
            help="Adapter folder or file; with --to creatilayout also a base, for its stream.",
            callback=adapter_is_there,
        ),
    ],
    to: Annotated[
        Literal["peft", "diffusers", "kohya", "creatilayout", "merged"],
        typer.Option(
            help="peft: a PEFT folder. diffusers: for pipe.load_lora_weights. kohya: one file in sd-scripts' names, which no other tool reads. "
            "creatilayout: under CreatiLayout's names. merged: a whole base."
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="PATH", help="Folder to write; for kohya a .safetensors file.")],
    base: OwnBase = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="creatilayout: the whole stream, with the adapter in its weights.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write an adapter for other tools, read it back in a fresh process, and compare."""
    if merge and to != "creatilayout":
        raise InputError("is for --to creatilayout", location="--merge", hint="--to merged writes a whole base")
    if to != "kohya":
        check_new_folder(out, verb="export", inputs={"ADAPTER": adapter, "--base": base})
    elif Path(out).suffix != ".safetensors":
        raise InputError("is one file", location=f"--out {out}", hint="give a name that ends in .safetensors")
    from mmdit_lora.export.export import export_adapter

    report = export_adapter(adapter, to=to, out=out, base=base, merge=merge)
    say(f"wrote {report.out} ({report.bytes / 2**20:.2f} MiB); read back, it differs by {report.max_abs_diff:.1e}")
    if report.max_image_diff is not None:
        say(f"an image sampled with it, twice with one seed, differs by {report.max_image_diff:.1e} of 1")
    if report.note:
        say(f"note: {report.note}")
    if as_json:
        emit(report.to_dict())


def verify(
    adapter: AdapterArgument,
    base: OwnBase = None,
    as_json: JsonFlag = False,
) -> None:
    """Check that an adapter is whole, fits its base, does something, and that PEFT alone loads it to the same outputs."""
    from mmdit_lora.export.export import verify_adapter

    report = verify_adapter(adapter, base=base)
    say("\n".join(f"{key:<13} {value}" for key, value in report.items()))
    if as_json:
        emit(report)


def layouts_of(path: Path) -> list[Layout]:
    """Of a layout file, or a data set folder."""
    from mmdit_lora.data.images import image_size
    from mmdit_lora.data.records import read_dataset
    from mmdit_lora.layout import read_layouts

    if path.is_dir():
        return [record.layout for record in read_dataset(path)]
    return read_layouts(path, image_size=image_size)


def given_layouts(
    layout: Path | None, prompt: str | None, boxes: list[str] | None, order: str, units: str, size: str | None
) -> list[Layout]:
    """The layouts of `--layout`, or the one of `--prompt` and `--box`.

    Args:
        order, units: of the boxes' numbers, see `Layout.from_dict`. size: of the image, for pixels.

    Raises:
        InputError: not exactly one of the two is given, or what is given is no layout.
    """
    if layout is not None:
        if prompt is not None or boxes:
            raise InputError("is given beside --layout", location="--prompt, --box", hint="give one of the two")
        return layouts_of(layout)
    if prompt is None:
        raise InputError(
            "is missing" if boxes else "nothing to paint",
            location="--prompt" if boxes else None,
            hint='give --layout FILE, or --prompt "TEXT" with --box "0.1,0.1,0.5,0.5=a red circle" for each box',
        )
    from mmdit_lora.boxes import EdgeCount, Reading
    from mmdit_lora.data.records import warn
    from mmdit_lora.layout import Box, BoxError, Clipped, Layout, as_box

    reading, image_size, edges = Reading(order, units), None, EdgeCount()
    if units == "pixel":
        if size is None:
            raise InputError(
                "is missing", location="--size", hint="boxes in pixels need the image's size, e.g. 1184x880"
            )
        image_size = partial(_width_and_height, size)
    made: list[Box] = []
    clipped: Clipped = []
    for text in boxes or ():
        numbers, phrase = _box(text)
        try:
            made.append(as_box(numbers, phrase, reading, image_size, f"--box {clip(text, 80)}", clipped))
        except BoxError as error:
            hint = (
                f"it is read as --box-format {order} --box-units {units}: {reading.allows}; "
                "correct the numbers, or give these options as the numbers are"
            )
            raise InputError(error.what, location=error.location, hint=hint) from None
    for by, place in clipped:
        edges.add(by, place)
    if edges.message:
        warn(edges.message)
    return [Layout(prompt, tuple(made))]


def _width_and_height(size: str) -> tuple[int, int]:
    height, width = _size(size)
    return width, height


def _box(text: str) -> tuple[list[float], str]:
    """Numbers and phrase of `LEFT,TOP,RIGHT,BOTTOM=PHRASE`."""
    numbers, _, phrase = text.partition("=")
    try:
        xyxy = [float(number) for number in numbers.split(",")]
    except ValueError:
        xyxy = []
    if len(xyxy) != 4 or not phrase.strip():
        raise InputError(
            f"is {clip(repr(text))}",
            location="--box",
            hint='give four numbers and the phrase: "0.1,0.1,0.5,0.5=a red circle"',
        )
    return xyxy, phrase.strip()


def sampling_config(
    steps: int | None, guidance: float | None, scale: float, window: tuple[float, float], size: str | None, batch: int
) -> SamplingConfig:
    """Of options that were checked as they were read."""
    from mmdit_lora.pipelines import SamplingConfig

    return SamplingConfig(
        steps=steps,
        guidance_scale=guidance,
        layout_scale=scale,
        layout_window=window,
        size=None if size is None else _size(size),
        batch_size=batch,
    )


def open_with_adapters(
    base: str,
    adapters: list[str] | None,
    dtype: str,
    settings: SamplingConfig | None = None,
    *,
    allow_same: bool = False,
) -> LayoutPipeline:
    """The base with its adapters on it, all active, on the GPU where there is one.

    Args:
        settings: their size must be one that this base can paint.
        allow_same: an adapter may be given several times, where they are not to act together.
    """
    import torch

    from mmdit_lora.lora import adapter_file, load_adapter
    from mmdit_lora.pipelines import load_pipeline

    for given in adapters or []:
        adapter_file(folder_and_weight(given)[0])  # before the base is opened, which takes longer

    pipe = load_pipeline(base, dtype=torch_dtype(dtype))
    for side in (settings.size if settings is not None else None) or ():
        try:
            pipe.check_side(side)
        except InputError as error:
            raise InputError(error.what, location="--size", hint=error.hint) from None
    weights = adapter_weights(adapters)
    for name, given in zip(weights, adapters or [], strict=True):
        folder, _ = folder_and_weight(given)
        load_adapter(pipe.transformer, folder, adapter_name=name, allow_same=allow_same)
    if weights:
        pipe.transformer.set_adapters(list(weights), list(weights.values()))
    pipe.transformer.eval()
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def adapter_weights(adapters: list[str] | None) -> dict[str, float]:
    """Names that `open_with_adapters` gives to adapters, and their weights."""
    return {f"adapter_{index}": folder_and_weight(given)[1] for index, given in enumerate(adapters or [])}


def torch_dtype(name: str) -> torch.dtype:
    """Of what `--dtype` says."""
    import torch

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return dtypes[name]


def sampling_inputs(base: str | None, adapters: list[str] | None, layout: Path | None) -> dict[str, str | Path | None]:
    """What painting reads, by option: no output may be there."""
    given = {f"--adapter {each}": folder_and_weight(each)[0] for each in adapters or []}
    return {"--base": base, "--layout": layout, **given}


def fidelity_table(report: dict[str, Any], title: str) -> str:
    """The chief figures of the sides that `report` has, as lines for a terminal."""
    sides = [key for key, side in report.items() if isinstance(side, dict) and "miou" in side]
    names = [name for name in _FIGURES if any(name in report[side] for side in sides)]
    rows = [f"{title:<40}" + "".join(f"{name:>11}" for name in names)]
    for side in sides:
        cells = (f"{report[side][name]:>11.3f}" if name in report[side] else f"{'-':>11}" for name in names)
        rows.append(f"  {side.replace('_', ' '):<38}" + "".join(cells))
    return "\n".join(rows)
