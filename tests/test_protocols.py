"""The published protocols' formulas on cases small enough to be computed by hand; COCO's AP against pycocotools itself."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdit_lora.evaluation.protocols import PROTOCOLS, Case, Observation
from mmdit_lora.evaluation.protocols.cocomig import opencv_hsv
from tests.format_makers import parquet, write

EXACT = 1e-9


@dataclass(frozen=True)
class Det:
    """As any detector's: more fields than the protocols look at do no harm."""

    xyxy: tuple[float, float, float, float]
    label: str
    score: float = 1.0
    color: str | None = None


def mig(folder: Path) -> list[Case]:
    """Two prompts: two things in the first, three in the second. Listed in another order than the yaml's."""
    first = "a photo of a red car and a blue dog "
    second = "a photo of a green apple and a white fire hydrant and a black cup "
    anno = {
        second: {
            "a green apple": [[0.0, 0.0, 0.4, 0.4]],
            "a white fire hydrant": [[0.5, 0.0, 1.0, 0.5]],
            "a black cup": [[0.5, 0.5, 1.0, 1.0]],
            "coco_id": "99",
        },
        first: {"a red car": [[0.0, 0.0, 0.5, 0.5]], "a blue dog": [[0.5, 0.5, 1.0, 1.0]], "coco_id": "7"},
    }
    write(folder / "mig_bench_anno.yaml", json.dumps(anno))
    write(folder / "mig_bench.txt", f"{first}\n{second}\n")
    return PROTOCOLS["coco-mig"].read(folder)


MIG_SEEN = [
    # car: 0.5 x 0.4 of 0.5 x 0.5 = 0.8 and red: met, adds 0.8. dog: 0.8 too, but a tenth is blue: not met, adds 0.
    Observation([Det((0, 0, 0.5, 0.4), "car"), Det((0.5, 0.5, 1, 0.9), "dog")], measured={"0": 0.3, "1": 0.1}),
    # apple: 0.36 / 0.4 = 0.9, exactly a fifth green: met, adds 0.9. hydrant: 0.1 / 0.5 = 0.2: not met, adds 0.2 (the colour
    # does not matter below 0.5). cup: not found; another noun at its place does not count.
    Observation(
        [Det((0, 0, 0.4, 0.36), "apple"), Det((0.5, 0, 0.6, 0.5), "Fire hydrant "), Det((0.5, 0.5, 1, 1), "bowl")],
        measured={"0": 0.2, "1": 0.0, "2": 1.0},
    ),
    # The first again, of another seed: both met, adds 2. The better of two cars counts.
    Observation(
        [Det((0, 0, 0.1, 0.1), "car"), Det((0, 0, 0.5, 0.5), "car"), Det((0.5, 0.5, 1, 1), "dog")],
        measured={"0": 0.9, "1": 0.9},
    ),
]


def test_coco_mig_by_hand(tmp_path: Path) -> None:
    first, second = mig(tmp_path)
    assert [case.id for case in (first, second)] == ["7", "99"], "in the order of mig_bench.txt"
    scores = PROTOCOLS["coco-mig"].score([first, second, first], MIG_SEEN)
    expected = {
        "sr": 1 / 3,  # of three images the third
        "isr": 4 / 7,  # 1 + 1 + 2 of 2 + 3 + 2
        "miou": (0.8 + 0.0 + 0.9 + 0.2 + 0.0 + 1.0 + 1.0) / 7,
        "sr_L2": 1 / 2,
        "isr_L2": 3 / 4,
        "miou_L2": (0.8 + 0.0 + 2.0) / 4,
        "sr_L3": 0.0,
        "isr_L3": 1 / 3,
        "miou_L3": 1.1 / 3,
    }
    assert scores == pytest.approx(expected, abs=EXACT)


def test_coco_mig_counts_the_colour_of_things_in_their_place_only(tmp_path: Path) -> None:
    first, _ = mig(tmp_path)
    detections = [Det((0, 0, 0.5, 0.5), "car"), Det((0.5, 0.5, 1, 1), "dog")]
    protocol = PROTOCOLS["coco-mig"]
    right = protocol.score([first], [Observation(detections, measured={"0": 0.2, "1": 0.2})])
    wrong = protocol.score([first], [Observation(detections, measured={"0": 0.2, "1": 0.1999})])
    assert (right["sr"], right["isr"], right["miou"]) == (1.0, 1.0, 1.0)
    assert (wrong["sr"], wrong["isr"], wrong["miou"]) == (0.0, 0.5, 0.5)


def test_coco_mig_takes_the_surer_of_two_that_are_one(tmp_path: Path) -> None:
    first, _ = mig(tmp_path)
    # 0.45 / 0.5 = 0.9 of the car, and the car itself, which is less sure: they overlap by 0.9 and are one, the first. Of
    # dogs that overlap by 0.7 both count: the better.
    cars = [Det((0, 0, 0.45, 0.5), "car", 0.8), Det((0, 0, 0.5, 0.5), "car", 0.7)]
    dogs = [Det((0.5, 0.5, 0.85, 1), "dog", 0.8), Det((0.5, 0.5, 1, 1), "dog", 0.7)]
    scores = PROTOCOLS["coco-mig"].score([first], [Observation(cars + dogs, measured={"0": 1, "1": 1})])
    assert scores["miou"] == pytest.approx((0.9 + 1) / 2, abs=EXACT)


def test_coco_mig_result_file(tmp_path: Path) -> None:
    first, second = mig(tmp_path)
    (file,) = PROTOCOLS["coco-mig"].write_results([first, second, first], MIG_SEEN, tmp_path / "out")
    written = json.loads(file.read_text())
    assert file.name == "metric_mmdit_lora.json"
    assert written["sucess_ratio"] == pytest.approx(1 / 3)
    assert written["inst_level_sucess_ratio"] == [0.75, pytest.approx(1 / 3), None, None, None]
    assert set(written) == {
        "sucess_ratio",
        "success_level_ratio",
        "inst_sucess_ratio",
        "inst_level_sucess_ratio",
        "miou",
        "miou_level",
        "metric_name",
        "image_path",
    }


# RGB -> OpenCV's 8-bit HSV, from the formulas of its documentation: V = max, S = 255 (V - min) / V, H = degrees / 2.
COLORS = {
    (255, 0, 0): (0, 255, 255),
    (0, 255, 0): (60, 255, 255),
    (0, 0, 255): (120, 255, 255),
    (255, 255, 0): (30, 255, 255),
    (255, 0, 128): (165, 255, 255),  # 360 - 60 * 128 / 255 = 329.88 degrees
    (200, 100, 50): (10, 191, 200),  # 60 * 50 / 150 = 20 degrees; 255 * 150 / 200 = 191.25
    (255, 255, 255): (0, 0, 255),
    (0, 0, 0): (0, 0, 0),
    (30, 30, 30): (0, 0, 30),
}


def test_hsv_is_opencvs() -> None:
    rgb = np.array([list(COLORS)], dtype=np.uint8)
    assert opencv_hsv(rgb)[0].tolist() == [list(hsv) for hsv in COLORS.values()]


@pytest.mark.parametrize(
    ("painted", "color", "is_it"),
    [
        ((255, 0, 0), "red", True),
        ((255, 0, 128), "red", True),  # the other end of the circle
        ((0, 0, 255), "red", False),
        ((0, 0, 255), "blue", True),
        ((0, 255, 0), "green", True),
        ((255, 255, 0), "yellow", True),
        ((255, 255, 0), "green", False),
        ((200, 100, 50), "brown", True),
        ((255, 255, 255), "white", True),
        ((200, 200, 200), "white", False),
        ((30, 30, 30), "black", True),
        ((31, 31, 31), "black", False),
    ],
)
def test_a_quarter_of_the_box_has_the_colour_or_none(
    tmp_path: Path, painted: tuple[int, int, int], color: str, is_it: bool
) -> None:
    """The box is the left half of the image; a quarter of that is painted, the rest and the right half are grey."""
    anno = {"a photo": {f"a {color} car": [[0.0, 0.0, 0.5, 1.0]], "coco_id": "7"}}
    write(tmp_path / "mig_bench_anno.yaml", json.dumps(anno))
    protocol = PROTOCOLS["coco-mig"]
    (case,) = protocol.read(tmp_path)
    image = Image.new("RGB", (512, 512), (127, 127, 127))
    image.paste(painted, (0, 0, 64, 512))
    assert protocol.measure(case, image) == {"0": pytest.approx(0.25 if is_it else 0.0)}


def overlay(folder: Path, **changes: Any) -> list[Case]:
    def entry(category: str, box: list[int]) -> dict[str, Any]:
        return {"category": category, "bbox": box, "local_prompts": f"a {category} that sits"}

    annotation = {
        "caption": "two cats and a dog",
        "annotations": {
            "cat_1": entry("cat", [0, 0, 512, 512]),
            "cat_2": entry("cat", [256, 0, 768, 512]),
            "dog_1": entry("dog", [512, 256, 1024, 768]),
        },
        "relations": {"(cat_1, dog_1)": "behind", "(cat_1, cat_2)": "beside"},
        "valid_overlap": [{"overlap_box": [0, 1]}, {"overlap_box": [1, 2]}],
    } | changes
    parquet(folder / "simple-00000-of-00001.parquet", {"image_id": "000000000017", "annotation": repr(annotation)})
    return PROTOCOLS["overlaybench"].read(folder)


def on_square(category: str, *box: int) -> Det:
    x0, y0, x1, y1 = (v / 1024 for v in box)
    return Det((x0, y0, x1, y1), category)


def test_overlaybench_by_hand(tmp_path: Path) -> None:
    (case,) = overlay(tmp_path)
    # Of the cats, [256, 0, 768, 512] is cat_2 exactly (1), and [0, 0, 512, 256] the upper half of cat_1 (0.5); no dog (0).
    detections = [
        on_square("cat", 0, 0, 512, 256),
        on_square("cat", 256, 0, 768, 512),
        on_square("bird", 512, 256, 1024, 768),
    ]
    answers = {"entity: cat_1": True, "entity: cat_2": None, "entity: dog_1": False, "relation: (cat_1, dog_1)": True}
    scores = PROTOCOLS["overlaybench"].score([case], [Observation(detections, answers)])
    expected = {
        "miou": (0.5 + 1 + 0) / 3,
        # cat_1 and cat_2 meet in [256, 0, 512, 512], what was found for them in [256, 0, 512, 256]: 0.5. The dog was not
        # found: 0.
        "o_miou": (0.5 + 0) / 2,
        "sr_e": 1 / 3,
        "sr_r": 1 / 2,  # the relation without an answer is a no
    }
    assert scores == pytest.approx(expected | {f"simple_{key}": value for key, value in expected.items()}, abs=EXACT)


def test_overlaybench_pairs_greedily(tmp_path: Path) -> None:
    """The pair of the highest IoU goes first, though another pairing would have the larger sum."""

    def cat(left: int, right: int) -> dict[str, Any]:
        return {"category": "cat", "bbox": [left, 0, right, 100], "local_prompts": "a cat"}

    (case,) = overlay(
        tmp_path,
        annotations={"a": cat(0, 600), "b": cat(300, 900)},
        valid_overlap=[{"overlap_box": [0, 1]}],
    )
    # [100, 700]: 500 / 700 with a, 400 / 800 with b. [0, 300]: 300 / 600 with a, 0 with b, which it gets all the same.
    detections = [on_square("cat", 100, 0, 700, 100), on_square("cat", 0, 0, 300, 100)]
    scores = PROTOCOLS["overlaybench"].score([case], [Observation(detections)])
    assert scores["miou"] == pytest.approx((500 / 700 + 0) / 2, abs=EXACT)
    assert scores["o_miou"] == 0.0  # the asked boxes meet in [300, 600], the found ones in [100, 300]


def test_overlaybench_means_over_images_not_boxes(tmp_path: Path) -> None:
    (three,) = overlay(tmp_path / "three")
    (one,) = overlay(
        tmp_path / "one",
        annotations={"dog_1": {"category": "dog", "bbox": [0, 0, 100, 100], "local_prompts": "a dog"}},
        relations={},
        valid_overlap=[],
    )
    all_found = [on_square("dog", 0, 0, 100, 100)]
    scores = PROTOCOLS["overlaybench"].score([three, one], [Observation([]), Observation(all_found)])
    assert scores["miou"] == pytest.approx(1 / 2, abs=EXACT)  # not 1 of 4 boxes
    assert scores["o_miou"] == 0.0  # of the first alone; the second lists no overlap
    assert "sr_e" not in scores


def test_overlaybench_result_files(tmp_path: Path) -> None:
    (case,) = overlay(tmp_path)
    seen = Observation(
        [on_square("cat", 0, 0, 512, 256)], {"entity: cat_1": True}, image="simple/seed_2/000000000017.png"
    )
    files = PROTOCOLS["overlaybench"].write_results([case], [seen], tmp_path / "out")
    written = {file.relative_to(tmp_path / "out").as_posix(): json.loads(file.read_text()) for file in files}
    assert written == {
        "simple/seed_2/baseline_bbox_predictions.json": {"000000000017": {"cat": [[0, 0, 512, 256]], "dog": []}},
        "simple/seed_2/entity_VQA.json": {"000000000017": {"cat_1": "Yes", "cat_2": "No", "dog_1": "No"}},
        "simple/seed_2/relation_VQA.json": {"000000000017": {"(cat_1, dog_1)": "No", "(cat_1, cat_2)": "No"}},
    }


def dense(folder: Path) -> list[Case]:
    """An image of 100 x 200: two lamps (one described), a chair whose caption is its name, a table."""
    annos = [
        {"bbox": [0, 0, 50, 100], "category_name": "lamp", "caption": "a brass lamp"},
        {"bbox": [50, 0, 100, 100], "category_name": "lamp", "caption": "a white lamp"},
        {"bbox": [0, 100, 50, 200], "category_name": "chair", "caption": "chair"},
        {"bbox": [50, 100, 100, 200], "category_name": "table", "caption": "a round table"},
    ]
    write(folder / "test.jsonl", json.dumps({"id": 3, "prompt": "a room", "width": 100, "height": 200, "annos": annos}))
    return PROTOCOLS["denselayout"].read(folder)


DENSE_SEEN = [
    Det((0, 0, 0.5, 0.4), "lamp"),  # 0.8 with the first lamp, 0 with the second
    Det((0.5, 0, 1, 0.25), "lamp"),  # 0.5 with the second: just counts
    Det((0, 0.5, 0.5, 1), "chair"),  # 1
    Det((0.5, 0.5, 1, 0.74), "table"),  # 0.48: does not count
]


def test_denselayout_by_hand(tmp_path: Path) -> None:
    (case,) = dense(tmp_path)
    protocol = PROTOCOLS["denselayout"]
    questions = protocol.questions(case, Observation(DENSE_SEEN))
    # The chair's caption says no more than its name, and the table is below 0.5: neither is asked about.
    assert [(q.key, q.xyxy) for q in questions] == [
        *((f"0: {kind}", (0, 0, 0.5, 0.4)) for kind in ("color", "texture", "shape")),
        *((f"1: {kind}", (0.5, 0, 1, 0.25)) for kind in ("color", "texture", "shape")),
    ]
    assert questions[0].text == (
        'Is the subject in "lamp" in the image consistent with the color described in the detailed description: "a brass '
        'lamp"? Strictly answer with "Yes" or "No". If the color is not mentioned, answer "Yes".'
    )
    answers = {"0: color": True, "0: texture": False, "0: shape": True, "1: color": True, "1: texture": None}
    scores = protocol.score([case], [Observation(DENSE_SEEN, answers)])
    expected = {"miou": (0.8 + 0.5 + 1 + 0) / 4, "color": (0.8 + 0.5) / 4, "texture": 0.0, "shape": 0.8 / 4}
    assert scores == pytest.approx(expected, abs=EXACT)
    assert protocol.score([case], [Observation(DENSE_SEEN)]) == {"miou": pytest.approx(0.575)}


def test_denselayout_result_files(tmp_path: Path) -> None:
    (case,) = dense(tmp_path)
    detailed, text = PROTOCOLS["denselayout"].write_results(
        [case], [Observation(DENSE_SEEN, {"1: shape": True})], tmp_path
    )
    assert detailed.name == "lgs_score_detailed.json"
    assert json.loads(detailed.read_text()) == {
        "3.jpg": {"box_count": 4, "sum_iou": pytest.approx(2.3), "sum_color": 0, "sum_texture": 0, "sum_shape": 0.5}
    }
    lines = text.read_text().splitlines()
    assert (text.name, lines[0], lines[-1]) == (
        "lgs_score.txt",
        "dense instance score: 4 boxes",
        "\t - shape score: 0.125",
    )


def layout_sam(folder: Path) -> list[Case]:
    row = {
        "global_caption": "a ball and a dog",
        "region_captions": "['a ball', 'a dog/wolf']",
        "detail_region_captions": "['a shiny red ball', 'a grey dog/wolf']",
        "bbox_list": "[[10, 4, 30, 16], [0, 0, 33, 20]]",
        "width": 99,
        "height": 20,
        "file_name": "sa_1.jpg",
    }
    parquet(folder / "data" / "test-00000-of-00001.parquet", row, row | {"file_name": "sa_2.jpg"})
    return PROTOCOLS["layoutsam-eval"].read(folder)


def test_layoutsam_eval_asks_as_its_code_does(tmp_path: Path) -> None:
    case, _ = layout_sam(tmp_path)
    assert case.regions[0].xyxy == (0.101, 0.2, 0.303, 0.8)  # three decimals: 10 / 99 = 0.10101
    questions = {q.key: q for q in PROTOCOLS["layoutsam-eval"].questions(case)}
    assert questions["1: spatial"].text == (
        'Is the subject "a dogwolf" present in the image? Strictly answer with "Yes" or "No", without any irrelevant words.'
    )
    assert questions["1: color"].text == (
        'Is the subject in "a dogwolf" in the image consistent with the color described in the detailed description: "a grey '
        'dogwolf"? Strictly answer with "Yes" or "No", without any irrelevant words. If the color is not mentioned in the '
        'detailed description, the answer is "Yes".'
    )
    assert [questions[f"0: {kind}"].after for kind in ("spatial", "color", "texture", "shape")] == [
        None,
        *["0: spatial"] * 3,
    ]


LAYOUTSAM_SEEN = [
    Observation(
        answers={"0: spatial": True, "0: color": True, "0: texture": None, "1: spatial": True, "1: color": True}
    ),
    # Not there: its colour does not count, whatever was said of it.
    Observation(answers={"0: spatial": False, "0: color": True, "1: spatial": True, "1: shape": True}),
]


def test_layoutsam_eval_by_hand(tmp_path: Path) -> None:
    cases = layout_sam(tmp_path)
    scores = PROTOCOLS["layoutsam-eval"].score(cases, LAYOUTSAM_SEEN)
    assert scores == {"spatial": 3 / 4, "color": 2 / 4, "texture": 0.0, "shape": 1 / 4}


def test_layoutsam_eval_result_files(tmp_path: Path) -> None:
    cases = layout_sam(tmp_path)
    stats, text = PROTOCOLS["layoutsam-eval"].write_results(cases, LAYOUTSAM_SEEN, tmp_path / "out")
    assert stats.name == "minicpm-vqa.json"
    assert json.loads(stats.read_text())["sa_1.jpg"] == {
        "bbox_count": 2,
        "score_spatial": 2.0,
        "score_color": 2.0,
        "score_texture": 0.0,
        "score_shape": 0.0,
    }
    lines = text.read_text().splitlines()
    assert text.name == "minicpm-vqa-score.txt"
    assert lines[:2] == ["Total number of bbox: 4", "Total score of spatial: 3.0; Average score of spatial: 0.75"]


PERSON, DOG = 1, 18


def coco(folder: Path, images: dict[int, list[tuple[int, list[float]]]], crowd: int | None = None) -> Path:
    """An instances file of images of 100 x 200 pixels: id -> (category, xywh)."""
    annotations = [
        {
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3] / 2,
            "iscrowd": int(image == crowd),
        }
        for image, boxes in images.items()
        for category, box in boxes
    ]
    data = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 100, "height": 200} for i in images],
        "annotations": [entry | {"id": number} for number, entry in enumerate(annotations, start=1)],
        "categories": [{"id": PERSON, "name": "person"}, {"id": DOG, "name": "Dog"}],
    }
    captions = [{"id": i, "image_id": i, "caption": f"image {i}"} for i in images]
    write(folder / "captions_val2017.json", {"annotations": captions})
    return write(folder / "instances_val2017.json", data)


def test_coco_filter(tmp_path: Path) -> None:
    big, other = [0, 0, 20, 20], [50, 50, 20, 20]  # exactly 2 % of 100 x 200
    small = [0, 0, 19, 21]  # 1.995 %
    path = coco(
        tmp_path,
        {
            1: [(DOG, big), (DOG, other), (DOG, small)],  # the small one goes
            2: [(DOG, big), (DOG, small)],  # one box is left: too few
            3: [(DOG, big), (DOG, other)],  # of a crowd
            4: [(PERSON, big), (DOG, other), *[(PERSON, small)] * 3],  # four persons, before the small ones go
            5: [(PERSON, big), (DOG, other), *[(PERSON, small)] * 2],  # three
            6: [(DOG, big)] * 11,
            7: [(DOG, big)] * 10,
        },
        crowd=3,
    )
    cases = PROTOCOLS["coco"].read(path)
    assert [(case.id, len(case.regions)) for case in cases] == [("1", 2), ("5", 2), ("7", 10)]
    assert cases[0].layout.caption == "image 1"
    assert cases[0].layout.boxes[0].phrase == "dog"
    assert cases[0].regions[0].xyxy == pytest.approx((0, 0, 0.2, 0.1))


def test_coco_figures_are_pycocotools(tmp_path: Path) -> None:
    """Twelve images, detections near and far; scored from the written files with pycocotools' own loaders."""
    draw = random.Random(0)

    def box() -> list[float]:
        return [draw.uniform(0, 40), draw.uniform(0, 100), draw.uniform(25, 60), draw.uniform(25, 100)]

    images = {i: [(draw.choice((PERSON, DOG)), box()) for _ in range(draw.randint(2, 4))] for i in range(1, 13)}
    protocol = PROTOCOLS["coco"]
    cases = protocol.read(coco(tmp_path, images))
    assert len(cases) > 8
    seen = []
    for case in cases:
        detections = [Det((0.1, 0.1, 0.3, 0.4), "no category", 0.99)]
        for thing in case.regions:
            near = tuple(min(max(v + draw.gauss(0, 0.03), 0), 1) for v in thing.xyxy)
            label = draw.choice(("person", "dog", thing.label, thing.label, thing.label))
            detections.append(Det(near, label, draw.random()))  # type: ignore[arg-type]
        seen.append(Observation(detections))
    results, truth = protocol.write_results(cases, seen, tmp_path / "out")
    assert results.name == "detections_val2017_mmdit_lora_results.json"
    ground = COCO(str(truth))
    run = COCOeval(ground, ground.loadRes(str(results)), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")
    expected = {name: value for name, value in zip(names, run.stats, strict=False) if value >= 0}
    scores = protocol.score(cases, seen)
    assert scores == pytest.approx(expected, abs=EXACT)
    assert 0.1 < scores["ap"] < scores["ap50"] < 1
    assert "ap_small" not in scores or run.stats[3] >= 0
    sizes = [truth_of["bbox"][2:] for truth_of in ground.dataset["annotations"]]
    assert all(across * down >= 0.02 * 100 * 200 for across, down in sizes)


def test_coco_without_a_detection_is_nothing_and_with_the_truth_all(tmp_path: Path) -> None:
    cases = PROTOCOLS["coco"].read(coco(tmp_path, {1: [(DOG, [0, 0, 50, 100]), (PERSON, [50, 0, 50, 100])]}))
    assert PROTOCOLS["coco"].score(cases, [Observation([])])["ap"] == 0.0
    exact = Observation([Det(thing.xyxy, thing.label, 0.5) for thing in cases[0].regions])
    scores = PROTOCOLS["coco"].score(cases, [exact])
    assert (scores["ap"], scores["ar_100"]) == (pytest.approx(1), pytest.approx(1))
    swapped = Observation([Det(t.xyxy, "dog" if t.label == "person" else "person", 0.5) for t in cases[0].regions])
    assert PROTOCOLS["coco"].score(cases, [swapped])["ap"] == 0.0


@pytest.mark.parametrize("name", PROTOCOLS)
def test_as_many_cases_as_images_seen(name: str) -> None:
    with pytest.raises(ValueError, match="0 cases, but 1"):
        PROTOCOLS[name].score([], [Observation([])])
