"""Aspect buckets: the few sizes that images are trained at, and which of them an image goes into.

Every image goes into one: nothing is left out. None is enlarged, unless asked for: an image that is smaller than every
bucket of its shape gets a smaller one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError

Size = tuple[int, int]  # (height, width) in pixels

# Less of a box than this share, after a crop, shows no longer what the phrase says. Here and not in transforms.py, which would
# cost `data check` the seconds that PyTorch takes to import.
MIN_VISIBLE = 0.25


@dataclass(frozen=True)
class Buckets:
    """The sizes of a run.

    Args:
        sizes: per resolution, from the largest to the smallest, the (height, width) of its buckets in pixels.
        multiple: every side is one of it: what an image token covers.
        upscale: enlarge an image that is smaller than its bucket.
    """

    sizes: tuple[tuple[Size, ...], ...]
    multiple: int
    upscale: bool

    @property
    def is_single(self) -> bool:
        """Whether every image has the same size, whatever its own is."""
        return self.upscale and sum(map(len, self.sizes)) == 1

    def of(self, image: Size) -> Size:
        """The (height, width) that an image of `image` pixels is trained at.

        The shape whose ratio is nearest (in logarithm) decides, then the largest resolution that needs no enlarging. A
        image that is smaller than all of them goes into the smallest, reduced until it fits; with `upscale` it is
        enlarged to it.

        Raises:
            InputError: a side is shorter than an image token.
        """
        if self.is_single:
            return self.sizes[0][0]
        nearest = [min(sizes, key=lambda size: _distance(size, image)) for sizes in self.sizes]
        for size in nearest:
            if size[0] <= image[0] and size[1] <= image[1]:
                return size
        if self.upscale:
            return nearest[-1]
        scale = min(image[0] / nearest[-1][0], image[1] / nearest[-1][1])
        height, width = (int(side * scale + 1e-9) // self.multiple * self.multiple for side in nearest[-1])
        if not height or not width:
            raise InputError(
                f"the image has {image[1]} x {image[0]} pixels, and an image token covers {self.multiple}",
                hint="leave it out, or set data.buckets.upscale: true",
            )
        return height, width


def record_bucket(record: Record, buckets: Buckets) -> Size:
    """The (height, width) that a record's image is trained at; its header is read where that matters.

    Raises:
        InputError: the file is no image, or one too small for any bucket; with the record's place.
    """
    if buckets.is_single:
        return buckets.sizes[0][0]
    width, height = record.size()
    try:
        return buckets.of((height, width))
    except InputError as error:
        raise error.at(record.location) from None


def make_buckets(
    resolutions: Sequence[int],
    ratios: Sequence[float],
    *,
    multiple: int,
    largest_side: int | None = None,
    upscale: bool = False,
) -> Buckets:
    """One bucket per resolution and ratio.

    Args:
        resolutions: a bucket of resolution r has about r x r pixels.
        ratios: width / height.
        multiple: in pixels; sides are rounded to the nearest multiple, at least one.
        largest_side: in pixels, which a base can have; a longer bucket is reduced to it. None = no limit.
    """
    ordered = sorted(set(resolutions), reverse=True)
    sizes = [[_size(resolution, ratio, multiple, largest_side) for ratio in ratios] for resolution in ordered]
    return Buckets(tuple(tuple(dict.fromkeys(each)) for each in sizes), multiple, upscale)


def one_size(size: Size) -> Buckets:
    """Every image at `size`, whatever its own is: cut, and enlarged where it is smaller."""
    return Buckets(((size,),), 1, upscale=True)


def parse_ratio(text: str) -> float:
    """ "4:3" (width:height) to 4 / 3.

    Raises:
        InputError: it is none, or beyond 1:8 or 8:1.
    """
    hint = "write width:height, e.g. 4:3"
    try:
        width, height = (float(part) for part in text.split(":"))
        ratio = width / height
    except (ValueError, ZeroDivisionError):
        raise InputError(f"holds {text!r}, no ratio", hint=hint) from None
    if not 1 / 8 <= ratio <= 8:
        raise InputError(f"holds {text!r}, beyond 1:8 and 8:1", hint=hint)
    return ratio


def size_counts(sizes: Sequence[Size]) -> dict[str, int]:
    """ "WIDTHxHEIGHT" -> images, the fullest bucket first."""
    counts = sorted(Counter(sizes).items(), key=lambda item: (-item[1], item[0]))
    return {f"{width}x{height}": count for (height, width), count in counts}


def _size(resolution: int, ratio: float, multiple: int, largest_side: int | None) -> Size:
    height, width = resolution / math.sqrt(ratio), resolution * math.sqrt(ratio)
    if largest_side is not None:
        scale = min(1.0, largest_side / max(height, width))
        height, width = height * scale, width * scale
    return _nearest(height, multiple), _nearest(width, multiple)


def _nearest(side: float, multiple: int) -> int:
    return max(round(side / multiple), 1) * multiple


def _distance(size: Size, image: Size) -> float:
    return abs(math.log(size[1] / size[0]) - math.log(image[1] / image[0]))
