"""What training makes of the images' sizes: boxes cut off, images enlarged, buckets with too few of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.data.buckets import MIN_VISIBLE, Buckets, Size, size_counts
from mmdit_lora.data.check.findings import Example, Findings
from mmdit_lora.data.check.images import ImageFacts
from mmdit_lora.data.filters import lost_boxes
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError


def size_findings(
    found: Findings,
    records: Sequence[Record],
    images: Sequence[ImageFacts],
    *,
    buckets: Buckets | None,
    batch: int = 1,
    min_visible: float = MIN_VISIBLE,
) -> dict[Path, Size]:
    """Image -> (height, width) that it is trained at.

    Args:
        buckets: the sizes of the training images; None = a square crop at each image's own size.
        batch: images of a training step, which are of one bucket.
        min_visible: a box of which the crop leaves a smaller share is lost.
    """
    sizes: dict[Path, Size] = {}
    regular = {size for each in buckets.sizes for size in each} if buckets else set()
    smallest = 2**31
    for image in images:
        if image.error is not None or image.size is None:
            continue
        record, (width, height) = image.record, image.size
        if buckets is None:
            sizes[record.image] = (min(image.size),) * 2
            continue
        try:
            size = sizes[record.image] = buckets.of((height, width))
        except InputError as error:
            found.add("no-bucket", record, error.what, line=str(InputError(error.what, location=record.location)))
            continue
        text = f"{width} x {height} pixels, trained at {size[1]} x {size[0]}"
        if (scale := max(size[1] / width, size[0] / height)) > 1:
            smallest = min(smallest, width, height)
            found.add("small-images", record, text, rank=-scale, fitting=smallest // 16 * 16)
        if size not in regular:
            found.add("below-buckets", record, text, rank=width + height / 2**31)
    if buckets is not None and not buckets.is_single:
        of = [sizes[record.image] for record in records if record.image in sizes]
        for name, count in size_counts(of).items():
            if count < batch:
                shown = Example(name, f"{name}: {count} records")
                found.add("sparse-buckets", shown, total=len(set(of)), batch=batch)
    square = buckets is None or all(height == width for height, width in regular)
    advice = "Add a ratio to data.buckets.ratios that is nearer to these images"
    if square:
        advice = "Give data.buckets.ratios, cut the images square around what matters, or train with crop: random"
    values: dict[str, Any] = {"crop": "square center" if square else "center", "advice": advice, "visible": min_visible}
    own = {image.record.image: image.size for image in images if image.size is not None}
    for record in records:
        width, height = own.get(record.image, (1, 1))
        lost = lost_boxes(record.layout, (height, width), sizes.get(record.image, (height, width)), min_visible)
        if lost:
            text = f"{len(lost)} of {len(record.layout.boxes)} boxes, image of {width} x {height} pixels"
            found.add("cropped-boxes", record, text, lost, count=len(lost), rank=-len(lost), **values)
    return sizes
