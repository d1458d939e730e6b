"""Files as people have them: encodings, readings of boxes, edges, odd files in the place of files, caps, names that lead out."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmdit_lora import Box, Layout
from mmdit_lora.boxes import READINGS, Boxed, Reading, evidence
from mmdit_lora.cli.main import main
from mmdit_lora.cli.sample import given_layouts
from mmdit_lora.config.loading import load_config
from mmdit_lora.data.formats import read_format
from mmdit_lora.data.images import image_size, load_image
from mmdit_lora.data.records import read_dataset, scan_dataset
from mmdit_lora.data.shards import open_shards
from mmdit_lora.data.shards.store import expand
from mmdit_lora.errors import InputError, several
from mmdit_lora.files import read_lines
from mmdit_lora.layout import MOST_BOXES, MOST_CAPTION, MOST_PHRASE, read_layouts
from mmdit_lora.models.weight_files import shard_names
from mmdit_lora.training.setup import read_data
from tests.data_makers import annotation, dataset, line, make_image, objects, voc
from tests.format_makers import MAKERS, coco_data, options, source, write
from tests.time_limit import at_most

BOX = [0.1, 0.2, 0.5, 0.9]


# --- readings of boxes ------------------------------------------------------------------------------------------------

DECLARED = Reading("xyxy", "relative")


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 4) relative xyxy, sides of at least 0.05."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.05, 0.6, (count, 2))
    corner = rng.uniform(0, 1 - size)
    return np.concatenate([corner, corner + size], axis=1)


def written_as(boxes: np.ndarray, reading: Reading, size: tuple[int, int]) -> list[tuple[float, ...]]:
    x0, y0, x1, y1 = boxes.T
    four = {
        "xyxy": (x0, y0, x1, y1),
        "xywh": (x0, y0, x1 - x0, y1 - y0),
        "cxcywh": ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0),
    }[reading.order]
    sides = {"relative": (1, 1), "permille": (1000, 1000), "pixel": size}[reading.unit]
    return [tuple(map(float, box)) for box in np.stack(four, axis=1) * (sides * 2)]


@pytest.mark.parametrize("meant", [r for r in READINGS if r != DECLARED], ids=" ".join)
@pytest.mark.parametrize("count", [8, 100])
def test_what_is_meant_is_proposed_by_its_share(meant: Reading, count: int) -> None:
    found = evidence([Boxed(written_as(random_boxes(count), meant, (640, 480)), (640, 480))], DECLARED)  # type: ignore[arg-type]
    assert found is not None
    assert found.wrong[meant] == 0
    assert meant in found.proposed
    assert found.proposed == [meant] or count == 8
    assert f"0.0% as {found.name(meant)}" in found.line
    assert found.declaration(meant) in str(found.hint)


def test_a_reading_is_not_proposed_for_single_boxes_nor_where_the_declared_one_fits_better() -> None:
    small = [(0.1, 0.1, 0.3, 0.4)] * 29  # right as xywh too
    for odd in ((0.5, 0.1, 0.5, 0.5), (0.3, 0.1, 0.2, 0.5), (0.1, 0.1, 0.2, 3.0)):
        found = evidence([Boxed([*small, odd])], DECLARED)
        assert found is not None
        assert (found.wrong[DECLARED], found.proposed, found.hint) == (1, [], None)
    swapped = [*map(tuple, random_boxes(97).tolist()), *[(0.4, 0.1, 0.2, 0.5)] * 10]
    found = evidence([Boxed(swapped)], DECLARED)
    assert found is not None
    assert found.wrong[DECLARED] == 10  # more than five, but the other 97 are right as declared
    assert found.proposed == []
    assert found.wrong[Reading("xywh", "relative")] > 10
    empty = evidence([Boxed([(0.5, 0.1, 0.5, 0.5)] * 9)], DECLARED)
    assert empty is not None
    assert (empty.misread, empty.proposed, empty.beside_error) == (0, [], None)
    assert evidence([Boxed([])], DECLARED) is None


def test_shares_stand_beside_the_error_of_a_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = [list(box) for box in written_as(random_boxes(12), Reading("xyxy", "permille"), (1, 1))]
    folder = dataset(tmp_path / "set", *(line(objects=objects([box])) for box in boxes))
    for run in (lambda: main(["data", "check", str(folder)]), lambda: main(["data", "stats", str(folder)])):
        assert run() == 2
        said = " ".join(capsys.readouterr().err.split())
        error = said[said.index("error:") :]
        assert "12 errors, the first" in error
        assert "100.0% as xyxy (declared)" in error
        assert "0.0% as xyxy permille" in error
        assert 'declare "bbox_units": "permille"' in error
        assert len(error) < 2000
    records = read_dataset(folder, bbox_units="permille")
    assert records[0].layout.boxes[0].xyxy == pytest.approx(random_boxes(12)[0])
    assert main(["data", "check", str(folder), "--bbox-units", "permille"]) == 0
    config = tmp_path / "run.yaml"
    config.write_text(f"base: b\ndata: {{path: {folder}, bbox_units: permille}}\n")
    assert load_config(config).data.bbox_units == "permille"


def test_the_one_empty_box_of_thirty_is_named_and_nothing_else_advised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(objects=objects([[0.1, 0.1, 0.5, 0.5]])) for _ in range(30)]
    lines[7] = line(objects=objects([[0.5, 0.1, 0.5, 0.5]]))
    assert main(["data", "check", str(dataset(tmp_path, *lines))]) == 2
    said = capsys.readouterr().err
    assert "metadata.jsonl:8: objects.bbox[0]: the box [0.5, 0.1, 0.5, 0.5] is empty: its width is 0" in said
    assert "xywh" not in said[said.index("error:") :]
    assert "probably" not in said


# --- the edge ---------------------------------------------------------------------------------------------------------

# Of an image of 40 x 20 pixels, two pixels are 5 % of the width and 10 % of the height.
EDGES: dict[str, tuple[list[float], dict[str, str], list[float] | None]] = {
    "a pixel": ([1, 1, 41, 10], {"bbox_units": "pixel"}, [0.025, 0.05, 1, 0.5]),
    "two pixels": ([-2, -2, 20, 22], {"bbox_units": "pixel"}, [0, 0, 0.5, 1]),
    "three pixels": ([-3, 1, 20, 20], {"bbox_units": "pixel"}, None),
    "xywh": ([30, 10, 12, 11], {"bbox_units": "pixel", "bbox_format": "xywh"}, [0.75, 0.5, 1, 1]),
    "cxcywh": ([20, 10, 42, 10], {"bbox_units": "pixel", "bbox_format": "cxcywh"}, [0, 0.25, 1, 0.75]),
    "relative": ([0.5, 0.5, 1.015, 1], {}, [0.5, 0.5, 1, 1]),
    "relative, by its pixels": ([0.5, 0.5, 1.05, 1.1], {}, [0.5, 0.5, 1, 1]),
    "relative, beyond": ([0.5, 0.5, 1.06, 1], {}, None),
    "permille": ([0, 0, 1015, 500], {"bbox_units": "permille"}, [0, 0, 1, 0.5]),
    "permille, beyond": ([0, 0, 1060, 500], {"bbox_units": "permille"}, None),
    "outside altogether": ([1.01, 0.5, 1.02, 1], {}, None),
}


@pytest.mark.parametrize("name", EDGES)
def test_a_box_at_the_edge_of_a_line(name: str, tmp_path: Path) -> None:
    box, keys, want = EDGES[name]
    folder = dataset(tmp_path, line(objects=objects([box]), **keys), line())
    told: list[str] = []
    if want is None:
        with pytest.raises(
            InputError, match=r"metadata.jsonl:1: objects.bbox\[0\]: the box .*(leaves|outside) the image"
        ):
            read_dataset(folder)
        return
    records = read_dataset(folder, on_warning=told.append)
    assert list(records[0].layout.boxes[0].xyxy) == pytest.approx(want)
    (said,) = told
    assert "1 box leaves its image by at most " in said
    assert "was clipped (metadata.jsonl:1: objects.bbox[0])" in said


def test_rounding_is_clipped_without_a_word(tmp_path: Path) -> None:
    told: list[str] = []
    (record,) = read_dataset(dataset(tmp_path, line(objects=objects([[-5e-4, 0, 1.0009, 1]]))), on_warning=told.append)
    assert record.layout.boxes[0].xyxy == (0, 0, 1, 1)
    assert told == []


# format -> (how a set with a box from -1 to 41 of 40 pixels is made, its relative box)
def _coco(folder: Path) -> None:
    make_image(folder / "val" / "a.png")
    write(folder / "annotations" / "instances_val.json", coco_data(annotations=[{"id": 1, "image_id": 7, "category_id": 3, "bbox": [-1, 4, 42, 12]}]))  # fmt: skip


def _yolo(folder: Path) -> None:
    MAKERS["yolo"](folder)
    write(folder / "labels" / "train" / "a.txt", "0 0.5 0.5 1.05 0.6\n")


def _simpletuner(folder: Path) -> None:
    MAKERS["simpletuner"](folder)
    write(folder / "a.bbox", [{"label": "a red ball", "bbox": [-0.025, 0.2, 1.025, 0.8]}])


def _openimages(folder: Path) -> None:
    MAKERS["openimages"](folder)
    table = folder / "validation-annotations-bbox.csv"
    write(table, table.read_text().replace("0.25,0.75,0.2,0.8", "-0.025,1.025,0.2,0.8"))


def _cvat(folder: Path) -> None:
    MAKERS["cvat"](folder)
    file = folder / "annotations.xml"
    write(file, file.read_text().replace('xtl="10"', 'xtl="-1"').replace('xbr="30"', 'xbr="41"'))


EDGED: dict[str, Callable[[Path], object]] = {
    "voc": lambda folder: voc(folder, annotation([("a red ball", 0, 5, 41, 16)])),
    "coco": _coco,
    "yolo": _yolo,
    "simpletuner": _simpletuner,
    "openimages": _openimages,
    "cvat": _cvat,
    "jsonl": lambda folder: dataset(folder, line(objects=objects([[-0.025, 0.2, 1.025, 0.8]]))),
}


@pytest.mark.parametrize("name", EDGED)
def test_every_format_clips_alike_and_counts(name: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    EDGED[name](src)
    found = read_format(name, source(name, src), **options(name, src))
    assert found.records[0].layout.boxes[0].xyxy == pytest.approx((0, 0.2, 1, 0.8), abs=0.06)  # voc counts from 0 here
    assert found.records[0].layout.boxes[0].xyxy[::2] == (0, 1)
    said = [text for text in found.warnings if "leaves its image by at most 2.5% of the side and was clipped" in text]
    assert len(said) == 1


def test_one_counted_warning_in_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    lines = [line(name, objects=objects([[0, 0, 41, 20]]), bbox_units="pixel") for name in ("a.png",) * 5]
    folder = dataset(tmp_path / "set", *lines, line("b.png"))
    said = (
        "5 boxes leave their images by at most 2.5% of the side and were clipped (metadata.jsonl:1: objects.bbox[0], "
    )
    for argv in (["check", str(folder)], ["convert", "--from", "jsonl", str(folder), "--out", str(tmp_path / "out")]):
        assert main(["data", *argv]) == 0
        assert " ".join(capsys.readouterr().err.split()).count(said) == 1
    read_dataset(folder)
    assert caplog.text.count(said) == 1
    config = tmp_path / "run.yaml"
    config.write_text(f"base: b\ndata: {{path: {folder}, validation_share: 0.5}}\n")
    data = read_data(load_config(config))
    assert [said in remark for remark in data.remarks] == [True]
    assert caplog.text.count(said) == 1


def test_shards_say_it_at_every_opening(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        content = make_image(tmp_path / "p.png").read_bytes()
        text = json.dumps({"caption": "c", "objects": objects([[0, 0, 41, 20]]), "bbox_units": "pixel"}).encode()
        for name, data in (("1.png", content), ("1.json", text)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    for _ in range(2):  # by looking through it, and by its index
        found = open_shards(path)
        assert found[0].layout.boxes[0].xyxy == (0, 0, 1, 1)
        assert found.remarks == [
            f"1 box leaves its image by at most 2.5% of the side and was clipped ({path}:1: objects.bbox[0])"
        ]


# --- text files -------------------------------------------------------------------------------------------------------


def _jsonl(text: str, **_: str) -> bytes:
    return text.encode()


SPELLINGS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "bom": lambda rows: ("\ufeff" + _lines(rows)).encode(),
    "crlf": lambda rows: _lines(rows).replace("\n", "\r\n").encode(),
    "utf-16": lambda rows: _lines(rows).encode("utf-16"),
    "utf-16-be": lambda rows: b"\xfe\xff" + _lines(rows).encode("utf-16-be"),
    "utf-16 with crlf": lambda rows: _lines(rows).replace("\n", "\r\n").encode("utf-16"),
    "array": lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode(),
    "array in a line": lambda rows: json.dumps(rows).encode(),
    "array in utf-16": lambda rows: json.dumps(rows).encode("utf-16"),
    "objects over lines": lambda rows: "\n".join(json.dumps(row, indent=2) for row in rows).encode(),
    "no newline at the end": lambda rows: _lines(rows).rstrip("\n").encode(),
}


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_metadata_and_layouts_as_editors_and_tools_write_them(spelling: str, tmp_path: Path) -> None:
    rows = [line(caption="ein grüner Ball \u2028 sagt sie"), line("b.png")]
    folder = dataset(tmp_path / "set")
    (folder / "metadata.jsonl").write_bytes(SPELLINGS[spelling](rows))
    found = [(r.image.name, r.layout) for r in read_dataset(folder)]
    want = [Layout.from_dict(row) for row in rows]
    assert found == [("a.png", want[0]), ("b.png", want[1])]
    plain = [layout.to_dict() for layout in want]
    (tmp_path / "many.jsonl").write_bytes(SPELLINGS[spelling](plain))
    assert read_layouts(tmp_path / "many.jsonl") == want
    (tmp_path / "one.json").write_bytes(SPELLINGS[spelling](plain[:1]))
    assert read_layouts(tmp_path / "one.json") == want[:1]


def test_places_in_an_array_are_lines(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (folder / "metadata.jsonl").write_text(
        "[\n" + ",\n".join(json.dumps(row) for row in (line(), line(caption=3), line())) + "\n]"
    )
    records, errors = scan_dataset(folder)
    assert [r.location[-2:] for r in records] == [":2", ":4"]
    assert [str(error).partition(": ")[0] for error in errors] == [f"{folder}/metadata.jsonl:3"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1, 2", r"metadata.jsonl:1: is not JSON: Expecting ',' or ']'"),
        ("[{}]\n{}", r"begins with a JSON array, and more stands behind it"),
        ("[", r"holds no image"),
        ("a r\xe9d square", r"is not UTF-8 text: byte 0xe9 in line 1, probably Windows-1252"),
    ],
)
def test_what_is_no_json_is_one_error(text: str, says: str, tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    (folder / "metadata.jsonl").write_bytes(text.encode("cp1252"))
    with pytest.raises(InputError, match=says):
        read_dataset(folder)


def test_cp1252_is_told_with_its_line(tmp_path: Path) -> None:
    folder = dataset(tmp_path)
    rows = [line()] * 40 + [line(caption="a réd square")]
    (folder / "metadata.jsonl").write_bytes(_lines(rows).encode("cp1252"))
    with pytest.raises(InputError, match=r"byte 0xe9 in line 41, probably Windows-1252.*\n.*iconv -f CP1252"):
        read_dataset(folder)


def test_backslashes_and_links_and_a_folder_deeper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "set"
    inner = dataset(folder / "train", line("sub\\c.png"), line("linked.png"), line("odd\\name.png"))
    make_image(inner / "sub" / "c.png", (8, 8))
    make_image(inner / "odd\\name.png", (4, 4))
    make_image(tmp_path / "elsewhere.png", (16, 16))
    (inner / "linked.png").symlink_to(tmp_path / "elsewhere.png")
    told: list[str] = []
    records = read_dataset(folder, on_warning=told.append)
    assert [(r.image, r.size()) for r in records] == [
        (inner / "sub/c.png", (8, 8)),
        (inner / "linked.png", (16, 16)),
        (inner / "odd\\name.png", (4, 4)),
    ]
    assert told == [f"{folder}: has no metadata.jsonl; the one in its folder train was read"]
    assert main(["data", "check", str(folder)]) == 0
    assert "the one in its folder train was read" in capsys.readouterr().err
    assert main(["data", "split", str(folder), "--out", str(tmp_path / "out"), "--share", "0.4"]) == 0
    assert len(read_dataset(tmp_path / "out/train")) == 2
    dataset(folder / "validation")
    with pytest.raises(InputError, match=rf"2 of its folders have one\n.*{folder}/train, {folder}/validation"):
        read_dataset(folder)


XML = {
    "utf-16": ('<?xml version="1.0" encoding="UTF-16"?>', "utf-16"),
    "utf-16 without mark": ('<?xml version="1.0" encoding="UTF-16"?>', "utf-16-le"),
    "says utf-16, is utf-8": ('<?xml version="1.0" encoding="utf-16"?>', "utf-8"),
    "cp1252": ("<?xml version='1.0' encoding='windows-1252'?>", "cp1252"),
    "latin-1": ('<?xml version="1.0" encoding="ISO-8859-1"?>', "latin-1"),
    "bom": ('<?xml version="1.0" encoding="utf-8"?>', "utf-8-sig"),
    "cp850": ('<?xml version="1.0" encoding="cp850"?>', "cp850"),
}


@pytest.mark.parametrize("name", XML)
def test_xml_is_read_in_the_encoding_that_it_has(name: str, tmp_path: Path) -> None:
    head, encoding = XML[name]
    src = voc(tmp_path / "voc")
    (src / "Annotations/0.xml").write_bytes((head + annotation([("réd", 0, 1, 20, 10)])).encode(encoding))
    found = read_format("voc", src)
    assert found.records[0].layout.boxes == (Box((0, 0.05, 0.5, 0.5), "réd"),)
    assert found.notes == {"pixels_from": 0}  # the 0 is seen whatever the encoding


def test_multi_byte_xml_and_what_is_no_xml(tmp_path: Path) -> None:
    src = voc(tmp_path / "voc")
    file = src / "Annotations/0.xml"
    file.write_bytes(('<?xml version="1.0" encoding="gb2312"?>' + annotation([("红", 1, 1, 20, 10)])).encode("gb2312"))
    assert read_format("voc", src).records[0].layout.boxes[0].phrase == "红"
    for head, encoding, says in (
        ("", "cp1252", "0.xml: is not UTF-8 text: byte 0xe9 in line 1, probably Windows-1252"),
        ('<?xml version="1.0" encoding="klingon"?>', "utf-8", "declares the encoding 'klingon', which is not known"),
        ('<?xml version="1.0" encoding="rot13"?>', "utf-8", "declares the encoding 'rot13', which is not known"),
        ('<?xml version="1.0" encoding="ascii"?>', "utf-8", "is not in ascii, the encoding that it declares"),
    ):
        file.write_bytes((head + annotation([("réd", 1, 1, 20, 10)])).encode(encoding))
        with pytest.raises(InputError, match=says):
            read_format("voc", src)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "want"),
    [
        ({"caption": "c"}, None),
        ({"caption": "c", "boxes": []}, None),
        ({"caption": "c", "boxes": [{"xyxy": BOX, "phrase": "p"}]}, BOX),
        ({"caption": "c", "boxes": [{"bbox": BOX, "phrase": "p"}]}, BOX),
        ({"caption": "c", "boxes": [{"xyxy": [0.1, 0.2, 0.4, 0.7], "phrase": "p"}], "bbox_format": "xywh"}, BOX),
        ({"caption": "c", "boxes": [{"xyxy": [100, 200, 500, 900], "phrase": "p"}], "bbox_units": "permille"}, BOX),
        ({"caption": "c", "boxes": [{"xyxy": [64, 96, 320, 432], "phrase": "p"}], "bbox_units": "pixel", "width": 640, "height": 480}, BOX),
        ({"file_name": "a.png", "source": 7, "caption": "c", "objects": {"bbox": [BOX], "phrase": ["p"]}}, BOX),
        ({"caption": "c", "objects": {"bbox": [[0.3, 0.55, 0.4, 0.7]], "phrase": ["p"]}, "bbox_format": "cxcywh"}, BOX),
        ({"file_name": "a.png", "caption": "c", "objects": {"bbox": [[4, 4, 20, 18]], "phrase": ["p"]}, "bbox_units": "pixel"}, BOX),
        ({"caption": "c", "boxes": [{"xyxy": [0.1, 0.2, 0.5, 1.02], "phrase": "p"}]}, [0.1, 0.2, 0.5, 1]),
    ],
)  # fmt: skip
def test_a_layout_in_every_form(data: dict[str, Any], want: list[float] | None, tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")  # 40 x 20
    (tmp_path / "one.json").write_text(json.dumps(data))
    (layout,) = read_layouts(tmp_path / "one.json", image_size=image_size)
    assert layout.caption == "c"
    assert [list(box.xyxy) for box in layout.boxes] == ([] if want is None else [pytest.approx(want)])
    assert Layout.from_dict(layout.to_dict()) == layout


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"caption": "c", "boxs": []}, "unknown key 'boxs'\n.*did you mean 'boxes'"),
        ({"caption": "c", "objects": {"bbox": [], "phrase": []}, "bbox_fromat": "xywh"}, "did you mean 'bbox_format'"),
        ({"caption": "c", "boxes": [], "bbox_units": "percent"}, "give one of relative, pixel, permille"),
        ({"caption": "c", "boxes": [{"xyxy": [1, 2, 30, 40], "phrase": "p"}], "bbox_units": "pixel"}, 'add "width" and "height"'),
        ({"caption": "c", "boxes": [], "width": -3, "height": 4}, "width and height are -3 and 4"),
        ({"boxes": []}, r"'caption' is missing\n.*\"boxes\": \[\{\"xyxy\""),
        ({"caption": "c", "boxes": [{"xyxy": [0.6, 0.6, 0.3, 0.3], "phrase": "p"}] * 5}, r'is inverted; .*100.0% as xyxy \(declared\).* declare "bbox_format": "xywh"'),
        ({"caption": "c", "boxes": [{"xyxy": [64, 64, 512, 512], "phrase": "p"}] * 5}, 'declare "bbox_units": "pixel" or "bbox_units": "permille"'),
        ({"caption": "c", "boxes": [{"xywh": [0.1, 0.1, 0.3, 0.3], "phrase": "p"}]}, 'unknown key .xywh.\n.*write the numbers under "xyxy" and declare "bbox_format": "xywh" beside the caption'),
        ({"caption": "c", "boxes": [{"cxcywh": [0.3, 0.3, 0.2, 0.2], "phrase": "p"}]}, 'under "xyxy" and declare "bbox_format": "cxcywh"'),
        ({"caption": "c", "boxes": [{"box": [0.1, 0.1, 0.3, 0.3], "phrase": "p"}]}, 'under "xyxy"; where they are not .*declare "bbox_format": "xywh" or "cxcywh"'),
        ({"caption": "c", "boxes": [{"zzz": 1, "phrase": "p"}]}, "known keys: xyxy, bbox, phrase"),
        ({"file_name": "../a.png", "caption": "c", "objects": {"bbox": [[4, 4, 20, 18]], "phrase": ["p"]}, "bbox_units": "pixel"}, r"without '\.\.'"),
    ],
)  # fmt: skip
def test_what_a_layout_may_not_say(data: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=says):
        read_layouts(tmp_path / "one.json", image_size=image_size)


@pytest.mark.parametrize(
    ("four", "declared", "says"),
    [
        ([100, 100, 1500, 500], {"bbox_units": "permille"}, "sides run from 0 to 1000"),
        ([100, 100, 2500, 500], {"bbox_units": "permille"}, "sides run from 0 to 1000"),
        ([0.5, 0.1, -0.2, 0.2], {"bbox_format": "xywh"}, "[left, top, width, height]; sides run from 0 to 1 "),
        ([64, 64, 32, 32], {}, "check the order"),
        ([0.6, 0.6, 0.3, 0.3], {}, "check the order"),
    ],
)
def test_few_wrong_boxes_are_no_evidence(
    four: list[float], declared: dict[str, Any], says: str, tmp_path: Path
) -> None:
    """The message has neither shares nor another reading; the hint says what the declared one allows."""
    for count in (1, 4):
        data = {"caption": "c", "boxes": [{"xyxy": four, "phrase": "p"}] * count} | declared
        (tmp_path / "one.json").write_text(json.dumps(data))
        with pytest.raises(InputError) as refused:
            read_layouts(tmp_path / "one.json")
        assert says in str(refused.value)
        for word in ("0.0%", "100.0%", "if that is what they are", '"pixel"'):
            assert word not in str(refused.value)


def test_boxes_of_options_are_clipped_and_refused_as_options(caplog: pytest.LogCaptureFixture) -> None:
    boxes = ["0,0,1.01,1=x", "0,0,0.5,0.5=y", "0,0,1,1.02=z"]
    (layout,) = given_layouts(None, "x", boxes, "xyxy", "relative", None)
    assert [box.xyxy for box in layout.boxes] == [(0, 0, 1, 1), (0, 0, 0.5, 0.5), (0, 0, 1, 1)]
    assert caplog.text.count("2 boxes leave their images by at most 2.0% of the side and were clipped (--box 0,0") == 1
    with pytest.raises(InputError) as refused:
        given_layouts(None, "x", ["100,100,500,900=x"], "xyxy", "relative", None)
    assert str(refused.value).startswith("--box 100,100,500,900=x: the box")
    assert "--box-units relative: [left, top, right, bottom]" in str(refused.value)
    assert "bbox_units" not in str(refused.value)


def test_clipped_boxes_of_layouts_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = {"caption": "c", "boxes": [{"xyxy": [0.1, 0.2, 0.5, 1.01], "phrase": "p"}]}
    (tmp_path / "many.jsonl").write_text(_lines([row] * 7))
    read_layouts(tmp_path / "many.jsonl")
    assert caplog.text.count("7 boxes leave their images by at most 1.0% of the side and were clipped") == 1


# --- odd files, caps, names -------------------------------------------------------------------------------------------


def _replace(path: Path, kind: str) -> None:
    path.unlink()
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")


UNUSED = {"jsonl": ("b.png",), "flickr30k": ("train.txt",)}  # files of a set that its records do not need


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
@pytest.mark.parametrize("name", [*MAKERS])
def test_no_reader_waits_for_a_fifo_or_reads_a_device(name: str, kind: str, tmp_path: Path) -> None:
    """Each file of a set in turn, annotations and images: there is an error, or less is read, and nothing waits."""
    MAKERS[name](tmp_path / "made")
    for file in sorted(
        path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*") if path.is_file()
    ):
        src = tmp_path / str(file).replace("/", "_")
        MAKERS[name](src)
        _replace(src / file, kind)
        with at_most(20):
            try:
                found = read_format(name, source(name, src), collect_errors=True, **options(name, src))
            except InputError:
                continue
            if not found.errors and str(file) not in UNUSED.get(name, ()):
                for record in found.records:
                    with pytest.raises(InputError):
                        record.load()


@pytest.mark.parametrize("kind", ["FIFO", "folder", "device"])
def test_layouts_images_shards_and_captions_are_regular_files(kind: str, tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.png", "a.tar", "a.parquet", "metadata.jsonl"):
        (tmp_path / name).touch()
        _replace(tmp_path / name, kind)
    src = voc(tmp_path / "voc")
    for read in (
        lambda: read_layouts(tmp_path / "a.json"),
        lambda: read_layouts(tmp_path / "a.jsonl"),
        lambda: load_image(tmp_path / "a.png"),
        lambda: image_size(tmp_path / "a.png"),
        lambda: read_dataset(tmp_path),
        lambda: open_shards(tmp_path / "a.tar") if kind != "folder" else open_shards(tmp_path / "none.tar"),
        lambda: read_format("voc", src, captions=tmp_path / "a.json") if kind != "folder" else read_dataset(tmp_path),
    ):
        with at_most(20), pytest.raises(InputError):
            read()


def test_caps_are_stated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the caption has 10,000,000 characters, and at most 100,000 are read"):
        Layout("x" * 10_000_000)
    with pytest.raises(InputError, match=r"the phrase has 10,001 characters, and at most 10,000"):
        Box((0, 0, 1, 1), "x" * (MOST_PHRASE + 1))
    assert Layout("x" * MOST_CAPTION).caption
    folder = dataset(tmp_path / "set", line(objects=objects([BOX] * 100_000)))
    with pytest.raises(InputError, match=r"metadata.jsonl:1: holds 100,000 boxes, and a layout has at most 10,000"):
        read_dataset(folder)
    with pytest.raises(InputError, match=r"names 1,000,000,000 files, and at most 100,000 shards are read"):
        expand(str(tmp_path / "{0..999999999}.tar"), ".tar")
    with pytest.raises(InputError, match=r"names 100,000,000 files"):
        expand(str(tmp_path / "{0..9999}-{0..9999}.tar"), ".tar")
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(2**31)  # sparse
    for read in (load_image, image_size):
        with pytest.raises(InputError, match=r"is a file of 2.0 GiB, and images have at most 1 GiB"):
            read(tmp_path / "huge.png")
    (tmp_path / "long.jsonl").write_text("{}\n" + "x" * 2000)
    with pytest.raises(InputError, match=r"long.jsonl:2: is longer than 0.000953674 MiB, the limit of a line"):
        list(read_lines(tmp_path / "long.jsonl", longest=1000))


def test_thousands_of_equal_boxes_are_counted_in_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = [[0.1, 0.1, 0.5, 0.5 + 1e-6 * n] for n in range(900)]
    folder = dataset(tmp_path, line(objects=objects([BOX] * MOST_BOXES)), line("b.png", objects=objects(near)))
    with at_most(60):
        assert main(["data", "check", str(folder), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    counts = {found["name"]: (found["count"], len(found["places"])) for found in report["findings"]}
    assert counts["duplicate-boxes"] == (MOST_BOXES - 1, 1)
    assert counts["near-identical-boxes"] == (900 * 899 // 2, 1)


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_names_in_archives_indices_and_lists_lead_nowhere_else(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, BytesIO(b"abcd"))
    with pytest.raises(InputError, match=r"(?s)x.tar: names the member .*without '\.\.'"):
        open_shards(tmp_path / "x.tar")
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "base" / "model.safetensors.index.json"
    write(index, {"weight_map": {"w": name.replace("png", "safetensors")}})
    with pytest.raises(InputError, match=r"(?s)index.json: names the shard .*without '\.\.'"):
        shard_names(index)
    with pytest.raises(InputError, match=r"metadata.jsonl:1: file_name is .*"):
        read_dataset(dataset(tmp_path / "set", line(name)))
    src = tmp_path / "flickr"
    MAKERS["flickr30k"](src)
    (src / "train.txt").write_text(name)
    with pytest.raises(InputError, match=r"train.txt: names the image"):
        read_format("flickr30k", src, split="train")


def test_a_base_whose_index_leads_out_is_not_opened(tmp_path: Path) -> None:
    from mmdit_lora.pipelines import load_pipeline

    write(tmp_path / "base/model_index.json", {"_class_name": "X"})
    write(
        tmp_path / "base/transformer/diffusion_pytorch_model.safetensors.index.json", {"weight_map": {"w": "../../x"}}
    )
    with pytest.raises(InputError, match=r"index.json: names the shard '../../x'"):
        load_pipeline(str(tmp_path / "base"))


def test_many_errors_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = dataset(tmp_path / "set", *(line(caption=n) for n in range(300)))
    for argv in (["data", "stats"], ["data", "check"], ["init"]):
        assert main([*argv, str(folder)]) == 2
        said = capsys.readouterr().err
        error = said[said.index("error:") :]
        assert f"{folder}: 300 errors, the first " in error
        assert "- metadata.jsonl:1: caption: is 0, not a text\n- metadata.jsonl:2: caption: is 1, not a text" in error
        assert len(error) < 2000
    src = voc(tmp_path / "voc", *["<annotation"] * 40)
    assert main(["data", "convert", "--from", "voc", str(src), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "40 errors, the first " in error
    assert "- Annotations/0.xml:1: is not XML" in error
    assert not (tmp_path / "out").exists()


def test_several_keep_the_only_one_whole() -> None:
    one = InputError("is wrong", location="f:1", hint="mend it")
    assert str(several([one], location="f")) == str(one)
    assert str(several([one, one], location="f")) == "f: 2 errors\n- f:1: is wrong\n- f:1: is wrong\n  hint: mend it"
    assert (
        len(str(several([InputError("x" * 5000, location="y" * 5000)] * 99, location="z" * 5000, hint="h" * 800)))
        < 2500
    )


def test_a_grey_image_that_is_a_link_to_a_regular_file_is_decoded(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert load_image(tmp_path / "b.png").getpixel((0, 0)) == (9, 9, 9)
