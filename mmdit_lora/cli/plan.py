"""The verb `plan`: what a training run needs, before any weight is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mmdit_lora.cli.options import JsonFlag, number
from mmdit_lora.cli.output import emit, say
from mmdit_lora.config.ranges import BATCH, SIDE, Range
from mmdit_lora.errors import InputError
from mmdit_lora.hub import require_base

if TYPE_CHECKING:
    from mmdit_lora.analysis.plan.bases import PlannedBase
    from mmdit_lora.analysis.plan.forecast import Forecast, Setup

_METHODS: tuple[Literal["lora", "layout_stream", "full"], ...] = ("lora", "layout_stream", "full")


_UP_TO = Range(1, 10_000, whole=True)


def register(app: typer.Typer) -> None:
    """Add this file's verb to the app."""
    app.command("plan")(plan)


def plan(
    base: Annotated[
        str | None, typer.Argument(help="Pipeline folder, transformer folder or hub id; only its config is read.")
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(help="Instead of a base: the name of a published one; a wrong name lists all. Downloads nothing."),
    ] = None,
    method: Annotated[
        Literal["lora", "layout_stream", "full", "all"], typer.Option(help="What is trained; all = side by side.")
    ] = "all",
    resolution: Annotated[
        int | None, number(SIDE, "--resolution", help="Side of the images in pixels; default: the base's own.")
    ] = None,
    boxes: Annotated[int, number(_UP_TO, "--boxes", help="Boxes of an image.")] = 10,
    batch: Annotated[int, number(BATCH, "--batch", help="Images of a step.")] = 1,
    dtype: Annotated[
        Literal["bf16", "fp16", "fp32"], typer.Option(help="Of frozen weights and of computing; what trains is fp32.")
    ] = "bf16",
    r: Annotated[int, number(_UP_TO, "--r", help="Rank of the LoRA.")] = 16,
    attention: Annotated[
        Literal["siamese", "cross"] | None, typer.Option(help="How a new stream is read; default: siamese.")
    ] = None,
    single_blocks: Annotated[
        bool | None, typer.Option("--single-blocks", help="A new stream in the single-stream blocks too.")
    ] = None,
    phrase_tokens: Annotated[
        int | None,
        number(
            _UP_TO, "--phrase-tokens", help="Text tokens of a phrase in a new stream; default: one pooled embedding."
        ),
    ] = None,
    stream_width: Annotated[
        int | None, number(SIDE, "--stream-width", help="Width of a generic stream; default: the base's, at most 1024.")
    ] = None,
    text_tokens: Annotated[
        int | None, number(_UP_TO, "--text-tokens", help="Text tokens of a caption; default: the published pipeline's.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Compute blocks again instead of keeping their activations."),
    ] = False,
    every: Annotated[int, number(_UP_TO, "--every", help="With it: of every k-th block only.")] = 1,
    optimizer: Annotated[Literal["adamw", "sgd-momentum"], typer.Option(help="Training uses adamw.")] = "adamw",
    device: Annotated[
        Literal["gpu", "cpu"], typer.Option(help="Whose autocast and optimizer are meant; none is needed here.")
    ] = "gpu",
    as_json: JsonFlag = False,
) -> None:
    """Parameters, memory and FLOPs of a training run: one step of the real model, on tensors without data."""
    if (base is None) == (family is None):
        raise InputError(
            "give a base or a --family" if base is None else "a base and a --family are given",
            hint="e.g. `mmdit-lora plan --family sd3-medium` or `mmdit-lora plan PIPELINE_FOLDER`",
        )
    if every != 1 and not gradient_checkpointing:
        raise InputError(
            f"is {every}, and nothing is checkpointed", location="--every", hint="add --gradient-checkpointing"
        )
    if base is not None:
        base = require_base(base, whole=False)
    stream = {
        "layout_attention": attention,
        "layout_single_blocks": single_blocks,
        "phrase_tokens": phrase_tokens,
        "layout_width": stream_width,
    }
    logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)  # where there is no triton, it warns
    from mmdit_lora.analysis.plan.bases import load_base, preset_base
    from mmdit_lora.analysis.plan.forecast import NOT_COUNTED, Setup, forecast, full_fine_tuning

    planned = preset_base(family, stream) if family is not None else load_base(str(base), stream)
    setup = Setup(
        resolution=resolution or planned.default_side,
        boxes=boxes,
        batch=batch,
        dtype=dtype,
        text_tokens=text_tokens or planned.family.max_length,
        rank=r,
        optimizer=optimizer,
        checkpoint_every=every if gradient_checkpointing else 0,
        device=device,
    )
    forecasts = [forecast(planned, setup, each) for each in (_METHODS if method == "all" else (method,))]
    classic = full_fine_tuning(planned, setup, forecasts)
    for line in (*_lines(planned, setup, forecasts), "", _classic_line(classic, r)):
        say(line)
    say(f"Not counted: {'; '.join(NOT_COUNTED)}.")
    if as_json:
        emit(
            {
                "base": planned.name,
                "transformer": planned.transformer.__name__,
                "setup": asdict(setup),
                "methods": {each.method: each.to_dict() for each in forecasts},
                "full_fine_tuning": classic,
                "not_counted": list(NOT_COUNTED),
            }
        )


def _lines(planned: PlannedBase, setup: Setup, forecasts: list[Forecast]) -> Iterator[str]:
    numbers = forecasts[0].parameters
    every = f", gradient checkpointing, every {setup.checkpoint_every}" if setup.checkpoint_every else ""
    yield f"{planned.name}: {numbers.base / 1e6:,.2f} M parameters, layout stream {numbers.stream / 1e6:,.2f} M"
    yield (
        f"{setup.resolution} px, {setup.boxes} boxes, {setup.text_tokens} text tokens, batch {setup.batch}, {setup.dtype}, "
        f"{setup.optimizer}{every}"
    )
    yield ""
    rows: dict[str, list[str]] = {"": [each.method for each in forecasts]}
    rows["trainable"] = [f"{each.parameters.trainable / 1e6:,.2f} M" for each in forecasts]
    if any(each.parameters.targets for each in forecasts):
        rows["linears with LoRA"] = [str(each.parameters.targets or "-") for each in forecasts]
        files = [each.parameters.adapter_bytes for each in forecasts]
        rows["adapter file"] = [_bytes(size) if size else "-" for size in files]
    for name in ("weights", "gradients", "optimizer_state", "activations", "peak"):
        rows[name.replace("_", " ")] = [_bytes(getattr(each.trace, name)) for each in forecasts]
    rows["  reached in the"] = [each.trace.peak_in for each in forecasts]
    for name in ("forward", "backward", "step", "per_image"):
        rows[name.replace("_", " ")] = [_flops(each.to_dict()["flops"][name]) for each in forecasts]
    for name, cells in rows.items():
        yield f"{name:<18}" + "".join(f"{cell:>18}" for cell in cells)


def _classic_line(classic: dict[str, int], rank: int) -> str:
    size = {name: _bytes(count) for name, count in classic.items()}
    return (
        f"Full fine-tuning with momentum holds 3 x the weights (weights, gradients, momentum; in fp32, as all that trains): "
        f"3 x {size['weights']} = {size['with_momentum']}; with AdamW 4 x: {size['with_adamw']}. "
        f"LoRA of rank {rank} with AdamW: {size['lora_with_adamw']}. Activations come on top."
    )


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"


def _flops(count: float) -> str:
    return f"{count / 1e12:,.2f} TFLOP" if count >= 1e12 else f"{count / 1e9:,.2f} GFLOP"
