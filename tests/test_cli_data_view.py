"""`data split`, `data stats`, `data show`: what they write and say, and that they leave everything else alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mmdit_lora.cli.main import main
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.data.split import split_records
from mmdit_lora.data.stats import dataset_stats
from mmdit_lora.outputs import MARKER
from tests.data_makers import dataset, line, make_image, objects


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "set", 20)


def write_scenes(folder: Path, count: int) -> Path:
    write_dataset(folder, DOMAINS["basic"], count=count, seed=5)
    return folder


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- split ------------------------------------------------------------------------------------------------------------


def test_split_parts_a_set_and_loses_nothing(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["data", "split", str(scenes), "--out", str(out), "--share", "0.25", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"out": str(out), "by": "name", "records": 20, "train": 15, "validation": 5}
    train, validation = read_dataset(out / "train"), read_dataset(out / "validation")
    layouts = {record.image.name: record.layout for record in read_dataset(scenes)}
    assert {record.image.name: record.layout for record in train + validation} == layouts
    assert files(out) - {MARKER} == {f"{side}/{name}" for side in ("train", "validation") for name in files(out / side)}
    for record in validation:
        assert record.image.read_bytes() == (scenes / record.image.name).read_bytes()
    # The sides are those of a run's own validation_share, and the same again.
    held = {record.image.name for record in split_records(read_dataset(scenes), 0.25)[1]}
    assert {record.image.name for record in validation} == held
    assert main(["data", "split", str(scenes), "--out", str(out), "--share", "0.25"]) == 0
    assert {record.image.name for record in read_dataset(out / "validation")} == held


def test_split_keeps_sub_folders_apart_and_layouts_of_an_image_together(tmp_path: Path) -> None:
    src = tmp_path / "src"
    lines = [line(f"{folder}/{name}.png") for folder in ("x", "y") for name in "abcd"] * 2
    for entry in lines:
        make_image(src / entry["file_name"], (10 + len(files(src)), 8))
    dataset(src, *lines)
    assert main(["data", "split", str(src), "--out", str(tmp_path / "out"), "--share", "0.5"]) == 0
    sides = [
        [r.image.relative_to(tmp_path / "out" / side).as_posix() for r in read_dataset(tmp_path / "out" / side)]
        for side in ("train", "validation")
    ]
    assert sorted(sides[0] + sides[1]) == sorted(entry["file_name"] for entry in lines)
    assert not set(sides[0]) & set(sides[1])
    assert sides[0]
    assert sides[1]
    for side, names in zip(("train", "validation"), sides, strict=True):
        for name in names:
            assert (tmp_path / "out" / side / name).read_bytes() == (src / name).read_bytes()


def test_by_image_copies_stay_on_one_side_and_by_name_they_need_not(tmp_path: Path) -> None:
    src = write_scenes(tmp_path / "set", 12)
    originals = read_dataset(src)
    lines = [json.loads(text) for text in (src / "metadata.jsonl").read_text().splitlines()]
    for record, entry in zip(originals, lines.copy(), strict=True):
        Image.open(record.image).save(src / f"copy_{record.image.stem}.tif")  # other bytes, the same pixels
        lines.append(entry | {"file_name": f"copy_{record.image.stem}.tif"})
    (src / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    records = read_dataset(src)

    def torn(by: str) -> int:
        train, validation = split_records(records, 0.5, by=by)
        assert len(train) + len(validation) == 24
        stems = [{record.image.stem.removeprefix("copy_") for record in side} for side in (train, validation)]
        return len(stems[0] & stems[1])

    assert torn("image") == 0
    assert torn("name") > 0


SPLITS = {
    "share of 0": (["--share", "0"], "--share: is 0.0"),
    "share of 1": (["--share", "1"], "--share: is 1.0"),
    "share is NaN": (["--share", "nan"], "--share: is nan"),
    "by nothing known": (["--by", "size"], "--by"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_wrong_splits(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options, says = SPLITS[name]
    src = dataset(tmp_path / "src", line("a.png"), line("b.png"))
    assert main(["data", "split", str(src), "--out", str(tmp_path / "out"), *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["src", "src/train", "."])
def test_split_never_writes_over_its_source(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = dataset(tmp_path / "src", line("a.png"), line("b.png"))
    before = files(tmp_path)
    assert main(["data", "split", str(src), "--out", str(tmp_path / out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_single_image_and_copies_of_one_cannot_be_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = dataset(tmp_path / "src", line(), line()), str(tmp_path / "out")
    assert main(["data", "split", str(src), "--out", out]) == 2
    assert "single image" in capsys.readouterr().err
    shutil.copy(src / "a.png", src / "b.png")
    dataset_of_copies = src / "metadata.jsonl"
    dataset_of_copies.write_text(json.dumps(line("a.png")) + "\n" + json.dumps(line("b.png")) + "\n")
    assert main(["data", "split", str(src), "--out", out, "--by", "image"]) == 2
    assert "copies of one" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["data", "split", str(src), "--out", out]) == 0


def test_columns_that_are_not_carried_over_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = dataset(tmp_path / "src", line("a.png", licence="CC0"), line("b.png"))
    assert main(["data", "split", str(src), "--out", str(tmp_path / "out")]) == 0
    assert "warning: columns that mean nothing here were not written: licence" in capsys.readouterr().err


# --- stats ------------------------------------------------------------------------------------------------------------


def test_stats_are_right_on_a_set_that_can_be_counted_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = objects([[0, 0, 0.5, 0.5], [0, 0, 1, 1], [0, 0, 0.1, 0.1]], ["a cat", "a dog", "a cat"])
    src = dataset(tmp_path, line("a.png", objects=boxes), line("b.png", objects=objects([])), line("a.png"))
    assert main(["data", "stats", str(src), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert (found["images"], found["layouts"], found["boxes"], found["distinct_phrases"]) == (2, 3, 5, 4)
    assert found["boxes_per_layout"] == {"0": 1, "2": 1, "3": 1}
    assert (found["width"]["min"], found["width"]["median"], found["width"]["max"]) == (20, 30, 40)
    assert found["aspect"] == pytest.approx(
        {"min": 0.5, "q05": 0.575, "q25": 0.875, "median": 1.25, "q75": 1.625, "q95": 1.925, "max": 2.0}
    )
    assert found["box_area"]["median"] == pytest.approx(0.2)
    assert found["box_aspect"]["max"] == pytest.approx(2.0)
    assert found["phrases"] == {"a cat": 2, "a blue square": 1, "a dog": 1, "a red circle": 1}
    assert found["filter"]["boxes_left_out"] == {}
    assert "2 images, 3 layouts, 5 boxes" in captured.err
    assert "2x a cat" in captured.err

    rules = ["--filter", "min_area=0.05", "--filter", "include_phrases=CAT"]
    assert main(["data", "stats", str(src), *rules, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["boxes"], found["layouts"]) == (1, 2)
    assert found["filter"]["boxes_left_out"] == {"below min_area": 1, "not in include_phrases": 3}


def test_stats_read_headers_only_and_name_a_file_that_is_no_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = dataset(tmp_path, line("a.png"), line("half.png"))
    whole = (src / "a.png").read_bytes()
    (src / "half.png").write_bytes(whole[: len(whole) - 30])
    assert dataset_stats(read_dataset(src)).images == 2
    (src / "half.png").write_bytes(b"")
    assert main(["data", "stats", str(src)]) == 2
    assert "metadata.jsonl:2" in capsys.readouterr().err


FILTERS = {
    "no value": ("min_area", "min_area=0.01"),
    "unknown": ("min_aera=0.1", "did you mean 'min_area'?"),
    "out of range": ("min_area=7", "less than 1"),
    "a word": ("max_boxes=many", "integer"),
    "no YAML": ("include_phrases=[", "is not YAML"),
    "no pattern": ("include_phrases=(", "no regular expression"),
    "nothing left": ("include_phrases=zebra", "leaves none of"),
}


@pytest.mark.parametrize("verb", ["stats", "show"])
@pytest.mark.parametrize("name", FILTERS)
def test_wrong_filters(name: str, verb: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule, says = FILTERS[name]
    out = ["--out", str(tmp_path / "x.png")] if verb == "show" else []
    assert main(["data", verb, str(scenes), *out, "--filter", rule]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert "--filter" in said
    assert not list(tmp_path.iterdir())


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_draws_images_taken_evenly_from_the_set(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "sheet.png"
    assert main(["data", "show", str(scenes), "--out", str(out), "--count", "4", "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    records = read_dataset(scenes)
    assert told["shown"] == [str(records[index].image) for index in (0, 5, 10, 15)]
    assert told["layouts"] == 20
    assert "wrote 4 of 20 layouts" in captured.err
    first = out.read_bytes()
    with Image.open(out) as sheet:
        assert sheet.width > 4 * 256
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24)}
    assert (230, 159, 0) in colors, "the first box of each image is outlined in orange"
    assert main(["data", "show", str(scenes), "--out", str(out), "--count", "4"]) == 0
    assert out.read_bytes() == first
    assert files(tmp_path) == {"deep/sheet.png"}


def test_show_draws_only_what_the_filter_leaves_and_all_of_a_small_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = dataset(tmp_path / "set", line("a.png"), line("b.png", objects=objects([[0, 0, 1, 1]], ["a dog"])))
    sheets = []
    for name, rules in (("all", []), ("dogs", ["--filter", "include_phrases=dog"])):
        out = tmp_path / f"{name}.png"
        assert main(["data", "show", str(src), "--out", str(out), "--json", *rules]) == 0
        sheets.append(json.loads(capsys.readouterr().out))
    assert [len(sheet["shown"]) for sheet in sheets] == [2, 1]
    assert sheets[1]["shown"] == [str(src / "b.png")]
    assert sheets[1]["filter"]["boxes_left_out"] == {"not in include_phrases": 2}


def test_wrong_outputs_of_show(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    for out, says in (("sheet.jpg", "ends in .png"), ("folder.png", "is a folder"), ("file/x.png", "is a file")):
        assert main(["data", "show", str(scenes), "--out", str(tmp_path / out)]) == 2
        assert says in capsys.readouterr().err
    assert files(tmp_path) == {"file"}


def test_show_names_an_image_that_cannot_be_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = dataset(tmp_path / "set", line("a.png"), line("empty.png"))
    (src / "empty.png").write_bytes(b"")
    assert main(["data", "show", str(src), "--out", str(tmp_path / "x.png")]) == 2
    assert "metadata.jsonl:2" in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()
