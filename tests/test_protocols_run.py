"""Published protocols end to end: their own files, painted images, a detector and a judge; and what is refused, and where."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection
from mmdit_lora.evaluation.protocols import PROTOCOLS
from mmdit_lora.evaluation.protocols.published import KINDS, OWN, beside, published, tables
from mmdit_lora.evaluation.protocols.runner import score_protocol, write_layouts
from mmdit_lora.layout import Box, Layout, read_layouts
from mmdit_lora.visual.pages import render
from tests.detector_makers import owlv2_folder
from tests.format_makers import (
    coco_data,
    dense_layout_row,
    layout_sam_eval_row,
    overlaybench_row,
    parquet,
    write,
)


@dataclass
class Exact:
    """A detector that finds every thing where it was asked for, `short` of its width."""

    short: float = 0.0
    asked: list[list[str]] = field(default_factory=list)
    dies_after: int | None = None

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        assert len(images) == len(layouts)
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += [[box.phrase for box in layout.boxes] for layout in layouts]
        return [[self._found(*box.xyxy, box.phrase) for box in layout.boxes] for layout in layouts]

    def _found(self, x0: float, y0: float, x1: float, y1: float, phrase: str) -> Detection:
        return Detection((x0, y0, x1 - self.short * (x1 - x0), y1), phrase, 0.9)

    def fingerprint(self) -> str:
        return f"exact-{self.short}"


@dataclass
class Answers:
    """A judge that says yes but to questions with one of these words, and remembers what it was shown."""

    no: tuple[str, ...] = ()
    shown: list[tuple[tuple[int, int], list[str]]] = field(default_factory=list)

    def ask(self, images: Sequence[Image.Image], questions: Sequence[list[str]]) -> list[list[bool | None]]:
        self.shown += [(image.size, asked) for image, asked in zip(images, questions, strict=True)]
        return [[not any(word in one for word in self.no) for one in asked] for asked in questions]


def image(path: Path, size: tuple[int, int] = (80, 40), color: str = "gray") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def mig(folder: Path, count: int) -> tuple[Path, Path]:
    """The bench files of `count` prompts with two red things each, and a red image of each, as MIGC names them."""
    anno = {}
    for number in range(count):
        prompt = f"a photo of a red car and a red dog {number}"
        boxes = {"a red car": [[0.0, 0.0, 0.5, 0.5]], "a red dog": [[0.5, 0.5, 1.0, 1.0]]}
        anno[prompt] = boxes | {"coco_id": str(100 + number)}
        image(folder / "MIGC" / f"{prompt}_420_{100 + number}.png", (64, 64), "red")
        image(folder / "MIGC" / f"anno_{prompt}_420_{100 + number}.png", (64, 64), "white")
    write(folder / "bench_file" / "mig_bench_anno.yaml", json.dumps(anno))
    write(folder / "bench_file" / "mig_bench.txt", "".join(f"{prompt}\n" for prompt in anno))
    return folder / "bench_file", folder / "MIGC"


def test_coco_mig_from_its_files_to_its_report(tmp_path: Path) -> None:
    bench, images = mig(tmp_path, 3)
    detector = Exact(short=0.1)
    report = score_protocol("coco-mig", bench, images, tmp_path / "out", detector)
    # Nine tenths of each width are found, and all is red: every thing is met, with an IoU of 0.9.
    assert report["scores"] == pytest.approx(
        {"sr": 1.0, "isr": 1.0, "miou": 0.9, "sr_L2": 1.0, "isr_L2": 1.0, "miou_L2": 0.9}
    )
    assert detector.asked == [["car", "dog"]] * 3, "the nouns alone, and not of the drawn layouts"
    assert (report["cases"], report["images"], report["boxes"]) == (3, 3, 6)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    page = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"^\| this run \| 100\.00 \| 100\.00 \| 90\.00 \|", page, re.MULTILINE)
    assert re.search(r"^\| MIGC \| 27\.75 \| 66\.44 \| 56\.96 \|", page, re.MULTILINE)
    assert re.search(r"^\| miou \| 90\.00 \| 90\.00 \| mean over things", page, re.MULTILINE), "all, L2; no L3"
    html = (tmp_path / "out" / "report.html").read_text()
    assert '<tr class="own"><td>this run</td><td>100.00</td>' in html
    assert (tmp_path / "out" / "metric_mmdit_lora.json").is_file()


def test_a_wrong_colour_is_seen_in_the_pixels(tmp_path: Path) -> None:
    bench, images = mig(tmp_path, 1)
    for file in images.iterdir():
        image(file, (64, 64), "blue")
    report = score_protocol("coco-mig", bench, images, tmp_path / "out", Exact(), published=False)
    assert (report["scores"]["isr"], report["scores"]["miou"]) == (0.0, 0.0)
    assert report["published"] == []
    assert "Published" not in (tmp_path / "out" / "report.md").read_text()


def test_several_seeds_of_a_prompt_all_count(tmp_path: Path) -> None:
    bench, images = mig(tmp_path, 2)
    image(images / "another seed_421_100.png", (64, 64), "blue")
    report = score_protocol("coco-mig", bench, images, tmp_path / "out", Exact())
    assert (report["images"], report["scores"]["sr"]) == (3, pytest.approx(2 / 3))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    bench, images = mig(tmp_path, 20)
    whole = score_protocol("coco-mig", bench, images, tmp_path / "whole", Exact(short=0.2))
    with pytest.raises(KeyboardInterrupt):
        score_protocol("coco-mig", bench, images, tmp_path / "out", Exact(short=0.2, dies_after=16))
    kept = tmp_path / "out" / "seen.jsonl"
    assert not (tmp_path / "out" / "report.json").exists()
    kept.write_text(kept.read_text()[:-10])  # the last line is torn
    second = Exact(short=0.2)
    report = score_protocol("coco-mig", bench, images, tmp_path / "out", second)
    assert len(second.asked) == 20 - 15
    assert report == whole
    assert len(kept.read_text().splitlines()) == 20
    # Another detector, or another image under the same name, is looked at anew.
    other = Exact(short=0.3)
    score_protocol("coco-mig", bench, images, tmp_path / "out", other)
    assert len(other.asked) == 20
    image(next(iter(sorted(images.glob("a photo*")))), (64, 64), "blue")
    third = Exact(short=0.2)
    assert score_protocol("coco-mig", bench, images, tmp_path / "out", third)["scores"]["isr"] == pytest.approx(0.95)
    assert len(third.asked) == 1


def test_layoutsam_eval_asks_about_attributes_of_what_is_there(tmp_path: Path) -> None:
    row = layout_sam_eval_row(tmp_path, file_name="sa_1.jpg")
    row |= {
        "bbox_list": "[[10, 4, 30, 16], [0, 0, 20, 20]]",
        "region_captions": "['a ball', 'a wolf']",
        "detail_region_captions": "['a red ball', 'a grey wolf']",
    }
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", row)
    image(tmp_path / "images" / "sa_1.jpg", (80, 40))
    judge = Answers(no=('"a wolf" present', "texture"))
    report = score_protocol("layoutsam-eval", tmp_path / "data", tmp_path / "images", tmp_path / "out", judge=judge)
    assert report["scores"] == {"spatial": 0.5, "color": 0.5, "texture": 0.0, "shape": 0.5}
    # First both boxes (cut out of 80 x 40 pixels), then the attributes of the ball alone.
    assert [(size, len(asked)) for size, asked in judge.shown] == [((40, 24), 1), ((40, 40), 1), ((40, 24), 3)]
    assert (report["questions"], report["unanswered"], report["detector"]) == (5, 0, None)


def test_denselayout_asks_about_what_was_found(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", json.dumps(dense_layout_row()))
    image(tmp_path / "output" / "images_denselayout" / "17.jpg")
    image(tmp_path / "output" / "images_denselayout_with_layout" / "17.jpg")
    judge = Answers(no=("shape",))
    args = ("denselayout", tmp_path / "test.jsonl", tmp_path / "output", tmp_path / "out", Exact(short=0.25))
    report = score_protocol(*args, judge)
    assert report["scores"] == pytest.approx({"miou": 0.75, "color": 0.75, "texture": 0.75, "shape": 0.0})
    assert [size for size, _ in judge.shown] == [(30, 24)]  # three quarters of 40 x 24
    assert list(score_protocol(*args)["scores"]) == ["miou"], "without a judge"


def test_overlaybench_from_its_folders(tmp_path: Path) -> None:
    parquet(tmp_path / "data" / "simple-00000-of-00001.parquet", overlaybench_row())
    parquet(tmp_path / "data" / "hard-00000-of-00001.parquet", overlaybench_row(category="a cup"))
    for place in ("simple/seed_1", "simple/seed_2", "hard/seed_1"):
        image(tmp_path / "EXP" / place / "00000017.png", (64, 64))
    judge = Answers(no=('"ball_1"',))
    report = score_protocol("overlaybench", tmp_path / "data", tmp_path / "EXP", tmp_path / "out", Exact(), judge)
    assert report["images"] == 3
    assert report["scores"]["simple_miou"] == report["scores"]["hard_miou"] == pytest.approx(1.0, abs=0.01)
    assert report["scores"]["sr_e"] == 0.0
    assert "medium_miou" not in report["scores"]
    assert {name for name in report["results"] if "bbox" in name} == {
        f"{place}/baseline_bbox_predictions.json" for place in ("simple/seed_1", "simple/seed_2", "hard/seed_1")
    }
    assert report["published"][0]["metrics"]["simple_miou"] == 69.98


@pytest.mark.parametrize("place", ["", "seed_1", "EXP/simple/seed_1", "elsewhere/a/b"])
def test_overlaybench_images_in_one_folder(tmp_path: Path, place: str) -> None:
    parquet(tmp_path / "simple-00000-of-00001.parquet", overlaybench_row() | {"image": b"unread"})
    image(tmp_path / "painted" / place / "00000017.png", (64, 64))
    out = tmp_path / "out"
    report = score_protocol(
        "overlaybench", tmp_path / "simple-00000-of-00001.parquet", tmp_path / "painted", out, Exact()
    )
    seed = f"{Path(place).name}/" if place else ""
    assert report["results"] == [f"simple/{seed}baseline_bbox_predictions.json"]


def test_a_box_outside_the_image_is_not_asked_about(tmp_path: Path) -> None:
    row = layout_sam_eval_row(tmp_path, file_name="a.jpg")
    row |= {"bbox_list": "[[40, 4, 44, 16], [0, 0, 20, 20]]", "region_captions": "['a ball', 'a wolf']"}
    parquet(tmp_path / "test.parquet", row | {"detail_region_captions": "['a red ball', 'a grey wolf']"})
    image(tmp_path / "images" / "a.jpg")
    judge = Answers()
    args = ("layoutsam-eval", tmp_path / "test.parquet", tmp_path / "images", tmp_path / "out")
    report = score_protocol(*args, judge=judge)
    assert report["scores"]["spatial"] == 0.5, "it counts as a box, and as not there"
    assert (report["questions"], report["unanswered"]) == (5, 1)
    assert len(PROTOCOLS["layoutsam-eval"].read(args[1])[0].layout.boxes) == 1
    assert len(judge.shown) == 2


def test_coco_from_its_files(tmp_path: Path) -> None:
    boxes = [[0, 0, 20, 20], [20, 0, 20, 20]]
    annotations = [{"id": i, "image_id": 7, "category_id": 3, "bbox": b, "iscrowd": 0} for i, b in enumerate(boxes)]
    write(tmp_path / "coco" / "annotations" / "instances_val.json", coco_data(annotations=annotations))
    image(tmp_path / "images" / "a.png")
    report = score_protocol("coco", tmp_path / "coco", tmp_path / "images", tmp_path / "out", Exact())
    assert report["scores"]["ap"] == pytest.approx(1.0)
    assert "a photo of a red ball" in PROTOCOLS["coco"].read(tmp_path / "coco")[0].layout.caption


def test_layouts_out_to_sample_and_its_images_in(tmp_path: Path) -> None:
    """As `sample` names them: by number. Which is whose is told by sample.json; the last was painted another layout."""
    bench, _ = mig(tmp_path, 3)
    assert write_layouts("coco-mig", bench, tmp_path / "layouts.jsonl") == 3
    layouts = read_layouts(tmp_path / "layouts.jsonl")
    assert layouts[1].boxes[1] == Box((0.5, 0.5, 1.0, 1.0), "a red dog")
    folder = tmp_path / "sampled"
    entries = []
    for number, (layout, color) in enumerate(zip(reversed(layouts), ("red", "blue", "red"), strict=True)):
        image(folder / f"{number:04d}.png", (64, 64), color)
        image(folder / f"{number:04d}_boxes.png", (64, 64), "white")
        entries.append({"file": f"{number:04d}.png", "layout": layout.to_dict()})
    write(folder / "sample.json", {"images": entries})
    report = score_protocol("coco-mig", bench, folder, tmp_path / "out", Exact())
    assert (report["images"], report["scores"]["sr"]) == (3, pytest.approx(2 / 3))
    seen = [json.loads(line)["measured"]["0"] for line in (tmp_path / "out" / "seen.jsonl").read_text().splitlines()]
    assert seen == [1.0, 0.0, 1.0], "in the order of the benchmark"
    write(folder / "sample.json", {"images": entries[:2]})
    with pytest.raises(InputError, match=r"1 of 3 images are missing: a photo of a red car and a red dog 0_100\.png"):
        score_protocol("coco-mig", bench, folder, tmp_path / "other", Exact())


def test_missing_images_in_one_message_and_nothing_written(tmp_path: Path) -> None:
    bench, images = mig(tmp_path, 12)
    for file in sorted(images.glob("a photo*"))[1:]:
        file.unlink()
    with pytest.raises(InputError) as error:
        score_protocol("coco-mig", bench, images, tmp_path / "out", Exact())
    assert "11 of 12 images are missing: a photo of a red car and a red dog 1_101.png, " in str(error.value)
    assert str(error.value).count(".png") == 8
    assert not (tmp_path / "out").exists()


def test_two_images_where_one_counts(tmp_path: Path) -> None:
    write(tmp_path / "test.jsonl", json.dumps(dense_layout_row()))
    for name in ("a/17.jpg", "b/17.png"):
        image(tmp_path / "images" / name)
    with pytest.raises(InputError, match=r"2 images of 17 \(a/17.jpg, b/17.png\)"):
        score_protocol("denselayout", tmp_path / "test.jsonl", tmp_path / "images", tmp_path / "out", Exact())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("coco", {}, "--detector: COCO layout needs one"),
        ("layoutsam-eval", {"detector": Exact()}, "--judge: LayoutSAM-Eval needs one"),
        ("overlaybench", {}, "needs a detector or a judge"),
        ("coco-mgi", {"detector": Exact()}, "did you mean 'coco-mig'"),
    ],
)
def test_what_a_protocol_needs_is_said_before_anything_is_read(
    tmp_path: Path, name: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        score_protocol(name, tmp_path / "nowhere", tmp_path, tmp_path / "out", **given)


def _mig(folder: Path, entry: object, listing: str = "a photo\n") -> Path:
    write(folder / "mig_bench_anno.yaml", json.dumps({"a photo": entry}))
    write(folder / "mig_bench.txt", listing)
    return folder


def _overlay(folder: Path, **changes: Any) -> Path:
    row = overlaybench_row()
    annotation = eval(row["annotation"]) | changes  # our own text
    return write(folder / "simple.jsonl", "\n" + json.dumps(row | {"annotation": repr(annotation)}))


def _sam(folder: Path, **changes: Any) -> Path:
    return parquet(folder / "test.parquet", layout_sam_eval_row(folder) | changes)


def _coco(folder: Path, **changes: Any) -> Path:
    return write(folder / "instances_val.json", coco_data(**changes))


RED = {"a red car": [[0.0, 0.0, 0.5, 0.5]], "coco_id": "7"}
MALFORMED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("coco-mig", lambda d: d, "mig_bench_anno.yaml: no such file"),
    (
        "coco-mig",
        lambda d: _mig(d, RED, "a photo\nanother\n"),
        r"mig_bench.txt:2: mig_bench_anno.yaml has no prompt 'another'",
    ),
    ("coco-mig", lambda d: _mig(d, {"a red car": [[0, 0, 1, 1]]}), "prompt 0: 'coco_id' is missing"),
    ("coco-mig", lambda d: _mig(d, RED | {"a pink cup": [[0, 0, 1, 1]]}), r"a pink cup\[0\]: .*'a pink cup' is not"),
    ("coco-mig", lambda d: _mig(d, RED | {"a red cup": [[0, 0, 1]]}), r"a red cup\[0\]: the box is \[0, 0, 1\]"),
    ("coco-mig", lambda d: _mig(d, {"coco_id": "7"}), "prompt 0: has no box"),
    ("coco-mig", lambda d: write(d / "mig_bench_anno.yaml", "a: [\n"), r"mig_bench_anno.yaml:2: is not YAML"),
    (
        "overlaybench",
        lambda d: _overlay(d, valid_overlap=[{"overlap_box": [0, 1]}]),
        r"simple.jsonl:2: valid_overlap\[0\]",
    ),
    (
        "overlaybench",
        lambda d: _overlay(d, valid_overlap=None),
        "simple.jsonl:2: annotation: 'valid_overlap' is missing",
    ),
    ("overlaybench", lambda d: _overlay(d, annotations={"a": {"bbox": [0, 0, 9, 9]}}), "'a'.*: category is None"),
    ("overlaybench", lambda d: _overlay(d, relations=[1]), "simple.jsonl:2: relations is list"),
    ("overlaybench", lambda d: write(d / "simple.jsonl", "{\n"), "simple.jsonl:1: is not JSON"),
    ("overlaybench", lambda d: write(d / "simple.jsonl", ""), "holds no case"),
    ("layoutsam-eval", lambda d: _sam(d, bbox_list="[[1, 2"), "test.parquet: row 0: bbox_list: is no Python literal"),
    ("layoutsam-eval", lambda d: _sam(d, region_captions="['a', 'b']"), "row 0: 1 boxes, 2 captions"),
    ("layoutsam-eval", lambda d: _sam(d, bbox_list="[[30, 4, 10, 16]]"), r"row 0: bbox_list\[0\]: .*inverted"),
    ("layoutsam-eval", lambda d: _sam(d, width=0), "row 0: says 0 x 20 pixels"),
    ("layoutsam-eval", lambda d: d / "none", "no such folder or file"),
    (
        "denselayout",
        lambda d: write(d / "a.jsonl", json.dumps(dense_layout_row(bbox=[1]))),
        r"a.jsonl:1: annos\[0\]: the box",
    ),
    (
        "denselayout",
        lambda d: write(d / "a.jsonl", json.dumps(dense_layout_row(category_name=None))),
        "category_name is None",
    ),
    (
        "denselayout",
        lambda d: write(d / "a.json", json.dumps([dense_layout_row()] * 2)),
        r"a.json\[1\]: has the same images",
    ),
    ("coco", lambda d: _coco(d), "holds no case"),  # one box: the filter leaves it out
    ("coco", lambda d: _coco(d, images=[{"id": 7, "file_name": "a.png"}]), r"images\[0\]: 'width' is missing"),
    ("coco", lambda d: _coco(d, images=[]), r"annotations\[0\]: its image_id"),
    ("coco", lambda d: _coco(d, categories=[]), r"annotations\[0\]: category_id is 3"),
    ("coco", lambda d: write(d / "instances_val.json", "{"), "instances_val.json.*: is not JSON"),
]


@pytest.mark.parametrize(("name", "make", "message"), MALFORMED, ids=[f"{i}-{m[0]}" for i, m in enumerate(MALFORMED)])
def test_malformed_files_are_refused_with_their_place(
    tmp_path: Path, name: str, make: Callable[[Path], Path], message: str
) -> None:
    src = make(tmp_path)
    with pytest.raises(InputError) as error:
        PROTOCOLS[name].read(src)
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_published_figures(name: str) -> None:
    rows = published(name)
    assert bool(rows) == (name != "denselayout"), "no table of LGS could be verified"
    for row in rows:
        assert row.kind in KINDS
        assert row.source
        assert set(row.metrics) & set(PROTOCOLS[name].keys()), f"{row.method} has nothing that is measured here"
        shares = {key: value for key, value in row.metrics.items() if key not in ("ir", "clip", "pick", "fid")}
        assert all(1 < value <= 100 for value in shares.values()), "shares are in percent"


def test_contested_figures_are_not_quoted() -> None:
    assert 65.70 not in [value for row in published("overlaybench") for value in row.metrics.values()]


def test_tables_put_one_s_own_first(tmp_path: Path) -> None:
    row = {
        "method": "A | B",
        "metrics": {"isr": 50.0, "clip": 25.5},
        "source": "p. 3",
        "kind": "secondary",
        "note": "<x>",
    }
    file = write(tmp_path / "p.json", {"protocols": {"coco-mig": [row]}})
    rows = beside("coco-mig", {"sr": 0.1, "isr": 0.256, "isr_L2": 0.5}, path=file)
    shown: dict[str, Any] = {"title": "x", "facts": [], "notes": [], "own": OWN}
    shown["tables"] = [("", *table) for table in tables(rows)]
    assert render("report.md", **shown).splitlines()[2:] == [
        "p. 3 (secondary); &lt;x&gt;",
        "",
        "| method | isr | clip |",
        "| --- | ---: | ---: |",
        "| this run | 25.60 | - |",
        "| A \\| B | 50.00 | 25.50 |",
    ]
    page = render("protocol.html", **shown)
    assert "<tr><td>A | B</td><td>50.00</td><td>25.50</td></tr>" in page
    assert "<p>p. 3 (secondary); &lt;x&gt;</p>" in page

    def beside_own(*published: dict[str, Any]) -> str:
        rows = beside("coco-mig", {"isr": 0.256}, path=write(file, {"protocols": {"coco-mig": published}}))
        return render("report.md", **shown | {"tables": [("", *table) for table in tables(rows)]})

    other = row | {"method": "C", "note": "another subset"}
    assert beside_own(row, other).splitlines()[-1] == "| C | 50.00 | 25.50 | another subset |", (
        "two notes, each at its row"
    )
    assert beside_own(row, other | {"source": "p. 4"}).count("| this run | 25.60 | - |") == 2, "a table a source"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"protocols": {}}, "unknown key 'coco'"),
        ({"protocols": {"coco": [{"method": "A", "source": "s", "metrics": {}}]}}, r"coco\[0\]: 'kind' is missing"),
        ({"protocols": {"coco": [{"method": "A", "source": "s", "metrics": {}, "kind": "x"}]}}, "kind is 'x'"),
        (
            {"protocols": {"coco": [{"method": "A", "source": "s", "metrics": {"ap": "?"}, "kind": "primary"}]}},
            r"coco\[0\]: ap: '\?' is no finite number",
        ),
    ],
)
def test_a_malformed_table_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        published("coco", write(tmp_path / "p.json", content))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, images = mig(tmp_path, 2)
    owl = owlv2_folder(tmp_path / "owl")
    out = tmp_path / "out"
    command = ["evaluate", "--protocol", "coco-mig", "--annotations", str(bench), "--out", str(out)]
    assert main(command) == 0
    assert len(read_layouts(out / "layouts.jsonl")) == 2
    looks = ["--images", str(images), "--detector", f"owlv2:{owl}?threshold=0", "--json"]
    assert main([*command, *looks]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((out / "report.json").read_text())
    assert report["images"] == 2
    assert report["detector"] == f"owlv2:{owl}"
    assert {row["kind"] for row in report["published"]} <= set(KINDS)
    for wrong, said in (
        (["evaluate", "--protocol", "coco-mig", "--out", str(out)], "give --annotations"),
        (["evaluate", "--annotations", str(bench), "--data", str(bench), "--out", str(out)], "give --protocol"),
        ([*command, "--images", str(images), "--detector", "owlv2"], "hf download"),
        (["evaluate", "--out", str(out)], "--data"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
