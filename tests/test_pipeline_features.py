"""What the diffusers pipelines bring works with a layout too: guidance, batches, images as input, schedulers, offloading."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from PIL import Image

from mmdit_lora import Layout
from mmdit_lora.errors import InputError
from mmdit_lora.lora import add_layout_lora, load_adapter, remove_adapter, save_adapter
from mmdit_lora.pipelines import (
    PIPELINES,
    LayoutFluxImg2ImgPipeline,
    LayoutFluxInpaintPipeline,
    LayoutPipeline,
    LayoutStableDiffusion3Img2ImgPipeline,
    LayoutStableDiffusion3InpaintPipeline,
    SamplingConfig,
)
from mmdit_lora.pipelines import generate as paint_layouts
from mmdit_lora.pipelines.base import steps_that_run
from tests.pipeline_makers import (
    FAMILIES,
    RED,
    TWO,
    attention_kwargs_seen,
    differ,
    generate,
    open_pipeline,
    scales_seen,
    stock_of,
)
from tests.tiny import trained_adapter

# Guidance by two calls, or by one call of a doubled batch; the negative text is part of it.
GUIDED = {
    "sd3": {"guidance_scale": 4.0, "negative_prompt": "a blur"},
    "flux": {"true_cfg_scale": 4.0, "negative_prompt": "a blur"},
}
FROM_IMAGE: dict[tuple[str, str], tuple[Any, Any]] = {
    ("sd3", "img2img"): (LayoutStableDiffusion3Img2ImgPipeline, StableDiffusion3Img2ImgPipeline),
    ("sd3", "inpaint"): (LayoutStableDiffusion3InpaintPipeline, StableDiffusion3InpaintPipeline),
    ("flux", "img2img"): (LayoutFluxImg2ImgPipeline, FluxImg2ImgPipeline),
    ("flux", "inpaint"): (LayoutFluxInpaintPipeline, FluxInpaintPipeline),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(family: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_pipeline(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def stock(pipe: Any) -> Any:
    return stock_of(pipe)


@pytest.fixture
def own(family: str, tmp_path: Path) -> Any:
    """A pipeline that a test may change."""
    return open_pipeline(family, tmp_path)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    left = np.zeros((32, 32), dtype=np.uint8)
    left[:, :16] = 255
    return Image.fromarray(left)


def test_both_families_are_listed(family: str, pipe: Any) -> None:
    assert type(pipe) in PIPELINES
    assert isinstance(pipe, LayoutPipeline)
    assert pipe.transformer.family == family


# -- guidance and batches


def test_no_layout_is_the_stock_pipeline_bit_for_bit(family: str, pipe: Any, stock: Any) -> None:
    for guidance in ({}, GUIDED[family]):
        base = generate(stock, "a red circle", **guidance)
        assert np.array_equal(generate(pipe, prompt="a red circle", **guidance), base)
        assert np.array_equal(generate(pipe, Layout("a red circle"), **guidance), base)
        assert np.array_equal(generate(pipe, RED, layout_scale=0.0, **guidance), base)
        assert differ(generate(pipe, RED, **guidance), base)


def test_the_unguided_call_sees_no_layout(family: str, pipe: Any, stock: Any) -> None:
    # Guidance g is v0 + g (v1 - v0): with the same text on both sides only the layout makes a difference.
    def guided(scale: float, target: Any = pipe, *layout: Layout) -> np.ndarray:
        prompts = {"prompt": "x", "negative_prompt": "x"}
        return generate(target, *layout, **prompts, **{key: scale for key in GUIDED[family] if key.endswith("_scale")})

    assert differ(guided(1.5, pipe, RED), guided(6.0, pipe, RED))
    np.testing.assert_allclose(guided(1.5, stock), guided(6.0, stock), atol=1e-4)
    np.testing.assert_allclose(guided(1.5), guided(6.0), atol=1e-4)


@pytest.mark.parametrize("guided", [False, True])
def test_a_batch_of_layouts_paints_what_each_alone_paints(family: str, pipe: Any, guided: bool) -> None:
    guidance = GUIDED[family] if guided else {}
    layouts = [RED, TWO, Layout("nothing")]
    batch = generate(pipe, layouts, seeds=[1, 2, 3], **guidance)
    for row, layout in enumerate(layouts):
        np.testing.assert_allclose(generate(pipe, layout, seeds=row + 1, **guidance)[0], batch[row], atol=5e-4)
    assert differ(generate(pipe, TWO, seeds=1, **guidance)[0], batch[0])


def test_one_further_text_is_meant_for_all(family: str, pipe: Any) -> None:
    texts = {"prompt_2": "in the style of x", "negative_prompt_2": "y"} | GUIDED[family]
    batch = generate(pipe, [RED, TWO], seeds=[1, 2], **texts)
    np.testing.assert_allclose(generate(pipe, TWO, seeds=2, **texts)[0], batch[1], atol=5e-4)
    assert differ(generate(pipe, TWO, seeds=2, **GUIDED[family])[0], batch[1])


@pytest.mark.parametrize("guided", [False, True])
def test_several_images_a_prompt_keep_their_own_layout(family: str, pipe: Any, guided: bool) -> None:
    guidance = GUIDED[family] if guided else {}
    batch = generate(pipe, [RED, TWO], seeds=[1, 2, 3, 4], num_images_per_prompt=2, **guidance)
    for row, layout in enumerate([RED, RED, TWO, TWO]):
        np.testing.assert_allclose(generate(pipe, layout, seeds=row + 1, **guidance)[0], batch[row], atol=5e-4)


def test_many_layouts_are_painted_whatever_the_batch(pipe: Any) -> None:
    settings = SamplingConfig(steps=2, size=(32, 32), batch_size=2)
    done: list[int] = []
    images = paint_layouts(pipe, [RED, TWO, RED], settings, seed=5, on_progress=done.append)
    assert done == [2, 3]
    alone = paint_layouts(pipe, [TWO], settings, seed=6)
    assert np.abs(np.asarray(alone[0], int) - np.asarray(images[1], int)).max() <= 1
    assert np.abs(np.asarray(images[0], int) - np.asarray(images[2], int)).max() > 10  # another seed


# -- schedules


def test_scale_window_and_the_users_callback_go_together(pipe: Any) -> None:
    steps: list[int] = []

    def mine(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == {"latents", "prompt_embeds"}
        steps.append(step)
        return {"latents": tensors["latents"] * 0.5}

    call = {"num_inference_steps": 4, "layout_scale": 0.7, "layout_window": (0.0, 0.5)}
    mine_too = {
        **call,
        "callback_on_step_end": mine,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    assert scales_seen(pipe, RED, **mine_too) == [0.7, 0.7, 0.0, 0.0]
    assert steps == [0, 1, 2, 3]
    assert differ(generate(pipe, RED, **mine_too), generate(pipe, RED, **call))
    assert scales_seen(pipe, prompt="x", num_inference_steps=2) == [None, None]


def test_a_second_scheduler_and_its_window(family: str, own: Any) -> None:
    euler = generate(own, RED, num_inference_steps=4)
    if family == "sd3":  # calls the model twice a step but in the last
        own.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
        expected = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    else:  # the stock pipeline gives `mu` and sigmas, which Heun does not take
        own.scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            prediction_type="flow_prediction",
            use_dynamic_shifting=True,
            time_shift_type="exponential",
        )
        expected = [1.0, 1.0, 0.0, 0.0]
    assert differ(generate(own, RED, num_inference_steps=4), euler)
    assert differ(
        generate(own, RED, num_inference_steps=4), generate(own, prompt="a red circle", num_inference_steps=4)
    )
    assert scales_seen(own, RED, num_inference_steps=4, layout_window=(0.0, 0.5)) == expected
    stock = stock_of(own)
    assert np.array_equal(generate(own, prompt="a red circle"), generate(stock, "a red circle"))


# -- from an image


@pytest.mark.parametrize(("steps", "strength"), [(4, 0.5), (10, 0.6), (3, 1.0), (7, 0.3), (28, 0.85)])
def test_the_number_of_steps_that_run_is_diffusers(steps: int, strength: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)

    class Stock:
        pass

    stock: Any = Stock()
    stock.scheduler = scheduler
    timesteps, running = StableDiffusion3Img2ImgPipeline.get_timesteps(stock, steps, strength, "cpu")
    assert steps_that_run(steps, strength) == running
    assert len(timesteps) == 2 * running - 1


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_from_an_image(family: str, pipe: Any, kind: str, image: Image.Image, mask: Image.Image) -> None:
    ours, stock_class = FROM_IMAGE[family, kind]
    made = ours.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    assert made.transformer is pipe.transformer  # the weights are shared, and untouched
    assert made.config.max_sequence_length == pipe.config.max_sequence_length
    stock = stock_class.from_pipe(stock_of(pipe))
    stock.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": image, "strength": 0.5, "num_inference_steps": 8}
    if kind == "inpaint":
        given["mask_image"] = mask

    for guidance in ({}, GUIDED[family]):
        base = generate(stock, "a red circle", **given, **({"guidance_scale": 5.0} | guidance))
        call = given | {"guidance_scale": 5.0} | guidance
        assert np.array_equal(generate(made, prompt="a red circle", **call), base)
        assert np.array_equal(generate(made, Layout("a red circle"), **call), base)
        painted = generate(made, RED, **call)
        assert differ(painted, base)
        images = {name: [value] * 2 for name, value in given.items() if name in ("image", "mask_image")}
        batch = generate(made, [RED, TWO], seeds=[0, 1], **{**call, **images})
        np.testing.assert_allclose(batch[0], painted[0], atol=5e-4)
        np.testing.assert_allclose(batch[1], generate(made, TWO, seeds=1, **call)[0], atol=5e-4)

    # The window is a part of the steps that run: 4 of 8.
    calls = 2 if family == "flux" else 1
    half = scales_seen(made, RED, layout_window=(0.0, 0.5), **given, **GUIDED[family])
    assert half == [1.0] * 2 * calls + [0.0] * 2 * calls
    assert len(scales_seen(made, RED, **{**given, "strength": 0.25})) == 2
    with pytest.raises(InputError, match="covers none of 2 steps"):
        generate(made, RED, layout_window=(0.0, 0.3), **{**given, "strength": 0.25})


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_from_an_image_the_unguided_half_sees_no_layout(
    family: str, pipe: Any, kind: str, image: Image.Image, mask: Image.Image
) -> None:
    made = FROM_IMAGE[family, kind][0].from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"image": [image] * 2, "strength": 0.5, "num_inference_steps": 4} | GUIDED[family]
    if kind == "inpaint":
        given["mask_image"] = [mask] * 2
    seen: list[list[bool]] = []
    begin = pipe.transformer.begin_layout

    def spy(layout: Any, *rest: Any) -> Any:
        seen.append(layout.mask.any(dim=1).tolist())
        return begin(layout, *rest)

    pipe.transformer.begin_layout = spy
    try:
        generate(made, [RED, TWO], seeds=[0, 1], **given)
    finally:
        del pipe.transformer.begin_layout
    doubled = [[False, False, True, True]] * 2
    assert seen == (doubled if family == "sd3" else [[True, True], [False, False]] * 2)
    assert not pipe.transformer._forward_pre_hooks  # nothing stays on the transformer
    seen_layouts = [kwargs["layout"].mask.any().item() for kwargs in attention_kwargs_seen(pipe, RED)]
    assert seen_layouts == [True, True]


def test_a_pipe_keeps_its_dtypes_and_refuses_another_transformer(family: str, own: Any, stock: Any) -> None:
    own.transformer.to(torch.bfloat16)
    add_layout_lora(own.transformer)
    made = FROM_IMAGE[family, "img2img"][0].from_pipe(own)
    assert {p.dtype for p in made.vae.parameters()} == {torch.float32}
    dtypes = {"lora" in name: p.dtype for name, p in made.transformer.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    made = FROM_IMAGE[family, "img2img"][0].from_pipe(own, num_inference_steps=3)
    assert made.config.num_inference_steps == 3
    with pytest.raises(ValueError, match="Transformer2DModel, not a Layout"):
        FROM_IMAGE[family, "img2img"][0].from_pipe(stock)


# -- memory


def test_tiling_and_slicing_of_the_vae(own: Any) -> None:
    whole = generate(own, [RED, TWO], seeds=[1, 2])
    own.vae.enable_slicing()
    np.testing.assert_allclose(generate(own, [RED, TWO], seeds=[1, 2]), whole, atol=1e-4)
    own.vae.enable_tiling()
    own.vae.tile_sample_min_size, own.vae.tile_latent_min_size = 16, 8
    tiled = generate(own, [RED, TWO], seeds=[1, 2])
    assert tiled.shape == whole.shape
    assert differ(tiled, whole)  # it did tile
    assert np.abs(tiled - whole).mean() < 0.1


@pytest.fixture
def adapter(own: Any, tmp_path: Path) -> Path:
    add_layout_lora(own.transformer)
    trained_adapter(own.transformer)
    save_adapter(own.transformer, tmp_path / "adapter", metadata={})
    remove_adapter(own.transformer)
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_changes_nothing(own: Any, adapter: Path, kind: str) -> None:
    bare = generate(own, RED)
    load_adapter(own.transformer, adapter)
    before = generate(own, RED)
    assert differ(before, bare)
    own.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )
    assert np.array_equal(generate(own, RED), before)


def test_sequential_offload_changes_nothing(own: Any, adapter: Path) -> None:
    bare = generate(own, RED)
    load_adapter(own.transformer, adapter)
    before = generate(own, RED)
    assert differ(before, bare)
    offload_sequentially(own)
    # Every weight is on the meta device but while its module runs, that of the layout processor's null features too.
    assert {p.device.type for p in own.transformer.parameters()} == {"meta"}
    assert np.array_equal(generate(own, RED), before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clip_skip": -1}, "clip_skip: is -1"),
        ({"clip_skip": 99}, "clip_skip: is 99"),
        ({"clip_skip": True}, "clip_skip: is True"),
        ({"layout_scale": None}, "layout_scale: is None"),
        ({"layout_scale": [1.0]}, r"layout_scale: is \[1.0\]"),
        ({"layout_window": 5}, "layout_window: is 5"),
        ({"guidance_scale": [7.0]}, "guidance_scale: is"),
        ({"sigmas": 0.5}, "sigmas: is 0.5"),
        ({"joint_attention_kwargs": 5}, "joint_attention_kwargs: is 5"),
        ({"joint_attention_kwargs": {"layout_scale": 3.0}}, "joint_attention_kwargs: holds layout_scale"),
    ],
)
def test_arguments_that_would_be_ignored_or_fail_late_are_refused(own: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        own(RED, **{"num_inference_steps": 1, **options})


def test_an_adapter_for_offloaded_weights_is_refused(own: Any, adapter: Path) -> None:
    bare = generate(own, RED)
    offload_sequentially(own)
    with pytest.raises(InputError, match="offloading"):  # PEFT would load nothing, with a mere warning
        load_adapter(own.transformer, adapter)
    assert np.array_equal(generate(own, RED), bare)


def offload_sequentially(pipe: Any) -> None:
    """As `enable_sequential_cpu_offload`, which does not take the CPU."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)


def test_model_offload_takes_every_model_in_turn(own: Any) -> None:
    before = generate(own, RED)
    own.enable_model_cpu_offload(device="cpu")
    models = [name for name, part in own.components.items() if isinstance(part, torch.nn.Module)]
    assert len(own._all_hooks) == len(models)
    assert own.model_cpu_offload_seq.endswith("transformer->vae")
    assert np.array_equal(generate(own, RED), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading moves weights only where there is an accelerator")
@pytest.mark.parametrize("kind", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_on_an_accelerator(own: Any, kind: str) -> None:
    before = generate(copy.deepcopy(own).to("cuda"), RED)
    if kind == "model":
        own.enable_model_cpu_offload()
    elif kind == "sequential":
        own.enable_sequential_cpu_offload()
    else:
        own.enable_group_offload(
            onload_device=torch.device("cuda"),
            offload_type=kind,
            num_blocks_per_group=1 if kind == "block_level" else None,
        )
    np.testing.assert_allclose(generate(own, RED), before, atol=1e-4)
    resident = {p.device.type for p in own.transformer.parameters()}
    assert resident <= ({"meta"} if kind == "sequential" else {"cpu"})


# -- training and sampling see the same


def test_the_transformer_is_called_as_in_training(family: str, pipe: Any) -> None:
    calls: list[dict[str, Any]] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        guidance = {"guidance_scale": 1.0} if family == "sd3" else {"guidance_scale": 3.5}
        length = pipe.config.max_sequence_length
        generate(pipe, RED, num_inference_steps=3, max_sequence_length=length, **guidance)
    finally:
        hook.remove()
    sampled = {name: value for name, value in calls[1].items() if isinstance(value, torch.Tensor)}
    hidden, t = sampled["hidden_states"], pipe.scheduler.timesteps[1:2] / 1000
    latents = hidden if family == "sd3" else pipe._unpack_latents(hidden, 32, 32, pipe.vae_scale_factor)
    assert latents.shape[1] == pipe.transformer.latent_channels
    texts = pipe.encode_caption("a red circle")
    trained = pipe.transformer.model_inputs(latents, t, texts, guidance=3.5)
    assert trained.keys() == sampled.keys()
    for name, value in trained.items():
        torch.testing.assert_close(value, sampled[name])
    torch.testing.assert_close(pipe.transformer.as_latents(hidden, *latents.shape[2:]), latents)
