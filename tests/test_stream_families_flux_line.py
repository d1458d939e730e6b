"""Descriptions of FLUX.1 and of what was built after it say what the stock pipelines do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdit_lora.models.stream_families import STREAM_FAMILIES
from tests.streams import MAKERS
from tests.streams.common import seeded

FAMILIES = ("flux", "chroma", "longcat", "ovis", "ideogram4", "flux3")
SCALE = 2.0  # of guidance
GUIDED: dict[str, dict[str, Any]] = {
    "flux": {"guidance_scale": 3.5, "true_cfg_scale": SCALE, "negative_prompt": "blurred"},
    "ideogram4": {"max_sequence_length": 31},  # of the prompt: no padding
    "longcat": {"enable_cfg_renorm": False},
}
APART = {"return_dict", "joint_attention_kwargs", "attention_kwargs"}
PROMPT = "a red circle"


def made(name: str) -> Any:
    with seeded(0):
        pipe = MAKERS[name].pipeline(MAKERS[name].transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, name: str, x: Tensor, output: str = "latent") -> Any:
    """Two steps of the stock pipeline from the tokens `x` of 4 x 6 places."""
    options = {"guidance_scale": SCALE, **GUIDED.get(name, {})}
    sizes = {"height": 8 * pipe.vae_scale_factor, "width": 12 * pipe.vae_scale_factor}
    settings = {**MAKERS[name].SAMPLING, **options, **sizes}
    with torch.no_grad():
        return pipe(prompt=PROMPT, num_inference_steps=2, latents=x, output_type=output, **settings).images


def spied(pipe: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Arguments and answer of every call of the transformers, as they come."""
    seen: list[tuple[dict[str, Any], Tensor]] = []
    for name in ("transformer", "unconditional_transformer"):
        if (model := getattr(pipe, name, None)) is None:
            continue
        model.register_forward_hook(lambda _, __, kwargs, out: seen.append((dict(kwargs), out[0])), with_kwargs=True)
    return seen


def start(pipe: Any, name: str) -> tuple[Any, Tensor, dict[str, Tensor], Tensor]:
    """The family, x_1, its texts, and x_1 as the pipeline takes it."""
    family = STREAM_FAMILIES[name]
    with seeded(1):
        x = torch.randn(1, family.channels(pipe.transformer.config), 8, 12)
    with torch.no_grad():
        texts = family.captions(pipe, [PROMPT], MAKERS[name].SAMPLING.get("max_sequence_length", 48))
    return family, x, texts, tokens(family.inputs(pipe.transformer, x, torch.ones(1), texts, 3.5))


def tokens(arguments: dict[str, Any]) -> Tensor:
    return arguments["hidden_states"][:, -24:]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_transformer_gets_what_the_stock_pipeline_gives_it(name: str) -> None:
    pipe = made(name)
    family, x, texts, packed = start(pipe, name)
    seen = spied(pipe)
    run(pipe, name, packed)
    call = seen[0][0]
    time = family.time(call) / 1000
    ours = family.inputs(pipe.transformer, x, time, texts, 3.5)
    given = {key: value for key, value in call.items() if key not in APART and value is not None}
    assert given.keys() == {key for key, value in ours.items() if value is not None}
    for key, value in given.items():
        assert ours[key].shape == value.shape, key
        torch.testing.assert_close(ours[key].double(), value.double(), atol=1e-6, rtol=0)
    assert family.grid(pipe.transformer, call) == (4, 6)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_velocity_is_what_the_stock_pipeline_integrates(name: str) -> None:
    """The clock falls; x moves by the guided velocity, noise - x0, times the step in t."""
    pipe = made(name)
    family, x, texts, packed = start(pipe, name)
    seen = spied(pipe)
    run(pipe, name, packed)
    (first, cond), (_, uncond), (second, _), _ = seen
    before, after = family.time(first) / 1000, family.time(second) / 1000
    assert 1 >= before > after > 0
    guided = torch.lerp(family.outputs(uncond, 8, 12), family.outputs(cond, 8, 12), SCALE)
    moved = x + (after - before) * guided
    ours = tokens(family.inputs(pipe.transformer, moved, after, texts, 3.5))
    torch.testing.assert_close(ours, tokens(second), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_latents_are_what_the_stock_pipeline_decodes(name: str) -> None:
    pipe = made(name)
    family, _, texts, packed = start(pipe, name)
    painted = run(pipe, name, packed)
    decoded: list[Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, **options: decoded.append(z) or decode(z, **options)
    run(pipe, name, packed, "pt")
    mode = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: decoded[0]))
    pipe.vae.encode = lambda pixels: mode  # noqa: ARG005
    latents = family.latents(pipe.vae, torch.zeros(1))
    ours = tokens(family.inputs(pipe.transformer, latents, torch.ones(1), texts, 3.5))
    torch.testing.assert_close(ours, painted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_phrase_does_not_depend_on_those_beside_it(name: str) -> None:
    pipe = made(name)
    family = STREAM_FAMILIES[name]
    with torch.no_grad():
        both = family.phrases(pipe, ["a cat", "the long tail of a 'red' kite"])
        alone = family.phrases(pipe, ["a cat"])
    assert both.shape == (2, family.phrase_dim(pipe.transformer.config))
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-4)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_kontexts_reference_follows_the_image_and_is_not_moved() -> None:
    """FluxKontextPipeline: latents of the reference behind those of the image, at another first coordinate."""
    from diffusers import FluxKontextPipeline

    from mmdit_lora.models import LayoutInputs, add_layout_stream

    stock = made("flux")
    pipe = FluxKontextPipeline(**stock.components)
    pipe.set_progress_bar_config(disable=True)
    seen = spied(pipe)
    add_layout_stream(pipe.transformer)
    for block in pipe.transformer.transformer_blocks:
        torch.nn.init.normal_(block.layout_stream.out_proj.weight, std=0.3)
    layout = LayoutInputs(
        torch.rand(1, 2, 4).sort(-1).values, torch.randn(1, 2, 16), torch.ones(1, 2, dtype=torch.bool)
    )
    picture = torch.rand(1, 3, 32, 32)
    options = {"num_inference_steps": 1, "height": 16, "width": 24, "output_type": "latent", "max_sequence_length": 24}
    options |= {"max_area": 16 * 24, "_auto_resize": False}
    plain = pipe(image=picture, prompt=PROMPT, generator=torch.Generator().manual_seed(0), **options)
    with pipe.transformer.with_layout(layout):
        moved = pipe(image=picture, prompt=PROMPT, generator=torch.Generator().manual_seed(0), **options)
    call = seen[-1][0]
    count = plain.images.shape[1]
    assert call["hidden_states"].shape[1] == count + 64, "of the reference: 32 / 2 / 2, squared"
    rows, columns = STREAM_FAMILIES["flux"].grid(pipe.transformer, call)
    assert rows * columns == count
    assert (moved.images - plain.images).abs().max() > 1e-4
