"""What is drawn for boxes in training, the filter in front of it, and what both leave untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.config.schema import FilterSection
from mmdit_lora.data.buckets import one_size
from mmdit_lora.data.filters import crop_loss, filter_records
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.transforms import augment_boxes, names_a_side, place, prepare
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
from mmdit_lora.training.loss import Batch
from tests.data_makers import dataset, line, objects


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layout_of(count: int) -> Layout:
    return Layout("c", [Box((0.1 * i, 0.2, 0.1 * i + 0.2, 0.6), f"thing {i}") for i in range(count)])


# --- boxes ------------------------------------------------------------------------------------------------------------


def test_jitter_moves_every_side_by_at_most_its_share_and_stays_in_the_image() -> None:
    layout = layout_of(8)
    moves = []
    for seed in range(40):
        moved, silent = augment_boxes(layout, jitter=0.25, generator=generator(seed))
        assert [box.phrase for box in moved.boxes] == [box.phrase for box in layout.boxes]
        assert not any(silent)
        for old, new in zip(layout.boxes, moved.boxes, strict=True):
            sides = (old.width, old.height) * 2
            moves += [(b - a) / side for a, b, side in zip(old.xyxy, new.xyxy, sides, strict=True)]
    assert max(map(abs, moves)) <= 0.25 + 1e-9
    assert min(moves) < -0.23
    assert max(moves) > 0.23
    assert abs(sum(moves) / len(moves)) < 0.01


def test_dropout_leaves_out_its_share_and_never_all() -> None:
    layout = layout_of(8)
    kept = [len(augment_boxes(layout, dropout=0.5, generator=generator(seed))[0].boxes) for seed in range(200)]
    assert 3.7 < sum(kept) / len(kept) < 4.3
    only = [augment_boxes(layout, dropout=1.0, generator=generator(seed))[0].boxes for seed in range(60)]
    assert {len(boxes) for boxes in only} == {1}
    assert len({boxes[0].phrase for boxes in only}) == 8, "the one that stays is any of them"
    assert augment_boxes(Layout("c"), dropout=1.0, jitter=0.4, phrase_dropout=1.0) == (Layout("c"), ())


def test_phrase_dropout_marks_its_share_and_follows_the_boxes_that_stay() -> None:
    layout = layout_of(8)
    marked = [sum(augment_boxes(layout, phrase_dropout=0.25, generator=generator(seed))[1]) for seed in range(200)]
    assert 1.7 < sum(marked) / len(marked) < 2.3
    assert augment_boxes(layout, phrase_dropout=1.0)[1] == (True,) * 8
    everything, flags = augment_boxes(layout, phrase_dropout=0.5, generator=generator(5))
    fewer, fewer_flags = augment_boxes(layout, phrase_dropout=0.5, dropout=0.5, generator=generator(5))
    by_phrase = {box.phrase: flag for box, flag in zip(everything.boxes, flags, strict=True)}
    assert 0 < len(fewer.boxes) < 8
    assert [by_phrase[box.phrase] for box in fewer.boxes] == list(fewer_flags)


def test_all_switches_off_is_no_change_and_switches_do_not_shift_one_another() -> None:
    layout = layout_of(6)
    assert augment_boxes(layout, generator=generator(0)) == (layout, (False,) * 6)
    alone = augment_boxes(layout, jitter=0.2, generator=generator(1))[0]
    both = augment_boxes(layout, jitter=0.2, dropout=0.4, generator=generator(1))[0]
    assert 0 < len(both.boxes) < 6
    assert set(both.boxes) < set(alone.boxes)


@pytest.mark.parametrize(
    "text",
    ["LEFT", "to the left.", "left-hand side", "a left_eye", "the lower-left corner", "topright", "left-handed",
     "lefthand", "rightwards", "(right)", "far right", "the left's"],
)  # fmt: skip
def test_words_that_name_a_side(text: str) -> None:
    assert names_a_side(Layout(text))
    assert names_a_side(Layout("c", [Box((0, 0, 1, 1), text)]))


@pytest.mark.parametrize("text", ["leftover", "left-over food", "left-overs", "Bright", "copyright", "cleft", "rights"])
def test_words_that_name_none(text: str) -> None:
    assert not names_a_side(Layout(text, [Box((0, 0, 1, 1), text)]))


def test_random_crops_and_flips_are_those_of_earlier_versions() -> None:
    """Draws of (seed, position) must not move between versions: a run could be neither resumed nor repeated."""
    layout = Layout("c", [Box((0.4, 0.2, 0.6, 0.8), "x"), Box((0.0, 0.2, 0.3, 0.8), "y")])
    found = [
        prepare(
            Image.new("RGB", (300, 100)), layout, (64, 64), crop="random", flip=True, generator=generator(seed)
        )[1].boxes[0].xyxy
        for seed in range(6)
    ]  # fmt: skip
    assert [box[0] for box in found] == pytest.approx([0.090625, 0, 0, 0.825, 0.146875, 0], abs=1e-6)
    assert [box[2] for box in found] == pytest.approx([0.690625, 0.253125, 0.759375, 1, 1, 0.58125], abs=1e-6)
    assert place((100, 300), (64, 64)).corner == (0, 64)


# --- batches ----------------------------------------------------------------------------------------------------------


def examples(base: Path, folder: Path, stream: str = "train", **sections: dict[str, Any]) -> EncodedDataset:
    config = Config.model_validate(
        {
            "base": str(base),
            "data": {"path": str(folder)} | sections.get("data", {}),
            "train": sections.get("train", {}),
        }
    )
    encoder = LayoutEncoder(load_pipeline(str(base)))
    return EncodedDataset(read_dataset(folder), encoder, config, buckets=one_size((64, 64)), stream=stream)


def same(one: Batch, two: Batch) -> bool:
    """All but the layout."""
    names = ("x0", "noise", "t")
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in names) and all(
        torch.equal(value, two.texts[name]) for name, value in one.texts.items()
    )


def test_the_switches_change_the_layout_and_nothing_else_that_is_drawn(base: Path, data: Path) -> None:
    crops = {"crop": "random", "flip": True}
    plain = examples(base, data, data=crops)
    before = plain.batch(range(8))
    zero = examples(base, data, data=crops | {"box_jitter": 0.0}, train={"box_dropout": 0.0, "phrase_dropout": 0.0})
    untouched = zero.batch(range(8))
    assert same(before, untouched)
    assert torch.equal(before.layout.boxes, untouched.layout.boxes)
    assert torch.equal(before.layout.phrase_embeds, untouched.layout.phrase_embeds)

    switched = examples(base, data, data=crops | {"box_jitter": 0.1})
    jittered = switched.batch(range(8))
    assert same(before, jittered)
    assert torch.equal(before.layout.phrase_embeds, jittered.layout.phrase_embeds)
    assert not torch.equal(before.layout.boxes, jittered.layout.boxes)
    assert torch.allclose(before.layout.boxes, jittered.layout.boxes, atol=0.1)

    dropped = examples(base, data, data=crops, train={"box_dropout": 1.0}).batch(range(8))
    assert same(before, dropped)
    assert dropped.layout.mask.sum(1).tolist() == before.layout.mask.any(1).int().tolist()

    silent = examples(base, data, data=crops, train={"phrase_dropout": 1.0})
    emptied = silent.batch(range(8))
    assert same(before, emptied)
    assert torch.equal(before.layout.boxes, emptied.layout.boxes)
    empty = silent.encoder.phrases([""])[""]
    assert all(torch.equal(row, empty) for row in emptied.layout.phrase_embeds[emptied.layout.mask])
    assert not torch.equal(before.layout.phrase_embeds, emptied.layout.phrase_embeds)


def test_draws_depend_on_the_position_alone_and_held_out_layouts_stay_as_they_are(base: Path, data: Path) -> None:
    switches: dict[str, Any] = {"data": {"box_jitter": 0.2}, "train": {"box_dropout": 0.3, "phrase_dropout": 0.3}}
    one, other = examples(base, data, **switches), examples(base, data, **switches)
    whole = one.batch(range(6))
    part = other.batch(range(4, 6))
    slots = part.layout.mask.shape[1]
    assert torch.equal(whole.layout.boxes[4:, :slots], part.layout.boxes)
    assert torch.equal(whole.layout.phrase_embeds[4:, :slots], part.layout.phrase_embeds)
    plain = examples(base, data, "held out").batch([0, 1])
    held = examples(base, data, "held out", **switches).batch([0, 1])
    assert same(plain, held)
    assert torch.equal(plain.layout.boxes, held.layout.boxes)


def test_min_visible_is_the_share_that_must_be_left(base: Path, tmp_path: Path) -> None:
    # The centre square of 40 x 20 keeps x from 0.25 to 0.75: of the first box a tenth, of the second two thirds.
    boxes = objects([[0.0, 0.2, 0.275, 0.8], [0.15, 0.2, 0.45, 0.8], [0.4, 0.2, 0.6, 0.8]])
    folder = dataset(tmp_path / "set", line(objects=boxes))
    for share, left in ((0.05, 3), (0.25, 2), (0.9, 1)):
        batch = examples(base, folder, data={"min_visible": share}).batch([0])
        assert batch.layout.mask.sum() == left


# --- filter -----------------------------------------------------------------------------------------------------------


def records() -> list[Record]:
    def of(name: str, *boxes: tuple[float, str]) -> Record:
        made = [Box((0.0, 0.0, side, side), phrase) for side, phrase in boxes]
        return Record(Path(name), Layout(name, made), location=name)

    return [
        of("a", (0.1, "a red cell"), (0.5, "a white cell"), (0.3, "a platelet"), (0.4, "a Red blob")),
        of("b", (0.1, "a platelet")),
        of("c"),
    ]


@pytest.mark.parametrize(
    ("rules", "left", "reasons"),
    [
        ({}, {"a": 4, "b": 1, "c": 0}, {}),
        ({"min_area": 0.05}, {"a": 3, "c": 0}, {"below min_area": 2}),
        ({"max_boxes": 2}, {"a": 2, "b": 1, "c": 0}, {"beyond max_boxes": 2}),
        ({"include_phrases": ["cell", "^a red"]}, {"a": 3, "c": 0}, {"not in include_phrases": 2}),
        ({"exclude_phrases": ["PLATELET"]}, {"a": 3, "c": 0}, {"in exclude_phrases": 2}),
        (
            {"min_area": 0.05, "exclude_phrases": ["cell|platelet"], "max_boxes": 1},
            {"a": 1, "c": 0},
            {"below min_area": 2, "in exclude_phrases": 2},
        ),
    ],
)
def test_each_rule_leaves_out_its_boxes_and_counts_them(
    rules: dict[str, Any], left: dict[str, int], reasons: dict[str, int]
) -> None:
    done = filter_records(records(), FilterSection(**rules))
    assert {record.layout.caption: len(record.layout.boxes) for record in done.records} == left
    assert done.left_out == reasons
    assert done.boxes + sum(reasons.values()) == 5
    assert len(done.records) + len(done.emptied) == 3
    assert (done.summary is None) == (not reasons)


def test_the_largest_boxes_stay_in_their_order() -> None:
    done = filter_records(records(), FilterSection(max_boxes=2))
    assert [box.phrase for box in done.records[0].layout.boxes] == ["a white cell", "a Red blob"]


def test_a_filter_that_leaves_nothing_or_is_no_pattern_is_refused() -> None:
    with pytest.raises(InputError, match="leaves none of 2 layouts"):
        filter_records(records()[:2], FilterSection(min_area=0.9))
    with pytest.raises(InputError, match=r"data\.filter\.exclude_phrases.*\('\)|\("):
        filter_records(records(), FilterSection(exclude_phrases=["("]))


def test_crop_loss_counts_what_the_centre_crop_drops(tmp_path: Path) -> None:
    boxes = objects([[0.0, 0.0, 0.2, 1.0], [0.4, 0.4, 0.6, 0.6]])
    folder = dataset(
        tmp_path, line(objects=boxes), line(objects=objects([[0.0, 0.0, 0.2, 1.0]])), line(objects=objects([]))
    )
    loss = crop_loss(read_dataset(folder), one_size((16, 16)), min_visible=0.25)  # a.png is 40 x 20
    assert loss.to_dict() == {"images": 3, "boxes": 3, "lost": 2, "emptied": 1}
    assert loss.summary is not None
    assert "a centre crop loses 2 of 3 boxes" in loss.summary
    assert crop_loss(read_dataset(folder), one_size((16, 32)), min_visible=0.25).summary is None


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_check_only_and_report_count_what_is_left_out(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        f"base: {base}\noutput_dir: {tmp_path / 'run'}\ndata:\n  path: {data}\n  validation_share: 0.25\n  filter:\n"
        "    max_boxes: 1\ntrain: {max_steps: 1, batch_size: 2, sample_every: 0, checkpoint_every: 0}\n"
    )
    before = sum(len(record.layout.boxes) for record in read_dataset(data))
    assert main(["train", str(path), "--check-only", "--json"]) == 0
    captured = capsys.readouterr()
    counts = json.loads(captured.out)["filter"]
    assert counts["boxes"] == counts["records"] == 12
    assert counts["boxes_left_out"] == {"beyond max_boxes": before - 12}
    assert f"data.filter left out {before - 12} boxes" in " ".join(captured.err.split())
    assert main(["train", str(path)]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["filter"] == counts
    assert report["center_crop"]["lost"] == 0
    assert main(["train", str(path), "output_dir=" + str(tmp_path / "none"), "data.filter.min_area=0.99"]) == 2
    assert "data.filter" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- the nested section of the config ---------------------------------------------------------------------------------


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_filter_is_a_section_within_a_section(tmp_path: Path) -> None:
    path = write(tmp_path, "base: b\ndata:\n  path: d\n  filter:\n    min_area: 0.1\n    include_phrases: [cell]\n")
    rules = load_config(path).data.filter
    assert (rules.min_area, rules.max_boxes, rules.include_phrases) == (0.1, None, ["cell"])
    rules = load_config(path, ["data.filter.max_boxes=3", "data.filter.exclude_phrases=[a, b]"]).data.filter
    assert (rules.min_area, rules.max_boxes, rules.exclude_phrases) == (0.1, 3, ["a", "b"])
    short = write(tmp_path, "base: b\ndata: d\n")
    assert load_config(short, ["data.filter.max_boxes=3"]).data.filter.max_boxes == 3
    empty = write(tmp_path, "base: b\ndata:\n  path: d\n  filter:\n")
    assert load_config(empty).data.filter == FilterSection()
    assert load_config(empty, ["data.filter.max_boxes=3"]).data.filter.max_boxes == 3


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("  filter:\n    min_aera: 0.1\n", [], ["c.yaml:5", "did you mean 'min_area'?"]),
        ("  filter:\n    min_area: 2\n", [], ["c.yaml:5", "data.filter.min_area is 2", "smaller share"]),
        ("  filter:\n    include_phrases: cell\n", [], ["c.yaml:5", "should be a list"]),
        ("  filter: 3\n", [], ["c.yaml:4", "data.filter is 3"]),
        ("", ["data.filter.max_boxs=3"], ["max_boxs", "did you mean 'max_boxes'?"]),
        ("", ["data.filter.max_boxes.x=3"], ["override"]),
        ("", ["data.path.x=3"], ["override"]),
        ("  max_boxes: 3\n", [], ["c.yaml:4", "did you mean 'data.filter.max_boxes'?"]),
        ("  filter: 3\n", ["data.filter.max_boxes=3"], ["data.filter is int"]),
    ],
)
def test_wrong_filters_are_named_with_their_line(
    tmp_path: Path, text: str, overrides: list[str], says: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, f"base: b\ndata:\n  path: d\n{text}"), overrides)
    for words in says:
        assert words in str(caught.value)
