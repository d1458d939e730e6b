"""The scene generator: images are a function of (spec, seed, index), and are what their layouts say."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.data import shapes
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import (
    COLORS,
    DOMAINS,
    SHAPES,
    make_layout,
    make_scene,
    phrase_attributes,
    shape_coverage,
    write_dataset,
)
from mmdit_lora.data.sources import open_dataset
from mmdit_lora.data.split import RULE, fingerprint_records, split_records
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.training.fingerprints import first_change
from mmdit_lora.training.setup import prepare_run
from mmdit_lora.training.trainer import train

SCENES = 30
BASIC = DOMAINS["basic"]


@pytest.fixture(scope="module", params=list(DOMAINS))
def domain(request: pytest.FixtureRequest) -> tuple[shapes.SceneSpec, list[tuple[Image.Image, Layout]]]:
    spec = DOMAINS[request.param]
    return spec, [make_scene(spec, 3, index) for index in range(SCENES)]


def pixels(layout: Layout, spec: shapes.SceneSpec) -> list[tuple[float, float, float, float]]:
    return [tuple(value * spec.size for value in box.xyxy) for box in layout.boxes]  # type: ignore[misc]


def test_a_scene_is_a_function_of_spec_seed_and_index() -> None:
    image, layout = make_scene(BASIC, 1, 2)
    again, same = make_scene(BASIC, 1, 2)
    assert image.tobytes() == again.tobytes()
    assert layout == same
    for other in (make_scene(BASIC, 1, 3), make_scene(BASIC, 2, 2)):
        assert other[0].tobytes() != image.tobytes()
        assert other[1] != layout
    assert (image.mode, image.size) == ("RGB", (64, 64))


def test_every_domain_keeps_its_spec(domain: tuple[shapes.SceneSpec, list[tuple[Image.Image, Layout]]]) -> None:
    spec, scenes = domain
    counts = set()
    for _, layout in scenes:
        boxes = pixels(layout, spec)
        counts.add(len(boxes))
        for x0, y0, x1, y1 in boxes:
            width, height = x1 - x0, y1 - y0
            assert min(x0, y0) >= 0
            assert max(x1, y1) <= spec.size
            assert spec.side[0] * 0.999 <= math.sqrt(width * height) <= spec.side[1] * 1.001
            assert spec.elongation[0] * 0.999 <= max(width, height) / min(width, height) <= spec.elongation[1] * 1.001
        covered = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in boxes)
        assert covered <= spec.fill * spec.size**2 * 1.1  # the smallest side wins over the fill
        for a, b in itertools.combinations(boxes, 2):
            across, down = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
            if spec.max_overlap:
                smaller = min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
                assert max(across, 0) * max(down, 0) <= spec.max_overlap * smaller * 1.001
            else:
                assert min(across, down) <= -spec.gap * 0.999
    assert {min(counts), max(counts)} <= set(range(spec.objects[0], spec.objects[1] + 1))
    assert len(counts) >= min(3, spec.objects[1] - spec.objects[0] + 1)


def test_phrases_and_captions_say_what_is_there(
    domain: tuple[shapes.SceneSpec, list[tuple[Image.Image, Layout]]],
) -> None:
    _, scenes = domain
    seen = set()
    for _, layout in scenes:
        for box in layout.boxes:
            known = phrase_attributes(box.phrase)
            assert known is not None
            assert box.phrase == f"{'an' if known[0] == 'orange' else 'a'} {known[0]} {known[1]}"
            seen |= set(known)
        what, _, background = layout.caption.rpartition(" on a ")
        assert background in ("light background", "grey background", "dark background")
        if len(layout.boxes) <= shapes.LISTED_IN_CAPTION:
            assert what.replace(" and ", ", ").split(", ") == [box.phrase for box in layout.boxes]
        else:
            assert what == f"{shapes.NUMBER_WORDS[len(layout.boxes)]} shapes"
    assert seen == {*COLORS, *SHAPES}


@pytest.mark.parametrize(
    "phrase", ["red circle", "a red ball", "a mauve circle", "the red circle", "a big red circle", ""]
)
def test_phrases_that_are_not_ours(phrase: str) -> None:
    assert phrase_attributes(phrase) is None


def test_the_background_is_grey_and_boxes_hold_their_colour() -> None:
    for index in range(10):
        image, layout = make_scene(BASIC, 4, index)
        array = np.asarray(image).astype(int)
        outside = np.ones(array.shape[:2], bool)
        for box, (x0, y0, x1, y1) in zip(layout.boxes, pixels(layout, BASIC), strict=True):
            outside[int(y0) : math.ceil(y1), int(x0) : math.ceil(x1)] = False
            color, _ = phrase_attributes(box.phrase) or ("", "")
            # Every shape covers a point a little below the middle of its box.
            assert tuple(array[int(y0 * 0.45 + y1 * 0.55), int((x0 + x1) / 2)]) == COLORS[color]
        assert np.ptp(array[outside], axis=1).max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_ink_touches_all_four_sides(shape: str) -> None:
    rng = np.random.default_rng(0)
    for ratio in (0.25, 0.5, 1.0, 2.0, 4.0):
        for _ in range(6):
            width, height = 14 * math.sqrt(ratio), 14 / math.sqrt(ratio)
            x0, y0 = rng.uniform(1, 63 - width), rng.uniform(1, 63 - height)
            ink = shape_coverage(shape, (x0, y0, x0 + width, y0 + height), 64)
            assert 0 <= ink.min() <= ink.max() == 1
            columns, rows = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
            # To within a pixel: the pixel that holds the side, or the next one where a tip is thinner than can be seen.
            for first, last, low, high in (
                (columns[0], columns[-1], x0, x0 + width),
                (rows[0], rows[-1], y0, y0 + height),
            ):
                assert int(low) <= first <= int(low) + 1
                assert math.ceil(high) - 2 <= last <= math.ceil(high) - 1


def test_shapes_have_their_areas_and_may_leave_the_image() -> None:
    areas = {"circle": math.pi / 4, "square": 1, "triangle": 1 / 2, "diamond": 1 / 2, "cross": 5 / 9}
    for shape in SHAPES:
        whole = shape_coverage(shape, (8, 4, 56, 60), 64)
        assert whole.sum() == pytest.approx(areas[shape] * 48 * 56, rel=0.02)
        moved = shape_coverage(shape, (-24, 4, 24, 60), 64)
        np.testing.assert_array_equal(moved[:, :24], whole[:, 32:56])
        assert not shape_coverage(shape, (70, 70, 80, 80), 64).any()
    with pytest.raises(ValueError, match="star"):
        shape_coverage("star", (0, 0, 8, 8), 64)


def test_a_data_set_reads_back(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", BASIC, count=3, seed=5)
    records = read_dataset(tmp_path / "d")
    assert [record.image.name for record in records] == ["000000.png", "000001.png", "000002.png"]
    for index, record in enumerate(records):
        image, layout = make_scene(BASIC, 5, index)
        assert record.load().tobytes() == image.tobytes()
        assert record.layout.caption == layout.caption
        for box, drawn in zip(record.layout.boxes, layout.boxes, strict=True):
            assert box.phrase == drawn.phrase
            assert box.xyxy == pytest.approx(drawn.xyxy, abs=1e-6)


def test_a_data_set_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path / "d", BASIC, count=1, seed=0)
    before = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}

    def failing(spec: shapes.SceneSpec, seed: int, index: int) -> tuple[Image.Image, Layout]:
        if index:
            raise RuntimeError("killed")
        return make_scene(spec, seed, index)

    monkeypatch.setattr(shapes, "make_scene", failing)
    for name in ("d", "new"):
        with pytest.raises(RuntimeError, match="killed"):
            write_dataset(tmp_path / name, BASIC, count=2, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()} == before


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    for count, seed in ((0, 0), (1, -1)):
        with pytest.raises(InputError):
            write_dataset(tmp_path / "d", BASIC, count=count, seed=seed)
    assert not list(tmp_path.iterdir())


# --- scenes as a data set ---------------------------------------------------------------------------------------------

URL = "shapes://page?count=40&seed=11"


def test_scenes_are_the_folder_that_data_make_writes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", DOMAINS["page"], count=40, seed=11)
    folder, scenes = read_dataset(tmp_path / "set"), open_dataset(URL)
    assert [r.name for r in scenes] == [r.name for r in folder]
    for ours, theirs in zip(scenes, folder, strict=True):
        assert ours.load().tobytes() == theirs.load().tobytes()
        assert ours.size() == theirs.size() == (64, 64)
        assert ours.layout.caption == theirs.layout.caption
        assert [b.phrase for b in ours.layout.boxes] == [b.phrase for b in theirs.layout.boxes]
        for mine, written in zip(ours.layout.boxes, theirs.layout.boxes, strict=True):
            assert mine.xyxy == pytest.approx(written.xyxy, abs=1e-6)
    held = [{r.name for r in split_records(records, 0.2)[1]} for records in (scenes, folder)]
    assert held[0] == held[1]
    assert len(held[0]) == 8


def test_scenes_go_through_pickle_and_are_known_by_what_they_are_made_from() -> None:
    scenes = open_dataset(URL)
    again = pickle.loads(pickle.dumps(list(scenes)))
    assert again == list(scenes)
    assert again[3].read_bytes() == scenes[3].read_bytes()
    assert make_layout(DOMAINS["page"], 11, 3) == make_scene(DOMAINS["page"], 11, 3)[1] == scenes[3].layout
    assert fingerprint_records(scenes) == fingerprint_records(again)
    assert fingerprint_records(scenes) != fingerprint_records(open_dataset(URL.replace("11", "12")))
    assert open_dataset("shapes://basic?count=1")[0].layout == make_layout(DOMAINS["basic"], 0, 0)


WRONG_URLS = {
    "shapes://pgae?count=4": "did you mean 'page'?",
    "shapes://?count=4": "no domain ''",
    "shapes://page": "does not say how many scenes",
    "shapes://page?count=0": "count: is 0",
    "shapes://page?count=many": "count: is 'many'",
    "shapes://page?count=9999999999999999999999": "count: is '9999",
    "shapes://page?count=4&seed=-1": "seed: is -1",
    "shapes://page?count=4&count=5": "gives count twice",
    "shapes://page?cuont=4": "did you mean 'count'?",
}


@pytest.mark.parametrize("url", WRONG_URLS)
def test_wrong_scenes_are_one_message(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(f"base: data/tiny_base\ndata: {{path: '{url}'}}\noutput_dir: {tmp_path / 'run'}\n")
    for argv in (["data", "check", url], ["data", "stats", url], ["train", str(config)]):
        assert main(argv) == 2
        message = capsys.readouterr().err
        assert WRONG_URLS[url] in " ".join(message.split()), argv
        assert url in message
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml"}


def test_the_verbs_that_look_at_data_look_at_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path / "set", DOMAINS["page"], count=40, seed=11)
    found = []
    for source in (URL, str(tmp_path / "set")):
        assert main(["data", "stats", source, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert main(["data", "check", source, "--out", str(tmp_path / "check"), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["ok"], report["records"], report["images"]) == (True, 40, 40)
    assert found[0]["phrases"] == found[1]["phrases"]
    assert main(["data", "show", URL, "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    assert main(["init", URL]) == 0
    assert f"path: {URL}" in capsys.readouterr().out


def test_training_on_scenes_holds_out_a_share_and_resumes(tmp_path: Path, base: Path) -> None:
    config = Config.model_validate(
        {
            "base": str(base),
            "output_dir": str(tmp_path / "run"),
            "data": {"path": URL, "validation_share": 0.2},
            "train": {"max_steps": 3, "batch_size": 4, "sample_every": 0, "checkpoint_every": 2},
        }
    )
    run = prepare_run(config)
    assert (len(run.examples.records), len(run.held_out.records if run.held_out else ())) == (32, 8)
    report = train(config).report
    assert report["images"] == 32
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 5})})
    assert train(longer, resume=True).report["steps"] == 5
    other = longer.model_copy(update={"data": config.data.model_copy(update={"path": URL.replace("11", "12")})})
    with pytest.raises(InputError, match="data is not the one that this run was started with"):
        train(other, resume=True)


def test_a_run_of_another_split_rule_is_refused_in_one_message() -> None:
    now = {"base": "b", "encoders": "e", "data": "new", "validation": "new", "split": RULE}
    before = {"base": "b", "encoders": "e", "data": "old", "validation": "old"}
    changed = first_change(before, now, location="checkpoint")
    assert changed is not None
    assert "the images that data.validation_share holds out" in changed.what
    assert "start a new one" in (changed.hint or "")
    assert first_change(before, before, location="checkpoint") is None
    assert first_change({**now, "split": "older"}, now, location="checkpoint") is None  # the same images after all


def test_a_folder_its_conversion_and_its_shards_hold_out_the_same_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, share = tmp_path / "set", "0.25"
    write_dataset(src, DOMAINS["basic"], count=24, seed=3)
    held: dict[str, set[str]] = {}
    for name, argv in {
        "split": ["data", "split", str(src), "--share", share],
        "convert": ["data", "convert", "--from", "jsonl", str(src), "--holdout", share],
    }.items():
        assert main([*argv, "--out", str(tmp_path / name)]) == 0
        held[name] = {r.image.stem for r in read_dataset(tmp_path / name / "validation")}
    assert main(["data", "convert", "--from", "jsonl", str(src), "--to", "yolo", "--out", str(tmp_path / "yolo")]) == 0
    back = [
        "data",
        "convert",
        "--from",
        "yolo",
        str(tmp_path / "yolo"),
        "--holdout",
        share,
        "--out",
        str(tmp_path / "b"),
    ]
    assert main(back) == 0
    held["yolo"] = {r.image.stem for r in read_dataset(tmp_path / "b" / "validation")}
    assert main(["data", "shard", str(src), "--out", str(tmp_path / "shards"), "--size", "20kB"]) == 0
    (tmp_path / "renamed").mkdir()
    for shard in (tmp_path / "shards").glob("*.tar"):  # without the index, which is made anew
        shutil.copy(shard, tmp_path / "renamed" / shard.name)
    stem_of = {r.read_bytes(): r.image.stem for r in read_dataset(src)}
    for name, path in {
        "folder": src,
        "shards": tmp_path / "shards",
        "shards without index": tmp_path / "renamed",
    }.items():
        held[name] = {stem_of[r.read_bytes()] for r in split_records(open_dataset(path), float(share))[1]}
    capsys.readouterr()
    assert len(held["folder"]) == 6
    assert all(names == held["folder"] for names in held.values()), held


def test_the_quickstarts_config_names_its_scenes() -> None:
    config = load_config("configs/quickstart.yaml")
    assert config.data.path == "shapes://page?count=2000&seed=11"
    assert config.data.validation == "shapes://page?count=96&seed=12"
