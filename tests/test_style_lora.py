"""Style LoRAs made elsewhere (diffusers and kohya names) beside a layout adapter, on both families."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from diffusers.training_utils import _collate_lora_metadata
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.lora import (
    add_layout_lora,
    base_fingerprint,
    is_layout_adapter,
    load_adapter,
    merge_adapter,
    remove_adapter,
    save_adapter,
)
from tests.pipeline_makers import FAMILIES, RED, differ, open_pipeline, paint, stock_of
from tests.tiny import VARIANTS, plain_twin, tiny_pipeline, tiny_transformer, trained_adapter

SHORT_NAMES = ["to_q", "to_k", "to_v", "to_out.0"]  # as training scripts write them: they fit the layout stream's too


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def files(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A style LoRA that diffusers' own training code would write, and a layout adapter."""
    folder = tmp_path_factory.mktemp(family)
    pipe = open_pipeline(family, folder / "vocabulary")
    stock = stock_of(pipe)
    stock.transformer.add_adapter(peft.LoraConfig(r=3, lora_alpha=6, target_modules=SHORT_NAMES))
    trained_adapter(stock.transformer, seed=8)
    type(stock).save_lora_weights(
        folder / "style",
        transformer_lora_layers=peft.get_peft_model_state_dict(stock.transformer),
        **_collate_lora_metadata({"transformer": stock.transformer}),
    )
    add_layout_lora(pipe.transformer)
    trained_adapter(pipe.transformer)
    save_adapter(pipe.transformer, folder / "layout", metadata={})
    return {"style": folder / "style" / "pytorch_lora_weights.safetensors", "layout": folder / "layout"}


@pytest.fixture
def pipe(family: str, tmp_path: Path) -> Any:
    return open_pipeline(family, tmp_path)


def adapter_state(transformer: nn.Module, name: str) -> dict[str, Any]:
    """Where an adapter sits, how strong, whether it acts, and its weights."""
    layers = {n: m for n, m in transformer.named_modules() if isinstance(m, BaseTunerLayer) and name in m.scaling}
    return {
        n: (
            m.scaling[name],
            name in m.active_adapters,
            m.disable_adapters,
            m.lora_A[name].weight,
            m.lora_B[name].weight,
        )
        for n, m in layers.items()
    }


def equal_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        a[n][:3] == b[n][:3] and torch.equal(a[n][3], b[n][3]) and torch.equal(a[n][4], b[n][4]) for n in a
    )


def test_a_style_acts_as_on_the_stock_pipeline_and_leaves_the_stream_alone(pipe: Any, files: dict[str, Path]) -> None:
    stock = stock_of(pipe)
    plain = paint(pipe, prompt="a red circle")
    for each in (pipe, stock):
        each.load_lora_weights(files["style"], adapter_name="style")
    styled = paint(pipe, prompt="a red circle")
    assert differ(styled, plain)
    assert np.array_equal(styled, paint(stock, "a red circle"))
    places = {name for name, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert places == {name for name, m in stock.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert not is_layout_adapter(pipe.transformer, "style")
    pipe.unload_lora_weights()
    assert np.array_equal(paint(pipe, prompt="a red circle"), plain)


def test_both_act_and_the_style_is_left_as_it_was(pipe: Any, files: dict[str, Path]) -> None:
    transformer = pipe.transformer
    bare = paint(pipe, RED)
    pipe.load_lora_weights(files["style"], adapter_name="style")
    pipe.set_adapters("style", 0.6)
    style_alone = paint(pipe, RED)
    assert base_fingerprint(transformer) == base_fingerprint(open_pipeline_again(pipe).transformer)
    before, names = adapter_state(transformer, "style"), [n for n, _ in transformer.named_parameters()]
    assert all(state[:2] == (1.2, True) for state in before.values())  # 0.6 x alpha / r

    load_adapter(transformer, files["layout"], adapter_name="layout")
    assert transformer.active_adapters() == ["style", "layout"]
    assert equal_states(adapter_state(transformer, "style"), before)
    both = paint(pipe, RED)

    layout_pipe = open_pipeline_again(pipe)
    load_adapter(layout_pipe.transformer, files["layout"], adapter_name="layout")
    layout_alone = paint(layout_pipe, RED)
    assert all(differ(a, b) for a, b in ((both, style_alone), (both, layout_alone), (both, bare), (style_alone, bare)))
    # Weights of both can be chosen in one place.
    pipe.set_adapters(["style", "layout"], [0.0, 1.0])
    np.testing.assert_allclose(paint(pipe, RED), layout_alone, atol=1e-5)
    pipe.set_adapters(["style", "layout"], [0.6, 1.0])
    assert np.array_equal(paint(pipe, RED), both)

    remove_adapter(transformer, "layout")
    assert transformer.active_adapters() == ["style"]
    assert equal_states(adapter_state(transformer, "style"), before)
    assert [n for n, _ in transformer.named_parameters()] == names  # no empty LoRA layer is left in the stream
    assert np.array_equal(paint(pipe, RED), style_alone)


def test_a_style_on_top_of_a_layout_adapter_and_off_again(pipe: Any, files: dict[str, Path]) -> None:
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    layout_alone = paint(pipe, RED)
    before = adapter_state(pipe.transformer, "layout")
    pipe.load_lora_weights(files["style"], adapter_name="style")
    assert pipe.transformer.active_adapters() == ["layout", "style"]
    assert equal_states(adapter_state(pipe.transformer, "layout"), before)
    both = paint(pipe, RED)
    assert differ(both, layout_alone)

    other = open_pipeline_again(pipe)
    other.load_lora_weights(files["style"], adapter_name="style")
    load_adapter(other.transformer, files["layout"], adapter_name="layout")
    assert np.array_equal(paint(other, RED), both)  # the order does not matter

    pipe.delete_adapters("style")
    assert equal_states(adapter_state(pipe.transformer, "layout"), before)
    assert np.array_equal(paint(pipe, RED), layout_alone)


def test_what_is_off_stays_off(pipe: Any, files: dict[str, Path]) -> None:
    pipe.load_lora_weights(files["style"], adapter_name="style")
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    pipe.set_adapters("layout")
    layout_alone = paint(pipe, RED)
    load_adapter(pipe.transformer, files["layout"], adapter_name="again", allow_same=True)
    assert pipe.transformer.active_adapters() == ["layout", "again"]
    remove_adapter(pipe.transformer, "again")
    assert pipe.transformer.active_adapters() == ["layout"]
    assert np.array_equal(paint(pipe, RED), layout_alone)
    # The only active one goes: nothing takes its place.
    remove_adapter(pipe.transformer, "layout")
    assert pipe.transformer.active_adapters() == []
    assert not any(active for _, active, *_ in adapter_state(pipe.transformer, "style").values())
    assert np.array_equal(paint(pipe, RED), paint(open_pipeline_again(pipe), RED))


def test_a_layout_adapter_trains_beside_a_frozen_style(pipe: Any, files: dict[str, Path]) -> None:
    pipe.load_lora_weights(files["style"], adapter_name="style")
    report = add_layout_lora(pipe.transformer, adapter_name="layout")
    trained = [name for name, p in pipe.transformer.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * len(report.targets)
    assert all("layout" in name and ".layout." in name for name in trained)
    assert pipe.transformer.active_adapters() == ["style", "layout"]


def test_a_pickle_is_refused(pipe: Any, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "style.bin")
    for call in ({"weight_name": "style.bin"}, {}):
        with pytest.raises(InputError, match="pickle"):
            pipe.load_lora_weights(str(tmp_path if call else tmp_path / "style.bin"), **call)


def test_a_lora_of_something_else_is_refused(pipe: Any) -> None:
    other = {"unet.mid.to_q.lora_A.weight": torch.ones(2, 8), "unet.mid.to_q.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(InputError, match="no LoRA for this pipeline"):
        pipe.load_lora_weights(other)
    assert pipe.get_list_adapters() == {}


def open_pipeline_again(pipe: Any) -> Any:
    """The same pipeline without any LoRA."""
    components = {name: copy.deepcopy(part) for name, part in pipe.components.items()}
    fresh = type(pipe)(**components, max_sequence_length=pipe.config.max_sequence_length)
    if hasattr(fresh.transformer, "peft_config"):
        fresh.transformer.unload_lora()
    fresh.set_progress_bar_config(disable=True)
    return fresh


# -- kohya's names


def original_names(transformer: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of the original code: what diffusers' single-file conversion takes."""
    state = dict(transformer.state_dict())
    blocks = len(transformer.transformer_blocks)
    out = {
        "pos_embed": state["pos_embed.pos_embed"],
        **{f"x_embedder.proj.{kind}": state[f"pos_embed.proj.{kind}"] for kind in ("weight", "bias")},
    }

    def put(original: str, *ours: str, swap: bool = False) -> None:
        for kind in ("weight", "bias"):
            if f"{ours[0]}.{kind}" in state:
                value = torch.cat([state[f"{name}.{kind}"] for name in ours])
                out[f"{original}.{kind}"] = torch.cat(value.chunk(2)[::-1]) if swap else value

    for index in (0, 2):
        put(f"t_embedder.mlp.{index}", f"time_text_embed.timestep_embedder.linear_{index // 2 + 1}")
        put(f"y_embedder.mlp.{index}", f"time_text_embed.text_embedder.linear_{index // 2 + 1}")
    put("context_embedder", "context_embedder")
    put("final_layer.linear", "proj_out")
    put("final_layer.adaLN_modulation.1", "norm_out.linear", swap=True)
    for index in range(blocks):
        old, new = f"joint_blocks.{index}", f"transformer_blocks.{index}"
        for attention in ("attn", "attn2"):
            put(f"{old}.x_block.{attention}.qkv", *(f"{new}.{attention}.to_{kind}" for kind in "qkv"))
            put(f"{old}.x_block.{attention}.proj", f"{new}.{attention}.to_out.0")
            for kind in "qk":
                put(f"{old}.x_block.{attention}.ln_{kind}", f"{new}.{attention}.norm_{kind}")
        put(f"{old}.context_block.attn.qkv", *(f"{new}.attn.add_{kind}_proj" for kind in "qkv"))
        put(f"{old}.context_block.attn.proj", f"{new}.attn.to_add_out")
        for kind in "qk":
            put(f"{old}.context_block.attn.ln_{kind}", f"{new}.attn.norm_added_{kind}")
        put(f"{old}.x_block.adaLN_modulation.1", f"{new}.norm1.linear")
        put(f"{old}.context_block.adaLN_modulation.1", f"{new}.norm1_context.linear", swap=index == blocks - 1)
        for side, ff in (("x_block", "ff"), ("context_block", "ff_context")):
            put(f"{old}.{side}.mlp.fc1", f"{new}.{ff}.net.0.proj")
            put(f"{old}.{side}.mlp.fc2", f"{new}.{ff}.net.2")
    return out


def kohya_lora(original: dict[str, Tensor], *, rank: int = 3, alpha: float = 2.0) -> dict[str, Tensor]:
    """Random LoRA on every linear and convolution, as sd-scripts writes it."""
    generator = torch.Generator().manual_seed(4)
    state = {}
    for key, value in original.items():
        if key == "pos_embed" or not key.endswith(".weight") or value.ndim < 2:
            continue
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        ones = (1, 1) if value.ndim == 4 else ()
        state[f"{name}.lora_down.weight"] = torch.randn(rank, *value.shape[1:], generator=generator) * 0.3
        state[f"{name}.lora_up.weight"] = torch.randn(value.shape[0], rank, *ones, generator=generator) * 0.3
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_kohya_deltas_are_those_of_the_original_weights(variant: str, tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(tmp_path, tiny_transformer(**VARIANTS[variant]))
    plain = plain_twin(pipe.transformer).state_dict()
    original = original_names(pipe.transformer)
    back = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert back.keys() == plain.keys()
    assert all(torch.equal(back[name], plain[name]) for name in plain)  # the table of this test is diffusers' own

    lora = kohya_lora(original)
    patched = dict(original)
    for key in original:
        name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
        if f"{name}.alpha" in lora:
            down, up = lora[f"{name}.lora_down.weight"], lora[f"{name}.lora_up.weight"]
            patched[key] = original[key] + 2.0 / 3 * (up.flatten(1) @ down.flatten(1)).view_as(original[key])
    expected = convert_sd3_transformer_checkpoint_to_diffusers(patched)

    save_file(lora, tmp_path / "style.safetensors")
    pipe.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    merged = merge_adapter(pipe.transformer).state_dict()
    changed = 0
    for name, value in plain.items():
        torch.testing.assert_close(merged[name], expected[name], atol=1e-5, rtol=1e-5)
        changed += not torch.equal(merged[name], value)
    # Every weight has moved; no bias, no norm, no position, and nothing of the layout stream.
    assert changed == sum(1 for name, value in plain.items() if name.endswith(".weight") and value.ndim > 1)
    fresh = tiny_transformer(**VARIANTS[variant]).state_dict()
    assert all(torch.equal(merged[name], fresh[name]) for name in fresh if "layout" in name)


def test_kohya_text_encoders_are_adapted_too(tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    before = pipe.encode_caption("a red circle")
    generator = torch.Generator().manual_seed(1)
    state = {}
    for number in (1, 2):
        for part, size_out, size_in in (
            ("self_attn_q_proj", 16, 16),
            ("self_attn_out_proj", 16, 16),
            ("mlp_fc1", 32, 16),
        ):
            name = f"lora_te{number}_text_model_encoder_layers_0_{part}"
            state[f"{name}.lora_down.weight"] = torch.randn(2, size_in, generator=generator)
            state[f"{name}.lora_up.weight"] = torch.randn(size_out, 2, generator=generator)
    pipe.load_lora_weights(state, adapter_name="style")
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        adapted = [name for name, m in encoder.named_modules() if isinstance(m, BaseTunerLayer)]
        assert sorted(name.split("layers.")[1] for name in adapted) == [
            "0.mlp.fc1",
            "0.self_attn.out_proj",
            "0.self_attn.q_proj",
        ]
    after = pipe.encode_caption("a red circle")
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", {}),
        ("lora_unet_joint_blocks_0_x_block_attn_qq", {}),
        ("lora_unet_double_blocks_0_img_attn_qkv", {}),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", {"hada_w1_a": torch.ones(2, 2)}),
    ],
)
def test_kohya_names_without_a_place_are_listed(name: str, extra: dict[str, Tensor], tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(tmp_path)
    state = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    state |= {f"{name}.{leaf}": value for leaf, value in extra.items()}
    with pytest.raises(InputError, match=name):
        pipe.load_lora_weights(state)
    assert not hasattr(pipe.transformer, "peft_config")


def test_kohya_flux_is_what_the_stock_pipeline_makes_of_it(tmp_path: Path) -> None:
    pipe = open_pipeline("flux", tmp_path)
    generator = torch.Generator().manual_seed(1)
    sizes = {
        "double_blocks_0_img_attn_qkv": (96, 32),
        "double_blocks_1_txt_mlp_0": (128, 32),
        "single_blocks_1_linear2": (32, 160),
    }
    state = {}
    for name, (size_out, size_in) in sizes.items():
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(4, size_in, generator=generator) * 0.5
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(size_out, 4, generator=generator) * 0.5
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "style.safetensors")
    stock = stock_of(pipe)
    plain = paint(pipe, prompt="a red circle")
    for each in (pipe, stock):
        each.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    styled = paint(pipe, prompt="a red circle")
    assert differ(styled, plain)
    assert np.array_equal(styled, paint(stock, "a red circle"))
    places = {name for name, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(places) == 5
    assert not any("layout" in name for name in places)
