"""`attribute`: which box moved which part of the image, by leaving out one box at a time and by attention from image to layout.

The result is a sheet with a row for each box: its change and its attention as heat over the image.
Shape letters: H, W pixels; L image tokens on a grid of (rows, columns); N layout tokens, K of them a box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout
from mmdit_lora.models.generic_stream import GenericLayoutStream, StreamState
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate
from mmdit_lora.visual import draw_boxes, phrase_colors
from mmdit_lora.visual.compose import WHITE, Rgb, blank, fit, join, paragraph
from mmdit_lora.visual.drawing import GREY


@dataclass(frozen=True)
class BoxAttribution:
    """What one box did.

    Args:
        area: of the box, as a share of the image.
        change: mean absolute difference, of RGB in [0, 1], between the images with the box and without it.
        change_inside: the share of that change that lies in the box; change_lift: that share / area, 1 = no better than
            chance. None where nothing changed.
        attention: mean share of an image token's attention that goes to the box, over blocks, heads, steps and tokens.
        attention_inside, attention_lift: as of the change.
        attention_lift_by_block: the same in each block.
    """

    phrase: str
    xyxy: tuple[float, float, float, float]
    area: float
    change: float
    change_inside: float | None
    change_lift: float | None
    attention: float
    attention_inside: float | None
    attention_lift: float | None
    attention_lift_by_block: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Attribution:
    """One layout.

    Args:
        image: generated with all boxes. without: box i left out, from the same noise.
        changes: (H, W) for each box, mean absolute difference over RGB in [0, 1].
        attentions: (rows, columns) for each box, share of each image token's attention that goes to it.
        boxes: the figures.
    """

    layout: Layout
    image: Image.Image
    without: list[Image.Image]
    changes: list[np.ndarray]
    attentions: list[np.ndarray]
    boxes: list[BoxAttribution]


def attribute(
    pipe: LayoutPipeline,
    layout: Layout,
    settings: SamplingConfig,
    *,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Attribution:
    """Generate a layout with all boxes and with each box left out, from one caption and noise, and read the first one's attention.

    Args:
        on_progress: called with the number of images done, of one more than there are boxes.

    Raises:
        InputError: the layout has no box, or the settings do not fit the base.
    """
    if not layout.boxes:
        raise InputError("has no boxes", hint="give a layout with boxes: each is left out once")
    one_less = [
        replace(layout, boxes=layout.boxes[:index] + layout.boxes[index + 1 :]) for index in range(len(layout.boxes))
    ]
    progress = on_progress or (lambda _: None)
    with image_attention(pipe.transformer) as seen:
        (image,) = generate(pipe, [layout], settings, seed=seed)
    progress(1)
    without = generate(
        pipe, one_less, settings, seed=seed, same_noise=True, on_progress=lambda done: progress(1 + done)
    )

    changes = [difference(image, other) for other in without]
    by_block = {name: _maps(total / count, image, layout, pipe) for name, (total, count) in seen.items()}
    attentions = [np.mean([maps[index] for maps in by_block.values()], axis=0) for index in range(len(layout.boxes))]
    boxes = []
    for index, box in enumerate(layout.boxes):
        shares = inside(box, changes[index]), inside(box, attentions[index])
        change_lift, attention_lift = (None if share is None else share / box.area for share in shares)
        in_blocks = {name: inside(box, maps[index]) for name, maps in by_block.items()}
        boxes.append(
            BoxAttribution(
                phrase=box.phrase,
                xyxy=box.xyxy,
                area=box.area,
                change=float(changes[index].mean()),
                change_inside=shares[0],
                change_lift=change_lift,
                attention=float(attentions[index].mean()),
                attention_inside=shares[1],
                attention_lift=attention_lift,
                attention_lift_by_block={
                    name: None if share is None else share / box.area for name, share in in_blocks.items()
                },
            )
        )
    return Attribution(layout, image, without, changes, attentions, boxes)


@contextmanager
def image_attention(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Within the block, every layout stream's attention is computed a second time, as probabilities.

    Yields:
        For each block's stream: the sum over calls of (L, N) attention from image to layout tokens, mean over heads, of the
        last sample of each batch (under guidance the one with a layout), and the number of calls. Filled as the model runs.
    """
    seen: dict[str, tuple[Tensor, int]] = {}
    undo: list[Callable[[], None]] = []
    for name, stream in model.named_modules():
        if name.split(".")[-1] == "layout_stream":
            undo += _watch(name.removesuffix(".layout_stream"), stream, seen)
    try:
        yield seen
    finally:
        for each in undo:
            each()


def _watch_generic(
    name: str, stream: GenericLayoutStream, seen: dict[str, tuple[Tensor, int]]
) -> list[Callable[[], None]]:
    state: list[tuple[int, StreamState]] = []  # image tokens and state of a call whose attention is still to come

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        state[:] = [(args[0].shape[1], args[1])]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        image, call = state.pop()
        samples = call.gain.flatten().nonzero().flatten()
        if len(samples):
            last = int(samples[-1])
            queries, keys = query[last, :, :image].transpose(0, 1), key[last].transpose(0, 1)
            mass = probabilities(queries, keys, mask[last])[:, -call.tokens.shape[1] :]
            total, calls = seen.get(name, (torch.zeros_like(mass), 0))
            seen[name] = (total + mass, calls + 1)
        return GenericLayoutStream.attend(stream, query, key, value, mask)

    handle = stream.register_forward_pre_hook(before)
    vars(stream)["attend"] = attend
    return [handle.remove, lambda: delattr(stream, "attend")]


def _watch(name: str, stream: Any, seen: dict[str, tuple[Tensor, int]]) -> list[Callable[[], None]]:
    if isinstance(stream, GenericLayoutStream):
        return _watch_generic(name, stream, seen)
    processor = stream.attn.processor
    counts: list[tuple[int, int]] = []  # image and layout tokens of a call whose first attention is still to come

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        image, layout, *_ = args  # image tokens and layout tokens, in every kind of stream
        counts[:] = [(image.shape[1], layout.shape[1])]

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if counts:  # a second attention, of layout tokens among themselves, is not meant
            image, layout = counts.pop()
            mass = probabilities(query[-1, :image], key[-1], None if mask is None else mask[-1])[:, -layout:]
            total, calls = seen.get(name, (torch.zeros_like(mass), 0))
            seen[name] = (total + mass, calls + 1)
        return type(processor).attend(processor, query, key, value, mask)

    handle = stream.register_forward_pre_hook(before)
    processor.attend = attend
    return [handle.remove, lambda: delattr(processor, "attend")]


def probabilities(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention (S, T) in fp32, mean over heads, of (S, heads, head_dim) and (T, heads, head_dim).

    Head by head: at 1024 px all heads at once would be gigabytes.

    Args:
        mask: broadcasts to (heads, S, T), True = attend.
    """
    total = torch.zeros(query.shape[0], key.shape[0], device=query.device)
    for head in range(query.shape[1]):
        scores = query[:, head].float() @ key[:, head].float().T / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.expand(query.shape[1], *scores.shape)[head], float("-inf"))
        total += scores.softmax(dim=-1)
    return total / query.shape[1]


def difference(one: Image.Image, other: Image.Image) -> np.ndarray:
    """(H, W): mean absolute difference over RGB in [0, 1]."""
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float64) / 255 for image in (one, other))
    return np.abs(first - second).mean(axis=-1)


def coverage(box: Box, shape: tuple[int, int]) -> np.ndarray:
    """(rows, columns) in [0, 1]: how much of each cell of a grid over the image a box covers. Its mean is the box's area."""

    def along(start: float, end: float, cells: int) -> np.ndarray:
        edges = np.arange(cells + 1)
        return (np.minimum(edges[1:], end * cells) - np.maximum(edges[:-1], start * cells)).clip(0, 1)

    left, top, right, bottom = box.xyxy
    return np.outer(along(top, bottom, shape[0]), along(left, right, shape[1]))


def inside(box: Box, amounts: np.ndarray) -> float | None:
    """The share of (rows, columns) amounts that lies in a box; None where all are 0."""
    total = float(amounts.sum())
    return float((amounts * coverage(box, (amounts.shape[0], amounts.shape[1]))).sum()) / total if total > 0 else None


def _maps(attention: Tensor, image: Image.Image, layout: Layout, pipe: LayoutPipeline) -> list[np.ndarray]:
    """(L, N) to a (rows, columns) map for each box."""
    cell = pipe.vae_scale_factor * pipe.transformer.latent_multiple
    rows, columns = image.height // cell, image.width // cell
    count = len(layout.boxes)
    tokens = pipe.transformer.phrase_tokens or 1
    if attention.shape[0] != rows * columns or attention.shape[1] < count * tokens:
        raise RuntimeError(f"attention {tuple(attention.shape)} of {rows} x {columns} image tokens and {count} boxes")
    of_boxes = attention[:, : count * tokens].unflatten(1, (count, tokens)).sum(-1)  # padding slots are behind
    return [of_boxes[:, index].reshape(rows, columns).double().cpu().numpy() for index in range(count)]


_CELL, _GAP, _GUTTER = 256, 18, 210
_HEADS = (
    "all boxes",
    "without this box, same noise",
    "what changed: heat over the image, lightest = most",
    "attention of the image to this box, lightest = most",
)


def sheet(attribution: Attribution, colors: Mapping[str, Rgb] | None = None) -> Image.Image:
    """One RGB figure, about 1400 px wide.

    Args:
        colors: of phrases, from `phrase_colors` of all layouts that get a sheet; None = of this one's.
    """
    layout, colors = attribution.layout, colors or phrase_colors([attribution.layout])
    rows = [join([blank(_GUTTER, 1), *(paragraph(head, _CELL, 15, GREY) for head in _HEADS)], gap=_GAP, across=True)]
    for index, box in enumerate(attribution.boxes):
        alone = replace(layout, boxes=(layout.boxes[index],))
        shown = (
            (fit(attribution.image, _CELL), layout),
            (fit(attribution.without[index], _CELL), alone),
            (heat(attribution.image, attribution.changes[index]), alone),
            (heat(attribution.image, attribution.attentions[index]), alone),
        )
        cells = [draw_boxes(image, boxes, scale_to=1, labels=False, colors=colors) for image, boxes in shown]
        label = (
            paragraph(box.phrase, _GUTTER, 19, max_lines=3),
            paragraph(f"{box.area:.0%} of the image", _GUTTER, 14, GREY, top=4),
            paragraph(f"change: {_share(box.change_inside, box.change_lift)}", _GUTTER, 15, top=12),
            paragraph(f"attention: {_share(box.attention_inside, box.attention_lift)}", _GUTTER, 15, top=6),
        )
        rows.append(join([join(label), *cells], gap=_GAP, across=True))
    grid = join(rows, gap=10)
    title = paragraph(layout.caption, grid.width, 24, max_lines=2)
    return ImageOps.expand(join([title, grid], gap=14), 28, WHITE)


def heat(image: Image.Image, amounts: np.ndarray) -> Image.Image:
    """(rows, columns) amounts, the largest lightest, over the image in grey."""
    ground = fit(image, _CELL).convert("L").convert("RGB")
    share = amounts / amounts.max() if amounts.max() > 0 else amounts
    colors = Image.fromarray(matplotlib.colormaps["GnBu_r"](share, bytes=True)[..., :3])
    return Image.blend(ground, colors.resize(ground.size, Image.Resampling.NEAREST), 0.75)


def _share(inside: float | None, lift: float | None) -> str:
    return "none" if inside is None else f"{inside:.0%} of it inside, {lift:.1f} times its area"
