"""Where layouts are hard: images by their number of boxes; boxes by their size, by how much others cover them, and by phrase."""

from __future__ import annotations

from collections.abc import Sequence

from mmdit_lora.evaluation.detectors.matching import iou_table
from mmdit_lora.layout import Layout

BOXES = ((1, 4), (5, 10), (11, None))  # an image; None: and more
SIZES = ((0.0, 0.02), (0.02, 0.1), (0.1, 1.0))  # share of the image that a box covers
OVERLAPS = ((0.0, 0.0), (0.0, 0.2), (0.2, 1.0))  # a box's largest IoU with another of its layout

PHRASES = 50  # of a report's table by phrase

Place = tuple[int, int]  # image, box


def image_groups(layouts: Sequence[Layout]) -> dict[str, list[int]]:
    """ "1-4", ... -> the images with so many boxes; groups without any are absent."""
    out = {}
    for low, high in BOXES:
        rows = [n for n, layout in enumerate(layouts) if low <= len(layout.boxes) <= (high or 10**9)]
        if rows:
            out[f"{low}-{high}" if high else f"{low}+"] = rows
    return out


def box_groups(layouts: Sequence[Layout]) -> dict[str, dict[str, list[Place]]]:
    """`by_size` and `by_overlap`: name -> the boxes in it; groups without any are absent."""
    sizes: dict[str, list[Place]] = {_percent(*pair): [] for pair in SIZES}
    overlaps: dict[str, list[Place]] = {"none" if not high else _iou(low, high): [] for low, high in OVERLAPS}
    for row, layout in enumerate(layouts):
        table = iou_table([box.xyxy for box in layout.boxes], [box.xyxy for box in layout.boxes])
        for place, box in enumerate(layout.boxes):
            others = [float(v) for n, v in enumerate(table[place]) if n != place]
            overlap = max(others, default=0.0)
            size = next(pair for pair in SIZES if box.area < pair[1] or pair is SIZES[-1])
            between = next(pair for pair in OVERLAPS if overlap <= pair[1])
            sizes[_percent(*size)].append((row, place))
            overlaps["none" if not between[1] else _iou(*between)].append((row, place))
    return {
        "by_size": {name: places for name, places in sizes.items() if places},
        "by_overlap": {name: places for name, places in overlaps.items() if places},
    }


def phrase_groups(layouts: Sequence[Layout]) -> dict[str, list[Place]]:
    """The `PHRASES` most frequent phrases, the most frequent first -> their boxes; blanks in a phrase count for nothing."""
    places: dict[str, list[Place]] = {}
    for row, layout in enumerate(layouts):
        for place, box in enumerate(layout.boxes):
            places.setdefault(" ".join(box.phrase.split()), []).append((row, place))
    ordered = sorted(places, key=lambda phrase: -len(places[phrase]))  # stable: then in the order of the layouts
    return {phrase: places[phrase] for phrase in ordered[:PHRASES]}


def _percent(low: float, high: float) -> str:
    if not low:
        return f"under {100 * high:g} %"
    return f"over {100 * low:g} %" if high == 1 else f"{100 * low:g}-{100 * high:g} %"


def _iou(low: float, high: float) -> str:
    return f"over {low:g}" if high == 1 else f"up to {high:g}"
