"""Images of every kind that data sets hold: the right pixels, upright and RGB, or one clear message."""

from __future__ import annotations

import resource
import struct
import zlib
from pathlib import Path

import pytest
from PIL import ExifTags, Image, ImageOps

from mmdit_lora.cli.main import main
from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.errors import InputError
from tests.data_makers import dataset, line

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners() -> Image.Image:
    """32 x 16 pixels: red, green / blue, white quarters."""
    image = Image.new("RGB", (32, 16))
    for index, color in enumerate((RED, GREEN, BLUE, WHITE)):
        x, y = 16 * (index % 2), 8 * (index // 2)
        image.paste(color, (x, y, x + 16, y + 8))
    return image


def png(size: tuple[int, int], depth: int, color_type: int, rows: bytes, *, behind: bytes = b"") -> bytes:
    """A PNG file by hand. `rows`: what is compressed, each row led by its filter byte; `behind`: chunks after the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, color_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + behind
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pixels(image: Image.Image) -> list[tuple[int, ...]]:
    return [image.getpixel((x, y)) for y in range(image.height) for x in range(image.width)]  # type: ignore[misc]


# How a viewer must turn an image that was stored with each orientation: the inverse of how it was stored.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright, how = corners(), STORED[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / f"x.{suffix}"
    quality = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    (upright if how is None else upright.transpose(how)).save(path, exif=exif, **quality)  # type: ignore[arg-type]
    loaded = load_image(path)
    assert image_size(path) == loaded.size == (32, 16)
    for x, y in ((4, 4), (27, 4), (4, 11), (27, 11)):
        assert loaded.getpixel((x, y)) == pytest.approx(upright.getpixel((x, y)), abs=12)


def test_exif_behind_the_pixels_of_a_png_counts_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    rows = b"".join(b"\0" + bytes(range(8)) for _ in range(4))
    late = tmp_path / "late.png"
    late.write_bytes(png((8, 4), 8, 0, rows, behind=chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))))
    assert image_size(late) == load_image(late).size == (4, 8)
    plain = tmp_path / "plain.png"
    plain.write_bytes(png((8, 4), 8, 0, rows, behind=chunk(b"tIME", bytes(7))))
    assert image_size(plain) == load_image(plain).size == (8, 4)


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png((8, 4), 8, 0, b"not four rows of eight"))
    assert image_size(path) == (8, 4)
    with pytest.raises(InputError, match="is no readable image"):
        load_image(path)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    corners().convert("CMYK").save(path, **({"quality": 95, "subsampling": 0} if suffix == "jpg" else {}))
    with Image.open(path) as stored:
        assert stored.mode == "CMYK"
    loaded = load_image(path)
    for x, y in ((4, 4), (27, 4), (4, 11), (27, 11)):
        assert loaded.getpixel((x, y)) == pytest.approx(corners().getpixel((x, y)), abs=12)


def test_a_palette_with_transparency_lies_over_white(tmp_path: Path) -> None:
    for suffix in ("png", "gif"):
        image = Image.new("P", (4, 2), 0)
        image.putpalette([200, 0, 0, 0, 0, 200])
        image.putpixel((1, 0), 1)
        path = tmp_path / f"x.{suffix}"
        image.save(path, transparency=0)
        assert pixels(load_image(path)) == [WHITE, (0, 0, 200), *[WHITE] * 6]
        image.save(path)
        assert pixels(load_image(path))[:2] == [(200, 0, 0), (0, 0, 200)]


@pytest.mark.parametrize("kind", ["grey png", "rgb png", "grey tif", "big-endian grey tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    values = [0, 0x1234, 0x8000, 0xFFFF]
    path = tmp_path / f"x.{kind.split()[-1]}"
    if kind.endswith("png"):
        channels = 1 if kind == "grey png" else 3
        row = b"\0" + b"".join(struct.pack(">H", value) * channels for value in values)
        path.write_bytes(png((4, 1), 16, 0 if channels == 1 else 2, row))
    else:
        mode, order = ("I;16B", ">") if kind.startswith("big") else ("I;16", "<")
        Image.frombytes(mode, (4, 1), struct.pack(f"{order}4H", *values)).save(path)
    assert [pixel[0] for pixel in pixels(load_image(path))] == pytest.approx([0, 0x12, 0x80, 0xFF], abs=1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_of_32_bits_are_refused_since_none_is_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.tif"
    Image.new(mode, (4, 4), 1).save(path)
    with pytest.raises(InputError, match=r"x\.tif: holds 32-bit numbers"):
        load_image(path)
    assert image_size(path) == (4, 4)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_an_animation_the_first_frame_is_the_image(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    frames = [corners(), ImageOps.mirror(corners()), Image.new("RGB", (32, 16), "black")]
    frames[0].save(path, save_all=True, append_images=frames[1:], **({"lossless": True} if suffix == "webp" else {}))  # type: ignore[arg-type]
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    assert pixels(load_image(path)) == pixels(corners())


def test_no_bytes_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    for read in (load_image, image_size):
        with pytest.raises(InputError, match=r"x\.png: is no readable image \(no image format"):
            read(tmp_path / "x.png")
        with pytest.raises(InputError, match=r"y\.png: no such image"):
            read(tmp_path / "y.png")


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_20000_by_20000_declared_is_refused_in_little_memory(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dataset(tmp_path / "set", line("a.png"), line("huge.png"))
    (folder / "huge.png").write_bytes(png((20_000, 20_000), 8, 2, bytes(1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["data", verb, str(folder)]) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024, "KiB"
    said = capsys.readouterr().err
    assert "metadata.jsonl:2" in said
    assert "declares more than 89,478,485 pixels" in said
    assert "make the image smaller" in said


def test_a_large_image_below_the_limit_is_loaded(tmp_path: Path) -> None:
    Image.new("1", (6000, 6000)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").size == (6000, 6000)
