"""Figures of images against layouts: computed by hand, against other implementations, repeated, killed and gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import main
from mmdit_lora.data.records import write_dataset
from mmdit_lora.data.shapes import COLORS, shape_coverage
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.cache import DetectionCache
from mmdit_lora.evaluation.detectors import Detection, open_detector
from mmdit_lora.evaluation.intervals import Bootstrap, ratio
from mmdit_lora.evaluation.metrics import (
    average_precision,
    box_groups,
    image_groups,
    kept_relations,
    match_images,
    metric_sums,
)
from mmdit_lora.layout import Box, Layout

ROOT = Path(__file__).resolve().parent.parent
SIDE = 128  # pixels of a planted image
# Four squares of 32 px, a corner each: centres 64 px apart along both axes or one.
CORNERS = ((16, 16), (80, 16), (16, 80), (80, 80))
SQUARES = tuple(zip(CORNERS, ("red", "blue", "green", "yellow"), strict=True))


def drawn(squares: Sequence[tuple[tuple[float, float], str]], side: float = 32) -> Image.Image:
    canvas = np.full((SIDE, SIDE, 3), 128.0)
    for (x, y), color in squares:
        ink = shape_coverage("square", (x, y, x + side, y + side), SIDE)[..., None]
        canvas = canvas * (1 - ink) + np.array(COLORS[color]) * ink
    return Image.fromarray(np.round(canvas).astype(np.uint8))


def layout_of(squares: Sequence[tuple[tuple[float, float], str]], side: float = 32) -> Layout:
    boxes = [
        Box((x / SIDE, y / SIDE, (x + side) / SIDE, (y + side) / SIDE), f"a {color} square")
        for (x, y), color in squares
    ]
    return Layout("four squares", tuple(boxes))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of the four squares."""
    folder = tmp_path_factory.mktemp("squares") / "data"
    write_dataset(folder, [(f"{n}.png", drawn(SQUARES), layout_of(SQUARES)) for n in range(10)])
    return folder


def of_images(data: Path, images: Sequence[Image.Image], folder: Path) -> dict[str, Any]:
    """What `evaluate --images` says of them."""
    shown = folder / "images"
    shown.mkdir(parents=True)
    for number, image in enumerate(images):
        image.save(shown / f"{number}.png")
    assert main(["evaluate", "--images", str(shown), "--data", str(data), "--out", str(folder / "out")]) == 0
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    assert "base" not in report  # nothing was painted
    assert not (folder / "out" / "images").exists()
    return report


def test_planted_faults_move_the_figures_as_computed_by_hand(squares: Path, tmp_path: Path) -> None:
    good = drawn(SQUARES)
    shifted = drawn([((x + 3.2, y), color) for (x, y), color in SQUARES])  # by 10 % of the side: IoU 0.9 / 1.1
    swapped = drawn(list(zip(CORNERS, ("blue", "red", "green", "yellow"), strict=True)))
    missing = drawn(SQUARES[:3])
    right = of_images(squares, [good] * 10, tmp_path / "right")["images"]
    assert right["miou"] > 0.99
    for name in ("iou50", "color_acc", "shape_acc", "precision", "count_acc", "relations", "ap50"):
        assert right[name] == 1
    assert right["count_error"] == 0

    moved = of_images(squares, [shifted] * 10, tmp_path / "shifted")["images"]
    assert moved["miou"] == pytest.approx(0.9 / 1.1, abs=0.01)
    assert {moved[name] for name in ("iou50", "color_acc", "shape_acc", "precision", "count_acc", "relations")} == {1}
    assert moved["ap50"] == 1
    # Of ten thresholds from 0.50 to 0.95, those up to 0.80 are passed: seven.
    assert moved["ap"] == pytest.approx(0.7, abs=1e-6)

    colors = of_images(squares, [swapped] * 5 + [good] * 5, tmp_path / "swapped")["images"]
    assert colors["color_acc"] == pytest.approx(1 - 10 / 40)  # two of four boxes in half the images
    assert colors["miou"] == pytest.approx(right["miou"], abs=0.003)
    assert {colors[name] for name in ("iou50", "shape_acc", "count_acc", "relations")} == {1}

    less = of_images(squares, [missing] * 4 + [good] * 6, tmp_path / "missing")["images"]
    for name in ("iou50", "color_acc", "shape_acc"):
        assert less[name] == pytest.approx(36 / 40)
    assert less["miou"] == pytest.approx(right["miou"] * 36 / 40, abs=0.003)
    assert less["precision"] == 1
    assert less["count_acc"] == pytest.approx(0.6)
    assert less["count_error"] == pytest.approx(0.4)
    # Each image has 2 + 2 pairs along each axis, 8 in all; the missing square is in 4 of them.
    assert less["relations"] == pytest.approx(1 - 4 * 4 / 80)


def test_the_data_sets_own_images_are_the_ceiling_and_those_of_others_the_floor(squares: Path, tmp_path: Path) -> None:
    report = of_images(squares, [drawn(SQUARES)] * 10, tmp_path)
    assert report["ground_truth"] == report["images"]
    assert report["shuffled"]["miou"] == report["ground_truth"]["miou"]  # ten times one layout: nothing to shuffle
    tested = report["detector"]
    assert tested["true"]["precision"] == tested["true"]["recall"] == 1
    assert tested["margin"] == 0
    assert tested["verdict"] == "useless"  # by these layouts nobody can tell


def test_relations_are_counted_by_hand() -> None:
    layout = Layout("", (Box((0.0, 0.0, 0.2, 0.2), "a red square"), Box((0.5, 0.02, 0.7, 0.22), "a blue square")))
    detector = open_detector()
    seen = [Detection(box.xyxy, "", color=box.phrase.split()[1], shape="square") for box in layout.boxes]
    (image,) = match_images(detector, [seen], [layout])
    assert kept_relations(image) == (1, 1)  # side by side; 0.02 apart in height is no order
    there = [replace(seen[0], xyxy=(0.15, 0.0, 0.35, 0.2)), replace(seen[1], xyxy=(0.5, 0.02, 0.7, 0.22))]
    assert kept_relations(match_images(detector, [there], [layout])[0]) == (1, 1)
    assert kept_relations(match_images(detector, [seen[:1]], [layout])[0]) == (0, 1)
    assert kept_relations(match_images(detector, [[]], [layout])[0]) == (0, 1)


def random_images(detector: Any) -> Any:
    rng = np.random.default_rng(5)
    phrases = ["a red square", "a blue circle", "a green star"]
    layouts, seen = [], []
    for _ in range(12):
        corners = rng.uniform(0, 0.6, (4, 2))
        sides = rng.uniform(0.1, 0.4, (4, 2))
        names = rng.choice(phrases, 4)
        boxes = [Box((*c, *(c + s)), str(name)) for c, s, name in zip(corners, sides, names, strict=True)]
        layouts.append(Layout("", tuple(boxes)))
        things = []
        for box in boxes[:3]:
            jitter = np.clip(np.array(box.xyxy) + rng.normal(0, 0.015, 4), 0, 1)
            label = str(rng.choice(phrases)) if rng.random() < 0.2 else box.phrase
            things.append(Detection(tuple(map(float, jitter)), label, score=float(rng.random())))
        seen.append(things)
    return match_images(detector, seen, layouts)


def test_average_precision_is_that_of_torchmetrics() -> None:
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    detector = open_detector()
    images = random_images(detector)
    ours = average_precision(images, detector)
    numbers: dict[str, int] = {}
    # Its own thresholds are float32 numbers: a recall of 12/20 then misses that of 0.6.
    thresholds = {
        "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
        "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    }
    theirs = MeanAveragePrecision(box_format="xyxy", backend="pycocotools", **thresholds)
    for image in images:
        sides = []
        for boxes, labels in (
            ([d.xyxy for d in image.detections], [d.label for d in image.detections]),
            ([b.xyxy for b in image.layout.boxes], [b.phrase for b in image.layout.boxes]),
        ):
            numbered = [numbers.setdefault(label, len(numbers) + 1) for label in labels]
            sides.append({"boxes": torch.tensor(boxes) * 1000, "labels": torch.tensor(numbered)})
        sides[0]["scores"] = torch.tensor([d.score for d in image.detections])
        theirs.update([sides[0]], [sides[1]])
    expected = theirs.compute()
    assert 0.2 < ours["ap"] < 0.8
    for own, other in (("ap", "map"), ("ap50", "map_50"), ("ar_100", "mar_100")):
        assert ours[own] == pytest.approx(float(expected[other]), abs=1e-6)


def test_average_precision_by_hand() -> None:
    """Two boxes of one phrase. The surer detection is wrong, the other meets one box: precision 1/2 at recall 1/2, which COCO
    reads at 101 recalls from 0 to 1: 51 of them are at most 1/2."""
    layout = Layout("", (Box((0, 0, 0.2, 0.2), "a red square"), Box((0.5, 0.5, 0.7, 0.7), "a red square")))
    wrong = Detection((0.8, 0.0, 1.0, 0.2), "a red square", score=0.9)
    right = Detection((0, 0, 0.2, 0.2), "a red square", score=0.8)
    detector = open_detector()
    assert average_precision(match_images(detector, [[wrong, right]], [layout]), detector) == pytest.approx(
        {"ap": 0.5 * 51 / 101, "ap50": 0.5 * 51 / 101, "ar_100": 0.5}
    )


def test_a_detection_is_of_a_category_of_its_own_image() -> None:
    """Of two images, the one asks for "a dog", the other for "a black dog": the label "dog" means each's own."""

    class Plain:
        name, by_label, attributes = "plain", True, False

        def agrees(self, label: str, phrase: str) -> bool:
            return label in phrase

    box = (0.0, 0.0, 0.5, 0.5)
    layouts = [Layout("", (Box(box, phrase),)) for phrase in ("a dog", "a black dog")]
    detector: Any = Plain()
    images = match_images(detector, [[Detection(box, "dog", score=0.9)]] * 2, layouts)
    assert average_precision(images, detector) == pytest.approx({"ap": 1.0, "ap50": 1.0, "ar_100": 1.0})


def test_intervals_are_those_of_scipy() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(0)
    table = np.stack([rng.uniform(0, 1, 80) * 3, np.full(80, 3.0)], axis=1)
    low, high = Bootstrap(80).interval(table) or (0, 0)
    theirs = bootstrap(
        (table[:, 0] / 3,), np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert low == pytest.approx(theirs.low, abs=0.006)
    assert high == pytest.approx(theirs.high, abs=0.006)
    assert low < ratio(table) < high
    assert Bootstrap(80).interval(table) == (low, high)  # the same every time
    shifted = table + np.array([0.3, 0.0])
    assert Bootstrap(80).difference(shifted, table) == pytest.approx((0.1, 0.1))  # paired: nothing varies
    assert Bootstrap(1).interval(table[:1]) is None
    # Images without a box that counts say nothing, and make nothing of nothing.
    empty = np.zeros((80, 2))
    assert Bootstrap(80).interval(empty) is None
    empty[3:5] = 1
    assert Bootstrap(80).interval(empty) == (1.0, 1.0)


def test_groups() -> None:
    small, large = Box((0, 0, 0.1, 0.1), "a"), Box((0.2, 0.2, 0.9, 0.9), "b")
    covering = Box((0.2, 0.2, 0.9, 0.8), "c")
    layouts = [Layout("", (small,) * 12), Layout("", (small, large)), Layout("", (large, covering))]
    assert image_groups(layouts) == {"1-4": [1, 2], "11+": [0]}
    groups = box_groups(layouts)
    assert groups["by_size"]["under 2 %"] == [*((0, n) for n in range(12)), (1, 0)]
    assert groups["by_size"]["over 10 %"] == [(1, 1), (2, 0), (2, 1)]
    assert groups["by_overlap"]["none"] == [(1, 0), (1, 1)]
    assert (2, 0) in groups["by_overlap"]["over 0.2"]


def test_a_figure_that_a_detector_cannot_tell_is_absent() -> None:
    class Plain:
        name, by_label, attributes = "plain", True, False

        def agrees(self, label: str, phrase: str) -> bool:
            return label in phrase

    layout = Layout("", (Box((0, 0, 0.5, 0.5), "a dog"),))
    seen = [Detection((0, 0, 0.5, 0.5), "dog", score=0.9), Detection((0, 0, 1, 1), "sofa", score=0.9)]
    tables = metric_sums(match_images(Plain(), [seen], [layout]))  # type: ignore[arg-type]
    assert set(tables) == {"miou", "iou50", "precision", "count_acc", "count_error"}  # one box: no relation either
    assert ratio(tables["precision"]) == ratio(tables["count_acc"]) == 1  # nobody asked for the sofa


def test_what_was_seen_is_kept_by_content(tmp_path: Path) -> None:
    detector, kept = open_detector(), DetectionCache(tmp_path)
    image, layout = drawn(SQUARES), layout_of(SQUARES)
    first = kept.detect(detector, [image], [layout])
    assert first == detector.detect([image], [layout])
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    content[0] = content[0][:1]
    file.write_text(json.dumps(content))
    assert kept.detect(detector, [image], [layout]) == [first[0][:1]]  # read, not seen again
    changed = image.copy()
    changed.putpixel((0, 0), (0, 0, 0))
    for pixels, asked in ((changed, layout), (image, replace(layout, caption="other"))):
        assert len(kept.detect(detector, [pixels], [asked])[0]) == 4
    assert len(list(tmp_path.iterdir())) == 3


# -- painted -------------------------------------------------------------------------------------------------------------


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    return ["evaluate", "--base", str(base), "--data", str(data), "--out", str(out), "--steps", "2", *more]


def test_sides_report_and_page(base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--adapter", str(adapter), "--ablations", "--variations", "1", "--batch-size", "5"]
    assert main(command(base, data, out, *flags)) == 0
    report = json.loads((out / "report.json").read_text())
    sides = ["base", "adapter", "text_only", "layout_only", "ground_truth", "shuffled"]
    assert [key for key in report if key in sides] == sides
    for side in sides:
        for key in ("miou", "iou50", "color_acc", "shape_acc", "ap"):
            assert 0 <= report[side][key] <= 1
        low, high = report[side]["intervals"]["miou"]
        assert low <= report[side]["miou"] <= high
    assert set(report["differences"]) == {"adapter_minus_base", "text_only_minus_adapter", "layout_only_minus_adapter"}
    assert report["base"]["spread"] > 0
    assert report["detector"]["true"]["precision"] == 1
    assert sum(group["layouts"] for group in report["by_boxes"].values()) == report["layouts"] == 12
    assert sum(group["boxes"] for group in report["by_size"].values()) == report["base"]["boxes"]
    assert {path.name for path in (out / "images").iterdir()} == {
        *(side for side in sides[:4]),
        *(f"{side}_noise_2" for side in sides[:4]),
    }
    images = {
        side: [np.asarray(Image.open(out / "images" / side / f"{n:05d}.png")) for n in range(12)] for side in sides[:4]
    }
    assert not np.array_equal(images["base"], images["adapter"])
    text = (out / "report.html").read_text()
    assert 'src="http' not in text
    assert "<script" not in text
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    assert text.count("data:image/png") >= 2 * 8 * 3
    table = (out / "report.md").read_text()
    assert f"{report['adapter']['miou']:.3f}" in table
    # Again: nothing is painted, and every figure is the same to the last digit.
    before = {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")}
    assert main(command(base, data, out, *flags)) == 0
    assert json.loads((out / "report.json").read_text()) == report
    assert {path: path.stat().st_mtime_ns for path in (out / "images").rglob("*.png")} == before


def test_adapters_side_by_side(base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> dict[str, Any]:
        assert main(command(base, data, tmp_path / name, *more)) == 0
        report: dict[str, Any] = json.loads((tmp_path / name / "report.json").read_text())
        return report

    one, half = str(adapter), f"{adapter}=0.5"
    both = run("both", "--adapter", one, "--adapter", half, "--each", "--ablations")
    assert [key for key in both if key.startswith("adapter") and key != "adapters"] == ["adapter", "adapter_2"]
    names = ["adapter_minus_base", "adapter_2_minus_base", "adapter_2_minus_adapter"]
    assert list(both["differences"])[:3] == names
    for side, given in (("adapter", one), ("adapter_2", half)):
        alone = run(side, "--adapter", given)
        assert both["base"] == alone["base"]
        assert both[side] == alone["adapter"]
        shown = [tmp_path / "both" / "images" / side, tmp_path / side / "images" / "adapter"]
        mine, theirs = ([Image.open(path).tobytes() for path in sorted(f.glob("*.png"))] for f in shown)
        assert mine == theirs
    # Together: two adapters; one alone given twice would act twice, and is refused.
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    file = other / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    save_file({name: 0.5 * value for name, value in load_file(file).items()}, file, metadata=metadata)
    assert "adapter_2" not in run("together", "--adapter", one, "--adapter", str(other))
    assert main(command(base, data, tmp_path / "twice", "--adapter", one, "--adapter", half)) == 2


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        del attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        pass  # <line/>

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_from_python_as_from_the_command_line(base: Path, data: Path, adapter: Path, tmp_path: Path) -> None:
    from mmdit_lora import evaluate, load_adapter, load_pipeline

    flags = ["--adapter", str(adapter), "--adapter", f"{adapter}=0.5", "--each", "--count", "3"]
    assert main(command(base, data, tmp_path / "out", *flags)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    pipe = load_pipeline(str(base))
    for name in ("full", "weaker"):
        load_adapter(pipe.transformer, adapter, adapter_name=name, allow_same=True)
    arguments: dict[str, Any] = {"steps": 2, "count": 3, "adapters": {"full": 1.0, "weaker": 0.5}}
    found = evaluate(pipe, data, **arguments, cache_dir=tmp_path / "kept").to_dict()
    names = ("base", "adapter", "adapter_2", "ground_truth", "differences", "by_size", "layouts", "settings")
    assert json.loads(json.dumps([found[name] for name in names])) == [report[name] for name in names]
    assert evaluate(pipe, str(data), **arguments, cache_dir=tmp_path / "kept").to_dict() == found
    with pytest.raises(InputError, match=r"(weights|each) was"):
        evaluate(pipe, data, **arguments | {"adapters": ["full"]}, cache_dir=tmp_path / "kept")


def test_images_of_other_settings_are_not_mixed_in(base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(command(base, data, out)) == 0
    report = (out / "report.json").read_bytes()
    assert main(command(base, data, out, "--seed", "1")) == 2
    assert "seed was 0 and is 1" in capsys.readouterr().err
    assert (out / "report.json").read_bytes() == report
    painted = out / "images" / "base" / "00003.png"
    was = painted.read_bytes()
    Image.new("RGB", (32, 32)).save(painted)
    assert main(command(base, data, out)) == 2
    assert "00003.png: is not the image that was generated" in capsys.readouterr().err
    painted.unlink()
    assert main(command(base, data, out)) == 0
    assert painted.read_bytes() == was
    assert (out / "report.json").read_bytes() == report
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter.txt").write_text("mine")
    assert main(command(base, data, foreign)) == 2
    assert [path.name for path in foreign.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "nothing to judge"),
        (["--images", "absent"], "no such folder"),
        (["--images", "{empty}"], "no image for"),
        (["--base", "{base}", "--detector", "guess"], "no such detector"),
        (["--images", "{empty}", "--ablations"], "give --base too"),
        (["--base", "{base}", "--clip", "{empty}"], "hf download"),
    ],
)
def test_wrong_input(args: list[str], said: str, base: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = [arg.format(base=base, empty=empty) for arg in args]
    out = tmp_path / "out"
    assert main(["evaluate", "--data", str(data), "--out", str(out), *filled]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "hint: " in error
    assert not out.exists()


@pytest.mark.slow
def test_killed_halfway_it_goes_on(base: Path, data: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    flags = ["--batch-size", "1", "--steps", "20"]
    child = subprocess.Popen(
        [sys.executable, "-m", "mmdit_lora", *command(base, data, out, *flags)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    images = out / "images" / "base"
    end = time.monotonic() + 120
    while not (images.is_dir() and len(list(images.glob("0*.png"))) >= 3) and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    whole_ones = json.loads((images / "digests.json").read_text())  # the last may be without its digest
    kept = {path: path.stat().st_mtime_ns for path in images.glob("0*.png") if path.name in whole_ones}
    assert 2 <= len(kept) < 12
    assert not (out / "report.json").exists()
    assert main(command(base, data, out, *flags)) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main(command(base, data, whole, *flags)) == 0
    assert (out / "report.json").read_bytes() == (whole / "report.json").read_bytes()


# -- CLIP ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_clip(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of the real class with random weights, and its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": tokenizer.model_max_length}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    seen = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=seen | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_are_those_of_the_model_itself(squares: Path, tiny_clip: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPProcessor

    from mmdit_lora.evaluation.clip import Clip, kid

    clip = Clip(str(tiny_clip))
    image, layout = drawn(SQUARES), layout_of(SQUARES)
    tables, features = clip.score([image, image], [layout, replace(layout, caption="")])
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)

    def theirs(shown: Image.Image, text: str) -> float:
        with torch.no_grad():
            out = model(**processor(images=[shown], text=[text], return_tensors="pt", padding=True, truncation=True))
        return max(100 * float((out.image_embeds * out.text_embeds).sum()), 0)

    assert tables["clip_score"][0] == pytest.approx([theirs(image, layout.caption), 1], abs=1e-3)
    assert tables["clip_score"][1] == pytest.approx([0, 0])  # no caption: no score
    crops = [image.crop((x, y, x + 32, y + 32)) for x, y in CORNERS]
    boxes = [theirs(crop, box.phrase) for crop, box in zip(crops, layout.boxes, strict=True)]
    assert tables["clip_box"][0] == pytest.approx([sum(boxes), 4], abs=1e-2)
    assert features.shape == (2, 8)
    rng = torch.Generator().manual_seed(0)
    one, other = (torch.randn(60, 8, generator=rng) for _ in range(2))
    assert abs(kid(one, other) or 1) < (kid(one + 1, other) or 0)
    assert kid(one[:49], other) is None
    out = tmp_path / "out"
    shown = squares
    assert (
        main(["evaluate", "--images", str(shown), "--data", str(squares), "--out", str(out), "--clip", str(tiny_clip)])
        == 0
    )
    report = json.loads((out / "report.json").read_text())
    assert report["images"]["clip_box"] == pytest.approx(sum(boxes) / 4, abs=1e-2)
    assert "clip_score" in report["ground_truth"]
    assert "kid_clip" not in report["images"]  # ten images are too few
