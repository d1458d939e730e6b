"""The verb `sample`, and what every verb that samples images shares: layouts from options, a base with its adapters."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmdit_lora.boxes import EdgeCount, Reading
from mmdit_lora.cli.options import (
    AdapterOption,
    BaseOption,
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
    folder_and_weight,
    size_of,
)
from mmdit_lora.cli.output import ProgressLines, emit, say
from mmdit_lora.config.sampling import SamplingConfig
from mmdit_lora.data.records import warn
from mmdit_lora.data.sources import open_layouts
from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import write_json
from mmdit_lora.layout import Box, BoxError, Clipped, Layout, as_box
from mmdit_lora.outputs import check_new_folder, new_folder

if TYPE_CHECKING:
    import torch

    from mmdit_lora.pipelines import LayoutPipeline


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("sample")(sample)


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
    """Sample images of layouts: plain, with their boxes, as a contact sheet, and a JSON of all settings."""
    inputs = sampling_inputs(base, adapter, layout) | {"--stream": stream}
    check_new_folder(out, verb="sample", inputs=inputs)
    layouts = given_layouts(layout, prompt, box, box_format, box_units, size)[:count]
    settings = sampling_config(steps, guidance, layout_scale, layout_window, size, batch_size)
    from mmdit_lora.pipelines import generate
    from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

    with new_folder(out, verb="sample", inputs=inputs) as temporary:
        pipe = open_with_adapters(base, adapter, dtype, settings, stream=stream)
        with ProgressLines() as progress:
            images = generate(
                pipe, layouts, settings, seed=seed, on_progress=lambda done: progress("sample", done, len(layouts), {})
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
        return open_layouts(layout)
    if prompt is None:
        raise InputError(
            "is missing" if boxes else "nothing to sample",
            location="--prompt" if boxes else None,
            hint='give --layout FILE, or --prompt "TEXT" with --box "0.1,0.1,0.5,0.5=a red circle" for each box',
        )
    reading, edges, pixels = Reading(order, units), EdgeCount(), None
    if units == "pixel":
        if size is None:
            raise InputError(
                "is missing", location="--size", hint="boxes in pixels need the image's size, e.g. 1184x880"
            )
        height, width = size_of(size)
        pixels = partial(tuple[int, int], (width, height))
    made: list[Box] = []
    clipped: Clipped = []
    for text in boxes or ():
        numbers, phrase = _box(text)
        try:
            made.append(as_box(numbers, phrase, reading, pixels, f"--box {clip(text, 80)}", clipped))
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
    return SamplingConfig(
        steps=steps,
        guidance_scale=guidance,
        layout_scale=scale,
        layout_window=window,
        size=None if size is None else size_of(size),
        batch_size=batch,
    )


def open_with_adapters(
    base: str,
    adapters: list[str] | None,
    dtype: str,
    settings: SamplingConfig | None = None,
    *,
    allow_same: bool = False,
    stream: Path | None = None,
) -> LayoutPipeline:
    """The base with its adapters, all active, on the GPU if there is one.

    Args:
        settings: their size must be one that this base can sample.
        stream: folder of a generic layout stream.
        allow_same: an adapter may be given several times, if they do not act together.
    """
    import torch

    from mmdit_lora.lora import adapter_file, load_adapter
    from mmdit_lora.pipelines import load_pipeline

    for given in adapters or []:
        adapter_file(folder_and_weight(given)[0])  # before the base is opened, which takes longer
    pipe = load_pipeline(base, dtype=torch_dtype(dtype), stream=stream)
    for side in (settings and settings.size) or ():
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

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def sampling_inputs(
    base: str | None, adapters: list[str] | None, layout: str | Path | None
) -> dict[str, str | Path | None]:
    """Option -> path that sampling reads, where nothing may be written."""
    given = {f"--adapter {each}": folder_and_weight(each)[0] for each in adapters or []}
    return {"--base": base, "--layout": layout, **given}
