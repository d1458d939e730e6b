"""Every format in: the same box, phrase and caption arrive; what is written reads back; what is wrong is said."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.data.formats import FORMATS, format_table, read_format, write_format
from mmdit_lora.data.formats.common import ImageFinder, MissingImageError
from mmdit_lora.data.records import read_dataset
from mmdit_lora.errors import InputError
from tests.data_makers import make_image
from tests.format_makers import (
    BOX,
    CAPTION,
    MAKERS,
    OPEN_IMAGES_HEAD,
    PHRASE,
    WITHOUT_CAPTION,
    coco_data,
    cvat_text,
    flickr_xml,
    grit_row,
    hf_parquet,
    hf_row,
    hico_entry,
    instances,
    label_studio_task,
    layout_sam_eval_row,
    layout_sam_row,
    make_coco,
    make_layoutsam,
    make_openimages,
    make_yolo,
    options,
    parquet,
    sacap_row,
    source,
    write,
)

WRITTEN = [name for name, kind in FORMATS.items() if kind.write]


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    """The JSON of a command that must succeed."""
    assert main([*map(str, argv), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def only_box(name: str, src: Path, **options: Any) -> tuple[float, ...]:
    ((box,),) = [record.layout.boxes for record in read_format(name, src, **options).records]
    return box.xyxy


def test_every_format_has_a_set_here() -> None:
    assert set(MAKERS) == set(FORMATS)


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_box_phrase_and_caption_arrive(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    found = read_format(name, source(name, tmp_path), **options(name, tmp_path))
    (record,) = found.records
    (box,) = record.layout.boxes
    assert box.xyxy == pytest.approx(BOX, abs=1e-6)
    assert box.phrase == PHRASE
    assert record.layout.caption == ("a photo of a red ball" if name in WITHOUT_CAPTION else CAPTION)
    assert str(tmp_path) in record.location
    assert record.load().size == ((40, 40) if name == "overlaybench" else (40, 20))
    assert not found.errors


@pytest.mark.parametrize("name", MAKERS)
def test_every_format_converts_and_checks_by_command(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    MAKERS[name](tmp_path / "src")
    src = source(name, tmp_path / "src")
    more = [
        text for key, value in options(name, tmp_path / "src").items() for text in (f"--{key.replace('_', '-')}", value)
    ]
    printed = run(capsys, "data", "convert", "--from", name, src, "--out", tmp_path / "out", *more)
    assert (printed["records"], printed["boxes"]) == (1, 1)
    (record,) = read_dataset(tmp_path / "out")
    assert record.layout.boxes[0].xyxy == pytest.approx(BOX, abs=1e-6)
    if name != "jsonl":
        assert run(capsys, "data", "check", src, "--from", name, *more)["boxes"] == 1


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_format_writes_reads_back(name: str, tmp_path: Path) -> None:
    layout = Layout("two <things> & 'more', \u2028 grün", (Box(BOX, "ein ball"), Box((0, 0, 1 / 3, 1), "a: 'b' #c")))
    source_image = make_image(tmp_path / "s.png")
    write_format(name, tmp_path / "out", {"": [("a.png", source_image, layout), ("b.png", source_image, layout)]})
    found = read_format(name, tmp_path / "out")
    assert [record.image.name for record in found.records] == ["a.png", "b.png"]
    for record in found.records:
        assert record.layout.caption == layout.caption
        assert record.image.read_bytes() == source_image.read_bytes()
        for box, wanted in zip(record.layout.boxes, layout.boxes, strict=True):
            assert (box.phrase, box.xyxy) == (wanted.phrase, pytest.approx(wanted.xyxy, abs=1e-6))


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    """At least 2 pixels of an image of 64 x 48, which every format holds."""
    left, top = draw(st.floats(0, 0.9)), draw(st.floats(0, 0.9))
    right, bottom = draw(st.floats(left + 0.05, 1)), draw(st.floats(top + 0.05, 1))
    return Box((left, top, right, bottom), draw(st.sampled_from(["a cat", "a dog", "ein grüner ball", "x"])))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.lists(boxes(), min_size=1, max_size=4), st.lists(st.sampled_from(WRITTEN), min_size=2, max_size=5))
def test_any_chain_of_formats_keeps_boxes(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[Box], chain: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("chain")
    image: Any = Image.new("RGB", (64, 48))
    layout = Layout("what the chain carries", tuple(drawn))
    for index, name in enumerate(chain):
        write_format(name, folder / str(index), {"": [("a.png", image, layout)]})
        (record,) = read_format(name, folder / str(index)).records
        image, layout = record.image, record.layout
    assert layout.caption == "what the chain carries"
    assert [box.phrase for box in layout.boxes] == [box.phrase for box in drawn]
    for box, wanted in zip(layout.boxes, drawn, strict=True):
        assert box.xyxy == pytest.approx(wanted.xyxy, abs=1e-6)


def test_convert_to_another_format_with_a_holdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(4):
        make_image(tmp_path / "src" / "images" / f"{index}.png")
        write(tmp_path / "src" / "labels" / f"{index}.txt", "0 0.5 0.5 0.5 0.6\n")
    write(tmp_path / "src" / "classes.txt", "ball\n")
    out = tmp_path / "out"
    argv = ["data", "convert", "--from", "yolo", tmp_path / "src", "--out", out, "--to", "coco", "--holdout", 0.25]
    assert run(capsys, *argv)["validation"] == 1
    assert len(read_format("coco", out / "train").records) == 3
    assert main([*map(str, argv)]) == 0  # what it wrote is replaced
    (out / "train" / "mine.txt").write_text("mine")
    assert main([*map(str, argv)]) == 2
    assert "train/mine.txt" in capsys.readouterr().err


def test_a_map_a_template_and_captions_from_beside(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    phrases = {PHRASE: "the ball"}
    (record,) = read_format("yolo", tmp_path, caption="here: {phrases}", phrases=phrases).records
    assert (record.layout.caption, record.layout.boxes[0].phrase) == ("here: the ball", "the ball")
    beside = [
        write(tmp_path / "c.jsonl", json.dumps({"file_name": "train/a.png", "caption": "beside"})),
        write(tmp_path / "c.json", {"a": "beside"}),
        write(tmp_path / "texts" / "a.txt", "beside\n").parent,
    ]
    for captions in beside:
        assert read_format("yolo", tmp_path, captions=captions).records[0].layout.caption == "beside"
    with pytest.raises(InputError, match="did you mean 'a red ball'"):
        read_format("yolo", tmp_path, phrases={"a red bal": "x"})


def test_missing_images_are_left_out_when_asked(tmp_path: Path) -> None:
    make_coco(tmp_path)
    data = coco_data()
    data["images"].append({"id": 8, "file_name": "gone.png", "width": 4, "height": 4})
    write(tmp_path / "annotations" / "instances_val.json", data)
    with pytest.raises(InputError, match=r"images\[1\]: its image 'gone.png' is not below"):
        read_format("coco", tmp_path)
    found = read_format("coco", tmp_path, skip_missing=True)
    assert (len(found.records), found.left_out) == (1, {"records whose image is not there": 1})


def test_check_takes_splits_and_leaves_missing_images_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_coco(tmp_path)
    write(tmp_path / "annotations" / "instances_train.json", coco_data())  # its image is in no folder of its own
    write(tmp_path / "annotations" / "instances_gone.json", coco_data(images=[{"id": 7, "file_name": "gone.png"}]))
    argv = ["data", "check", tmp_path, "--from", "coco"]
    assert main([*map(str, argv)]) == 2
    assert "'gone.png' is not below" in capsys.readouterr().err
    report = run(capsys, *argv, "--skip-missing")
    assert (report["records"], report["left_out"]) == (2, {"records whose image is not there": 1})
    assert run(capsys, *argv, "--split", "val")["records"] == 1
    assert main(["data", "check", str(tmp_path), "--split", "val"]) == 2
    assert "--split: belongs to --from" in capsys.readouterr().err


def test_coco_crowds_polygons_and_run_lengths(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    common = {"image_id": 7, "category_id": 3}
    mask = {"size": [20, 40], "counts": [10 * 20 + 4, *([12, 8] * 19), 12, 4 + 10 * 20]}
    shapes = [
        {"iscrowd": 1, "segmentation": mask},
        {"segmentation": [[10, 4, 30, 4, 30, 16], [10, 16, 12, 8, 14, 15]]},
        {"segmentation": mask},
    ]
    annotations = [{"id": index, **common, **shape} for index, shape in enumerate(shapes)]
    path = write(tmp_path / "x.json", coco_data(annotations=annotations))
    found = read_format("coco", path)
    assert [box.xyxy for box in found.records[0].layout.boxes] == [pytest.approx(BOX), pytest.approx(BOX)]
    assert found.left_out == {"crowds": 1}


def test_coco_splits(tmp_path: Path) -> None:
    make_coco(tmp_path)
    make_image(tmp_path / "train" / "a.png")
    write(tmp_path / "annotations" / "instances_train.json", coco_data())
    assert len(read_format("coco", tmp_path).records) == 2
    (record,) = read_format("coco", tmp_path, split="train").records
    assert record.image == tmp_path / "train" / "a.png"


def test_yolo_polygons_confidences_and_splits(tmp_path: Path) -> None:
    make_yolo(tmp_path)
    make_image(tmp_path / "images" / "val" / "b.png")
    make_image(tmp_path / "images" / "val" / "c.png")
    write(tmp_path / "labels" / "val" / "b.txt", "0 0.25 0.2 0.75 0.3 0.5 0.8\n\n0 0.5 0.5 0.5 0.6 0.9\n")
    found = read_format("yolo", tmp_path, split="val")
    assert [box.xyxy for box in found.records[0].layout.boxes] == [pytest.approx(BOX), pytest.approx(BOX)]
    assert found.left_out == {"images without a box": 1}
    assert len(read_format("yolo", tmp_path).records) == 2


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        # In an image of 40 x 20, 12 pixels to the right become 12 down (60 %), 10 pixels down become 10 to the left.
        ({"x": 75, "y": 20, "width": 30, "height": 50, "rotation": 90}, (0.5, 0.2, 0.75, 0.8)),
        ({"width": ..., "x": ..., "points": [[25, 80], [75, 50], [50, 20]]}, BOX),
        ({"x": 50, "y": 50, "radiusX": 25, "radiusY": 30}, BOX),
    ],
    ids=["turned", "polygon", "ellipse"],
)
def test_label_studio_shapes(value: dict[str, Any], wanted: tuple[float, ...], tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    path = write(tmp_path / "export.json", [label_studio_task(**value)])
    assert only_box("labelstudio", path) == pytest.approx(wanted)


def test_label_studio_minimal_export_and_local_files(tmp_path: Path) -> None:
    make_image(tmp_path / "images" / "my a.png")
    value = {"x": 25, "y": 20, "width": 50, "height": 60, "rectanglelabels": ["Ball"]}
    row = {"id": 1, "image": "/data/local-files/?d=images/my%20a.png", "label": [value], "caption": "c"}
    path = write(tmp_path / "export.json", [row])
    (record,) = read_format("labelstudio", path).records
    assert (record.layout.caption, record.layout.boxes[0]) == ("c", Box(BOX, "ball"))


def test_cvat_shapes(tmp_path: Path) -> None:
    make_image(tmp_path / "a.png")
    shapes = (
        '<polygon label="b" points="10,4;30,10;20,16"/><points label="p" points="1,1"/><tag label="t"/>'
        '<box label="b" xtl="14" ytl="0" xbr="26" ybr="20" rotation="90"/>'
    )
    found = read_format("cvat", write(tmp_path / "annotations.xml", cvat_text(shapes)))
    assert [box.xyxy for box in found.records[0].layout.boxes] == [pytest.approx(BOX), pytest.approx(BOX)]
    assert found.left_out == {"shapes of the kind points": 1}


def test_simpletuner_lines_of_json_and_of_yolo(tmp_path: Path) -> None:
    for stem, content in (
        ("lines", "\n".join(json.dumps({"label": PHRASE, "bbox": list(BOX)}) for _ in range(2))),
        ("yolo", "0 0.5 0.5 0.5 0.6\n"),
        ("none", ""),
    ):
        make_image(tmp_path / f"{stem}.png")
        write(tmp_path / f"{stem}.bbox", content)
    write(tmp_path / "classes.txt", PHRASE)
    found = read_format("simpletuner", tmp_path)
    assert [[box.xyxy for box in r.layout.boxes] for r in found.records] == [
        [pytest.approx(BOX)] * 2,
        [pytest.approx(BOX)],
    ]
    assert found.left_out == {"images without a box": 1}


def test_open_images_groups_and_splits(tmp_path: Path) -> None:
    make_openimages(tmp_path)
    lines = "a,x,/m/02,1,0.1,0.2,0.3,0.4,0,0,1,0,0\na,x,Dog,1,0.1,0.2,0.3,0.4,0,0,0,0,0\n"
    write(tmp_path / "train-annotations-bbox.csv", OPEN_IMAGES_HEAD + lines)
    found = read_format("openimages", tmp_path, split="train")
    assert found.records[0].layout.boxes == (Box((0.1, 0.3, 0.2, 0.4), "dog"),)
    assert found.records[0].location.endswith("train-annotations-bbox.csv:2")
    assert found.left_out == {"groups of objects": 1}


@pytest.mark.parametrize("name", ["layoutsam", "layoutsam-eval", "denselayout", "instancediffusion", "sacap", "grit"])
def test_detailed_descriptions(name: str, tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    chunk = [0, len(CAPTION), *BOX, 1]
    if name == "sacap":
        parquet(tmp_path / "train.parquet", sacap_row(short_caption=PHRASE, caption="a shiny red ball"))
    if name == "grit":
        parquet(tmp_path / "coyo_0_snappy.parquet", grit_row(ref_exps=[chunk]))
    short, long = (
        read_format(name, source(name, tmp_path), detailed=detailed, **options(name, tmp_path)).records[0].layout.boxes
        for detailed in (False, True)
    )
    assert short[0].phrase == PHRASE
    assert long[0].phrase == (CAPTION if name == "grit" else "a shiny red ball")
    assert short[0].xyxy == long[0].xyxy


def test_layout_sam_without_a_long_description_takes_the_short_one(tmp_path: Path) -> None:
    make_layoutsam(tmp_path)
    parquet(tmp_path / "train" / "sa_000000_train.parquet", layout_sam_row(detail_description=None))
    (record,) = read_format("layoutsam", tmp_path, detailed=True).records
    assert record.layout.boxes[0].phrase == PHRASE


def test_images_in_a_file_keep_apart_and_go_with_the_set(tmp_path: Path) -> None:
    colours = ["red", "blue", "green"]
    rows = []
    for colour in colours:
        Image.new("RGB", (40, 20), colour).save(tmp_path / "x.png")
        rows.append(layout_sam_eval_row(tmp_path, image={"bytes": (tmp_path / "x.png").read_bytes(), "path": None}))
    found = read_format("layoutsam-eval", parquet(tmp_path / "test.parquet", *rows))  # all have one id
    pixels = [record.load().getpixel((0, 0)) for record in found.records]
    assert pixels == [Image.new("RGB", (1, 1), colour).getpixel((0, 0)) for colour in colours]
    image = found.records[0].image
    assert image.exists()
    del found
    gc.collect()
    assert not image.exists()


def test_coco_mig_wants_cocos_images(tmp_path: Path) -> None:
    MAKERS["cocomig"](tmp_path)
    with pytest.raises(InputError, match="layouts and no images") as caught:
        read_format("cocomig", tmp_path)
    assert "--images" in str(caught.value)
    (tmp_path / "val2017").rename(tmp_path / "val2014")
    (tmp_path / "val2014" / "000000000139.jpg").rename(tmp_path / "val2014" / "COCO_val2014_000000000139.jpg")
    assert len(read_format("cocomig", tmp_path, images=tmp_path / "val2014").records) == 1


def test_hico_objects_and_flat_boxes(tmp_path: Path) -> None:
    MAKERS["hico"](tmp_path)
    keys = ("base_info", "caption", "obj_nums", "img_size", "path_img", "list_bbox_info", "crop_location")
    write(tmp_path / "hico.json", [dict(zip(keys, hico_entry([PHRASE, 10, 4, 30, 16]), strict=True))])
    assert only_box("hico", tmp_path / "hico.json") == pytest.approx(BOX)


def test_instance_diffusion_lists_and_images_beside(tmp_path: Path) -> None:
    make_image(tmp_path / "images" / "two.png")
    write(tmp_path / "two.json", instances())
    write(tmp_path / "three.json", "{")
    listing = write(tmp_path / "train.txt", "elsewhere/two.json\n\n")
    assert only_box("instancediffusion", listing, images=tmp_path / "images") == pytest.approx(BOX)
    write(tmp_path / "train.txt", "two.json\nfour.json\n")
    with pytest.raises(InputError, match=r"names 'four.json'"):
        read_format("instancediffusion", listing, images=tmp_path / "images")


def test_sacap_takes_the_mask_where_there_is_no_box(tmp_path: Path) -> None:
    MAKERS["sacap"](tmp_path)
    mask = {"size": [20, 40], "counts": [10 * 20 + 4, *([12, 8] * 19), 12, 4 + 10 * 20]}
    data = {"image": {"width": 40, "height": 20}, "annotations": [{"id": 91, "segmentation": mask}]}
    write(tmp_path / "sa_000000" / "sa_1.json", data)
    assert only_box("sacap", tmp_path) == pytest.approx(BOX)


def test_flickr30k_splits_and_phrases_of_several_boxes(tmp_path: Path) -> None:
    MAKERS["flickr30k"](tmp_path)
    path = tmp_path / "Annotations" / "36979.xml"
    again = flickr_xml().replace("<annotation>", "").replace("</annotation>", "")
    write(path, flickr_xml().replace("</annotation>", f"{again}</annotation>"))
    found = read_format("flickr30k", tmp_path, split="train")
    assert [box.phrase for box in found.records[0].layout.boxes] == [PHRASE, PHRASE]
    assert found.left_out == {"phrases without a box": 1}
    with pytest.raises(InputError, match=r"has no val.txt"):
        read_format("flickr30k", tmp_path, split="val")


def test_stale_paths_and_two_images_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        make_image(tmp_path / folder / "x.png")
    for said in ("/old/disk/b/x.png", "C:\\old\\b\\x.png", "b/x.png"):
        assert ImageFinder(tmp_path).find(said, "here") == tmp_path / "b" / "x.png"
    with pytest.raises(InputError, match=r"here: its image 'x.png' exists 2 times"):
        ImageFinder(tmp_path).find("c/x.png", "here")
    make_image(tmp_path / "outside.png")
    for said in ("../outside.png", "\0", "x" * 5000, ""):
        with pytest.raises(MissingImageError):
            ImageFinder(tmp_path / "a").find(said, "here")


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_layoutsam(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match="needs pyarrow") as caught:
        read_format("layoutsam", tmp_path)
    assert "--extra formats" in str(caught.value)


def test_only_formats_with_a_writer_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_yolo(tmp_path / "src")
    for to, says in (("grit", "is read, not written"), ("yoll", "did you mean 'yolo'?")):
        argv = ["data", "convert", "--from", "yolo", str(tmp_path / "src"), "--out", str(tmp_path / "out"), "--to", to]
        assert main(argv) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    image = make_image(tmp_path / "s.png")
    twice = [("a.png", image, Layout("one", (Box(BOX, "x"),))), ("a.png", image, Layout("two", (Box(BOX, "x"),)))]
    for name in ("voc", "yolo", "simpletuner"):
        with pytest.raises(InputError, match="one layout an image"):
            write_format(name, tmp_path / "out", {"": twice})
    thin = [("a.png", image, Layout("thin", (Box((0.5, 0, 0.51, 1), "x"),)))]
    with pytest.raises(InputError, match="too small for VOC"):
        write_format("voc", tmp_path / "out", {"": thin})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.png"]
    write_format("coco", tmp_path / "out", {"": [*twice, *thin]})
    assert [r.layout.caption for r in read_format("coco", tmp_path / "out").records] == ["one", "two", "thin"]


def test_a_convention_that_nobody_declared_is_not_guessed(tmp_path: Path) -> None:
    boxes_ = [[4.0 * n, 2.0, 12.0, 9.0] for n in range(8)]
    rows = hf_row(tmp_path, objects=[{"bbox": box, "phrase": "a ball"} for box in boxes_])
    path = hf_parquet(tmp_path / "train.parquet", rows)
    with pytest.raises(InputError, match=r"Of 8 boxes, each reading makes wrong: xywh pixel 0%, xywh permille 0%, "):
        read_format("hf", path)
    found = read_format("hf", path, bbox_format="xywh", bbox_units="pixel")
    assert found.records[0].layout.boxes[1] == Box((0.1, 0.1, 0.4, 0.55), "a ball")


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("coco", {"bbox_format": "xyxy"}),
        ("coco", {"detailed": True}),
        ("jsonl", {"split": "train"}),
        ("jsonl", {"images": Path()}),
        ("eligen", {"split": "train"}),
        ("gligen", {"images": Path()}),
    ],
)
def test_options_that_mean_nothing_are_refused(name: str, option: dict[str, Any], tmp_path: Path) -> None:
    MAKERS[name](tmp_path)
    with pytest.raises(InputError, match=f"means nothing for {name}"):
        read_format(name, source(name, tmp_path), **option)


def test_a_single_file_has_no_splits(tmp_path: Path) -> None:
    make_layoutsam(tmp_path)
    with pytest.raises(InputError, match="has no splits"):
        read_format("layoutsam", tmp_path / "train" / "sa_000000_train.parquet", split="train")
    assert len(read_format("layoutsam", tmp_path, split="train").records) == 1
    with pytest.raises(InputError, match="'val'"):
        read_format("layoutsam", tmp_path, split="val")


def test_the_table_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "formats"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == format_table()
    assert all(f"| `{name}` |" in printed for name in FORMATS)
    assert set(run(capsys, "data", "formats")) == set(FORMATS)
    readme = Path(__file__).resolve().parent.parent / "data" / "README.md"
    assert format_table() in readme.read_text(encoding="utf-8")
