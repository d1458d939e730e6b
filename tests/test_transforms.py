"""Images and boxes move together: what a box frames before is what it frames after."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, ImageDraw

from mmdit_lora import Box, Layout
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import InputError


def scene(
    size: tuple[int, int], xyxy: tuple[int, int, int, int], caption: str = "a scene"
) -> tuple[Image.Image, Layout]:
    """A white rectangle on black, framed exactly by the one box."""
    image = Image.new("RGB", size)
    ImageDraw.Draw(image).rectangle((xyxy[0], xyxy[1], xyxy[2] - 1, xyxy[3] - 1), fill="white")
    width, height = size
    box = Box((xyxy[0] / width, xyxy[1] / height, xyxy[2] / width, xyxy[3] / height), "a white box")
    return image, Layout(caption, (box,))


def white_extent(pixels: torch.Tensor) -> tuple[float, ...]:
    """xyxy in [0, 1] of what is brighter than grey."""
    ys, xs = torch.nonzero(pixels.mean(0) > 0, as_tuple=True)
    height, width = pixels.shape[1:]
    return (int(xs.min()) / width, int(ys.min()) / height, (int(xs.max()) + 1) / width, (int(ys.max()) + 1) / height)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nothing_changes_at_the_right_size() -> None:
    image, layout = scene((64, 48), (10, 20, 30, 40))
    pixels, moved = prepare(image, layout, (48, 64))
    assert (pixels.shape, pixels.dtype) == ((3, 48, 64), torch.float32)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert type(pixels) is torch.Tensor
    assert moved.boxes[0].xyxy == pytest.approx(layout.boxes[0].xyxy, abs=1e-12)
    assert white_extent(pixels) == pytest.approx(moved.boxes[0].xyxy)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (32, 80), (200, 200)])
@pytest.mark.parametrize("source", [(100, 60), (60, 100), (64, 64)])
def test_the_box_frames_the_same_thing(source: tuple[int, int], size: tuple[int, int], flip: bool, crop: str) -> None:
    width, height = source
    image, layout = scene(source, (width * 3 // 8, height * 3 // 8, width * 6 // 8, height * 6 // 8))
    for seed in range(4):
        pixels, moved = prepare(image, layout, size, crop=crop, flip=flip, generator=generator(seed))
        assert pixels.shape == (3, *size)
        if moved.boxes:
            assert white_extent(pixels) == pytest.approx(moved.boxes[0].xyxy, abs=1.5 / min(size))


def test_a_box_that_is_mostly_cropped_away_goes_with_its_phrase() -> None:
    def of(left: float, right: float, phrase: str) -> Box:
        return Box((left, 0.2, right, 0.8), phrase)

    # The centre square of 200 x 100 keeps x from 0.25 to 0.75.
    boxes = (of(0.0, 0.2, "gone"), of(0.05, 0.3, "a fifth"), of(0.05, 0.35, "a third"), of(0.3, 0.7, "all"))
    _, moved = prepare(Image.new("RGB", (200, 100)), Layout("c", boxes), (50, 50))
    assert [box.phrase for box in moved.boxes] == ["a third", "all"]
    assert moved.boxes[0].xyxy == pytest.approx((0.0, 0.2, 0.2, 0.8))
    assert moved.boxes[1].xyxy == pytest.approx((0.1, 0.2, 0.9, 0.8))


def test_flips_happen_half_of_the_time_and_take_the_boxes_along() -> None:
    image, layout = scene((40, 40), (0, 10, 10, 30))
    lefts = [prepare(image, layout, (40, 40), flip=True, generator=generator(s))[1].boxes[0].xyxy[0] for s in range(60)]
    assert set(lefts) == {0.0, 0.75}
    assert 15 < lefts.count(0.75) < 45


@pytest.mark.parametrize("caption", ["a cat left of a dog", "the Right hand", "the leftmost box"])
def test_text_that_names_a_side_stops_the_flip(caption: str) -> None:
    image, layout = scene((40, 40), (0, 10, 10, 30), caption)
    in_phrase = Layout("c", (Box(layout.boxes[0].xyxy, caption),))
    for text in (layout, in_phrase):
        assert {
            prepare(image, text, (40, 40), flip=True, generator=generator(s))[1].boxes[0].xyxy[0] for s in range(20)
        } == {0.0}


@pytest.mark.parametrize("caption", ["a bright scene", "leftover food", "copyright"])
def test_words_that_merely_hold_a_side_do_not(caption: str) -> None:
    image, layout = scene((40, 40), (0, 10, 10, 30), caption)
    assert {
        prepare(image, layout, (40, 40), flip=True, generator=generator(s))[1].boxes[0].xyxy[0] for s in range(20)
    } == {0.0, 0.75}


def test_the_generator_decides_everything() -> None:
    image, layout = scene((90, 60), (30, 20, 60, 40))

    def run(seed: int) -> tuple[torch.Tensor, Layout]:
        return prepare(image, layout, (40, 40), crop="random", flip=True, generator=generator(seed))

    assert torch.equal(run(1)[0], run(1)[0])
    assert run(1)[1] == run(1)[1]
    assert len({run(seed)[1] for seed in range(12)}) > 3


def test_no_boxes_and_a_wrong_crop() -> None:
    pixels, layout = prepare(Image.new("RGB", (10, 30)), Layout("c"), (16, 16), crop="random", flip=True)
    assert (pixels.shape, layout) == ((3, 16, 16), Layout("c"))
    with pytest.raises(InputError, match="crop is 'middle'"):
        prepare(Image.new("RGB", (8, 8)), Layout("c"), (8, 8), crop="middle")
