"""What holds for every image, box, filter and split, not only for those that somebody thought of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmdit_lora import Box, Layout
from mmdit_lora.config.schema import FilterSection
from mmdit_lora.data.filters import filter_records
from mmdit_lora.data.records import Record
from mmdit_lora.data.split import split_records
from mmdit_lora.data.transforms import Placement, augment_boxes, move_boxes, place, prepare
from mmdit_lora.errors import InputError

# The same examples every time, and none written to disk.
ALWAYS = settings(
    derandomize=True, deadline=None, max_examples=100, database=None, suppress_health_check=[HealthCheck.too_slow]
)

SIDE = st.integers(24, 140)
TARGETS = st.sampled_from([(32, 32), (48, 32), (32, 64), (96, 96)])
FRACTION = st.floats(0, 1, allow_nan=False)


@st.composite
def boxes(draw: st.DrawFn) -> Box:
    left, right = sorted((draw(FRACTION), draw(FRACTION)))
    top, bottom = sorted((draw(FRACTION), draw(FRACTION)))
    assume(right - left > 1e-3)
    assume(bottom - top > 1e-3)
    return Box((left, top, right, bottom), draw(st.sampled_from(["a red cell", "a platelet", "a dog", "Right"])))


LAYOUTS = st.builds(lambda found: Layout("c", found), st.lists(boxes(), max_size=6))


@st.composite
def painted(draw: st.DrawFn) -> tuple[Image.Image, Layout]:
    """A white rectangle of whole pixels on black, framed exactly by the one box."""
    width, height = draw(SIDE), draw(SIDE)
    left, top = draw(st.integers(0, width - 12)), draw(st.integers(0, height - 12))
    right, bottom = draw(st.integers(left + 12, width)), draw(st.integers(top + 12, height))
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image, Layout("c", [Box((left / width, top / height, right / width, bottom / height), "white")])


@ALWAYS
@given(painted(), TARGETS, st.sampled_from(["center", "random"]), st.booleans(), st.integers(0, 99))
def test_a_painted_rectangle_stays_under_its_box_within_a_pixel(
    scene: tuple[Image.Image, Layout], size: tuple[int, int], crop: str, flip: bool, seed: int
) -> None:
    image, layout = scene
    generator = torch.Generator().manual_seed(seed)
    pixels, moved = prepare(image, layout, size, crop=crop, flip=flip, min_visible=0.0, generator=generator)
    height, width = size
    bright = pixels.mean(0) > 0
    if not moved.boxes:
        assert not bright.any()
        return
    left, top, right, bottom = (v * s for v, s in zip(moved.boxes[0].xyxy, (width, height) * 2, strict=True))
    assume(right - left >= 2)  # of less, the resampling may leave nothing bright
    assume(bottom - top >= 2)
    ys, xs = torch.nonzero(bright, as_tuple=True)
    seen = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
    assert seen == pytest.approx((left, top, right, bottom), abs=1.0)


@ALWAYS
@given(painted(), st.integers(0, 50))
def test_flipped_twice_is_where_it_was(scene: tuple[Image.Image, Layout], seed: int) -> None:
    image, layout = scene
    size = (image.height, image.width)

    def flipped(given: Image.Image, of: Layout) -> tuple[Image.Image, Layout]:
        for attempt in range(100):
            generator = torch.Generator().manual_seed(100 * seed + attempt)
            pixels, moved = prepare(given, of, size, flip=True, generator=generator)
            again = torch.Generator().manual_seed(100 * seed + attempt)
            if torch.rand(1, generator=again) < 0.5:
                whole = ((pixels + 1) * 127.5).round().to(torch.uint8)
                return Image.fromarray(whole.permute(1, 2, 0).numpy()), moved
        raise AssertionError("a hundred draws, and none below a half")

    once, once_layout = flipped(image, layout)
    twice, twice_layout = flipped(once, once_layout)
    assert once.tobytes() == image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert twice.tobytes() == image.tobytes()
    assert twice_layout.boxes[0].xyxy == pytest.approx(layout.boxes[0].xyxy, abs=1e-6)


@ALWAYS
@given(LAYOUTS, SIDE, SIDE)
def test_boxes_mirrored_twice_are_the_same(layout: Layout, height: int, width: int) -> None:
    whole = Placement((height, width), (0, 0), (height, width))
    once = move_boxes(layout, (height, width), whole, mirrored=True, min_visible=0.0)
    twice = move_boxes(once, (height, width), whole, mirrored=True, min_visible=0.0)
    assert [box.phrase for box in twice.boxes] == [box.phrase for box in layout.boxes]
    for old, middle, new in zip(layout.boxes, once.boxes, twice.boxes, strict=True):
        assert new.xyxy == pytest.approx(old.xyxy, abs=1e-6)
        assert middle.xyxy == pytest.approx((1 - old.xyxy[2], old.xyxy[1], 1 - old.xyxy[0], old.xyxy[3]), abs=1e-6)


@ALWAYS
@given(SIDE, SIDE, TARGETS, st.sampled_from(["center", "random"]), st.integers(0, 99))
def test_the_window_lies_in_the_resized_image_and_touches_two_of_its_sides(
    height: int, width: int, size: tuple[int, int], crop: str, seed: int
) -> None:
    to = place((height, width), size, crop=crop, generator=torch.Generator().manual_seed(seed))
    over = [resized - side for resized, side in zip(to.resized, size, strict=True)]
    assert min(over) == 0, "no more is cut than must be"
    assert all(0 <= corner <= extra for corner, extra in zip(to.corner, over, strict=True))
    assert to.resized[0] / height == pytest.approx(to.resized[1] / width, abs=1 / min(height, width))


@ALWAYS
@given(LAYOUTS, st.floats(0, 0.49), FRACTION, FRACTION, st.integers(0, 99))
def test_augmented_boxes_are_boxes_of_the_layout_in_order(
    layout: Layout, jitter: float, dropout: float, phrase_dropout: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, silent = augment_boxes(
        layout, jitter=jitter, dropout=dropout, phrase_dropout=phrase_dropout, generator=generator
    )
    assert len(silent) == len(found.boxes)
    assert bool(found.boxes) == bool(layout.boxes)
    old = iter(layout.boxes)
    for box in found.boxes:
        assert any(box.phrase == other.phrase and _near(box, other, jitter) for other in old)


def _near(box: Box, other: Box, jitter: float) -> bool:
    sides = (other.width, other.height) * 2
    return all(abs(a - b) <= jitter * side + 1e-9 for a, b, side in zip(box.xyxy, other.xyxy, sides, strict=True))


RULES = st.builds(
    FilterSection,
    min_area=st.sampled_from([0.0, 0.05, 0.3]),
    max_boxes=st.sampled_from([None, 1, 2, 4]),
    include_phrases=st.sampled_from([[], ["cell"], ["cell", "DOG"]]),
    exclude_phrases=st.sampled_from([[], ["^a "], ["plate"]]),
)


@ALWAYS
@given(st.lists(LAYOUTS, min_size=1, max_size=6), RULES)
def test_a_filter_keeps_or_counts_every_box_and_every_record(layouts: list[Layout], rules: FilterSection) -> None:
    records = [Record(Path(f"{index}.png"), layout, f"line {index}") for index, layout in enumerate(layouts)]
    try:
        done = filter_records(records, rules)
    except InputError:
        assert all(layout.boxes for layout in layouts), "a layout without boxes always stays"
        return
    assert sorted([r.location for r in done.records] + [r.location for r in done.emptied]) == [
        r.location for r in records
    ]
    assert done.boxes == sum(len(record.layout.boxes) for record in done.records)
    assert done.boxes + sum(done.left_out.values()) == sum(len(layout.boxes) for layout in layouts)
    before = {record.location: record.layout.boxes for record in records}
    for record in done.records:
        left = iter(before[record.location])
        assert all(any(box is other for other in left) for box in record.layout.boxes), "in their order, unchanged"
        assert all(box.area >= rules.min_area for box in record.layout.boxes)
        assert rules.max_boxes is None or len(record.layout.boxes) <= rules.max_boxes
    again = filter_records(done.records, rules)
    assert (again.records, again.emptied, again.left_out) == (done.records, [], {})


@ALWAYS
@given(
    st.lists(st.integers(0, 12), min_size=2, max_size=30),
    st.floats(0.01, 0.99),
    st.randoms(use_true_random=False),
)
def test_a_split_loses_no_record_and_depends_on_names_alone(names: list[int], share: float, chance: object) -> None:
    assume(len(set(names)) > 1)
    records = [Record(Path(f"{name}.png"), Layout(str(index)), str(index)) for index, name in enumerate(names)]
    train, validation = split_records(records, share)
    assert sorted(train + validation, key=records.index) == records
    assert train
    assert validation
    assert not {record.image for record in train} & {record.image for record in validation}
    held = {record.image for record in validation}
    assert len(held) == min(max(1, round(share * len(set(names)))), len(set(names)) - 1)
    shuffled = records.copy()
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert {record.image for record in split_records(shuffled, share)[1]} == held
