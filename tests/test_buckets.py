"""Aspect buckets: which sizes there are, which an image gets, which records make a batch; and a run that trains on them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.data.buckets import Buckets, make_buckets, one_size, parse_ratio
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.sampler import BatchPlan, box_count_group, epoch_order, seeded
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
from mmdit_lora.training.fill_cache import fill_cache
from mmdit_lora.training.setup import run_buckets
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.data_makers import line, make_image, objects

ALWAYS = settings(derandomize=True, deadline=None, max_examples=200, database=None)
RATIOS = ["1:1", "4:3", "3:4", "16:9", "9:16"]


def sdxl_like(**changes: Any) -> Buckets:
    return make_buckets([1024, 512], [parse_ratio(text) for text in RATIOS], multiple=64, **changes)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_buckets_have_the_area_of_their_resolution_and_sides_of_whole_tokens() -> None:
    large, small = sdxl_like().sizes
    assert large == ((1024, 1024), (896, 1152), (1152, 896), (768, 1344), (1344, 768))
    assert small[0] == (512, 512)
    for height, width in large:
        assert height % 64 == width % 64 == 0
        assert 0.95 < height * width / 1024**2 < 1.05


def test_no_side_is_longer_than_the_base_has_positions_for() -> None:
    buckets = make_buckets([64], [1.0, 16 / 9], multiple=8, largest_side=64)
    assert buckets.sizes == (((64, 64), (32, 64)),)  # 85 x 48 pixels reduced to 64 x 36, rounded to tokens
    with_room = make_buckets([64], [16 / 9], multiple=8)
    assert with_room.sizes == (((48, 88),),)


@pytest.mark.parametrize("text", ["4", "4:0", "a:b", "4:3:2", "-4:3", "100:1", "nan:1", ""])
def test_what_is_no_ratio_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"ratio|beyond"):
        parse_ratio(text)


@ALWAYS
@given(st.integers(16, 4000), st.integers(16, 4000), st.booleans())
def test_every_image_has_a_bucket_and_none_is_enlarged_without_leave(height: int, width: int, upscale: bool) -> None:
    buckets = sdxl_like(upscale=upscale)
    try:
        found = buckets.of((height, width))
    except InputError:
        assert not upscale
        assert min(height, width) < 128  # 64 is a token, and the other side follows the bucket's shape
        return
    assert found[0] % 64 == found[1] % 64 == 0
    if upscale:
        assert found in (*buckets.sizes[0], *buckets.sizes[1])
    else:
        assert found[0] <= height
        assert found[1] <= width
    if height >= 1344 and width >= 1344:
        assert found in buckets.sizes[0]  # the largest that fits


@pytest.mark.parametrize(
    ("size", "bucket"),
    [
        ((2000, 2000), (1024, 1024)),
        ((1000, 1000), (512, 512)),  # a pixel too few for 1024
        ((900, 1200), (896, 1152)),
        ((3000, 1700), (1344, 768)),
        ((300, 300), (256, 256)),  # smaller than all: its own
        ((200, 300), (192, 256)),  # 4:3, reduced from 448 x 576
    ],
)
def test_an_image_goes_where_its_shape_and_its_pixels_say(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert sdxl_like().of(size) == bucket


def test_an_image_below_a_token_is_refused_and_enlarged_on_request() -> None:
    with pytest.raises(InputError, match="64") as caught:
        sdxl_like().of((40, 2000))
    assert caught.value.hint is not None
    assert "upscale" in caught.value.hint
    assert sdxl_like(upscale=True).of((40, 2000)) == (384, 704)


def test_one_size_is_for_every_image() -> None:
    assert one_size((64, 48)).of((3, 5000)) == (64, 48)


# --- batches ----------------------------------------------------------------------------------------------------------


def plan(groups: list[int] | None, count: int, batch: int, seed: int = 0) -> BatchPlan:
    def shuffle(epoch: int, batches: int) -> Tensor:
        return torch.randperm(batches, generator=seeded("batches", seed, epoch))

    return BatchPlan(count, batch, order=lambda epoch: epoch_order(seed, epoch, count), shuffle=shuffle, groups=groups)


def test_with_one_group_it_is_the_order_of_the_epochs() -> None:
    found = [plan(None, 7, 3).record(position) for position in range(21)]
    assert found == [index for epoch in range(3) for index in epoch_order(0, epoch, 7).tolist()]
    assert found == [plan([5] * 7, 7, 3).record(position) for position in range(21)]


@ALWAYS
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_batches_are_of_one_group_and_every_record_comes_as_often_as_the_others(
    groups: list[int], batch: int, seed: int
) -> None:
    count, epochs = len(groups), 5
    of = plan(groups, count, batch, seed)
    total = sum(epochs * groups.count(group) // batch for group in set(groups))
    found = [of.record(position) for position in range(total * batch)]
    for start in range(0, len(found), batch):
        assert len({groups[index] for index in found[start : start + batch]}) == 1
    often = Counter(found)
    for group in set(groups):
        times = [often[index] for index in range(count) if groups[index] == group]
        # Nothing is dropped: what the last epoch does not show is less than a batch, and opens the next.
        assert epochs * len(times) - sum(times) < batch
        assert max(times) - min(times) <= 1 + batch // len(times)
    # Any position, without those before it: as a resumed run asks.
    again = plan(groups, count, batch, seed)
    assert [again.record(position) for position in reversed(range(len(found)))] == found[::-1]


def test_batches_of_an_epoch_are_shuffled_and_epochs_differ() -> None:
    groups = [0] * 40 + [1] * 40
    of = plan(groups, 80, 4)
    kinds = [[groups[of.record(p)] for p in range(start, start + 80, 4)] for start in (0, 80)]
    assert kinds[0] != kinds[1]
    assert all(sorted(kind) == [0] * 10 + [1] * 10 for kind in kinds)
    assert sum(a != b for a, b in pairwise(kinds[0])) > 3  # not one bucket after the other


def test_layouts_with_about_as_many_boxes_are_one_group() -> None:
    assert [box_count_group(n) for n in (0, 1, 2, 3, 4, 5, 8, 9, 100)] == [0, 1, 2, 4, 4, 8, 8, 16, 128]


# --- runs -------------------------------------------------------------------------------------------------------------

SIZES = {"wide": (120, 60), "tall": (60, 120), "square": (90, 90), "tiny": (30, 28)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of four shapes, with one to eight boxes."""
    out = tmp_path_factory.mktemp("shapes")
    lines = []
    for shape, size in SIZES.items():
        for number in range(4):
            make_image(out / f"{shape}{number}.png", size)
            boxes = [[0.3 + 0.05 * n, 0.4, 0.35 + 0.05 * n, 0.6] for n in range(2**number)]  # no crop takes one
            lines.append(json.dumps(line(f"{shape}{number}.png", objects=objects(boxes, ["a thing"] * len(boxes)))))
    (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return out


def run_config(base: Path, data: Path, out: Path, *, buckets: dict[str, Any] | None = None, **train: Any) -> Config:
    chosen: dict[str, Any] = {"ratios": ["1:1", "2:1", "1:2"]} if buckets is None else buckets
    steps = {
        "max_steps": 6,
        "batch_size": 2,
        "checkpoint_every": 0,
        "validate_every": 0,
        "sample_every": 0,
        "log_every": 1,
    }
    return Config.model_validate(
        {
            "base": str(base),
            "output_dir": str(out),
            "data": {"path": str(data), "resolution": 32, "validation_share": 0.25, "buckets": chosen},
            "train": steps | train,
        }
    )


def adapter_of(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def examples(config: Config, batch: int = 2) -> EncodedDataset:
    pipe = load_pipeline(config.base)
    buckets = run_buckets(config, pipe)
    return EncodedDataset(read_dataset(config.data.path), LayoutEncoder(pipe), config, buckets=buckets, batch=batch)


def test_images_are_encoded_at_their_buckets_and_batches_are_of_one(base: Path, folder: Path, tmp_path: Path) -> None:
    found = examples(run_config(base, folder, tmp_path))
    assert found.bucket_counts() == {"24x44": 4, "28x28": 4, "32x32": 4, "44x24": 4}
    shapes = Counter()
    for start in range(0, 32, 2):  # two epochs
        batch = found.batch([start, start + 1])
        shapes[tuple(batch.x0.shape[-2:])] += 1
        assert batch.noise.shape == batch.x0.shape
    assert set(shapes.values()) == {4}
    cell = load_pipeline(str(base)).vae_scale_factor
    assert {(h * cell, w * cell) for h, w in shapes} == {(28, 28), (44, 24), (24, 44), (32, 32)}


def test_one_square_without_buckets_whatever_the_images_are(base: Path, folder: Path, tmp_path: Path) -> None:
    found = examples(run_config(base, folder, tmp_path, buckets={}))
    assert found.bucket_counts() == {"32x32": 16}


def test_a_batch_has_layouts_of_about_as_many_boxes_on_request(base: Path, folder: Path, tmp_path: Path) -> None:
    found = examples(run_config(base, folder, tmp_path, buckets={"group_boxes": True}))
    for start in range(0, 16, 2):
        boxes = found.batch([start, start + 1]).layout.mask.sum(1).tolist()
        assert boxes[0] == boxes[1]  # here every group is one number
    mixed = examples(run_config(base, folder, tmp_path, buckets={}))
    assert any(len(set(mixed.batch([start, start + 1]).layout.mask.sum(1).tolist())) > 1 for start in range(0, 16, 2))


def test_a_run_on_buckets_trains_paints_and_resumes_to_the_bit(base: Path, folder: Path, tmp_path: Path) -> None:
    length = {"max_steps": 7, "checkpoint_every": 3, "validate_every": 3, "sample_every": 3, "sample_count": 3}
    report = train(run_config(base, folder, tmp_path / "whole", **length)).report
    assert sum(report["buckets"].values()) == report["images"] == 12
    assert report["held_out_loss"]["images"] == 4
    stopped = run_config(base, folder, tmp_path / "stopped", **length)
    stop(stopped, at=5)
    train(stopped, resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped"))


def test_a_batch_that_is_gathered_in_parts_is_the_same_step(base: Path, folder: Path, tmp_path: Path) -> None:
    """The plan goes by the whole batch of a step: so by how many processes or parts it comes does not matter."""
    for name, parts in (("one", {"batch_size": 4}), ("parts", {"batch_size": 2, "gradient_accumulation": 2})):
        config = run_config(base, folder, tmp_path / name, **parts)
        train(config.model_copy(update={"lora": config.lora.model_copy(update={"dropout": 0.0})}))
    one, parts = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "parts")
    for key, tensor in one.items():
        torch.testing.assert_close(parts[key], tensor, rtol=1e-4, atol=1e-6)


def test_the_cache_has_images_at_their_buckets(base: Path, folder: Path, tmp_path: Path) -> None:
    config = run_config(base, folder, tmp_path / "plain")
    train(config)
    cache = EncodingCache(tmp_path / "cache")
    fill_cache(config, cache)
    with_cache = config.model_copy(
        update={
            "output_dir": str(tmp_path / "cached"),
            "data": config.data.model_copy(update={"cache": str(tmp_path / "cache")}),
        }
    )
    before = cache.size()
    train(with_cache)
    assert same(adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "cached"))
    assert cache.size() == before  # nothing was missing


def test_what_a_run_refuses_about_buckets(base: Path, folder: Path, tmp_path: Path) -> None:
    def refused(**buckets: Any) -> InputError:
        with pytest.raises(InputError) as caught:
            prepare_run(run_config(base, folder, tmp_path / "no", buckets=buckets))
        return caught.value

    assert refused(ratios=["1:1", "wide"]).location == "data.buckets.ratios"
    assert refused(resolutions=[32, 4096]).location == "data.buckets.resolutions"
    small = json.dumps(line("line.png"))
    make_image(tmp_path / "small" / "line.png", (40, 3))
    (tmp_path / "small" / "metadata.jsonl").write_text(small + "\n")
    small_set = run_config(base, tmp_path / "small", tmp_path / "no")
    with pytest.raises(InputError, match="40 x 3") as caught:
        prepare_run(small_set.model_copy(update={"data": small_set.data.model_copy(update={"validation_share": 0})}))
    assert caught.value.location == f"{tmp_path / 'small' / 'metadata.jsonl'}:1"
    assert not (tmp_path / "no").exists()


def test_a_bucket_with_fewer_images_than_a_batch_is_told(base: Path, folder: Path, tmp_path: Path) -> None:
    def told(batch: int) -> list[str]:
        run = prepare_run(run_config(base, folder, tmp_path, batch_size=batch))
        return [text for text in run.data_losses[1] if "repeat" in text]

    assert told(2) == []
    assert "fewer images than a batch of 8" in told(8)[0]


def stop(config: Config, *, at: int) -> None:
    """Run it until a step, and break off as a failure would."""

    class Stopped(Exception):
        pass

    def halt(step: int, _: dict[str, float]) -> None:
        if step == at:
            raise Stopped

    with pytest.raises(Stopped):
        train(config, callbacks=[Calls(logged=halt)])
