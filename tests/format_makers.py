"""A small set of every format, made from its stated fields: one image of 40 x 20 pixels, and in it `BOX`."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data_makers import annotation, dataset, line, make_image, objects, voc

BOX = (0.25, 0.2, 0.75, 0.8)  # pixels: 10, 4, 30, 16
PHRASE = "a red ball"
CAPTION = "a red ball in the grass"


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def coco_data(**changes: Any) -> dict[str, Any]:
    right = {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 4, 20, 12], "iscrowd": 0}],
        "categories": [{"id": 3, "name": PHRASE}],
    }
    return right | changes


def make_jsonl(folder: Path) -> None:
    dataset(folder, line(caption=CAPTION, objects=objects([list(BOX)], [PHRASE])))


def make_voc(folder: Path) -> None:
    voc(folder, annotation([(PHRASE, 11, 5, 30, 16)]))


def make_coco(folder: Path) -> None:
    make_image(folder / "val" / "a.png")
    write(folder / "annotations" / "instances_val.json", coco_data())
    captions = [{"id": 1, "image_id": 7, "caption": CAPTION}, {"id": 2, "image_id": 7, "caption": "another"}]
    write(folder / "annotations" / "captions_val.json", {"annotations": captions})


def make_yolo(folder: Path) -> None:
    make_image(folder / "images" / "train" / "a.png")
    write(folder / "labels" / "train" / "a.txt", "0 0.5 0.5 0.5 0.6\n")
    write(folder / "data.yaml", f"train: images/train\nnames:\n  0: {PHRASE}\n")


OPEN_IMAGES_HEAD = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


def make_openimages(folder: Path) -> None:
    make_image(folder / "images" / "a.jpg")
    lines = "a,xclick,/m/01,1,0.25,0.75,0.2,0.8,0,0,0,0,0\n"
    write(folder / "validation-annotations-bbox.csv", OPEN_IMAGES_HEAD + lines)
    write(folder / "class-descriptions-boxable.csv", "/m/01,A red ball\n/m/02,Cat\n")


def label_studio_task(**value: Any) -> dict[str, Any]:
    shape = {"x": 25, "y": 20, "width": 50, "height": 60, "rotation": 0, "rectanglelabels": [PHRASE]} | value
    shape = {key: entry for key, entry in shape.items() if entry is not ...}
    result = {"type": "rectanglelabels", "original_width": 40, "original_height": 20, "value": shape}
    caption = {"type": "textarea", "value": {"text": [CAPTION]}}
    data = {"image": "/data/upload/1/0a1b2c3d-a.png"}
    return {
        "id": 1,
        "data": data,
        "annotations": [{"was_cancelled": True, "result": []}, {"result": [result, caption]}],
    }


def make_labelstudio(folder: Path) -> None:
    make_image(folder / "images" / "a.png")
    write(folder / "export.json", [label_studio_task()])


def cvat_text(shapes: str, size: tuple[int, int] = (40, 20)) -> str:
    image = f'<image id="0" name="sub/a.png" width="{size[0]}" height="{size[1]}">{shapes}</image>'
    return f"<annotations><version>1.1</version><meta/>{image}</annotations>"


def make_cvat(folder: Path) -> None:
    make_image(folder / "images" / "sub" / "a.png")
    box = f'<box label="{PHRASE}" xtl="10" ytl="4" xbr="30" ybr="16" occluded="0" z_order="0"/>'
    write(folder / "annotations.xml", cvat_text(box))


def make_simpletuner(folder: Path) -> None:
    make_image(folder / "a.png")
    write(folder / "a.bbox", [{"label": PHRASE, "bbox": list(BOX)}])
    write(folder / "a.txt", CAPTION)


def make_comfyui(folder: Path) -> None:
    make_image(folder / "a.png")
    entry = {"x": 10, "y": 4, "width": 20, "height": 12, "metadata": {"name": "ball", "desc": PHRASE}}
    write(folder / "a.json", [[entry]])
    write(folder / "a.txt", CAPTION)


def parquet(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def image_bytes(folder: Path) -> bytes:
    path = make_image(folder / "bytes.png")
    content = path.read_bytes()
    path.unlink()
    return content


def layout_sam_row(**changes: Any) -> dict[str, Any]:
    entry = {"bbox": [20.0, 8.0, 60.0, 32.0], "description": PHRASE, "detail_description": "a shiny red ball"} | changes
    info = {"height": 40, "width": 80, "file_name": "sa_1.jpg"}  # the image is kept at half its size
    metadata = {"global_caption": CAPTION, "image_info": info, "bbox_info": [entry]}
    return {"image_path": "sa_000000/sa_1.jpg", "metadata": metadata}


def make_layoutsam(folder: Path) -> None:
    make_image(folder / "sa_000000" / "sa_1.jpg")
    parquet(folder / "train" / "sa_000000_train.parquet", layout_sam_row())


def layout_sam_eval_row(folder: Path, **changes: Any) -> dict[str, Any]:
    right = {
        "image": {"bytes": image_bytes(folder), "path": "a.png"},
        "image_id": 5,
        "global_caption": CAPTION,
        "detail_region_captions": "['a shiny red ball']",
        "region_captions": f"['{PHRASE}']",
        "bbox_list": "[[10, 4, 30, 16]]",
        "width": 40,
        "height": 20,
        "file_name": "a.png",
    }
    return right | changes


def make_layoutsam_eval(folder: Path) -> None:
    parquet(folder / "data" / "test-00000-of-00001.parquet", layout_sam_eval_row(folder))


def dense_layout_row(**changes: Any) -> dict[str, Any]:
    entry = {"bbox": [10, 4, 30, 16], "category_name": PHRASE, "caption": "a shiny red ball"} | changes
    return {"id": "17", "prompt": CAPTION, "width": 40, "height": 20, "annos": [entry]}


def make_denselayout(folder: Path) -> None:
    make_image(folder / "images" / "17.jpg")
    write(folder / "test.jsonl", json.dumps(dense_layout_row()))


def sacap_row(**changes: Any) -> dict[str, Any]:
    entry = {"anno_id": 91, "caption": PHRASE} | changes
    return {"imagename": "sa_1.jpg", "image_group": "sa_000000", "caption": CAPTION, "segments_info": [entry]}


def make_sacap(folder: Path) -> None:
    make_image(folder / "sa_000000" / "sa_1.jpg")
    data = {"image": {"width": 40, "height": 20}, "annotations": [{"id": 91, "bbox": [10, 4, 20, 12]}]}
    write(folder / "sa_000000" / "sa_1.json", data)
    parquet(folder / "train.parquet", sacap_row())


def overlaybench_row(**changes: Any) -> dict[str, Any]:
    """BOX of an image of 40 x 40 pixels, on 1024."""
    x0, y0, x1, y1 = (1024 * v for v in BOX)
    entry = {"category": PHRASE, "bbox": [x0, y0, x1, y1], "local_prompts": "a shiny red ball"} | changes
    annotation = {"caption": CAPTION, "annotations": {"ball_1": entry}, "relations": {}, "valid_overlap": []}
    return {"image_id": "00000017", "annotation": repr(annotation)}


def make_overlaybench(folder: Path) -> None:
    make_image(folder / "images" / "00000017.png", (40, 40))
    parquet(folder / "simple.parquet", overlaybench_row())


def make_cocomig(folder: Path) -> None:
    make_image(folder / "val2017" / "000000000139.jpg")
    entry = json.dumps({PHRASE: [list(BOX)], "coco_id": 139})
    write(folder / "mig_bench_anno.yaml", f"{CAPTION}: {entry}\n")


def grit_row(**changes: Any) -> dict[str, Any]:
    chunk = [0.0, float(len(PHRASE)), *BOX, 0.9]
    return {"key": "000000012", "caption": CAPTION, "noun_chunks": [chunk], "ref_exps": [chunk]} | changes


def make_grit(folder: Path) -> None:
    make_image(folder / "00000" / "000000012.jpg")
    parquet(folder / "coyo_0_snappy.parquet", grit_row())


def hico_entry(*bbox_info: Any) -> list[Any]:
    base = {"id": 1, "width": 40, "height": 20, "f_path": "x/a.jpg"}
    info = list(bbox_info) or [[PHRASE, [10, 4, 30, 16]]]
    return [base, CAPTION, 1, {"H": 20, "W": 40}, "x/a.jpg", info, [0, 0]]


def make_hico(folder: Path) -> None:
    make_image(folder / "images" / "a.jpg")
    write(folder / "hico.json", [hico_entry()])


def instances(image: bytes | None = None, **changes: Any) -> dict[str, Any]:
    anno = {"bbox": [10, 4, 20, 12], "category_name": PHRASE, "caption": "a shiny red ball", "mask": []} | changes
    more = {} if image is None else {"image": base64.b64encode(image).decode()}
    return {"caption": CAPTION, "width": 40, "height": 20, "annos": [anno]} | more


def gligen_line(image: bytes, **changes: Any) -> str:
    anno = {"bbox": [10, 4, 20, 12], "tokens_positive": [[0, len(PHRASE)]]} | changes
    image_text = base64.b64encode(image).decode()
    data = {"data_id": 3, "image": image_text, "file_name": "a.jpg", "caption": CAPTION, "annos": [anno]}
    return f"3\t{json.dumps(data)}\n"


def make_gligen(folder: Path) -> None:
    write(folder / "train-00.tsv", gligen_line(image_bytes(folder)))


def make_instancediffusion(folder: Path) -> None:
    write(folder / "one.json", instances(image_bytes(folder)))


def flickr_xml(name: str = "3", box: str = "") -> str:
    box = box or "<bndbox><xmin>11</xmin><ymin>5</ymin><xmax>30</xmax><ymax>16</ymax></bndbox>"
    scene = "<object><name>0</name><scene>1</scene><nobndbox>1</nobndbox></object>"
    return f"<annotation><filename>36979.jpg</filename>{scene}<object><name>{name}</name>{box}</object></annotation>"


def make_flickr30k(folder: Path) -> None:
    make_image(folder / "flickr30k-images" / "36979.jpg")
    sentences = f"[/EN#3/other {PHRASE}] in [/EN#0/scene the grass]\nanother sentence\n"
    write(folder / "Sentences" / "36979.txt", sentences)
    write(folder / "Annotations" / "36979.xml", flickr_xml())
    write(folder / "train.txt", "36979\n")


def eligen_row(**changes: Any) -> dict[str, Any]:
    names = {"eligen_entity_prompts": [PHRASE], "eligen_entity_masks": ["masks/0.png"]}
    return {"image": "a.jpg", "prompt": CAPTION} | names | changes


def make_eligen(folder: Path) -> None:
    make_image(folder / "a.jpg")
    mask = Image.new("L", (80, 40))  # masks may have a size of their own
    mask.paste(255, (20, 8, 60, 32))
    (folder / "masks").mkdir()
    mask.save(folder / "masks" / "0.png")
    write(folder / "metadata.json", [eligen_row()])


def hf_row(folder: Path, **changes: Any) -> dict[str, Any]:
    image = {"bytes": image_bytes(folder), "path": "a.png"}
    return {"image": image, "caption": CAPTION, "objects": {"bbox": [[10, 4, 20, 12]], "category": [1]}} | changes


def hf_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    """With the features that `datasets` stores."""
    label = {"_type": "ClassLabel", "names": ["nothing", PHRASE]}
    features = {"objects": {"_type": "Sequence", "feature": {"bbox": {}, "category": label}}}
    table = pa.Table.from_pylist(list(rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": stored}), path)
    return path


def make_hf(folder: Path) -> None:
    hf_parquet(folder / "data" / "train-00000-of-00001.parquet", hf_row(folder))


MAKERS: dict[str, Callable[[Path], None]] = {
    "jsonl": make_jsonl,
    "voc": make_voc,
    "coco": make_coco,
    "yolo": make_yolo,
    "openimages": make_openimages,
    "labelstudio": make_labelstudio,
    "cvat": make_cvat,
    "simpletuner": make_simpletuner,
    "comfyui": make_comfyui,
    "layoutsam": make_layoutsam,
    "layoutsam-eval": make_layoutsam_eval,
    "denselayout": make_denselayout,
    "sacap": make_sacap,
    "overlaybench": make_overlaybench,
    "cocomig": make_cocomig,
    "grit": make_grit,
    "hico": make_hico,
    "gligen": make_gligen,
    "instancediffusion": make_instancediffusion,
    "flickr30k": make_flickr30k,
    "eligen": make_eligen,
    "hf": make_hf,
}
# Formats that hold no caption: there it is made of the phrases.
WITHOUT_CAPTION = {"voc", "yolo", "openimages", "cvat"}
# Where the source is a file of the folder, or needs an option.
SOURCES: dict[str, str] = {"labelstudio": "export.json"}
# Subfolder of the set for --images.
IMAGES: dict[str, str] = {"cocomig": "val2017", "hico": "images", "denselayout": "images", "overlaybench": "images"}


def options(name: str, folder: Path) -> dict[str, Any]:
    if name == "hf":
        return {"bbox_format": "xywh", "bbox_units": "pixel"}
    return {"images": folder / IMAGES[name]} if name in IMAGES else {}


def source(name: str, folder: Path) -> Path:
    return folder / SOURCES.get(name, "")
