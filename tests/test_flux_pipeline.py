"""The FLUX pipeline with a layout: folders, dev and schnell, phrases as tokens; and what opens which family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxPipeline

from mmdit_lora import Box, Layout
from mmdit_lora.errors import InputError
from mmdit_lora.models.flux import LayoutFluxTransformer2DModel
from mmdit_lora.pipelines import (
    LayoutFluxPipeline,
    LayoutStableDiffusion3Pipeline,
    load_pipeline,
)
from tests.pipeline_makers import RED, TWO, differ, generate, open_pipeline, stock_of
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

FORMS: dict[str, dict[str, Any]] = {
    "pooled": {},
    "tokens": {"phrase_tokens": 3},
    "creatilayout": {
        "phrase_tokens": 3,
        "layout_single_blocks": True,
        "mask_padding": False,
        "layout_slots": 4,
    },
    "cross": {"layout_attention": "cross", "phrase_tokens": 3, "layout_single_blocks": True},
}


def make(folder: Path, **changes: Any) -> LayoutFluxPipeline:
    pipe = tiny_flux_pipeline(folder, tiny_flux_transformer(**changes))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> LayoutFluxPipeline:
    return make(tmp_path_factory.mktemp("vocabulary"), phrase_tokens=3)


@pytest.fixture(scope="module")
def plain_folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "plain"
    stock_of(pipe).save_pretrained(folder)
    return folder


# -- folders


@pytest.mark.parametrize("form", list(FORMS))
def test_a_layout_folder_round_trips(form: str, tmp_path: Path) -> None:
    pipe = make(tmp_path / "vocabulary", **FORMS[form])
    pipe.save_pretrained(tmp_path / "base")
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    assert index["_class_name"] == "LayoutFluxPipeline"
    assert index["transformer"] == ["mmdit_lora.models.flux", "LayoutFluxTransformer2DModel"]
    assert (index["max_sequence_length"], index["default_sample_size"]) == (12, 16)
    painted = generate(pipe, RED)
    again = load_pipeline(str(tmp_path / "base"))
    assert isinstance(again, LayoutFluxPipeline)
    assert again.default_side == 32
    # Weights that lie in a file's memory map are aligned otherwise, which may change the last bit.
    np.testing.assert_allclose(generate(again, RED), painted, atol=1e-5)
    assert differ(generate(again, TWO), painted)
    assert differ(generate(again, prompt="a red circle"), painted)


def test_a_plain_folder_opens_and_paints_as_before(pipe: Any, plain_folder: Path, tmp_path: Path) -> None:
    options = {"layout_attention": "cross", "phrase_tokens": 5, "layout_single_blocks": True, "layout_seed": 3}
    opened = load_pipeline(str(plain_folder), **options)
    assert isinstance(opened, LayoutFluxPipeline)
    transformer = opened.transformer
    assert isinstance(transformer, LayoutFluxTransformer2DModel)
    assert not any(p.is_meta for p in transformer.parameters())
    assert (transformer.phrase_tokens, transformer.config.layout_attention) == (5, "cross")
    assert hasattr(transformer.single_transformer_blocks[0], "layout_stream")
    base = generate(FluxPipeline.from_pretrained(plain_folder), "a red circle")
    assert np.array_equal(generate(opened, RED), base)  # zero gates
    assert np.array_equal(generate(opened, prompt="a red circle"), base)
    np.testing.assert_allclose(generate(stock_of(pipe), "a red circle"), base, atol=1e-5)
    # diffusers' own defaults, which this base does not override
    assert (opened.config.num_inference_steps, opened.config.guidance_scale) == (28, 3.5)
    assert (opened.config.max_sequence_length, opened.default_side) == (512, 256)
    opened.save_pretrained(tmp_path / "saved")
    again = load_pipeline(str(tmp_path / "saved")).transformer.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in transformer.state_dict().items())
    other = load_pipeline(str(plain_folder), **{**options, "layout_seed": 4}).transformer.state_dict()
    assert not all(torch.equal(value, other[name]) for name, value in transformer.state_dict().items())


def test_a_folder_opens_as_the_family_that_it_names(plain_folder: Path, tmp_path: Path) -> None:
    sd3 = open_pipeline("sd3", tmp_path / "vocabulary")
    sd3.save_pretrained(tmp_path / "ours")
    stock_of(sd3).save_pretrained(tmp_path / "stock")
    assert type(load_pipeline(str(tmp_path / "ours"))) is LayoutStableDiffusion3Pipeline
    assert type(load_pipeline(str(tmp_path / "stock"), layout_init="random")) is LayoutStableDiffusion3Pipeline
    half = load_pipeline(str(plain_folder), dtype=torch.bfloat16)
    assert type(half) is LayoutFluxPipeline
    parts = (half.transformer, half.vae, half.text_encoder, half.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} <= {torch.bfloat16, torch.float32}
    assert {p.dtype for p in half.transformer.parameters()} == {torch.bfloat16}
    assert np.isfinite(generate(half, RED)).all()

    index = tmp_path / "stock" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "PixArtSigmaPipeline"}))
    with pytest.raises(InputError, match=r"PixArtSigmaPipeline; known are .*LayoutFluxPipeline, FluxPipeline"):
        load_pipeline(str(tmp_path / "stock"))
    # The weights of one family under the name of the other.
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError):
        load_pipeline(str(tmp_path / "stock"))


def test_options_of_a_transformer_that_is_given_are_refused(plain_folder: Path) -> None:
    with pytest.raises(ValueError, match="one is given"):
        LayoutFluxPipeline.from_pretrained(
            plain_folder, transformer=tiny_flux_transformer(), transformer_options={"layout_seed": 1}
        )


# -- dev and schnell


def test_embedded_guidance_is_an_input_of_dev_only(tmp_path: Path) -> None:
    dev = make(tmp_path / "dev")
    schnell = make(tmp_path / "schnell", guidance_embeds=False)
    assert differ(generate(dev, RED, guidance_scale=1.0), generate(dev, RED, guidance_scale=8.0))
    assert np.array_equal(generate(dev, RED), generate(dev, RED, guidance_scale=3.5))
    assert np.array_equal(generate(schnell, RED, guidance_scale=1.0), generate(schnell, RED, guidance_scale=8.0))
    assert differ(generate(schnell, RED), generate(schnell, prompt="a red circle"))


def test_a_base_states_its_defaults(tmp_path: Path) -> None:
    stated = tiny_flux_pipeline(
        tmp_path, tiny_flux_transformer(guidance_embeds=False), num_inference_steps=3, guidance_scale=0.0
    )
    stated.set_progress_bar_config(disable=True)
    calls = {"output_type": "np", "generator": torch.Generator().manual_seed(0)}
    painted = stated(RED, **calls).images
    assert painted.shape == (1, 32, 32, 3)
    assert stated.num_timesteps == 3
    assert np.array_equal(generate(stated, RED, num_inference_steps=3, max_sequence_length=12), painted)


# -- texts


def test_phrases_are_the_first_tokens_of_t5(pipe: Any, tmp_path: Path) -> None:
    phrases = ["red circle", "a very long phrase of many letters"]
    tokens = pipe.encode_phrases(phrases)
    assert tuple(tokens.shape) == (2, 3, 24)
    ids = pipe.tokenizer_2(phrases, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(tokens, pipe.text_encoder_2(ids)[0][:, :3])
        pooled = make(tmp_path)  # no tokens: CLIP's pooled embedding
        ids = pooled.tokenizer(
            phrases, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
        ).input_ids
        torch.testing.assert_close(pooled.encode_phrases(phrases), pooled.text_encoder(ids).pooler_output)
    inputs = pipe.prepare_layout([RED, TWO])
    assert tuple(inputs.phrase_embeds.shape) == (2, 2, 3, 24)
    torch.testing.assert_close(inputs.phrase_embeds[0, 0], tokens[0])
    assert tuple(pipe.prepare_layout([Layout("nothing")]).phrase_embeds.shape) == (1, 1, 3, 24)


def test_the_phrase_matters_and_so_does_the_box(pipe: Any) -> None:
    def with_box(phrase: str, x: float = 0.1) -> np.ndarray:
        return generate(pipe, Layout("a red circle", [Box((x, 0.1, x + 0.3, 0.5), phrase)]))

    assert np.array_equal(with_box("red circle"), generate(pipe, RED))
    assert differ(with_box("zz zz"), generate(pipe, RED))
    assert differ(with_box("red circle", 0.6), generate(pipe, RED))


def test_offloading_with_phrase_tokens(tmp_path: Path) -> None:
    own = make(tmp_path, **FORMS["creatilayout"])
    before = generate(own, RED)
    for part in own.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert np.array_equal(generate(own, RED), before)


# -- sizes


def test_sides(pipe: Any) -> None:
    for side in (4, 32, 1024):  # no position table: any multiple of 2 latent cells
        pipe.check_side(side)
    with pytest.raises(InputError, match=r"30 pixels; this base takes multiples of 4 from 4\n") as caught:
        pipe.check_side(30)
    assert "give 28" in str(caught.value.hint)
    for side in (0, -4):
        with pytest.raises(InputError, match="multiples of 4"):
            pipe.check_side(side)
    assert generate(pipe, RED, height=16, width=48).shape == (1, 16, 48, 3)
