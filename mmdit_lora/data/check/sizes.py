"""What training makes of the images' sizes: boxes cut off, images enlarged, buckets with too few of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmdit_lora.data.buckets import MIN_VISIBLE, Buckets, Size, size_counts
from mmdit_lora.data.check.findings import Example, Finding, example, finding
from mmdit_lora.data.check.images import ImageFacts
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError


def trained_sizes(
    images: Sequence[ImageFacts], buckets: Buckets
) -> tuple[dict[Path, Size], list[tuple[ImageFacts, str]]]:
    """ImageFacts -> (height, width) that it is trained at, and those that have none, with the reason."""
    sizes, without = {}, []
    for image in images:
        if image.error is None and image.size is not None:
            width, height = image.size
            try:
                sizes[image.record.image] = buckets.of((height, width))
            except InputError as error:
                without.append((image, error.what))
    return sizes, without


def size_findings(
    records: Sequence[Record],
    images: Sequence[ImageFacts],
    *,
    buckets: Buckets | None,
    batch: int = 1,
    min_visible: float = MIN_VISIBLE,
) -> list[Finding]:
    """Warnings of sizes, and an error where an image fits no bucket.

    Args:
        buckets: the sizes of the training images; None = a square crop is judged at each image's own size.
        batch: images of a training step, which are of one bucket.
        min_visible: a box of which the crop leaves a smaller share is lost.
    """
    own = {p.record.image: p.size for p in images if p.size is not None}
    if buckets is None:
        return _cropped(records, own, lambda size, _: (min(size),) * 2, min_visible, square=True)
    sizes, without = trained_sizes(images, buckets)
    return [
        *finding(
            "no-bucket",
            "{n} images are smaller than an image token, and fit no bucket",
            "leave them out, or set data.buckets.upscale: true",
            [example(p.record, what) for p, what in without],
            total=len(images),
            unit="images",
            severity="error",
            lines=[str(InputError(what, location=p.record.location)) for p, what in without],
        ),
        *_enlarged(images, sizes),
        *_reduced(images, sizes, buckets),
        *(() if buckets.is_single else _sparse(records, sizes, batch)),
        *_cropped(
            records, own, lambda size, path: sizes.get(path, size[::-1]), min_visible, square=_are_square(buckets)
        ),
    ]


def _enlarged(images: Sequence[ImageFacts], sizes: Mapping[Path, Size]) -> list[Finding]:
    found = []
    for image in images:
        size = sizes.get(image.record.image)
        if size is not None and image.size is not None:
            scale = max(size[1] / image.size[0], size[0] / image.size[1])
            if scale > 1:
                found.append((scale, image, size))
    found.sort(key=lambda item: -item[0])
    smallest = min((min(p.size) for _, p, _ in found if p.size), default=0)
    return finding(
        "small-images",
        "{n} of {total} images are smaller than the size they are trained at and are scaled up, which blurs them",
        f"leave them out, train at {smallest // 16 * 16} pixels, or use data.buckets, which enlarge none",
        [
            example(p.record, f"{p.size[0]} x {p.size[1]} pixels, trained at {size[1]} x {size[0]}")
            for _, p, size in found
            if p.size
        ],
        total=len(images),
        unit="images",
    )


def _reduced(images: Sequence[ImageFacts], sizes: Mapping[Path, Size], buckets: Buckets) -> list[Finding]:
    """Images that are smaller than every bucket of their shape."""
    regular = {size for each in buckets.sizes for size in each}
    small = [p for p in images if sizes.get(p.record.image, next(iter(regular))) not in regular]
    small.sort(key=lambda p: p.size or (0, 0))
    return finding(
        "below-buckets",
        "{n} of {total} images are smaller than every bucket of their shape and get a smaller size of their own",
        "add a lower data.buckets.resolutions for them, or leave them out",
        [
            example(p.record, "{} x {} pixels, trained at {} x {}".format(*p.size, *sizes[p.record.image][::-1]))
            for p in small
            if p.size
        ],
        total=len(images),
        unit="images",
    )


def _sparse(records: Sequence[Record], sizes: Mapping[Path, Size], batch: int) -> list[Finding]:
    """Buckets with fewer records than a batch, which holds some of them twice."""
    of = [sizes[record.image] for record in records if record.image in sizes]
    counts = {name: count for name, count in size_counts(of).items() if count < batch}
    shown = [Example(name, f"{name}: {count} records") for name, count in counts.items()]
    return finding(
        "sparse-buckets",
        f"{{n}} of {{total}} buckets hold fewer records than a batch of {batch}: their batches repeat images",
        "fewer data.buckets.ratios or resolutions, or a smaller batch",
        shown,
        total=len(Counter(of)),
        unit="buckets",
    )


def _cropped(
    records: Sequence[Record],
    own: Mapping[Path, tuple[int, int]],
    trained: Callable[[tuple[int, int], Path], Size],
    min_visible: float,
    *,
    square: bool,
) -> list[Finding]:
    total = sum(len(record.layout.boxes) for record in records)
    found = []
    for record in records:
        width, height = own.get(record.image, (1, 1))
        (north, south), (west, east) = _kept((height, width), trained((width, height), record.image))
        lost = []
        for n, box in enumerate(record.layout.boxes):
            left, top, right, bottom = box.xyxy
            across = min(right, east) - max(left, west)
            down = min(bottom, south) - max(top, north)
            if max(across, 0) * max(down, 0) < (min_visible - 1e-9) * box.area:  # exactly this share is kept
                lost.append(n)
        if lost:
            what = f"{len(lost)} of {len(record.layout.boxes)} boxes, image of {width} x {height} pixels"
            found.append((len(lost), example(record, what, lost)))
    found.sort(key=lambda pair: -pair[0])
    hint = (
        "Give data.buckets.ratios, cut the images square around what matters, or train with crop: random"
        if square
        else "Add a ratio to data.buckets.ratios that is nearer to these images"
    )
    return finding(
        "cropped-boxes",
        f"{{n}} of {{total}} boxes, in {len(found)} records, are lost to the {'square center' if square else 'center'} crop",
        f"they are dropped with their phrase where less than {min_visible:.0%} is left; captions still name them. {hint}",
        [shown for _, shown in found],
        total=total,
        unit="boxes",
        count=sum(lost_here for lost_here, _ in found),
    )


def _kept(image: Size, size: Size) -> list[tuple[float, float]]:
    """What the center crop to `size` keeps of an image, each side as a range in [0, 1]; whole pixels, as in transforms.py."""
    scale = max(side / length for side, length in zip(size, image, strict=True))
    resized = [max(side, round(length * scale)) for side, length in zip(size, image, strict=True)]
    return [
        ((length - side) // 2 / length, ((length - side) // 2 + side) / length)
        for side, length in zip(size, resized, strict=True)
    ]


def _are_square(buckets: Buckets) -> bool:
    return all(height == width for each in buckets.sizes for height, width in each)
