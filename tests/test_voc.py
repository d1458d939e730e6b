"""Pascal VOC in: whose pixel is the first, what is left out, captions and phrases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora.data.formats import Source, read_format
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from tests.data_makers import annotation, make_image, voc


def scan_voc(src: Path, split: str | None = None, **options: Any) -> Source:
    return read_format("voc", src, split=split, **options)


def read_voc(src: Path, split: str | None = None, **options: Any) -> list[tuple[Path, Layout]]:
    return [(record.image, record.layout) for record in scan_voc(src, split, **options).records]


def test_pixels_count_from_one_and_include_the_last(tmp_path: Path) -> None:
    ((image, layout),) = read_voc(voc(tmp_path, annotation([("RBC", 1, 1, 40, 20), ("WBC", 11, 6, 30, 15)])))
    assert image == tmp_path / "JPEGImages" / "0.png"
    assert [box.xyxy for box in layout.boxes] == [(0, 0, 1, 1), pytest.approx((0.25, 0.25, 0.75, 0.75))]


def test_a_zero_anywhere_says_that_the_tool_counts_from_zero(tmp_path: Path) -> None:
    found = scan_voc(voc(tmp_path, annotation([("a", 10, 5, 30, 15)]), annotation([("a", 0, 5, 30, 15)])))
    assert found.notes["pixels_from"] == 0
    assert found.records[0].layout.boxes[0].xyxy == pytest.approx((0.25, 0.25, 0.75, 0.75))


def test_boxes_are_clipped_and_empty_ones_counted(tmp_path: Path) -> None:
    boxes = [("a", 5, 5, 5, 5), ("b", 31, 11, 42, 22), ("c", 2, 2, 9, 2)]
    found = scan_voc(voc(tmp_path, annotation(boxes), annotation([])))
    assert [box.xyxy for box in found.records[0].layout.boxes] == [(0.75, 0.5, 1, 1)]
    assert found.left_out == {"boxes without area": 2, "images without a box": 1}
    warning = found.warnings[-1]  # two of 20 pixels below
    assert warning.startswith("1 box leaves its image by at most 10.0% of the side and was clipped")
    assert "0.xml: object 2" in warning
    with pytest.raises(
        InputError, match=r"0.xml: object 1: the box \[30.0, 10.0, 43.0, 20.0\] leaves the image of 40 x 20"
    ):
        scan_voc(voc(tmp_path / "far", annotation([("b", 31, 11, 43, 20)])))


def test_captions_name_distinct_phrases_in_order(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation([(name, 1, 1, 9, 9) for name in ("RBC", "WBC", "RBC")]))
    assert read_voc(src)[0][1].caption == "a photo of rbc, wbc"
    ((_, layout),) = read_voc(src, caption="{{blood}}: {phrases}.", phrases={"RBC": "a red blood cell"})
    assert layout.caption == "{blood}: a red blood cell, wbc."
    assert [box.phrase for box in layout.boxes] == ["a red blood cell", "wbc", "a red blood cell"]


def test_splits_are_lists_of_names_or_of_members(tmp_path: Path) -> None:
    src = voc(tmp_path, *[annotation()] * 3, train=["2", "0"], cat_train=["0  1", "1 -1", "2  0"])
    assert [image.stem for image, _ in read_voc(src)] == ["0", "1", "2"]
    assert [image.stem for image, _ in read_voc(src, "train")] == ["2", "0"]
    assert [image.stem for image, _ in read_voc(src, "cat_train")] == ["0", "2"]


def test_the_image_is_found_by_stem_or_by_its_stale_path(tmp_path: Path) -> None:
    src = voc(tmp_path, annotation(filename="C:\\old\\other.png"))
    assert read_voc(src)[0][0].name == "0.png"
    (src / "JPEGImages" / "0.png").unlink()
    make_image(src / "JPEGImages" / "other.png")
    assert read_voc(src)[0][0].name == "other.png"


def test_parts_of_objects_are_no_objects_and_a_size_of_zero_is_none(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    text = annotation(size=(0, 0)).replace("</object>", f"{part}</object>")
    assert [box.phrase for box in read_voc(voc(tmp_path, text))[0][1].boxes] == ["rbc"]


def test_errors_can_be_collected(tmp_path: Path) -> None:
    found = scan_voc(voc(tmp_path, annotation(), "<annotation>", annotation([("a", 9, 9, 3, 3)])), collect_errors=True)
    assert (len(found.records), len(found.errors)) == (1, 2)
    assert "1.xml:1: is not XML" in str(found.errors[0])


def test_an_entity_bomb_is_not_expanded(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "ha"}">' for n in range(12))
    bomb = f"<?xml version='1.0'?>\n<!DOCTYPE annotation [{entities}]>" + annotation([("&e11;", 1, 1, 9, 9)])
    with pytest.raises(InputError, match=r"0.xml:2: has a DTD"):
        read_voc(voc(tmp_path, bomb))


def test_blood_cells() -> None:
    """The real set (BCCD): 364 images, two of whose 4888 boxes are points."""
    root = os.environ.get("MMDIT_LORA_DATA")
    if not root or not (Path(root) / "bccd").is_dir():
        pytest.skip("set MMDIT_LORA_DATA to a folder that holds bccd (Pascal VOC)")
    found = scan_voc(Path(root) / "bccd")
    assert (len(found.records), sum(len(r.layout.boxes) for r in found.records)) == (364, 4886)
    assert found.left_out == {"boxes without area": 2}
    assert found.notes["pixels_from"] == 1
    assert len(read_voc(Path(root) / "bccd", "test")) == 72
