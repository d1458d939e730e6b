"""Every image decoded once, in parallel: what its file says, what it is, and a fingerprint of what it shows."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from mmdit_lora.data.check.findings import Finding, example, finding
from mmdit_lora.data.images import MAX_PIXELS, TooManyPixels, load_image, opened
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError
from mmdit_lora.files import require_file

_THUMB = 16  # side of the image that near duplicates are compared by


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one file.

    Args:
        record: the first record that names it.
        size: (width, height) in pixels, upright; None where the header could not be read.
        mode: of Pillow, e.g. "RGB", "CMYK", "I;16".
        orientation: of EXIF; 1 = upright as stored.
        frames: more than 1 for an animation.
        transparency: whether it has any.
        digest: hash of the file's bytes. phash: 64 bits (perceptual hash of the `imagehash` package).
        thumb: (16, 16, 3) uint8.
        error: why it cannot be used, and `kind` of that: "empty-file" | "decompression-bomb" | "undecodable".
        decoded: whether the pixels were looked at.
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


def look_at_all(records: Iterable[Record], *, workers: int | None = None) -> list[ImageFacts]:
    """The distinct images of the records, in the order of their first record.

    Args:
        workers: threads (Pillow decodes outside Python's lock); None = one a core, at most 8, so that memory is bounded.
    """
    first: dict[Path, Record] = {}
    for record in records:
        first.setdefault(record.image, record)
    count = workers or min(8, os.cpu_count() or 1)
    # Around the threads: the filters are the whole process's.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor(count) as pool:
        return list(pool.map(look_at, first.values()))


def look_at(record: Record) -> ImageFacts:
    """One image. Nothing is raised: what is wrong is in the answer."""
    import imagehash

    try:
        source = record.source()
        if not (source if isinstance(source, bytes) else require_file(source, what="image").stat().st_size):
            error = InputError(
                "is an empty file of 0 bytes", location=str(record.image), hint="restore it, or leave it out"
            )
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
    return ImageFacts(
        record,
        size=image.size,
        mode=head.mode,
        orientation=head.orientation,
        frames=head.frames,
        transparency=head.transparency,
        digest=hashlib.blake2b(record.read_bytes(), digest_size=16).digest(),
        phash=int.from_bytes(np.packbits(bits).tobytes(), "big"),
        thumb=np.asarray(image.resize((_THUMB, _THUMB), Image.Resampling.BOX)),
    )


def _head(record: Record, source: Path | bytes) -> ImageFacts:
    """What the header alone says. A damaged one is left to `load_image`, which says it in one way."""
    try:
        with opened(source) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            size = image.size if orientation < 5 else image.size[::-1]
            frames = getattr(image, "n_frames", 1)
            return ImageFacts(record, size, image.mode, orientation, frames, image.has_transparency_data)
    except Exception:  # Pillow's plug-ins raise many kinds for damaged files
        return ImageFacts(record)


def image_findings(images: Sequence[ImageFacts]) -> list[Finding]:
    """Files that cannot be decoded (errors), and those that are not what they look like (warnings)."""
    total = len(images)
    found: list[Finding] = []
    for kind, message, hint in _BROKEN:
        bad = [p for p in images if p.error is not None and p.kind == kind]
        found += finding(
            kind,
            message,
            hint,
            [example(p.record, p.error.what) for p in bad if p.error],
            total=total,
            unit="images",
            severity="error",
            lines=[str(p.error) for p in bad],
        )
    usable = [p for p in images if p.error is None]

    def some(name: str, chosen: Iterable[ImageFacts], message: str, hint: str, text: str) -> None:
        examples = [example(p.record, text.format(p=p)) for p in chosen]
        found.extend(finding(name, message, hint, examples, total=total, unit="images"))

    some(
        "exif-rotation",
        [p for p in usable if p.orientation not in (0, 1)],
        "{n} images are stored turned (EXIF orientation)",
        "they are turned upright here: check on the images below that the boxes were drawn on upright ones",
        "EXIF orientation {p.orientation}",
    )
    some(
        "cmyk",
        [p for p in usable if p.mode == "CMYK"],
        "{n} images are CMYK: converted without a colour profile, colours shift",
        "convert them to sRGB with their profile",
        "mode {p.mode}",
    )
    some(
        "palette-transparency",
        [p for p in usable if p.mode in ("P", "PA") and p.transparency],
        "{n} images have a palette with transparency: what is transparent becomes white",
        "put them on the background that you want to be learnt",
        "mode {p.mode} with transparency",
    )
    some(
        "transparency",
        [p for p in usable if p.mode not in ("P", "PA") and p.transparency],
        "{n} images are transparent: what is transparent becomes white",
        "put them on the background that you want to be learnt",
        "mode {p.mode}",
    )
    some(
        "16-bit",
        [p for p in usable if p.mode.startswith("I") or p.mode == "F"],
        "{n} images have more than 8 bits a channel: scaled to 8",
        "check on the images below that they are not dark or clipped",
        "mode {p.mode}",
    )
    some(
        "animated",
        [p for p in usable if p.frames > 1],
        "{n} images are animated: only the first frame is used",
        "save the frame that the boxes were drawn on",
        "{p.frames} frames",
    )
    return found


_BROKEN = (
    ("empty-file", "{n} image files hold 0 bytes", "restore them, or leave their lines out"),
    (
        "decompression-bomb",
        f"{{n}} images declare more than {MAX_PIXELS // 10**6} million pixels, which is not safe to decode",
        "scale them down, or leave their lines out: nothing was decoded",
    ),
    ("undecodable", "{n} images cannot be decoded", "restore the files, or leave their lines out"),
)
