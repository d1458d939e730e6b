"""The data set format: every box convention arrives as the same box; what is written reads back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.ops import box_convert, clip_boxes_to_image

from mmdit_lora import Box, Layout
from mmdit_lora.boxes import box_iou, clip, corners
from mmdit_lora.data.check import check_dataset, read_written
from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.records import read_dataset, scan_dataset, write_dataset, write_splits
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import MARKER
from tests.data_makers import dataset, line, make_image, objects


def only_box(folder: Path) -> tuple[float, ...]:
    return read_dataset(folder)[0].layout.boxes[0].xyxy


@pytest.mark.parametrize(
    ("bbox", "bbox_format", "bbox_units"),
    [
        ([0.25, 0.2, 0.75, 0.8], "xyxy", "relative"),
        ([0.25, 0.2, 0.5, 0.6], "xywh", "relative"),
        ([0.5, 0.5, 0.5, 0.6], "cxcywh", "relative"),
        ([10, 4, 30, 16], "xyxy", "pixel"),  # a.png is 40 x 20
        ([10, 4, 20, 12], "xywh", "pixel"),
        ([20, 10, 20, 12], "cxcywh", "pixel"),
    ],
)
def test_every_convention_is_the_same_box(tmp_path: Path, bbox: list[float], bbox_format: str, bbox_units: str) -> None:
    per_line = dataset(tmp_path / "l", line(objects=objects([bbox]), bbox_format=bbox_format, bbox_units=bbox_units))
    assert only_box(per_line) == pytest.approx((0.25, 0.2, 0.75, 0.8))
    given = dataset(tmp_path / "g", line(objects=objects([bbox])))
    (record,) = read_dataset(given, bbox_format=bbox_format, bbox_units=bbox_units)
    assert record.layout.boxes[0].xyxy == pytest.approx((0.25, 0.2, 0.75, 0.8))


def test_a_line_overrides_what_was_given(tmp_path: Path) -> None:
    folder = dataset(tmp_path, line(objects=objects([[0, 0, 0.5, 0.5]]), bbox_format="xyxy", bbox_units="relative"))
    (record,) = read_dataset(folder, bbox_format="cxcywh", bbox_units="pixel")
    assert record.layout.boxes[0].xyxy == (0, 0, 0.5, 0.5)


def test_pixels_are_those_of_the_upright_image(tmp_path: Path) -> None:
    dataset(tmp_path, line("turned.jpg", objects=objects([[0, 0, 20, 40]]), bbox_units="pixel"))
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(tmp_path / "turned.jpg", (40, 20), exif=exif)
    assert image_size(tmp_path / "turned.jpg") == load_image(tmp_path / "turned.jpg").size == (20, 40)
    assert only_box(tmp_path) == (0, 0, 1, 1)


def test_where_order_extra_columns_and_repeated_images(tmp_path: Path) -> None:
    folder = dataset(tmp_path, line(source="x"), "", line("b.png"), line(caption="again"))
    records = read_dataset(folder)
    assert [r.location for r in records] == [f"{folder}/metadata.jsonl:{n}" for n in (1, 3, 4)]
    assert [r.image.name for r in records] == ["a.png", "b.png", "a.png"]
    assert records[0].extra == ("source",)


def test_a_byte_order_mark_and_no_boxes_are_fine(tmp_path: Path) -> None:
    folder = dataset(tmp_path, line(objects={"bbox": [], "phrase": []}))
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text("\ufeff" + text, encoding="utf-8")
    assert read_dataset(folder)[0].layout.boxes == ()


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "L", "I;16", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode in ("CMYK", "I;16") else "png"
    path = tmp_path / f"x.{suffix}"
    image = Image.new("L", (4, 4), 0)
    image = Image.new("I;16", (4, 4), 32768) if mode == "I;16" else image.convert(mode)
    image.save(path)
    loaded = load_image(path)
    assert (loaded.mode, loaded.size) == ("RGB", (4, 4))
    if mode == "I;16":
        assert loaded.getpixel((0, 0)) == (128, 128, 128)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_truncated_image_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    data = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(data[: len(data) // 2])
    (record,) = read_dataset(folder)
    with pytest.raises(InputError, match=r"metadata.jsonl:1: .*a.png: is no readable image"):
        record.load()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    layout = Layout(
        "ein Bild, \u2028 sagt sie",
        (Box((1 / 3, 0.1, 2 / 3, 0.9), "ein grüner Ball"), Box((0.5, 0.5, 0.5 + 1e-8, 1), "a line")),
    )
    source = make_image(tmp_path / "source.png")
    out = tmp_path / "out"
    write_dataset(
        out, [("a.png", Image.new("RGB", (8, 8)), layout), ("sub/b.png", source, layout), ("a.png", source, layout)]
    )
    records = read_dataset(out)
    assert [r.image.relative_to(out).as_posix() for r in records] == ["a.png", "sub/b.png", "a.png"]
    assert records[0].load().size == (8, 8)
    assert (out / "sub/b.png").read_bytes() == source.read_bytes()
    for record in records:
        assert record.layout.caption == layout.caption
        for box, wanted in zip(record.layout.boxes, layout.boxes, strict=True):
            assert (box.phrase, box.xyxy) == (wanted.phrase, pytest.approx(wanted.xyxy, abs=1e-6))


def test_a_data_set_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    item = ("a.png", Image.new("RGB", (8, 8)), Layout("c"))
    out = tmp_path / "out"
    write_dataset(out, [item, ("old.png", *item[1:])])
    write_dataset(out, [item])
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "a.png", "metadata.jsonl"]
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"thesis.txt"):
        write_dataset(out, [item])
    assert (out / "thesis.txt").read_text() == "precious"


def test_a_failure_leaves_the_earlier_data_set(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_dataset(out, [("a.png", Image.new("RGB", (8, 8)), Layout("c"))])
    with pytest.raises(InputError):
        write_splits(tmp_path / "split", {"train": [("b.png", out / "a.png", Layout("c"))], "validation": []})
    with pytest.raises(InputError):
        write_dataset(out, [("b.png", out / "a.png", Layout("c")), ("c.png", out / "missing.png", Layout("c"))])
    assert len(read_dataset(out)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_scan_goes_on_past_wrong_lines(tmp_path: Path) -> None:
    folder = dataset(tmp_path, line(), "{", line(caption=None), line("b.png"))
    records, errors = scan_dataset(folder)
    assert [r.image.name for r in records] == ["a.png", "b.png"]
    assert [str(e).split(": ")[0][-1] for e in errors] == ["2", "3"]


def test_check_counts_what_it_sees(tmp_path: Path) -> None:
    tiny = line("b.png", objects=objects([[0, 0, 0.005, 0.5]]), bbox_fromat="xyxy", source=1)
    report = check_dataset(read_dataset(dataset(tmp_path, line(), line(), tiny)))
    assert (report.records, report.images, report.boxes, report.tiny_boxes, report.duplicate_records) == (
        3,
        2,
        5,
        1,
        1,
    )
    assert report.image_sizes == {"40x20": 1, "20x40": 1}
    assert report.boxes_per_image == {1: 1, 2: 2}
    assert report.extra_columns == {"bbox_fromat": 1, "source": 1}
    assert any("did you mean 'bbox_format'" in warning for warning in report.warnings)
    assert report.ok
    assert report.to_dict()["ok"] is True


@pytest.mark.parametrize("declared", ["xyxy", "xywh"])
def test_check_sees_xywh_that_is_taken_for_xyxy(tmp_path: Path, declared: str) -> None:
    # Sizes larger than their corners: as xyxy nothing is inverted, and only the statistics tell.
    boxes = [[0.02 * n, 0.03 * n, 0.02 * n + 0.2, 0.03 * n + 0.1] for n in range(13)]
    folder = dataset(tmp_path, line(objects=objects(boxes), bbox_format=declared))
    assert any("as xywh" in warning for warning in check_dataset(read_dataset(folder)).warnings) == (declared == "xyxy")


def test_xywh_is_proposed_where_a_share_of_the_set_says_so_and_not_for_a_box(tmp_path: Path) -> None:
    right = line(objects=objects([[0.1, 0.1, 0.3, 0.3]]))
    wrong = line(objects=objects([[0.1, 0.5, 0.8, 0.2]]))

    def findings(name: str, *lines: dict[str, object], shares: bool = True) -> list[str]:
        folder = dataset(tmp_path / name, *lines)
        records, errors = scan_dataset(folder)
        written = read_written(folder, bbox_format="xyxy", bbox_units="relative")
        report = check_dataset(records, errors=errors, written=written)
        said = f"{len(errors) / len(lines):.1%} as xyxy (declared), 0.0% as xywh"
        assert (said in str(report.hint)) == shares == (report.hint is not None)
        with pytest.raises(InputError) as refused:
            read_dataset(folder)
        assert (said in str(refused.value)) == shares
        return [f.message for f in report.findings if f.name == "box-format"]

    (message,) = findings("many", right, *[wrong] * 5)
    assert "5 of 6 boxes are wrong as xyxy, 0 as xywh: the boxes are probably xywh" in message
    assert findings("one", *[right] * 9, wrong) == []
    assert findings("half", right, wrong, shares=False) == []


def test_boxes_are_converted_clipped_and_compared_as_torchvision_does() -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.rand(40, 4, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    for order in ("xyxy", "xywh", "cxcywh"):
        converted = box_convert(raw, order, "xyxy")
        for four, wanted in zip(raw.tolist(), converted.tolist(), strict=True):
            assert corners(four, order) == pytest.approx(wanted, abs=1e-12)
            inside = clip_boxes_to_image(torch.tensor([wanted], dtype=torch.float64), (1, 1))[0].tolist()
            assert clip(tuple(wanted)) == pytest.approx(inside, abs=1e-12)
    low, high = raw[:, :2].minimum(raw[:, 2:]), raw[:, :2].maximum(raw[:, 2:])
    boxes = torch.cat([low, high], dim=1)
    table = box_iou(boxes[:25].tolist(), boxes[15:].tolist())
    assert table == pytest.approx(torchvision.ops.box_iou(boxes[:25], boxes[15:]).numpy(), abs=1e-12)
    assert box_iou([], [[0, 0, 1, 1]]).shape == (0, 1)
    assert box_iou([[0, 0, 0, 0]], [[0, 0, 0, 0]]) == 0
