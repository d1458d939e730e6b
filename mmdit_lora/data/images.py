"""Pictures from disk: upright, RGB, and an `InputError` where a file is none."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from mmdit_lora.errors import InputError

# What Pillow raises for files that are damaged in one way or another; only the first is documented.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def load_image(path: str | Path) -> Image.Image:
    """The picture as RGB, turned upright by its EXIF orientation; transparency over white, 16 bits scaled to 8.

    Raises:
        InputError: no such file, no picture, or a truncated one; with the path.
    """
    with _opened(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            return upright.point(lambda value: value / 256).convert("L").convert("RGB")  # convert alone clips at 255
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright).convert("RGB")
        return upright.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright picture in pixels, from its header alone.

    Raises:
        InputError: no such file, or no picture; with the path.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise InputError("no such picture", where=str(path)) from None
    except _DAMAGED as error:
        raise InputError(
            f"is no readable picture ({_reason(error)})",
            where=str(path),
            cure="restore the file, or leave the picture out",
        ) from None


def _reason(error: BaseException) -> str:
    return (
        "no picture format that Pillow knows" if "cannot identify" in str(error) else str(error) or type(error).__name__
    )
