"""Images from files or bytes: upright, RGB, and an `InputError` where one is none."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from mmdit_lora.errors import InputError
from mmdit_lora.files import require_file

Source = str | Path | bytes  # a path, or the whole content of a file

MOST_BYTES = 2**30  # of an image's file
# Pillow's own threshold, where it warns; it refuses at twice that. To decode such an image takes gigabytes in every worker.
MAX_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `opened` refuses where Pillow warns

# What Pillow raises for files that are damaged in one way or another; only the first is documented.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error)


_SMALLER = "make the image smaller, or leave it out"


class TooManyPixels(InputError):
    """An image that declares more pixels than are decoded."""


def load_image(path: Source) -> Image.Image:
    """The image as RGB, turned upright by its EXIF orientation; transparency over white, 16 bits scaled to 8.

    Raises:
        InputError: no such file, no image, a truncated one, one of 32-bit numbers, or one that declares more than
            `MAX_PIXELS`; with the path, where there is one.
    """
    with opened(path) as image:
        if image.mode in ("I", "F"):  # a file does not say which number is white
            raise InputError(
                "holds 32-bit numbers, of which none is known to be white",
                location=_place(path),
                hint="save it with 8 or 16 bits",
            )
        upright = ImageOps.exif_transpose(image)
        if upright.mode == "I;16B":  # as big-endian TIFF has it, and `point` has not
            upright = upright.convert("I")
        if upright.mode in ("I", "I;16"):
            return upright.point(lambda value: value / 256).convert("L").convert("RGB")  # convert alone clips at 255
        return opaque(upright)


def opaque(image: Image.Image) -> Image.Image:
    """As RGB, transparency over white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_size(path: Source) -> tuple[int, int]:
    """(width, height) of the upright image in pixels, from its header alone.

    Raises:
        InputError: no such file, or no image; with the path, where there is one.
    """
    with opened(path) as image:
        # Of a TIFF, Pillow's `size` is upright already, and only its.
        width, height = (image.tag_v2[256], image.tag_v2[257]) if isinstance(image, TiffImageFile) else image.size
        header_alone = image.format == "PNG" and not _tells_more_behind_pixels(path)
        exif = Image.Image.getexif(image) if header_alone else image.getexif()
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def image_bytes(path: Path) -> bytes:
    """The whole content of an image's file. Raises `InputError` with the path: no regular file, or a huge one."""
    try:
        return _regular(path).read_bytes()
    except OSError as error:
        raise InputError(
            f"the image cannot be read ({error.strerror})",
            location=str(path),
            hint="restore the file, or leave the record out",
        ) from None


def _tells_more_behind_pixels(path: Source) -> bool:
    """Whether a PNG has EXIF or text behind its pixels, where Pillow finds it only by decoding these.

    Its own `getexif` decodes every PNG, which takes a hundred times as long as this walk from chunk to chunk.
    """
    with _file(path) as file:
        file.seek(8)
        behind = False
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if behind and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            behind = behind or kind == b"IDAT"
            file.seek(length + 4, 1)
    return False


@contextmanager
def opened(path: Source) -> Iterator[Image.Image]:
    """The image as Pillow opens it, nothing decoded.

    Raises:
        InputError: no regular file, no image, or one that declares too many pixels; also of what the caller does in it.
    """
    try:
        with Image.open(BytesIO(path) if isinstance(path, bytes) else _regular(path)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise TooManyPixels(
                    f"declares {image.width:,} x {image.height:,} pixels, and more than {MAX_PIXELS:,} are not decoded",
                    location=_place(path),
                    hint=_SMALLER,
                )
            yield image
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise TooManyPixels(
            f"declares more than {MAX_PIXELS:,} pixels, and is not decoded", location=_place(path), hint=_SMALLER
        ) from None
    except _DAMAGED as error:
        raise InputError(
            f"is no readable image ({_reason(error)})",
            location=_place(path),
            hint="restore the file, or leave the image out",
        ) from None


def _regular(path: str | Path) -> Path:
    """`path`, a regular file that is not too large to be an image. Raises `InputError`."""
    path = require_file(path, what="image")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(
            f"is a file of {size / 2**30:.1f} GiB, and images have at most {MOST_BYTES / 2**30:g} GiB",
            location=str(path),
            hint="leave it out",
        )
    return path


def _file(path: Source) -> BinaryIO:
    return BytesIO(path) if isinstance(path, bytes) else Path(path).open("rb")


def _place(path: Source) -> str | None:
    return None if isinstance(path, bytes) else str(path)


def _reason(error: BaseException) -> str:
    return (
        "no image format that Pillow knows" if "cannot identify" in str(error) else str(error) or type(error).__name__
    )
