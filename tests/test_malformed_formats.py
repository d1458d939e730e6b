"""Wrong sets of every format: exit code 2, one message with the file and the record, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora.cli.main import main
from mmdit_lora.data.formats import read_format
from tests.data_makers import make_image
from tests.format_makers import (
    MAKERS,
    OPEN_IMAGES_HEAD,
    PHRASE,
    coco_data,
    cvat_text,
    dense_layout_row,
    eligen_row,
    flickr_xml,
    gligen_line,
    grit_row,
    hf_parquet,
    hf_row,
    hico_entry,
    image_bytes,
    instances,
    label_studio_task,
    layout_sam_eval_row,
    layout_sam_row,
    options,
    overlaybench_row,
    parquet,
    sacap_row,
    source,
    write,
)

Spoil = Callable[[Path], object]


def coco(**changes: Any) -> Spoil:
    return lambda d: write(d / "annotations" / "instances_val.json", coco_data(**changes))


def coco_box(**changes: Any) -> Spoil:
    right = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 4, 20, 12]}
    return coco(annotations=[{key: value for key, value in (right | changes).items() if value is not ...}])


def text(name: str, content: Any) -> Spoil:
    return lambda d: write(d / name, content)


def rows(name: str, *content: dict[str, Any]) -> Spoil:
    return lambda d: parquet(d / name, *content)


def removed(name: str) -> Spoil:
    return lambda d: (d / name).unlink()


def eval_row(**changes: Any) -> Spoil:
    return lambda d: parquet(d / "data" / "test-00000-of-00001.parquet", layout_sam_eval_row(d, **changes))


def hf(**changes: Any) -> Spoil:
    return lambda d: hf_parquet(d / "data" / "train-00000-of-00001.parquet", hf_row(d, **changes))


def gligen(**changes: Any) -> Spoil:
    return lambda d: write(d / "train-00.tsv", gligen_line(image_bytes(d), **changes))


def one_instance(**changes: Any) -> Spoil:
    return lambda d: write(d / "one.json", instances(image_bytes(d), **changes))


def apart(folder: Path) -> None:
    make_image(folder / "images" / "b.jpg")
    lines = "".join(f"{name},ball,0,1,0,1\n" for name in "aba")
    write(folder / "validation-annotations-bbox.csv", f"ImageID,LabelName,XMin,XMax,YMin,YMax\n{lines}")


CVAT_BOX = '<box label="b" xtl="10" ytl="4" xbr="30" ybr="16"/>'
CASES: dict[str, tuple[str, Spoil, str, str]] = {
    # what is wrong: (format, how, the place that the message names, what it says)
    "coco: no json": ("coco", text("annotations/instances_val.json", "{"), "instances_val.json", "is not JSON"),
    "coco: a list": ("coco", text("annotations/instances_val.json", []), "instances_val.json", "not an object"),
    "coco: no images": ("coco", coco(images=None), "instances_val.json", "'images' is missing"),
    "coco: annotations is an object": ("coco", coco(annotations={}), "instances_val.json", "annotations is dict"),
    "coco: no such category": ("coco", coco_box(category_id=9), "annotations[0]", "category_id is 9"),
    "coco: a category without a name": ("coco", coco(categories=[{"id": 3}]), "categories[0]", "'name' is missing"),
    "coco: a box of three": ("coco", coco_box(bbox=[1, 2, 3]), "annotations[0]", "the box is [1, 2, 3]"),
    "coco: a word in a box": ("coco", coco_box(bbox=[1, 2, 3, "x"]), "annotations[0]", "'x' is no finite number"),
    "coco: infinity": ("coco", coco_box(bbox=[1, 2, 3, 1e999]), "instances_val.json", "Infinity"),
    "coco: a negative width": ("coco", coco_box(bbox=[9, 2, -3, 4]), "annotations[0]", "inverted as xywh"),
    "coco: xyxy taken for xywh": ("coco", coco_box(bbox=[30, 4, 38, 16]), "annotations[0]", "leaves the image of 40 x 20"),
    "coco: no box at all": ("coco", coco_box(bbox=...), "annotations[0]", "neither bbox nor segmentation"),
    "coco: no run lengths": ("coco", coco_box(bbox=..., segmentation={"size": [9]}), "annotations[0]", "the size of its mask is [9]"),
    "coco: an annotation of no image": ("coco", coco_box(image_id=8), "annotations[0]", "image_id is 8"),
    "coco: another size": ("coco", coco(images=[{"id": 7, "file_name": "a.png", "width": 4, "height": 2}]), "images[0]", "says 4 x 2"),
    "coco: no image": ("coco", removed("val/a.png"), "images[0]", "'a.png' is not below"),
    "coco: a damaged image": ("coco", text("val/a.png", "x"), "images[0]", "is no readable image"),
    "coco: captions without image_id": ("coco", text("annotations/captions_val.json", {"annotations": [{}]}), "captions_val.json: annotations[0]", "'image_id'"),
    "coco: no annotations": ("coco", removed("annotations/instances_val.json"), "src", "holds no annotations/instances"),
    "yolo: a class without a name": ("yolo", text("labels/train/a.txt", "3 .5 .5 .5 .5"), "a.txt:1", "class '3' has no name"),
    "yolo: four numbers": ("yolo", text("labels/train/a.txt", "0 .5 .5 .5 .5\n0 .5 .5 .5"), "a.txt:2", "has 3 numbers"),
    "yolo: pixels": ("yolo", text("labels/train/a.txt", "0 20 10 20 12"), "a.txt:1", "leaves the image"),
    "yolo: a negative class": ("yolo", text("labels/train/a.txt", "-1 .5 .5 .5 .5"), "a.txt:1", "class '-1'"),
    "yolo: no names": ("yolo", text("data.yaml", "train: x\n"), "data.yaml", "has no `names`"),
    "yolo: no yaml": ("yolo", text("data.yaml", "names:\n  - [a\n"), "data.yaml", "is not YAML"),
    "yolo: no names at all": ("yolo", removed("data.yaml"), "src", "names no classes"),
    "yolo: NaN": ("yolo", text("labels/train/a.txt", "0 nan .5 .5 .5"), "a.txt:1", "no finite number"),
    "open images: a code without a name": ("openimages", removed("class-descriptions-boxable.csv"), "bbox.csv:2", "'/m/01' has no name"),
    "open images: a column too few": ("openimages", text("validation-annotations-bbox.csv", OPEN_IMAGES_HEAD + "a,b\n"), "bbox.csv:2", "has 2 columns"),
    "open images: no XMax": ("openimages", text("validation-annotations-bbox.csv", "ImageID,LabelName,XMin\na,/m/01,0\n"), "bbox.csv:2", "'XMax' is missing"),
    "open images: lines apart": ("openimages", apart, "bbox.csv:4", "are apart"),
    "open images: xyxy order": ("openimages", text("validation-annotations-bbox.csv", "ImageID,LabelName,XMin,XMax,YMin,YMax\na,x,0.5,0.2,0.8,0.9\n"), "bbox.csv:2", "inverted as xxyy"),
    "label studio: no image": ("labelstudio", text("export.json", [{"data": {}, "annotations": []}]), "export.json[0]", "'image' is missing"),
    "label studio: a label missing": ("labelstudio", text("export.json", [label_studio_task(rectanglelabels=...)]), "result[0]", "has no label"),
    "label studio: no width": ("labelstudio", text("export.json", [label_studio_task(width=...)]), "result[0]", "'width' is missing"),
    "label studio: pixels": ("labelstudio", text("export.json", [label_studio_task(width=400)]), "result[0]", "leaves the image"),
    "label studio: a number": ("labelstudio", text("export.json", [3]), "export.json[0]", "is int"),
    "cvat: no xml": ("cvat", text("annotations.xml", "<annotations>"), "annotations.xml:1", "is not XML"),
    "cvat: a DTD": ("cvat", text("annotations.xml", "<!DOCTYPE x>" + cvat_text(CVAT_BOX)), "annotations.xml:1", "has a DTD"),
    "cvat: VOC": ("cvat", text("annotations.xml", "<annotation/>"), "annotations.xml", "its root is <annotation>"),
    "cvat: a video": ("cvat", text("annotations.xml", "<annotations><track/></annotations>"), "annotations.xml", "tracks"),
    "cvat: no label": ("cvat", text("annotations.xml", cvat_text(CVAT_BOX.replace("label", "lable"))), "image 0: box 0", "label is None"),
    "cvat: no xbr": ("cvat", text("annotations.xml", cvat_text(CVAT_BOX.replace("xbr", "x"))), "image 0: box 0", "xbr of <box> is None"),
    "cvat: bad points": ("cvat", text("annotations.xml", cvat_text('<polygon label="b" points="1;2"/>')), "polygon 0", "points is '1;2'"),
    "cvat: a bad rotation": ("cvat", text("annotations.xml", cvat_text(CVAT_BOX.replace("/>", ' rotation="x"/>'))), "box 0", "rotation of <box> is 'x'"),
    "simpletuner: no label": ("simpletuner", text("a.bbox", [{"bbox": [0, 0, 1, 1]}]), "a.bbox[0]", "'label' is missing"),
    "simpletuner: a broken line": ("simpletuner", text("a.bbox", '{"label": "x", "bbox": [0, 0, 1, 1]}\n{"label"'), "a.bbox:2", "is not JSON"),
    "simpletuner: pixels": ("simpletuner", text("a.bbox", [{"label": "x", "bbox": [10, 4, 30, 16]}]), "a.bbox[0]", "leaves the image"),
    "simpletuner: no names for yolo": ("simpletuner", text("a.bbox", "0 .5 .5 .5 .5"), "src", "names no classes"),
    "simpletuner: no image": ("simpletuner", removed("a.png"), "a.bbox", "has no image a.jpg"),
    "comfyui: an object": ("comfyui", text("a.json", {"x": 1}), "a.json", "not a list of boxes"),
    "comfyui: no phrase": ("comfyui", text("a.json", [{"x": 1, "y": 1, "width": 9, "height": 9}]), "a.json[0]", "the label is None"),
    "comfyui: two frames": ("comfyui", text("a.json", [[{"x": 1}], [{"x": 1}]]), "a.json", "boxes of 2 frames"),
    "layoutsam: no parquet": ("layoutsam", text("train/sa_000000_train.parquet", "x"), "sa_000000_train.parquet", "no readable parquet"),
    "layoutsam: no box": ("layoutsam", rows("train/sa_000000_train.parquet", layout_sam_row(bbox=None)), "row 0: bbox_info[0]", "'bbox' is missing"),
    "layoutsam: no description": ("layoutsam", rows("train/sa_000000_train.parquet", layout_sam_row(description=None, detail_description=None)), "row 0: bbox_info[0]", "the description is None"),
    "layoutsam: another shape": ("layoutsam", lambda d: make_image(d / "sa_000000" / "sa_1.jpg", (20, 40)), "row 0", "another shape"),
    "layoutsam: no metadata": ("layoutsam", rows("train/sa_000000_train.parquet", {"image_path": "sa_000000/sa_1.jpg"}), "row 0", "'metadata' is missing"),
    "layoutsam-eval: a call": ("layoutsam-eval", eval_row(bbox_list="__import__('os').getcwd()"), "row 0", "is no Python literal"),
    "layoutsam-eval: one box too many": ("layoutsam-eval", eval_row(bbox_list="[[0, 0, 1, 1], [0, 0, 2, 2]]"), "row 0", "2 boxes, 1 captions"),
    "layoutsam-eval: no image": ("layoutsam-eval", eval_row(image={"bytes": b"x", "path": None}), "row 0", "cannot be read"),
    "layoutsam-eval: a width of 0": ("layoutsam-eval", eval_row(width=0), "row 0", "says 0 x 20"),
    "denselayout: no annos": ("denselayout", text("test.jsonl", '{"id": "17", "prompt": "p", "width": 40, "height": 20}'), "test.jsonl:1", "'annos' is missing"),
    "denselayout: xywh": ("denselayout", text("test.jsonl", json.dumps(dense_layout_row(bbox=[30, 4, 9, 9]))), "test.jsonl:1: annos[0]", "inverted"),
    "sacap: an unknown segment": ("sacap", rows("train.parquet", sacap_row(anno_id=92)), "row 0: segments_info[0]", "anno_id 92"),
    "sacap: no json": ("sacap", removed("sa_000000/sa_1.json"), "row 0", "has no sa_1.json"),
    "cocomig: no id": ("cocomig", text("mig_bench_anno.yaml", "p: {x: [[0, 0, 1, 1]]}"), "prompt 0", "'coco_id' is missing"),
    "cocomig: pixels": ("cocomig", text("mig_bench_anno.yaml", "p: {x: [[0, 0, 9, 9]], coco_id: 139}"), "prompt 0: x[0]", "leaves the image"),
    "grit: a short chunk": ("grit", rows("coyo_0_snappy.parquet", grit_row(noun_chunks=[[0.0, 2.0, 0.1]])), "row 0: noun_chunks[0]", "a chunk is"),
    "grit: a span outside": ("grit", rows("coyo_0_snappy.parquet", grit_row(noun_chunks=[[0.0, 99.0, 0, 0, 1, 1, 1]])), "row 0: noun_chunks[0]", "span 0.0:99.0"),
    "hico: no sizes": ("hico", text("hico.json", [[{}, "c", 1, {}, "x/a.jpg", []]]), "hico.json[0]", "'W' is missing"),
    "hico: a bad box": ("hico", text("hico.json", [hico_entry(["x", 1])]), "list_bbox_info[0]", "the box is 1"),
    "gligen: a column": ("gligen", text("train-00.tsv", "3\n"), "train-00.tsv:1", "has 1 columns"),
    "gligen: no json": ("gligen", text("train-00.tsv", "3\t{\n"), "train-00.tsv:1", "is not JSON"),
    "gligen: no spans": ("gligen", gligen(tokens_positive=[]), "train-00.tsv:1: annos[0]", "tokens_positive is []"),
    "gligen: no base64": ("gligen", lambda d: write(d / "train-00.tsv", '3\t{"caption": "c", "image": "?"}\n'), "train-00.tsv:1", "no base64"),
    "instancediffusion: xyxy": ("instancediffusion", one_instance(bbox=[10, 4, 60, 16]), "one.json: annos[0]", "leaves the image"),
    "instancediffusion: no phrase": ("instancediffusion", one_instance(caption=" ", category_name=""), "annos[0]", "the description is"),
    "flickr30k: no number": ("flickr30k", text("Annotations/36979.xml", flickr_xml(box="<bndbox/>")), "36979.xml: object 2", "<xmin> is missing"),
    "flickr30k: no xml": ("flickr30k", removed("Annotations/36979.xml"), "36979.xml", "no such annotation file"),
    "eligen: a mask too few": ("eligen", text("metadata.json", [eligen_row(eligen_entity_masks=[])]), "metadata.json[0]", "1 prompts and 0 masks"),
    "eligen: no mask": ("eligen", removed("masks/0.png"), "eligen_entity_masks[0]", "is not below"),
    "eligen: a blank prompt": ("eligen", text("metadata.json", [eligen_row(eligen_entity_prompts=[""])]), "eligen_entity_prompts[0]", "the prompt is ''"),
    "hf: a class without a name": ("hf", hf(objects={"bbox": [[1, 2, 3, 4]], "category": [2]}), "row 0: objects[0]", "class 2 has no name"),
    "hf: a phrase too few": ("hf", hf(objects={"bbox": [[1, 2, 3, 4]], "category": []}), "row 0", "not as many phrases"),
    "hf: no objects": ("hf", hf(objects=None), "row 0", "'objects' is missing"),
    "hf: no parquet": ("hf", text("data/train-00000-of-00001.parquet", "x"), ".parquet", "no readable parquet"),
    "overlaybench: no literal": ("overlaybench", rows("simple.parquet", overlaybench_row() | {"annotation": "__import__('os')"}), "row 0: annotation", "no Python literal"),
    "overlaybench: a list": ("overlaybench", rows("simple.parquet", overlaybench_row() | {"annotation": "[1]"}), "row 0", "not an object"),
    "overlaybench: no caption": ("overlaybench", rows("simple.parquet", overlaybench_row() | {"annotation": "{'annotations': {}}"}), "row 0", "'caption' is missing"),
    "overlaybench: three numbers": ("overlaybench", rows("simple.parquet", overlaybench_row(bbox=[1, 2, 3])), "annotations['ball_1']", "four numbers"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["check", "convert"])
@pytest.mark.parametrize("case", CASES)
def test_wrong_records(case: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, spoil, place, says = CASES[case]
    src = tmp_path / "src"
    src.mkdir()
    if name in MAKERS:
        MAKERS[name](src)
    spoil(src)
    argv = ["data", verb, "--from", name, str(source(name, src))]
    argv += [text for key, value in options(name, src).items() for text in (f"--{key.replace('_', '-')}", str(value))]
    assert main(argv + (["--out", str(tmp_path / "out")] if verb == "convert" else [])) == 2
    printed = capsys.readouterr().err
    assert printed.count("error:") == 1
    message = printed[printed.index("error:") :]
    assert place in message
    assert says in message
    assert "Traceback" not in printed
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_there_are_many() -> None:
    assert len(CASES) >= 60
    assert {case[0] for case in CASES.values()} == set(MAKERS) - {"jsonl", "voc"}


def test_a_wrong_record_does_not_hide_the_others(tmp_path: Path) -> None:
    right, wrong = dense_layout_row(), dense_layout_row(bbox="x")
    make_image(tmp_path / "17.jpg")
    write(tmp_path / "test.jsonl", "\n".join(["{", json.dumps(wrong), json.dumps(right)]))
    found = read_format("denselayout", tmp_path, collect_errors=True)
    assert [str(error).split(": ")[0] for error in found.errors] == [f"{tmp_path}/test.jsonl:{n}" for n in (1, 2)]
    assert [record.location for record in found.records] == [f"{tmp_path}/test.jsonl:3"]
    assert found.records[0].layout.boxes[0].phrase == PHRASE
