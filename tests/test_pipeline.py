"""The SD3 pipeline with a layout: folders, the base's own images, batches, schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from mmdit_lora import Box, Layout
from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.errors import InputError
from mmdit_lora.models import LayoutSD3Transformer2DModel
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline
from mmdit_lora.pipelines.base import LayoutSchedule
from tests.tiny import plain_twin, tiny_pipeline, tiny_transformer

RED = Layout("a red circle", [Box((0.1, 0.1, 0.4, 0.5), "red circle")])
TWO = Layout("two things", [Box((0.5, 0.5, 0.9, 0.9), "blue square"), Box((0.0, 0.2, 0.3, 0.9), "red circle")])
STEPS = 4


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> LayoutStableDiffusion3Pipeline:
    pipeline = tiny_pipeline(tmp_path_factory.mktemp("tokenizer"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def layout_folder(pipe: LayoutStableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "layout"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stock(pipe: LayoutStableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """diffusers' own pipeline with the same weights."""
    components = {**pipe.components, "transformer": plain_twin(pipe.transformer)}
    pipeline = StableDiffusion3Pipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def plain_folder(stock: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "plain"
    stock.save_pretrained(folder)
    return folder


def generate(pipeline: Any, *args: Any, seeds: int | list[int] = 0, **kwargs: Any) -> np.ndarray:
    """(n, H, W, 3) in [0, 1]."""
    seeds = [seeds] if isinstance(seeds, int) else seeds
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    settings = {"num_inference_steps": STEPS, "output_type": "np", **kwargs}
    return pipeline(*args, generator=generators if len(generators) > 1 else generators[0], **settings).images


def scales_seen(pipeline: Any, *args: Any, **kwargs: Any) -> list[float]:
    """The layout scale of every call of the transformer."""
    seen: list[float] = []
    forward = pipeline.transformer.forward

    def spy(*inner: Any, **options: Any) -> Any:
        seen.append((options["joint_attention_kwargs"] or {}).get("layout_scale"))
        return forward(*inner, **options)

    pipeline.transformer.forward = spy
    try:
        generate(pipeline, *args, **kwargs)
    finally:
        del pipeline.transformer.forward
    return seen


# -- folders


def test_a_layout_folder_round_trips_without_t5(pipe: Any, layout_folder: Path, tmp_path: Path) -> None:
    index = json.loads((layout_folder / "model_index.json").read_text())
    assert index["text_encoder_3"] == [None, None]
    assert not (layout_folder / "text_encoder_3").exists()
    again = LayoutStableDiffusion3Pipeline.from_pretrained(layout_folder)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer, LayoutSD3Transformer2DModel)
    assert again.text_encoder_3 is None
    assert again.config.max_sequence_length == 8
    painted = generate(pipe, RED)
    assert np.array_equal(generate(again, RED), painted)
    assert painted.shape == (1, 32, 32, 3)
    assert not np.allclose(generate(again, TWO.__class__("a red circle")), painted, atol=1e-2)
    again.save_pretrained(tmp_path / "again")
    assert (
        json.loads((tmp_path / "again" / "model_index.json").read_text()).items()
        >= {"max_sequence_length": 8, "tokenizer_3": [None, None]}.items()
    )


def test_a_plain_folder_opens_paints_as_before_and_round_trips(stock: Any, plain_folder: Path, tmp_path: Path) -> None:
    opened = LayoutStableDiffusion3Pipeline.from_pretrained(plain_folder)
    opened.set_progress_bar_config(disable=True)
    assert isinstance(opened.transformer, LayoutSD3Transformer2DModel)
    assert not any(p.is_meta for p in opened.transformer.parameters())
    base = generate(stock, "a red circle", max_sequence_length=256)
    assert np.array_equal(generate(opened, RED), base)  # zero gates
    assert np.array_equal(generate(opened, prompt="a red circle"), base)
    assert not np.allclose(generate(stock, "a blue circle", max_sequence_length=256), base, atol=1e-2)

    opened.save_pretrained(tmp_path / "saved")
    again = LayoutStableDiffusion3Pipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    assert np.array_equal(generate(again, RED), base)
    state = again.transformer.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in opened.transformer.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])  # the old name and the new
def test_a_folder_opens_in_the_dtype_asked_for(layout_folder: Path, key: str) -> None:
    half = LayoutStableDiffusion3Pipeline.from_pretrained(layout_folder, **{key: torch.bfloat16})
    half.set_progress_bar_config(disable=True)
    assert {p.dtype for m in (half.transformer, half.vae, half.text_encoder) for p in m.parameters()} == {
        torch.bfloat16
    }
    assert np.isfinite(generate(half, RED)).all()


def test_a_transformer_given_is_taken(layout_folder: Path) -> None:
    mine = tiny_transformer(seed=9)
    assert LayoutStableDiffusion3Pipeline.from_pretrained(layout_folder, transformer=mine).transformer is mine


def test_no_such_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        LayoutStableDiffusion3Pipeline.from_pretrained(tmp_path / "nowhere")


# -- the base's own images, where there is no layout


def test_no_layout_is_the_stock_pipeline_bit_for_bit(pipe: Any, stock: Any) -> None:
    base = generate(stock, "a red circle", max_sequence_length=8)
    assert np.array_equal(generate(pipe, prompt="a red circle"), base)
    assert np.array_equal(generate(pipe, Layout("a red circle")), base)
    assert np.array_equal(generate(pipe, RED, layout_scale=0.0), base)
    assert not np.allclose(generate(pipe, RED), base, atol=1e-2)
    assert not np.allclose(generate(pipe, RED, layout_scale=0.5), generate(pipe, RED), atol=1e-2)
    # The base's own length of text is the default; another one is another image.
    assert not np.array_equal(generate(pipe, prompt="a red circle", max_sequence_length=64), base)


# -- batches


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_batch_of_layouts_paints_what_each_alone_paints(pipe: Any, guidance: float) -> None:
    batch = generate(pipe, [RED, TWO, Layout("nothing")], seeds=[1, 2, 3], guidance_scale=guidance)
    for row, layout in enumerate([RED, TWO, Layout("nothing")]):
        np.testing.assert_allclose(
            generate(pipe, layout, seeds=row + 1, guidance_scale=guidance)[0], batch[row], atol=2e-4
        )
    assert not np.allclose(batch[0], batch[1], atol=1e-2)
    assert not np.allclose(generate(pipe, TWO, seeds=1, guidance_scale=guidance)[0], batch[0], atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_several_images_a_prompt_keep_their_own_layout(pipe: Any, guidance: float) -> None:
    batch = generate(pipe, [RED, TWO], seeds=[1, 2, 3, 4], num_images_per_prompt=2, guidance_scale=guidance)
    assert len(batch) == 4
    for row, layout in enumerate([RED, RED, TWO, TWO]):
        np.testing.assert_allclose(
            generate(pipe, layout, seeds=row + 1, guidance_scale=guidance)[0], batch[row], atol=2e-4
        )


def test_the_unguided_half_has_no_layout(pipe: Any, stock: Any) -> None:
    # Guidance g is v0 + g (v1 - v0): with the same text on both sides, only the layout makes the difference.
    same = {"prompt": "x", "negative_prompt": "x"}
    assert np.array_equal(
        generate(pipe, RED, guidance_scale=3.0, layout_scale=0.0, **same),
        generate(pipe, prompt="x", negative_prompt="x", guidance_scale=3.0),
    )
    weak, strong = (generate(pipe, RED, guidance_scale=scale, **same) for scale in (1.5, 6.0))
    assert not np.allclose(weak, strong, atol=1e-2)
    np.testing.assert_allclose(
        *(generate(stock, max_sequence_length=8, guidance_scale=scale, **same) for scale in (1.5, 6.0)), atol=1e-4
    )


def test_skip_layer_guidance_takes_the_guided_half(pipe: Any, stock: Any) -> None:
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    seen = scales_seen(pipe, RED, **skip)
    assert len(seen) == 2 * STEPS - 1  # diffusers leaves the first step out
    assert not np.allclose(generate(pipe, RED, **skip), generate(pipe, RED), atol=1e-2)
    fresh = Layout("a red circle")
    assert np.array_equal(generate(pipe, fresh, **skip), generate(stock, "a red circle", max_sequence_length=8, **skip))
    batch = generate(pipe, [RED, TWO], seeds=[1, 2], **skip)
    np.testing.assert_allclose(generate(pipe, TWO, seeds=2, **skip)[0], batch[1], atol=2e-4)


# -- the schedule


def test_scale_and_window_reach_the_transformer(pipe: Any) -> None:
    assert scales_seen(pipe, RED) == [1.0] * 4
    assert scales_seen(pipe, RED, layout_scale=0.7, layout_window=(0.0, 0.5)) == [0.7, 0.7, 0.0, 0.0]
    assert scales_seen(pipe, RED, layout_window=(0.5, 1.0)) == [0.0, 0.0, 1.0, 1.0]
    assert scales_seen(pipe, RED, layout_window=(0.0, 0.3), num_inference_steps=10) == [1.0] * 3 + [0.0] * 7
    assert scales_seen(pipe, RED, layout_window=(0.0, 0.5), sigmas=[1.0, 0.6]) == [1.0, 0.0]
    assert scales_seen(pipe, prompt="x") == [None] * 4
    # One call's window does not stay for the next.
    first = generate(pipe, RED)
    generate(pipe, RED, layout_window=(0.0, 0.25))
    assert np.array_equal(generate(pipe, RED), first)


def test_the_users_callback_runs_too(pipe: Any) -> None:
    calls: list[tuple[int, list[str]]] = []

    def mine(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append((step, sorted(tensors)))
        return {"latents": tensors["latents"] * 0.5}

    window = {"layout_window": (0.0, 0.5), "callback_on_step_end": mine}
    assert scales_seen(pipe, RED, **window, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"]) == [
        1.0,
        1.0,
        0.0,
        0.0,
    ]
    assert calls == [(step, ["latents", "prompt_embeds"]) for step in range(4)]
    assert not np.allclose(generate(pipe, RED, **window), generate(pipe, RED, layout_window=(0.0, 0.5)), atol=1e-2)


def test_the_users_attention_kwargs_stay_his(pipe: Any) -> None:
    mine = {"scale": 1.0}
    assert np.array_equal(generate(pipe, RED, joint_attention_kwargs=mine), generate(pipe, RED))
    assert mine == {"scale": 1.0}


@pytest.mark.parametrize("window", [(0.5, 0.5), (0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_an_impossible_window_is_refused(pipe: Any, window: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        generate(pipe, RED, layout_window=window)


def test_a_window_that_covers_no_step_is_refused(pipe: Any) -> None:
    with pytest.raises(
        ValueError, match="covers none of 3 steps"
    ):  # CreatiLayout would silently paint without a layout
        generate(pipe, RED, layout_window=(0.0, 0.3), num_inference_steps=3)
    assert [LayoutSchedule(2.0, (0.0, 0.3), 4)(step) for step in range(4)] == [2.0, 0.0, 0.0, 0.0]


# -- wrong input


def test_numbers_of_prompts_and_layouts_must_agree(pipe: Any) -> None:
    with pytest.raises(ValueError, match="2 prompts for 1 layouts"):
        generate(pipe, RED, ["a", "b"])
    with pytest.raises(ValueError, match="1 prompts for 2 layouts"):
        generate(pipe, [RED, TWO], "a")
    with pytest.raises(ValueError, match="no layout"):
        generate(pipe, [])
    assert np.array_equal(generate(pipe, [RED], "a red circle"), generate(pipe, RED))


def test_encoded_texts_replace_the_captions(pipe: Any) -> None:
    with torch.no_grad():
        embeds = pipe.encode_prompt("a red circle", None, None, max_sequence_length=8)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    encoded = dict(zip(names, embeds, strict=True))
    assert np.array_equal(generate(pipe, RED, **encoded), generate(pipe, RED))
    with pytest.raises(ValueError, match="1 prompts for 2 layouts"):
        generate(pipe, [RED, TWO], **encoded)


def test_layout_slots_pad_and_limit(tmp_path: Path) -> None:
    slots = tiny_pipeline(tmp_path, tiny_transformer(mask_padding=False, layout_slots=2))
    slots.set_progress_bar_config(disable=True)
    assert slots.prepare_layout([RED]).mask.tolist() == [[True, False]]
    assert generate(slots, [RED, TWO], seeds=[1, 2]).shape == (2, 32, 32, 3)
    three = Layout("three", [*TWO.boxes, *RED.boxes])
    with pytest.raises(InputError, match="a layout has 3 boxes, this base takes 2"):
        generate(slots, three)


def test_prepared_layouts_hold_the_phrases_own_embeddings(pipe: Any) -> None:
    inputs = pipe.prepare_layout([RED, TWO])
    assert inputs.mask.tolist() == [[True, False], [True, True]]
    assert not inputs.phrase_embeds.requires_grad
    torch.testing.assert_close(inputs.boxes[1, 0], torch.tensor([0.5, 0.5, 0.9, 0.9]))
    blue, red = pipe.encode_phrases(["blue square", "red circle"])
    torch.testing.assert_close(inputs.phrase_embeds[1], torch.stack([blue, red]))
    torch.testing.assert_close(inputs.phrase_embeds[0, 0], red)
    assert not torch.allclose(blue, red, atol=1e-2)
    empty = pipe.prepare_layout([Layout("nothing")])
    assert tuple(empty.phrase_embeds.shape) == (1, 1, 48)
    assert not empty.mask.any()
    assert len(collate_layouts([RED], {"red circle": red}, phrase_dim=48, slots=4)) == 1
