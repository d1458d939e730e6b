"""The families that read a language model's states: each description is what the stock pipeline does, exactly."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageEditPipeline
from PIL import Image
from torch import Tensor

from mmdit_lora import Box, Layout
from mmdit_lora.models import LayoutInputs, add_layout_stream
from mmdit_lora.models.generic_stream import stream_parameters
from mmdit_lora.models.latents import pack
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.models.stream_families.base import StreamFamily
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.trainer import train
from tests.streams import MAKERS
from tests.streams.common import seeded
from tests.streams.qwen_parts import qwen25_vl_processor
from tests.test_trainer import make_config

FAMILIES = ("z_image", "qwen_image", "krea2", "lumina2", "qwen_image21")
GUIDED_OFF: dict[str, dict[str, Any]] = {
    "z_image": {"guidance_scale": 0.0},
    "qwen_image": {"true_cfg_scale": 1.0, "negative_prompt": None},
    "krea2": {"guidance_scale": 0.0},
    "lumina2": {"guidance_scale": 1.0},
    "qwen_image21": {"true_cfg_scale": 1.0, "negative_prompt": None, "use_kv_cache": False},
}
PROMPTS = ["a red circle", "a blue square, below it a very long table"]
HEIGHT, WIDTH = 8, 12  # of the latents
NOT_DESCRIBED = {"attention_kwargs", "joint_attention_kwargs", "return_dict", "kv_cache", "kv_cache_mode", "guidance"}


@pytest.fixture(scope="module", params=FAMILIES)
def described(request: pytest.FixtureRequest) -> StreamFamily:
    return STREAM_FAMILIES[request.param]


@pytest.fixture(scope="module")
def pipe(described: StreamFamily) -> Any:
    with seeded(0):
        made = MAKERS[described.name]
        pipe = made.pipeline(made.transformer())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def noise(described: StreamFamily, pipe: Any) -> Tensor:
    with seeded(1):
        return torch.randn(2, described.channels(pipe.transformer.config), HEIGHT, WIDTH)


def given(family: StreamFamily, x: Tensor) -> Tensor:
    """(B, C, h, w) as the pipeline takes and steps latents."""
    if family.name in ("z_image", "lumina2"):
        return x
    return x.flatten(2).transpose(1, 2) if family.name == "qwen_image21" else pack(x)


@contextmanager
def spied(pipe: Any) -> Iterator[tuple[list[dict[str, Any]], list[tuple[Any, ...]]]]:
    """The transformer's calls: arguments by name with "answer"; the scheduler's: (prediction, sigma, latents)."""
    calls: list[dict[str, Any]] = []
    steps: list[tuple[Any, ...]] = []
    model, scheduler = pipe.transformer, pipe.scheduler
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    forward, step = model.forward, scheduler.step

    def spy(*args: Any, **kwargs: Any) -> Any:
        answer = forward(*args, **kwargs)
        calls.append(dict(zip(names, args, strict=False)) | kwargs | {"answer": answer[0]})
        return answer

    def stepped(prediction: Tensor, t: Any, latents: Tensor, **kwargs: Any) -> Any:
        out = step(prediction, t, latents, **kwargs)
        steps.append((prediction, scheduler.sigmas[scheduler.step_index - 1], latents))
        return out

    model.forward, scheduler.step = spy, stepped
    try:
        yield calls, steps
    finally:
        del model.forward, scheduler.step


def sample(pipe: Any, family: StreamFamily, x: Tensor, **options: Any) -> Any:
    settings = {"output_type": "latent", "num_inference_steps": 2, **MAKERS[family.name].SAMPLING, **options}
    if settings.get("negative_prompt"):
        settings["negative_prompt"] = [settings["negative_prompt"]] * len(PROMPTS)
    with torch.no_grad():
        return pipe(
            prompt=list(PROMPTS),
            height=HEIGHT * family.vae_scale_factor,
            width=WIDTH * family.vae_scale_factor,
            latents=given(family, x),
            **settings,
        ).images


def captions(pipe: Any, family: StreamFamily, texts: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        return family.captions(pipe, texts, MAKERS[family.name].SAMPLING.get("max_sequence_length", 64))


def assert_same(one: Any, other: Any, name: str) -> None:
    assert type(one) is type(other), name
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, name
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5, msg=name)
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), name
        for a, b in zip(one, other, strict=True):
            assert_same(a, b, name)
    else:
        assert one == other, name


@pytest.mark.parametrize("texts", [PROMPTS, PROMPTS[:1] * 2], ids=["lengths differ", "one length"])
def test_the_arguments_are_those_of_the_stock_pipeline(
    described: StreamFamily, pipe: Any, noise: Tensor, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PROMPTS", texts)
    with spied(pipe) as (calls, steps):
        sample(pipe, described, noise, **GUIDED_OFF[described.name])
    assert len(calls) == len(steps) == 2
    encoded = captions(pipe, described, texts)
    x = noise
    for call, (prediction, sigma, latents) in zip(calls, steps, strict=True):
        time = sigma.expand(2)
        expected = described.inputs(pipe.transformer, x, time, encoded, 1.0)
        left = {name: value for name, value in call.items() if name not in expected and name != "answer"}
        assert left.keys() <= NOT_DESCRIBED
        for name, value in expected.items():
            assert_same(value, call[name], name)
        assert described.grid(pipe.transformer, call) == described.grid(pipe.transformer, expected)
        torch.testing.assert_close(described.time(call).float(), 1000 * time)
        # What the scheduler adds (sigma' - sigma) times of is noise - x0.
        velocity = described.outputs(call["answer"], HEIGHT, WIDTH)
        assert velocity.shape == x.shape
        torch.testing.assert_close(given(described, velocity).float(), prediction)
        assert_same(given(described, x), latents, "latents")
        x = x + (pipe.scheduler.sigmas[list(pipe.scheduler.sigmas).index(sigma) + 1] - sigma) * velocity
    rows, columns = described.grid(pipe.transformer, calls[0])
    assert rows / columns == HEIGHT / WIDTH


def test_guided_calls_come_in_the_order_that_is_described(described: StreamFamily, pipe: Any, noise: Tensor) -> None:
    with spied(pipe) as (calls, _):
        sample(pipe, described, noise)
    encoded = captions(pipe, described, PROMPTS)
    if described.guidance == "cond_first":
        assert len(calls) == 2
        for row, (embeds, mask) in enumerate(zip(encoded["embeds"], encoded["mask"], strict=True)):
            assert_same(calls[0]["cap_feats"][row], embeds[mask.bool()], "captions")
        empty = captions(pipe, described, [""])["embeds"][0]
        assert_same(calls[0]["cap_feats"][2:], [empty, empty], "captions")
    else:
        assert len(calls) == 4
        for number, call in enumerate(calls):
            guided = call["encoder_hidden_states"]
            same = guided.shape == encoded["embeds"].shape and torch.allclose(guided, encoded["embeds"], atol=1e-6)
            assert same == (number % 2 == 0)


def test_latents_are_what_the_pipeline_decodes(
    described: StreamFamily, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with seeded(2), torch.no_grad():
        pixels = 2 * torch.rand(2, 3, HEIGHT * described.vae_scale_factor, WIDTH * described.vae_scale_factor) - 1
        latents = described.latents(pipe.vae, pixels)
        assert latents.shape == (2, described.channels(pipe.transformer.config), HEIGHT, WIDTH)
        read = pixels
        if described.name == "qwen_image21":  # opaque
            read = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
        video = described.name in ("qwen_image", "krea2", "qwen_image21")
        mode = pipe.vae.encode(read.unsqueeze(2) if video else read).latent_dist.mode()
    assert mode.std() > 1e-3
    decoded: list[Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, **options: decoded.append(z) or decode(z, **options))
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **_: (args[2],))  # so nothing moves
    sample(pipe, described, latents, output_type="pt", num_inference_steps=1, **GUIDED_OFF[described.name])
    torch.testing.assert_close(decoded[0], mode, atol=1e-5, rtol=1e-4)


def test_phrases_are_means_of_their_own_tokens(described: StreamFamily, pipe: Any) -> None:
    with torch.no_grad():
        together = described.phrases(pipe, ["a cat", "a very long-legged dog", "a cat"])
        alone = described.phrases(pipe, ["a cat"])
    assert together.shape == (3, described.phrase_dim(pipe.transformer.config))
    torch.testing.assert_close(together[0], together[2])
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-4


def opened(name: str) -> Any:
    with seeded(0):
        made = MAKERS[name]
        model = made.transformer()
        add_layout_stream(model)
        with torch.no_grad():
            for parameter_name, parameter in stream_parameters(model).items():
                if any(part in parameter_name for part in ("out_proj", "time_image", "time_layout")):
                    parameter.normal_(std=0.3)
        pipe = made.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def layout_of(model: Any) -> LayoutInputs:
    with seeded(4):
        boxes, phrases = torch.rand(2, 3, 4).sort(-1).values, torch.randn(2, 3, model.phrase_dim)
    return LayoutInputs(boxes, phrases, torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool))


@contextmanager
def block_inputs(model: Any) -> Iterator[list[Tensor]]:
    """What the stock forward of the first block with a stream is given, call by call."""
    block = model.get_submodule(next(iter(model.stream_family.blocks)))[0]
    stock = type(block).__bases__[1]
    forward = stock.forward
    given: list[Tensor] = []

    def seen(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is block:
            given.append(args[0] if args else kwargs["hidden_states"])
        return forward(self, *args, **kwargs)

    stock.forward = seen
    try:
        yield given
    finally:
        stock.forward = forward


def moved_rows(given: list[Tensor]) -> list[list[int]]:
    """Of each sample: the tokens that the second call has and the first one has not."""
    return [row.nonzero().flatten().tolist() for row in (given[1] - given[0]).abs().amax(-1) > 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_moves_the_tokens_of_the_image_and_no_others(name: str) -> None:
    family, pipe = STREAM_FAMILIES[name], opened(name)
    model = pipe.transformer
    with seeded(1):
        x = torch.randn(2, family.channels(model.config), HEIGHT, WIDTH)
    encoded = captions(pipe, family, PROMPTS)
    arguments = family.inputs(model, x, torch.tensor([0.3, 0.6]), encoded, 1.0)
    with block_inputs(model) as given, torch.no_grad():
        model(**arguments)
        model(**arguments, layout=layout_of(model))
    rows, columns = family.grid(model, arguments)
    before = {"z_image": [0, 0], "qwen_image": [0, 0], "lumina2": encoded["mask"].sum(1).tolist()}
    starts = before.get(name, [encoded["embeds"].shape[1]] * 2)
    assert moved_rows(given) == [list(range(start, start + rows * columns)) for start in starts]


def test_the_kv_cache_of_qwen_image21_keeps_the_layout() -> None:
    pipe, family = opened("qwen_image21"), STREAM_FAMILIES["qwen_image21"]
    with seeded(1):
        x = torch.randn(2, 4, HEIGHT, WIDTH)
    with pipe.transformer.with_layout(layout_of(pipe.transformer)):
        cached = sample(pipe, family, x, num_inference_steps=3)
        whole = sample(pipe, family, x, num_inference_steps=3, use_kv_cache=False)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-4)
    assert (sample(pipe, family, x, num_inference_steps=3) - cached).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image21"])
def test_the_layout_does_not_move_images_to_edit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Qwen-Image-Edit they follow the image that is generated; of Qwen-Image 2.1 they are amid the text."""
    family, pipe = STREAM_FAMILIES[name], opened(name)
    model = pipe.transformer
    if name == "qwen_image":
        parts = {part: value for part, value in pipe.components.items() if part != "tokenizer"}
        pipe = QwenImageEditPipeline(**parts, tokenizer=pipe.tokenizer, processor=qwen25_vl_processor())
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe).__name__ in family.pipelines
    # The pipelines scale a reference to an area of a million pixels.
    monkeypatch.setattr(sys.modules[type(pipe).__module__], "calculate_dimensions", lambda *_: (64, 96, None))
    with seeded(1):
        x = torch.randn(1, 4, HEIGHT, WIDTH)
    settings = {**GUIDED_OFF[name], "num_inference_steps": 1, "output_type": "latent", "latents": given(family, x)}

    def edit() -> Tensor:
        size = {"height": HEIGHT * family.vae_scale_factor, "width": WIDTH * family.vae_scale_factor}
        with torch.no_grad():
            return pipe(image=Image.new("RGB", (64, 96), "red"), prompt="make it blue", **settings, **size).images

    with block_inputs(model) as seen:
        plain = edit()
        with model.with_layout(layout_of(model)[:1]):
            changed = edit()
    (moved,) = moved_rows(seen)
    rows, columns = (HEIGHT // 2, WIDTH // 2) if name == "qwen_image" else (HEIGHT, WIDTH)
    total = seen[0].shape[1]
    reference = 4 * 6  # 64 x 96 pixels, at 16 a token
    assert total >= rows * columns + reference
    start = 0 if name == "qwen_image" else total - rows * columns
    assert moved == list(range(start, start + rows * columns))
    assert plain.shape == changed.shape == given(family, x).shape
    assert (changed - plain).abs().max() > 1e-4


def test_captions_without_a_mask_have_all_their_tokens(described: StreamFamily, pipe: Any, noise: Tensor) -> None:
    model, time = pipe.transformer, torch.tensor([0.3, 0.6])
    embeds = {name: torch.randn(2, *shape) for name, shape in described.text_shapes(model.config, 6).items()}
    assert embeds.keys() == {"embeds"}
    whole = embeds | {"mask": torch.ones(2, 6, dtype=captions(pipe, described, [""])["mask"].dtype)}
    with torch.no_grad():
        one, other = (model(**described.inputs(model, noise, time, texts, 1.0))[0] for texts in (embeds, whole))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_the_scale_of_guidance_is_that_of_cfg(described: StreamFamily, pipe: Any, noise: Tensor) -> None:
    """uncond + scale (cond - uncond), in the stock pipeline's own words; 1 = no guidance."""
    made = MAKERS[described.name].SAMPLING
    own = {key: value for key, value in made.items() if key == "max_sequence_length"}
    size = {
        "height": HEIGHT * described.vae_scale_factor,
        "width": WIDTH * described.vae_scale_factor,
        "latents": given(described, noise),
    }
    for scale in (1.0, 3.0):
        with spied(pipe) as (calls, steps), torch.no_grad():
            pipe(
                prompt=list(PROMPTS),
                num_inference_steps=1,
                output_type="latent",
                **own,
                **size,
                **described.guide(scale, 2),
            )
        answers = [described.outputs(call["answer"], HEIGHT, WIDTH) for call in calls]
        if len(answers) == 1:
            answers = list(answers[0].split(2))
        assert len(answers) == (1 if scale == 1 else 2)
        expected = answers[0] if scale == 1 else answers[1] + scale * (answers[0] - answers[1])
        prediction, expected = steps[0][0].float(), given(described, expected)
        if described.name in ("qwen_image", "lumina2"):  # they rescale it to the norm of the guided answer
            prediction, expected = (each / each.norm(dim=-1, keepdim=True) for each in (prediction, expected))
        torch.testing.assert_close(prediction, expected, atol=1e-5, rtol=1e-4)


def test_a_folder_of_the_base_is_trained_on_and_painted_with(
    described: StreamFamily, pipe: Any, data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "base"
    pipe.save_pretrained(folder)
    index = folder / "model_index.json"
    length = MAKERS[described.name].SAMPLING.get("max_sequence_length", 64)
    stated = {"max_sequence_length": length, "default_sample_size": 4, "num_inference_steps": 1}
    index.write_text(json.dumps(json.loads(index.read_text()) | stated))
    train(make_config(folder, data, tmp_path / "run", method="layout_stream", stream={"width": 16}))
    opened = load_pipeline(str(folder), stream=tmp_path / "run" / "stream")
    layout = Layout("two things", [Box((0.1, 0.1, 0.5, 0.5), "red circle"), Box((0.5, 0.4, 0.9, 0.9), "blue square")])
    size = {"height": 8 * described.vae_scale_factor, "width": 8 * described.vae_scale_factor}
    for scale in (1.0, 3.0):
        for call, count in (({"layout": layout}, 1), ({"layout": [layout, layout]}, 2), ({"prompt": "a cat"}, 1)):
            images = opened(**call, **size, guidance_scale=scale).images
            assert [image.size for image in images] == [
                (8 * described.vae_scale_factor, 8 * described.vae_scale_factor)
            ] * count
