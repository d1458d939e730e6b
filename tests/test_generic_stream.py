"""The generic layout stream on the real transformer class of every family, at a tiny size."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.lora import add_layout_lora, load_adapter, merge_adapter, save_adapter
from mmdit_lora.models import (
    LayoutInputs,
    add_layout_stream,
    load_layout_stream,
    remove_layout_stream,
    save_layout_stream,
)
from mmdit_lora.models.generic_stream import StreamModel, stream_blocks, stream_parameters
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from tests.streams import MAKERS
from tests.streams.common import seeded

FAMILIES = sorted(STREAM_FAMILIES)
SIDE = 8  # of the latents
NULLS = {"layout_processor.null_phrase", "layout_processor.null_box"}  # padding is masked, so they are never read


def stock(family: str) -> Any:
    with seeded(0):
        return MAKERS[family].transformer()


def open_stream(family: str, *, seed: int = 1, **options: Any) -> Any:
    """With random gates and modulation: it stands for a trained stream."""
    model = stock(family)
    add_layout_stream(model, **options)
    with seeded(seed), torch.no_grad():
        for name, parameter in stream_parameters(model).items():
            if any(part in name for part in ("out_proj", "time_image", "time_layout")):
                parameter.normal_(std=0.3)
    return model


def text_inputs(family: str, count: int = 3) -> dict[str, Tensor]:
    """As the family's own pipeline encodes captions."""
    with seeded(2), torch.no_grad():
        pipe = MAKERS[family].pipeline(stock(family))
        length = MAKERS[family].SAMPLING.get("max_sequence_length", 48)
        return STREAM_FAMILIES[family].captions(pipe, [f"a thing {'x' * n}" for n in range(count)], length)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def inputs(family: str) -> dict[str, Tensor]:
    described = STREAM_FAMILIES[family]
    with seeded(3):
        x = torch.randn(3, described.channels(stock(family).config), SIDE, SIDE)
        return {"x": x, "t": torch.tensor([0.2, 0.5, 0.9]), **text_inputs(family)}


def layouts(model: Any, *, slots: int = 4) -> LayoutInputs:
    """Of three samples: two boxes, four, none."""
    with seeded(4):
        boxes = torch.rand(3, 4, 4).sort(-1).values
        phrases = torch.randn(3, 4, model.phrase_dim)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    more = slots - 4
    pad = lambda value: torch.cat([value, value.new_full((3, more, *value.shape[2:]), 7)], 1)  # noqa: E731
    return LayoutInputs(pad(boxes), pad(phrases), torch.cat([mask, mask.new_zeros(3, more)], 1))


def velocity(model: Any, inputs: dict[str, Tensor], *, rows: slice = slice(None), **layout: Any) -> Tensor:
    described = STREAM_FAMILIES[model.stream_family.name if isinstance(model, StreamModel) else family_name(model)]
    dtype = next(model.parameters()).dtype
    each = {name: value[rows] for name, value in inputs.items()}
    each = {name: v.to(dtype) if v.is_floating_point() and name != "t" else v for name, v in each.items()}
    arguments = described.inputs(model, each.pop("x"), each.pop("t"), each, 1.0)
    return described.outputs(model(**arguments, **layout, return_dict=False)[0], SIDE, SIDE)


def family_name(model: Any) -> str:
    return next(name for name, described in STREAM_FAMILIES.items() if described.transformer == type(model).__name__)


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    velocity(model, inputs, layout=layouts(model)).float().pow(2).mean().backward()
    return {n.replace("_orig_mod.", ""): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train_stream(model: Any) -> Any:
    model.requires_grad_(False)
    for parameter in stream_parameters(model).values():
        parameter.requires_grad_(True)
    return model


# --- the contract


def test_without_a_layout_or_with_zero_gates_it_is_the_stock_model(family: str, inputs: dict[str, Tensor]) -> None:
    expected = velocity(stock(family), inputs)
    model = stock(family)
    report = add_layout_stream(model)
    assert report.blocks == len(stream_blocks(model, model.stream_family)) > 1
    assert report.parameters == sum(p.numel() for p in stream_parameters(model).values())
    assert torch.equal(velocity(model, inputs), expected)
    assert torch.equal(velocity(model, inputs, layout=layouts(model)), expected)
    opened = open_stream(family)
    assert torch.equal(velocity(opened, inputs, layout=layouts(opened), layout_scale=0.0), expected)
    assert torch.equal(velocity(opened, inputs, layout=layouts(opened).dropped()), expected)
    moved = velocity(opened, inputs, layout=layouts(opened))
    assert torch.equal(moved[2], expected[2]), "a sample without boxes is the base"
    assert ((moved - expected).abs().amax((1, 2, 3)) > 1e-3).tolist() == [True, True, False]


def test_padding_neighbours_and_order_of_boxes_do_not_matter(family: str, inputs: dict[str, Tensor]) -> None:
    model = open_stream(family)
    layout = layouts(model)
    expected = velocity(model, inputs, layout=layout)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(velocity(model, inputs, layout=layouts(model, slots=7)), expected, **close)
    alone = velocity(model, inputs, rows=slice(1, 2), layout=layout[1:2])
    torch.testing.assert_close(alone, expected[1:2], **close)
    order = torch.tensor([3, 1, 0, 2])
    shuffled = LayoutInputs(layout.boxes[:, order], layout.phrase_embeds[:, order], layout.mask[:, order])
    torch.testing.assert_close(velocity(model, inputs, layout=shuffled), expected, **close)
    other = LayoutInputs(layout.boxes.flip(-1), layout.phrase_embeds, layout.mask)
    assert (velocity(model, inputs, layout=other) - expected)[:2].abs().max() > 1e-4, "boxes are read"


@pytest.mark.parametrize("attention", ["siamese", "cross"])
def test_gradients_reach_all_of_the_stream_and_nothing_else(
    family: str, inputs: dict[str, Tensor], attention: str
) -> None:
    model = train_stream(open_stream(family, attention=attention))
    reached = {name for name, gradient in gradients(model, inputs).items() if gradient.any()}
    assert reached == stream_parameters(model).keys() - NULLS


def test_checkpointing_changes_nothing(family: str, inputs: dict[str, Tensor]) -> None:
    model = train_stream(open_stream(family)).train()
    expected = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    again = gradients(model, inputs)
    assert expected.keys() == again.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_regional_compilation_changes_nothing(family: str, inputs: dict[str, Tensor]) -> None:
    model = train_stream(open_stream(family)).train()
    expected, base = gradients(model, inputs), velocity(model, inputs)
    out = velocity(model, inputs, layout=layouts(model))
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(velocity(model, inputs, layout=layouts(model)), out)
    assert torch.equal(velocity(model, inputs), base)
    compiled = gradients(model, inputs)
    assert all(torch.equal(compiled[name], expected[name]) for name in expected)


def test_in_bf16_it_is_near_and_without_boxes_the_stock_model(family: str, inputs: dict[str, Tensor]) -> None:
    model = open_stream(family)
    exact = velocity(model, inputs, layout=layouts(model))
    model.to(torch.bfloat16)
    rounded = velocity(model, inputs, layout=layouts(model)).float()
    assert (rounded - exact).abs().max() < 0.15 * exact.abs().max()
    assert torch.equal(velocity(model, inputs), velocity(stock(family).to(torch.bfloat16), inputs))


def test_offloading_takes_the_stream_along(family: str, inputs: dict[str, Tensor]) -> None:
    model = open_stream(family)
    expected = velocity(model, inputs, layout=layouts(model))
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    assert torch.equal(velocity(model, inputs, layout=layouts(model)), expected)
    offloaded = stock(family)
    offloaded.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="add the layout stream first, then offload"):
        add_layout_stream(offloaded)


def test_a_stream_is_saved_loaded_and_taken_off(family: str, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = open_stream(family)
    expected = velocity(model, inputs, layout=layouts(model))
    save_layout_stream(model, tmp_path / "stream")
    assert {path.name for path in (tmp_path / "stream").iterdir()} >= {"layout_stream.safetensors", "config.json"}
    other = stock(family)
    load_layout_stream(other, tmp_path / "stream")
    assert torch.equal(velocity(other, inputs, layout=layouts(other)), expected)
    model.save_pretrained(tmp_path / "base")
    opened = type(stock(family)).from_pretrained(tmp_path / "base")
    assert {n: v.sum() for n, v in opened.state_dict().items()} == {
        n: v.sum() for n, v in stock(family).state_dict().items()
    }
    assert stream_parameters(model), "saving leaves the stream where it is"
    plain, before = stock(family), vars(stock(family)).keys()
    remove_layout_stream(other)
    assert type(other) is type(plain)
    assert vars(other).keys() == before
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(velocity(other, inputs), velocity(plain, inputs))


def test_an_adapter_is_added_saved_loaded_and_merged(family: str, inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model = open_stream(family)
    base = velocity(model, inputs, layout=layouts(model))
    report = add_layout_lora(model)
    blocks = len(stream_blocks(model, model.stream_family))
    assert len(report.targets) == 2 * blocks, "of every block but the last, and of the processor"
    assert not report.zero_gates
    assert not report.dead_targets
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".lora_" in name and "layout_mlp" in name for name in trained)
    with seeded(5), torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    expected = velocity(model, inputs, layout=layouts(model))
    assert (expected - base).abs().max() > 1e-4
    assert torch.equal(velocity(model, inputs), velocity(stock(family), inputs)), (
        "the adapter acts through layouts alone"
    )
    save_adapter(model, tmp_path / "adapter", metadata={})
    other = open_stream(family)
    load_adapter(other, tmp_path / "adapter")
    torch.testing.assert_close(velocity(other, inputs, layout=layouts(other)), expected, atol=1e-6, rtol=1e-5)
    merged = merge_adapter(other)
    torch.testing.assert_close(velocity(merged, inputs, layout=layouts(merged)), expected, atol=1e-5, rtol=1e-4)


def sampled(pipe: Any, family: str, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    size = SIDE * STREAM_FAMILIES[family].vae_scale_factor
    settings = {
        "num_inference_steps": 2,
        "height": size,
        "width": size,
        "output_type": "latent",
        **MAKERS[family].SAMPLING,
    }
    with torch.no_grad():
        images = pipe(
            prompt="a red circle", generator=torch.Generator().manual_seed(0), **{**settings, **options}
        ).images
    return np.asarray(images[0] if isinstance(images, list) else images)


def test_its_stock_pipeline_paints_with_and_without_a_layout(family: str) -> None:
    with seeded(6):
        plain = MAKERS[family].pipeline(stock(family))
        pipe = MAKERS[family].pipeline(open_stream(family))
    for name, part in plain.components.items():  # random weights: the same ones
        if isinstance(part, nn.Module) and name != "transformer":
            pipe.components[name].load_state_dict(part.state_dict())
    expected = sampled(plain, family)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(sampled(pipe, family), expected)
    model = pipe.transformer
    layout = layouts(model)[1:2]
    alternates = model.stream_family.guidance == "alternate"
    seen: list[bool] = []
    begin = model._begin
    model._begin = lambda *args: seen.append(True) or begin(*args)
    calls: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(True))
    with model.with_layout(layout, alternates=alternates):
        moved = sampled(pipe, family)
    hook.remove()
    assert np.isfinite(moved).all()
    assert np.abs(moved - expected).max() > 1e-4
    doubled = model.stream_family.guidance in ("calls", "alternate") and len(calls) > 2
    assert len(seen) == (len(calls) // 2 if doubled else len(calls)), "calls without text have no layout"
    with model.with_layout(layout, 0.0, alternates=alternates):
        np.testing.assert_array_equal(sampled(pipe, family), expected)
    np.testing.assert_array_equal(sampled(pipe, family), expected)  # nothing outlives the context
    assert model.layout_call.stream is None


# --- what does not depend on the family


def test_two_threads_and_a_copy_do_not_disturb_one_another() -> None:
    family = "sd3"
    model = open_stream(family)
    with seeded(3):
        inputs = {"x": torch.randn(3, 4, SIDE, SIDE), "t": torch.tensor([0.2, 0.5, 0.9]), **text_inputs(family)}
    layout = layouts(model)
    expected = {True: velocity(model, inputs, layout=layout), False: velocity(model, inputs)}
    wrong: list[bool] = []

    def work(with_layout: bool) -> None:
        for _ in range(20):
            out = velocity(model, inputs, **({"layout": layout} if with_layout else {}))
            wrong.append(not torch.equal(out, expected[with_layout]))

    threads = [threading.Thread(target=work, args=(with_layout,)) for with_layout in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 60
    twin = copy.deepcopy(model)
    assert twin.layout_call is not model.layout_call
    assert all(block.layout_call is twin.layout_call for block, _ in stream_blocks(twin, twin.stream_family))
    assert torch.equal(velocity(twin, inputs, layout=layout), expected[True])


@pytest.mark.parametrize(
    ("options", "said"),
    [({"attention": "both"}, "attention is 'both'"), ({"width": 7}, "width is 7"), ({"width": 33}, "width is 33")],
)
def test_what_cannot_be_built_is_refused(options: dict[str, Any], said: str) -> None:
    model = stock("sd3")
    with pytest.raises(ValueError, match=said):
        add_layout_stream(model, **options)
    assert type(model) is type(stock("sd3"))
    add_layout_stream(model)
    with pytest.raises(ValueError, match="has a layout stream already"):
        add_layout_stream(model)
    with pytest.raises(ValueError, match="no layout stream for a Linear"):
        add_layout_stream(nn.Linear(2, 2))


def test_a_stream_of_another_base_width_or_family_is_refused(tmp_path: Path) -> None:
    save_layout_stream(open_stream("sd3", width=16), tmp_path / "stream")
    with seeded(9):
        another = MAKERS["sd3"].transformer()
    with pytest.raises(InputError, match="was trained on another base"):
        load_layout_stream(another, tmp_path / "stream")
    assert not isinstance(another, StreamModel)
    with pytest.raises(InputError, match="is of the family sd3, and this transformer of flux2"):
        load_layout_stream(stock("flux2"), tmp_path / "stream")
    config = tmp_path / "stream" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"width": 32, "heads": 2}))
    model = stock("sd3")
    with pytest.raises(InputError, match="another shape"):
        load_layout_stream(model, tmp_path / "stream")
    assert not isinstance(model, StreamModel)
    (tmp_path / "stream" / "layout_stream.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="is not a whole safetensors file"):
        load_layout_stream(model, tmp_path / "stream")
    with pytest.raises(InputError, match="no layout stream"):
        load_layout_stream(model, tmp_path / "nothing")
