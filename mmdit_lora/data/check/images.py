"""Every image decoded once, in parallel: what its file says, what it is, which images are the same or look the same."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from mmdit_lora.data.check.findings import Findings
from mmdit_lora.data.images import TooManyPixels, load_image, opened
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError
from mmdit_lora.files import require_file

HEADERS = 1000  # read before a run: some tenths of a second
# Of 64 bits of the perceptual hash. Saved again or scaled, a photograph keeps all but a few; two photographs of one kind
# (blood under one microscope) were seen to differ in 14 and more.
MAX_DISTANCE = 6
# The hash sees no colour and little of what is small; so both images are compared at 16 x 16 too, less their mean
# brightness: by the mean difference and by the largest, in levels of 255.
MEAN_LEVELS, MAX_LEVELS = 4, 24
_THUMB = 16  # side of the image that near duplicates are compared by


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one file.

    Args:
        record: the first record that names it.
        size: (width, height) in pixels, upright; None where the header could not be read.
        mode: of Pillow, e.g. "RGB", "CMYK", "I;16". orientation: of EXIF; 1 = upright as stored.
        frames: more than 1 for an animation. transparency: whether it has any.
        digest: hash of the file's bytes. phash: 64 bits (perceptual hash of the `imagehash` package).
        thumb: (16, 16, 3) uint8.
        error: why it cannot be used, and `kind` of that: "empty-file" | "decompression-bomb" | "undecodable".
    """

    record: Record
    size: tuple[int, int] | None = None
    mode: str = ""
    orientation: int = 1
    frames: int = 1
    transparency: bool = False
    digest: bytes = b""
    phash: int = 0
    thumb: np.ndarray | None = None
    error: InputError | None = None
    kind: str = ""

    @property
    def decoded(self) -> bool:
        return self.thumb is not None


def quick_check(records: Sequence[Record]) -> None:
    """Look at every file's size and at `HEADERS` images' headers, evenly spread over the set. Nothing is decoded.

    Raises:
        InputError: the first file that is empty, declares more pixels than is safe, or is no image; with its record.
    """
    first = {record.file: record for record in reversed(records) if record.file is not None}
    every = max(1, -(-len(first) // HEADERS))
    for n, record in enumerate(reversed(first.values())):
        if not _is_usable(record, header=n % every == 0) and (error := inspect_image(record).error):
            raise error


def _is_usable(record: Record, *, header: bool) -> bool:
    try:
        if require_file(record.image, what="image").stat().st_size == 0:
            return False
        if header:
            with warnings.catch_warnings(action="ignore"), opened(record.image):
                pass
    except Exception:  # Pillow's plug-ins raise many kinds; `inspect_image` says which it is
        return False
    return True


def inspect_images(records: Iterable[Record], *, workers: int | None = None) -> list[ImageFacts]:
    """The distinct images of the records, in the order of their first record.

    Args:
        workers: threads (Pillow decodes outside Python's lock); None = one a core, at most 8, so that memory is bounded.
    """
    first: dict[Path, Record] = {}
    for record in records:
        first.setdefault(record.image, record)
    # Around the threads: the filters are the whole process's.
    count = workers or min(8, os.cpu_count() or 1)
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(count) as pool:
        return list(pool.map(inspect_image, first.values()))


def inspect_image(record: Record) -> ImageFacts:
    """One image. Nothing is raised: what is wrong is in the answer."""
    import imagehash

    try:
        source = record.source()
        if not (source if isinstance(source, bytes) else require_file(source, what="image").stat().st_size):
            hint = "restore it, or leave it out"
            error = InputError("is an empty file of 0 bytes", location=str(record.image), hint=hint)
            return ImageFacts(record, error=error.at(record.location), kind="empty-file")
        head = _head(record, source)
        image = load_image(source)
    except InputError as error:
        kind = "decompression-bomb" if isinstance(error, TooManyPixels) else "undecodable"
        placed = error if error.location == record.location else error.at(record.location)
        return ImageFacts(record, error=placed, kind=kind)
    except OSError as problem:
        unread = InputError(f"cannot be read ({problem})", location=str(record.image))
        return ImageFacts(record, error=unread.at(record.location), kind="undecodable")
    bits = imagehash.phash(image).hash.flatten()
    return replace(
        head,
        size=image.size,
        digest=hashlib.blake2b(record.read_bytes(), digest_size=16).digest(),
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        thumb=np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BOX)),
    )


def _head(record: Record, source: Path | bytes) -> ImageFacts:
    """What the header alone says. A damaged one is left to `load_image`, which says it in one way."""
    try:
        with opened(source) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            frames = getattr(image, "n_frames", 1)
            return ImageFacts(record, None, image.mode, orientation, frames, image.has_transparency_data)
    except Exception:  # Pillow's plug-ins raise many kinds for damaged files
        return ImageFacts(record)


def image_findings(found: Findings, images: Sequence[ImageFacts]) -> None:
    """Files that cannot be decoded, and those that are not what they look like."""
    for image in images:
        if image.error is not None:
            found.add(image.kind, image.record, image.error.what, line=str(image.error))
            continue
        mode, palette = f"mode {image.mode}", image.mode in ("P", "PA")
        for name, applies, text in (
            ("exif-rotation", image.orientation not in (0, 1), f"EXIF orientation {image.orientation}"),
            ("cmyk", image.mode == "CMYK", mode),
            ("palette-transparency", image.transparency and palette, f"{mode} with transparency"),
            ("transparency", image.transparency and not palette, mode),
            ("16-bit", image.mode.startswith("I") or image.mode == "F", mode),
            ("animated", image.frames > 1, f"{image.frames} frames"),
        ):
            if applies:
                found.add(name, image.record, text)


def set_findings(found: Findings, records: Sequence[Record], images: Sequence[ImageFacts]) -> None:
    """Records and images that stand in the set twice."""
    seen: dict[object, Record] = {}
    for record in records:
        first = seen.setdefault((record.image, record.layout), record)
        if first is not record:
            found.add("duplicate-records", record, f"repeats {first.location}")
    equal: defaultdict[bytes, list[ImageFacts]] = defaultdict(list)
    for image in images:
        if image.decoded:
            equal[image.digest].append(image)
    for name, groups, how in (
        ("duplicate-images", equal.values(), "has the bytes of"),
        ("near-duplicate-images", near_groups(images), "looks like"),
    ):
        for group in groups:
            if len(group) > 1:  # side by side: what is the same is seen at a glance
                found.add(name, group[0].record, f"first of {len(group)} alike", count=0)
                for image in group[1:]:
                    found.add(name, image.record, f"{how} {group[0].record.image.name}")


def leak_findings(found: Findings, images: Sequence[ImageFacts], against: Sequence[ImageFacts]) -> None:
    """Images of the set that the other one holds too."""
    theirs = {image.digest: image for image in against if image.decoded}
    exact = [(image, theirs[image.digest]) for image in images if image.decoded and image.digest in theirs]
    leaked, mine = {image.digest for image, _ in exact}, {id(image) for image in images}
    alike: list[tuple[ImageFacts, ImageFacts]] = []
    for group in near_groups([*images, *against]) if against else ():
        other = [image for image in group if id(image) not in mine]
        alike += [(image, other[0]) for image in group if other and id(image) in mine and image.digest not in leaked]
    for name, pairs, how in (("leakage", exact, "has the bytes of"), ("near-leakage", alike, "looks like")):
        for ours, other_image in pairs:
            found.add(name, ours.record, f"{how} {other_image.record.image.name} of the other set")
            found.add(name, other_image.record, "of the other set", count=0)


def near_groups(images: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    """Groups of images that look the same and are not the same bytes.

    Two hashes that differ in at most `MAX_DISTANCE` of 64 bits are equal in one of `MAX_DISTANCE + 1` bands of them; so
    only images with an equal band are compared, not all pairs.
    """
    first: dict[bytes, ImageFacts] = {}
    for image in images:
        if image.decoded:
            first.setdefault(image.digest, image)
    distinct = list(first.values())
    if len(distinct) < 2:
        return []
    hashes = np.array([image.phash for image in distinct], dtype=np.uint64)
    thumbs = np.stack([image.thumb for image in distinct if image.thumb is not None]).reshape(len(distinct), -1)
    label = np.arange(len(distinct))  # of the group that each one is in so far
    width = 64 // (MAX_DISTANCE + 1) + 1
    for shift in range(0, 64, width):
        band = (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, band[order][1:] != band[order][:-1]])
        for members in np.split(order, starts[1:]):
            for place, i in enumerate(members[:-1]):
                rest = members[place + 1 :]
                rest = rest[label[rest] != label[i]]
                rest = rest[np.bitwise_count(hashes[rest] ^ hashes[i]) <= MAX_DISTANCE]
                for j in rest[_look_alike(thumbs[i], thumbs[rest])]:
                    label[label == label[j]] = label[i]
    sizes = Counter(label.tolist())
    groups: defaultdict[int, list[ImageFacts]] = defaultdict(list)
    for n, image in zip(label.tolist(), distinct, strict=True):
        if sizes[n] > 1:
            groups[n].append(image)
    return list(groups.values())


def _look_alike(one: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Which of `many` (N, values) look like `one` (values,): (N,) bool."""
    levels = many.astype(np.float32)
    levels -= levels.mean(axis=1, keepdims=True)
    apart = np.abs(levels - (one - one.mean()))
    same: np.ndarray = (apart.mean(axis=1) < MEAN_LEVELS) & (apart.max(axis=1) < MAX_LEVELS)
    return same
