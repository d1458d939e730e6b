"""What a data set consists of, in numbers; images are not decoded, only their headers are read."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmdit_lora.data.records import Record

_MOST_PHRASES = 50
_QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Stats:
    """Plain data; a spread is {"min", "q05", "q25", "median", "q75", "q95", "max"}, None where there is nothing to spread.

    Args:
        layouts: records. images: distinct files. distinct_phrases: of all `boxes`.
        boxes_per_layout: number of boxes -> how many layouts.
        width, height: spreads of the upright images' sides, pixels. aspect: of width / height.
        box_area: spread of the share of its image that a box covers. box_aspect: of the boxes' width / height, in pixels.
        caption_words: spread.
        phrases: the most frequent ones (at most 50) -> how many boxes.
    """

    images: int
    layouts: int
    boxes: int
    distinct_phrases: int
    boxes_per_layout: dict[int, int]
    width: dict[str, float] | None
    height: dict[str, float] | None
    aspect: dict[str, float] | None
    box_area: dict[str, float] | None
    box_aspect: dict[str, float] | None
    caption_words: dict[str, float] | None
    phrases: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def dataset_stats(records: Sequence[Record]) -> Stats:
    """Raises `InputError`: a file is no image, with the record's place."""
    sizes: dict[Any, tuple[int, int]] = {}
    for record in records:
        if record.image not in sizes:
            sizes[record.image] = record.size()
    pairs = [(box, sizes[record.image]) for record in records for box in record.layout.boxes]
    phrases = Counter(box.phrase for box, _ in pairs)
    return Stats(
        images=len(sizes),
        layouts=len(records),
        boxes=len(pairs),
        distinct_phrases=len(phrases),
        boxes_per_layout=dict(sorted(Counter(len(record.layout.boxes) for record in records).items())),
        width=_spread([width for width, _ in sizes.values()]),
        height=_spread([height for _, height in sizes.values()]),
        aspect=_spread([width / height for width, height in sizes.values()]),
        box_area=_spread([box.area for box, _ in pairs]),
        box_aspect=_spread([box.width * width / (box.height * height) for box, (width, height) in pairs]),
        caption_words=_spread([len(record.layout.caption.split()) for record in records]),
        phrases=dict(sorted(phrases.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST_PHRASES]),
    )


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    if ordered[0] == ordered[-1]:
        return dict.fromkeys(_QUANTILES, ordered[0])
    cuts = [ordered[0], *statistics.quantiles(ordered, n=100, method="inclusive"), ordered[-1]]
    return {name: cuts[round(100 * share)] for name, share in _QUANTILES.items()}
