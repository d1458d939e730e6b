"""The SD3 model with a layout stream: what the contract of all families (test_families.py) does not say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from mmdit_lora.lora import add_layout_lora, lora_parameters
from mmdit_lora.models import LayoutInputs, LayoutProcessor, LayoutSD3Transformer2DModel
from tests.tiny import SD3_CONFIG, VARIANTS, plain_twin, tiny_inputs, tiny_layout, tiny_transformer

INPUTS, LAYOUT = tiny_inputs(), tiny_layout()
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _default_attention_backend() -> Iterator[None]:
    """diffusers' `set_attention_backend` also changes the default of every other model in the process."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@torch.no_grad()
def velocity(model: torch.nn.Module, inputs: dict[str, Any] = INPUTS, **kwargs: Any) -> torch.Tensor:
    return model(**inputs, **kwargs).sample


def with_mask(layout: LayoutInputs, mask: list[list[bool]]) -> LayoutInputs:
    return LayoutInputs(layout.boxes, layout.phrase_embeds, torch.tensor(mask))


# -- without a layout it is diffusers' own model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("call", ["plain", "skip_layers", "controlnet", "tuple"])
def test_no_layout_is_diffusers_own_class_bit_for_bit(variant: str, call: str) -> None:
    model = tiny_transformer(**VARIANTS[variant])
    twin = plain_twin(model)
    kwargs: dict[str, Any] = {
        "plain": {},
        "skip_layers": {"skip_layers": [1]},
        "controlnet": {"block_controlnet_hidden_states": [torch.ones(2, 64, 32)]},
        "tuple": {"joint_attention_kwargs": {"scale": 1.0}},
    }[call]
    base = velocity(twin, **kwargs)
    assert torch.equal(velocity(model, **kwargs), base)
    if call == "tuple":
        assert torch.equal(model(**INPUTS, return_dict=False)[0], twin(**INPUTS, return_dict=False)[0])
    if call in ("skip_layers", "controlnet"):
        assert not torch.allclose(base, velocity(twin))
    # The same through the blocks that carry the third stream.
    assert torch.equal(velocity(model, layout=LAYOUT.dropped(), **kwargs), base)
    assert not torch.allclose(velocity(model, layout=LAYOUT, **kwargs), base, atol=1e-2)


def test_scale_zero_is_the_base_and_the_scale_matters() -> None:
    model = tiny_transformer()
    base, full = velocity(model), velocity(model, layout=LAYOUT)
    assert torch.equal(velocity(model, layout=LAYOUT, layout_scale=0.0), base)
    half = velocity(model, layout=LAYOUT, layout_scale=0.5)
    assert 1e-2 < (half - base).abs().max() < (full - base).abs().max()
    assert not torch.allclose(half, full, atol=1e-3)


# -- names and sizes


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_added_name_contains_layout_and_the_last_block_has_no_mlp(variant: str) -> None:
    model = tiny_transformer(**VARIANTS[variant])
    ours, base = set(model.state_dict()), set(plain_twin(model).state_dict())
    assert base < ours
    assert all("layout" in name for name in ours - base)
    assert {n for n, _ in model.named_modules() if n.endswith("layout_mlp.fc2")} == {
        "layout_processor.layout_mlp.fc2",
        "transformer_blocks.0.layout_stream.layout_mlp.fc2",
        "transformer_blocks.1.layout_stream.layout_mlp.fc2",
    }


def test_the_last_blocks_residual_reaches_the_image() -> None:
    model = tiny_transformer()
    before = velocity(model, layout=LAYOUT)
    torch.nn.init.zeros_(model.transformer_blocks[2].layout_stream.out_proj.weight)
    assert not torch.allclose(velocity(model, layout=LAYOUT), before, atol=1e-3)


# -- trap 5: padding and no layout


def test_without_mask_padding_the_nulls_are_attended_to() -> None:
    model = tiny_transformer(mask_padding=False)
    base, three = velocity(model), velocity(model, layout=LAYOUT)
    assert not torch.allclose(
        velocity(model, layout=tiny_layout(slots=9)), three, atol=1e-3
    )  # the amount of padding counts
    assert not torch.allclose(velocity(model, layout=LAYOUT.dropped()), base, atol=1e-3)  # and an all-null layout acts
    masked = tiny_transformer()  # the same weights
    full = with_mask(LAYOUT, [[True] * 3] * 2)
    torch.testing.assert_close(velocity(masked, layout=full), velocity(model, layout=full), atol=2e-6, rtol=0)
    # The null features are parameters that this mode trains.
    model(**INPUTS, layout=LAYOUT).sample.square().mean().backward()
    assert model.layout_processor.null_phrase.grad.any()
    assert model.layout_processor.null_box.grad.any()


# -- trap 6: Fourier features in fp32


def test_boxes_keep_their_resolution_in_a_bf16_model() -> None:
    processor = LayoutProcessor(48, 32).to(torch.bfloat16)
    near = [0.9004, 0.9014]  # one thousandth apart, the same number in bf16
    assert torch.tensor(near).bfloat16().unique().numel() == 1
    features: list[torch.Tensor] = []
    processor.layout_mlp.register_forward_pre_hook(lambda _, args: features.append(args[0][..., 32:].float()))
    for right in near:
        boxes = torch.tensor([[[0.1, 0.1, right, 0.5]]])
        layout = LayoutInputs(boxes, torch.zeros(1, 1, 48), torch.ones(1, 1, dtype=torch.bool)).to(dtype=torch.bfloat16)
        assert layout.boxes.dtype is torch.float32
        processor(layout)
    # 56 rad per unit is the highest frequency: 0.001 moves its sine or cosine by up to 0.056.
    assert (features[0] - features[1]).abs().max() > 0.03
    exact = torch.tensor([56.2341 * near[1]]).sin()
    assert (features[1] - exact).abs().min() < 4e-3  # only the rounding of the feature itself to bf16


# -- trap 9: dropped layouts


def test_a_dropped_layout_keeps_the_graph_with_gradients_of_zero() -> None:
    model = tiny_transformer()
    add_layout_lora(model)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(**INPUTS).sample.mean().backward()
    model(**INPUTS, layout=LAYOUT.dropped()).sample.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in lora_parameters(model))
    model(**INPUTS, layout=LAYOUT).sample.square().mean().backward()
    assert all(p.grad.any() for p in lora_parameters(model))


def test_the_attention_backend_reaches_our_processors() -> None:
    model = tiny_transformer()
    model.set_attention_backend("_native_math")
    backends = {str(p._attention_backend) for p in model.attn_processors.values()}
    assert len(model.attn_processors) == 6  # three blocks, the base's attention and ours
    assert len(backends) == 1
    assert backends.pop().endswith("NATIVE_MATH")


# -- the interface


def test_riding_in_the_attention_kwargs_is_the_same_as_the_arguments() -> None:
    model = tiny_transformer()
    riding = {"layout": LAYOUT, "layout_scale": 0.5, "scale": 1.0}
    assert torch.equal(velocity(model, joint_attention_kwargs=riding), velocity(model, layout=LAYOUT, layout_scale=0.5))
    assert riding.keys() == {"layout", "layout_scale", "scale"}  # left as it was, for the next step
    mixed = velocity(model, layout=LAYOUT, joint_attention_kwargs={"layout_scale": 0.5})
    assert torch.equal(mixed, velocity(model, layout=LAYOUT, layout_scale=0.5))
    with pytest.raises(ValueError, match="give it once"):
        velocity(model, layout=LAYOUT, joint_attention_kwargs={"layout": LAYOUT})


def test_a_layout_of_the_doubled_batch_means_its_second_half() -> None:
    model = tiny_transformer()
    doubled = LayoutInputs.cat([LAYOUT.dropped(), LAYOUT])
    assert torch.equal(velocity(model, layout=doubled), velocity(model, layout=LAYOUT))
    for wrong in (LAYOUT[:1], tiny_layout((1, 1, 1)), LayoutInputs.cat([LAYOUT] * 3)):
        with pytest.raises(ValueError, match="layouts for a batch of 2"):
            velocity(model, layout=wrong)
    with pytest.raises(ValueError, match="a phrase is 20 wide, this model takes 48"):
        velocity(model, layout=tiny_layout(width=20))


def test_layout_inputs_refuse_what_does_not_fit() -> None:
    boxes, phrases, mask = torch.zeros(2, 3, 4), torch.zeros(2, 3, 48), torch.ones(2, 3, dtype=torch.bool)
    LayoutInputs(boxes, phrases, mask)
    for wrong in (
        (boxes[:, :2], phrases, mask),
        (boxes, phrases[:1], mask),
        (boxes, phrases, mask.float()),
        (boxes, phrases[0], mask),
    ):
        with pytest.raises(ValueError, match="must be"):
            LayoutInputs(*wrong)
    assert len(LAYOUT[1:]) == 1
    repeated = LAYOUT.repeat_interleave(2)
    assert torch.equal(repeated.mask, LAYOUT.mask[[0, 0, 1, 1]])
    assert torch.equal(repeated.boxes, LAYOUT.boxes[[0, 0, 1, 1]])


def test_unknown_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="layout_attention is 'other'"):
        LayoutSD3Transformer2DModel(**SD3_CONFIG, layout_attention="other")
    with pytest.raises(ValueError, match="layout_init is 'copy'; known: copy_text, copy_image, random"):
        tiny_transformer().reset_layout_stream(seed=0, init="copy")
