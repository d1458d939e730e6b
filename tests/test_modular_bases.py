"""A base that diffusers has as modular blocks alone (FLUX.3), opened, sampled, trained on and saved as any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, ModularPipeline
from torch import Tensor

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.export.export import export_adapter
from mmdit_lora.hub import MODULAR_INDEX, pipeline_index
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.trainer import train
from tests.streams import MAKERS
from tests.streams.common import seeded
from tests.test_trainer import make_config

LAYOUTS = [
    Layout("a red circle", [Box((0.1, 0.1, 0.5, 0.5), "a red circle")]),
    Layout("two things", [Box((0.1, 0.1, 0.5, 0.5), "a dog"), Box((0.5, 0.4, 0.9, 0.9), "a blue square")]),
]
CAPTIONS = [layout.caption for layout in LAYOUTS]
SETTINGS: dict[str, Any] = {"num_inference_steps": 3, "height": 32, "width": 48, "max_sequence_length": 80}


@pytest.fixture(scope="module")
def flux3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by the stock class."""
    folder = tmp_path_factory.mktemp("flux3") / "base"
    with seeded(0):
        pipe = MAKERS["flux3"].pipeline(MAKERS["flux3"].transformer())
    pipe.modular.save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


@pytest.fixture(scope="module")
def pipe(flux3: Path) -> Any:
    """With gates that have opened."""
    opened: Any = load_pipeline(str(flux3))
    with seeded(1):
        for block in opened.transformer.single_transformer_blocks:
            torch.nn.init.normal_(block.layout_stream.out_proj.weight, std=0.3)
    return opened


def seeds(count: int, start: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(start + number) for number in range(count)]


def stock_images(folder: Path, prompt: str, seed: int) -> Tensor:
    """By diffusers alone."""
    stock: Any = ModularPipeline.from_pretrained(str(folder))
    stock._blocks.sub_blocks.pop("prompt_upsampler")
    stock.load_components(names=["vae", "text_encoder", "tokenizer", "transformer"])
    stock.update_components(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    stock.set_progress_bar_config(disable=True)
    images: Tensor = stock(prompt=prompt, generator=seeds(1, seed)[0], output_type="pt", output="images", **SETTINGS)
    return images


def test_without_a_layout_it_paints_what_the_stock_blocks_paint(flux3: Path, pipe: Any) -> None:
    options = {"guidance_scale": 2.0, "output_type": "pt", **SETTINGS}
    plain = pipe(CAPTIONS, generator=seeds(2), **options).images
    for number, caption in enumerate(CAPTIONS):
        assert torch.equal(plain[number : number + 1], stock_images(flux3, caption, number))
    off = pipe(LAYOUTS, layout_scale=0.0, generator=seeds(2), **options).images
    assert torch.equal(off, plain)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_image_follows_its_own_layout(pipe: Any, guidance: float) -> None:
    options = {"guidance_scale": guidance, "output_type": "pt", **SETTINGS}
    plain = pipe(CAPTIONS, generator=seeds(2), **options).images
    both = pipe(LAYOUTS, generator=seeds(2), **options).images
    assert ((both - plain).abs().amax((1, 2, 3)) > 1e-3).all()
    for number, layout in enumerate(LAYOUTS):  # as alone, from the first step on
        alone = pipe(layout, generator=seeds(1, number), **options).images
        torch.testing.assert_close(alone[0], both[number], atol=1e-4, rtol=0)  # its slots are padded no more
    twice = pipe(LAYOUTS, num_images_per_prompt=2, generator=seeds(4), **options).images
    again = pipe(LAYOUTS[1], num_images_per_prompt=2, generator=seeds(2, 2), **options).images
    torch.testing.assert_close(twice[2:], again, atol=1e-4, rtol=0)
    early = pipe(LAYOUTS, layout_window=(0.0, 0.4), generator=seeds(2), **options).images
    assert not torch.equal(early, both)
    assert ((early - plain).abs().amax((1, 2, 3)) > 1e-3).all()


def test_callbacks_outputs_and_latents(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []

    def callback(running: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert 0 <= timestep <= 1000
        seen.append((step, running.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else tensors

    options = {"guidance_scale": 2.0, **SETTINGS}
    latents = pipe(CAPTIONS, generator=seeds(2), output_type="latent", callback_on_step_end=callback, **options).images
    assert seen == [(step, 3) for step in range(3)] * 2
    assert latents.shape == (2, 16, 32 // 4, 48 // 4)
    assert not latents.any(), "what a callback gives back is taken"
    noise = torch.randn(2, *latents.shape[1:], generator=seeds(1, 5)[0])
    one = pipe(CAPTIONS, latents=noise, output_type="np", **options).images
    two = pipe(CAPTIONS[1], latents=noise[1:], output_type="np", return_dict=False, **options)[0]
    assert (one[1] == two[0]).all()
    assert pipe(CAPTIONS[0], **options).images[0].size == (48, 32)


def test_a_saved_folder_is_one_that_both_open_and_names_no_path_of_this_machine(
    flux3: Path, pipe: Any, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path / "saved")
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    text = (moved / MODULAR_INDEX).read_text()
    assert str(tmp_path) not in text
    assert str(flux3.parent) not in text
    assert json.loads(text)["guidance_scale"] == 4.0
    assert not list(moved.glob("**/layout_stream*"))
    assert torch.equal(stock_images(moved, CAPTIONS[0], 0), stock_images(flux3, CAPTIONS[0], 0))
    again: Any = load_pipeline(str(moved))
    options = {"guidance_scale": 2.0, "output_type": "pt", **SETTINGS}
    assert torch.equal(again(CAPTIONS[0], generator=seeds(1), **options).images, stock_images(flux3, CAPTIONS[0], 0))
    assert again.scheduler.config.shift == pipe.scheduler.config.shift


@pytest.mark.usefixtures("in_this_process")
def test_a_stream_and_an_adapter_are_trained_on_it_and_sampled(flux3: Path, data: Path, tmp_path: Path) -> None:
    size = {"path": str(data), "validation_share": 0.25, "resolution": 32}
    steps = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "sample_every": 0}
    common = {"data": size, "train": steps}
    out = tmp_path / "stream"
    train(make_config(flux3, data, out, method="layout_stream", stream={"width": 16}, **common))
    train(make_config(flux3, data, tmp_path / "run", stream_weights=str(out / "stream"), **common))
    (tmp_path / "layout.json").write_text(json.dumps(LAYOUTS[1].to_dict()))
    arguments = ["--base", flux3, "--stream", out / "stream", "--adapter", tmp_path / "run" / "adapter"]
    arguments += ["--layout", tmp_path / "layout.json", "--steps", 2, "--size", 32, "--out", tmp_path / "images"]
    assert main(["sample", *map(str, arguments)]) == 0
    assert list((tmp_path / "images").glob("*.png"))
    for to in ("peft", "diffusers"):  # PEFT's wrapper hides the names of the arguments
        assert export_adapter(tmp_path / "run" / "adapter", to, tmp_path / to).max_abs_diff <= 1e-5


def test_what_its_index_names_elsewhere_is_not_needed_and_what_is_missing_is_told(
    flux3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(flux3, folder)
    index = json.loads((folder / MODULAR_INDEX).read_text())
    upsampler = {"pretrained_model_name_or_path": "somebody/upsampler", "subfolder": "", "revision": None}
    hint = {"type_hint": ["transformers", "Qwen3VLForConditionalGeneration"], "variant": None}
    index["prompt_upsampler"] = [None, None, upsampler | hint]
    index["transformer"][2]["pretrained_model_name_or_path"] = "somebody/base"  # as in a copy of a hub's repository
    (folder / MODULAR_INDEX).write_text(json.dumps(index))
    assert pipeline_index(str(folder))["prompt_upsampler"] == hint["type_hint"]
    assert load_pipeline(str(folder)).transformer.config.num_layers == 1
    shutil.rmtree(folder / "vae")
    assert main(["sample", "--base", str(folder), "--prompt", "x", "--out", str(tmp_path / "images")]) == 2
    assert f"lacks vae, which {MODULAR_INDEX} names" in capsys.readouterr().err
    assert not (tmp_path / "images").exists()
