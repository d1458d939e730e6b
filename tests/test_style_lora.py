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
from tests.pipeline_makers import FAMILIES, RED, differ, generate, open_pipeline, stock_of
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
    plain = generate(pipe, prompt="a red circle")
    for each in (pipe, stock):
        each.load_lora_weights(files["style"], adapter_name="style")
    styled = generate(pipe, prompt="a red circle")
    assert differ(styled, plain)
    assert np.array_equal(styled, generate(stock, "a red circle"))
    places = {name for name, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert places == {name for name, m in stock.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert not is_layout_adapter(pipe.transformer, "style")
    pipe.unload_lora_weights()
    assert np.array_equal(generate(pipe, prompt="a red circle"), plain)


def test_both_act_and_the_style_is_left_as_it_was(pipe: Any, files: dict[str, Path]) -> None:
    transformer = pipe.transformer
    bare = generate(pipe, RED)
    pipe.load_lora_weights(files["style"], adapter_name="style")
    pipe.set_adapters("style", 0.6)
    style_alone = generate(pipe, RED)
    assert base_fingerprint(transformer) == base_fingerprint(open_pipeline_again(pipe).transformer)
    before, names = adapter_state(transformer, "style"), [n for n, _ in transformer.named_parameters()]
    assert all(state[:2] == (1.2, True) for state in before.values())  # 0.6 x alpha / r

    load_adapter(transformer, files["layout"], adapter_name="layout")
    assert transformer.active_adapters() == ["style", "layout"]
    assert equal_states(adapter_state(transformer, "style"), before)
    both = generate(pipe, RED)

    layout_pipe = open_pipeline_again(pipe)
    load_adapter(layout_pipe.transformer, files["layout"], adapter_name="layout")
    layout_alone = generate(layout_pipe, RED)
    assert all(differ(a, b) for a, b in ((both, style_alone), (both, layout_alone), (both, bare), (style_alone, bare)))
    # Weights of both can be chosen in one place.
    pipe.set_adapters(["style", "layout"], [0.0, 1.0])
    np.testing.assert_allclose(generate(pipe, RED), layout_alone, atol=1e-5)
    pipe.set_adapters(["style", "layout"], [0.6, 1.0])
    assert np.array_equal(generate(pipe, RED), both)

    remove_adapter(transformer, "layout")
    assert transformer.active_adapters() == ["style"]
    assert equal_states(adapter_state(transformer, "style"), before)
    assert [n for n, _ in transformer.named_parameters()] == names  # no empty LoRA layer is left in the stream
    assert np.array_equal(generate(pipe, RED), style_alone)


def test_a_style_on_top_of_a_layout_adapter_and_off_again(pipe: Any, files: dict[str, Path]) -> None:
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    layout_alone = generate(pipe, RED)
    before = adapter_state(pipe.transformer, "layout")
    pipe.load_lora_weights(files["style"], adapter_name="style")
    assert pipe.transformer.active_adapters() == ["layout", "style"]
    assert equal_states(adapter_state(pipe.transformer, "layout"), before)
    both = generate(pipe, RED)
    assert differ(both, layout_alone)

    other = open_pipeline_again(pipe)
    other.load_lora_weights(files["style"], adapter_name="style")
    load_adapter(other.transformer, files["layout"], adapter_name="layout")
    assert np.array_equal(generate(other, RED), both)  # the order does not matter

    pipe.delete_adapters("style")
    assert equal_states(adapter_state(pipe.transformer, "layout"), before)
    assert np.array_equal(generate(pipe, RED), layout_alone)


def test_what_is_off_stays_off(pipe: Any, files: dict[str, Path]) -> None:
    pipe.load_lora_weights(files["style"], adapter_name="style")
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    pipe.set_adapters("layout")
    layout_alone = generate(pipe, RED)
    load_adapter(pipe.transformer, files["layout"], adapter_name="again", allow_same=True)
    assert pipe.transformer.active_adapters() == ["layout", "again"]
    remove_adapter(pipe.transformer, "again")
    assert pipe.transformer.active_adapters() == ["layout"]
    assert np.array_equal(generate(pipe, RED), layout_alone)
    # The only active one goes: nothing takes its place.
    remove_adapter(pipe.transformer, "layout")
    assert pipe.transformer.active_adapters() == []
    assert not any(active for _, active, *_ in adapter_state(pipe.transformer, "style").values())
    assert np.array_equal(generate(pipe, RED), generate(open_pipeline_again(pipe), RED))


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


# -- several adapters of one pipeline: switched off, chosen, fused, named

TO_Q, FF = "transformer.transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.ff.net.2"


def te_q(pipe: Any) -> str:
    """A linear of CLIP-L, whose class names it differently in the two families."""
    (name,) = (n for n, _ in pipe.text_encoder.named_modules() if n.endswith("encoder.layers.0.self_attn.q_proj"))
    return f"text_encoder.{name}"


def lora_of(pipe: Any, *modules: str, seed: int = 1) -> dict[str, Tensor]:
    """A style on these modules, `<component>.<name>`."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in modules:
        component, _, module = name.partition(".")
        linear = getattr(pipe, component).get_submodule(module)
        linear = getattr(linear, "base_layer", linear)
        state[f"{name}.lora_A.weight"] = torch.randn(2, linear.in_features, generator=generator)
        state[f"{name}.lora_B.weight"] = torch.randn(linear.out_features, 2, generator=generator)
    return state


def test_what_is_loaded_after_disable_lora_acts_wholly_and_alone(pipe: Any, files: dict[str, Path]) -> None:
    one, two = lora_of(pipe, TO_Q, te_q(pipe)), lora_of(pipe, TO_Q, FF, seed=2)

    def fresh(*loads: Any) -> Any:
        made = open_pipeline_again(pipe)
        for load in loads:
            load(made)
        return made

    def style(pipe: Any) -> None:
        pipe.load_lora_weights(two, adapter_name="two")

    def by_the_transformer(pipe: Any) -> None:
        state = {key.removeprefix("transformer."): value for key, value in two.items()}
        pipe.transformer.load_lora_adapter(state, prefix=None, adapter_name="two")

    def layout(pipe: Any) -> None:
        load_adapter(pipe.transformer, files["layout"], adapter_name="layout")

    def added(pipe: Any) -> None:
        add_layout_lora(pipe.transformer, peft.LoraConfig(target_modules=["attn.to_q"]), adapter_name="added")
        trained_adapter(pipe.transformer, "added", seed=9)

    def added_by_diffusers(pipe: Any) -> None:
        pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["attn.to_q"]), "added")
        trained_adapter(pipe.transformer, "added", seed=9)

    def layout_style(pipe: Any) -> None:
        pipe.load_lora_weights(files["layout"], adapter_name="layout")

    for load in (style, by_the_transformer, layout, layout_style, added, added_by_diffusers):
        switched = fresh(lambda made: made.load_lora_weights(one, adapter_name="one"))
        switched.disable_lora()
        load(switched)
        assert np.array_equal(generate(switched, RED), generate(fresh(load), RED)), load.__name__
        (name,) = switched.transformer.active_adapters()
        assert name != "one"
        # Chosen again, both act, in every component.
        switched.set_adapters(["one", name])
        both = fresh(lambda made: made.load_lora_weights(one, adapter_name="one"), load)
        both.set_adapters(["one", name])
        assert np.array_equal(generate(switched, RED), generate(both, RED)), load.__name__


def test_a_load_that_is_refused_leaves_what_is_switched_off_as_it_is(pipe: Any, files: dict[str, Path]) -> None:
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    pipe.disable_lora()
    with pytest.raises(InputError, match="on the model already"):
        load_adapter(pipe.transformer, files["layout"], adapter_name="again")
    remove = lora_of(pipe, TO_Q)
    pipe.load_lora_weights(remove, adapter_name="style")
    pipe.set_adapters(["layout", "style"])
    pipe.disable_lora()
    before = adapter_state(pipe.transformer, "layout")
    assert all(active and disabled for _, active, disabled, *_ in before.values())
    with pytest.raises(InputError, match="is loaded already, as 'style'"):
        pipe.load_lora_weights(remove, adapter_name="again")
    remove_adapter(pipe.transformer, "style")
    assert equal_states(adapter_state(pipe.transformer, "layout"), before)
    pipe.enable_lora()
    assert all(not disabled for _, _, disabled, *_ in adapter_state(pipe.transformer, "layout").values())


def test_adapters_are_chosen_once_by_names_that_are_loaded(pipe: Any, files: dict[str, Path]) -> None:
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    clip_q = te_q(pipe)
    pipe.load_lora_weights(lora_of(pipe, TO_Q, clip_q), adapter_name="style")
    pipe.set_adapters(["layout", "style"], [1.0, 0.5])
    before = [adapter_state(pipe.transformer, name) for name in ("layout", "style")]
    for names, weights, says in (
        (["layout", "layout"], None, "'layout': is named twice"),
        ([], None, "no adapter is named"),
        (["nope"], None, "'nope': no such adapter\n  hint: loaded: layout, style"),
        (5, None, "5: no such adapter"),
        (None, None, "None: no such adapter"),
        (["layout"], [1.0, 2.0], "2 weights for 1 adapters"),
    ):
        for target in (pipe, pipe.transformer):
            with pytest.raises(InputError, match=says):
                target.set_adapters(names, weights)
    for weights, says in (
        ({"zz": 1.0}, "the weights name 'zz'.*\n.*transformer, text_encoder.*loaded: layout, style"),
        ({"transformer": {"x_x": 1}}, "'x_x' is in the name of no module"),
        ({"text_encoder": {"x_x": 1}}, "'x_x' is in the name of no module"),
    ):
        with pytest.raises(InputError, match=says):
            pipe.set_adapters("style", weights)
    with pytest.raises(InputError, match="'x_x' is in the name of no module"):
        pipe.transformer.set_adapters("style", {"x_x": 1})
    for call in (
        pipe.delete_adapters,
        pipe.transformer.delete_adapters,
        lambda name: pipe.set_lora_device(name, "cpu"),
    ):
        with pytest.raises(InputError, match="'nope': no such adapter\n  hint: loaded: layout, style"):
            call("nope")
    for state, name in zip(before, ("layout", "style"), strict=True):
        assert equal_states(adapter_state(pipe.transformer, name), state)
    # By component and block, of two that share one dict.
    pipe.set_adapters(["layout", "style"], {"transformer": {"transformer_blocks.0": 0.25}, "text_encoder": 0.5})
    scales = {n: s for name in ("layout", "style") for n, (s, *_) in adapter_state(pipe.transformer, name).items()}
    assert {n: s for n, s in scales.items() if n == TO_Q.removeprefix("transformer.")} == {
        "transformer_blocks.0.attn.to_q": 0.25
    }
    assert all(s == (0.5 if "transformer_blocks.0." in n else 2.0) for n, s in scales.items() if "layout" in n)
    assert adapter_state(pipe.text_encoder, "style")[clip_q.removeprefix("text_encoder.")][0] == 0.5
    pipe.delete_adapters("style")
    assert pipe.get_list_adapters() == {"transformer": ["layout"]}


def test_a_style_on_a_text_encoder_alone_is_chosen_fused_and_deleted(pipe: Any) -> None:
    plain = generate(pipe, RED)
    pipe.load_lora_weights(lora_of(pipe, te_q(pipe)), adapter_name="style")
    styled = generate(pipe, RED)
    assert differ(styled, plain)
    pipe.set_adapters("style", 0.0)
    np.testing.assert_allclose(generate(pipe, RED), plain, atol=1e-6)
    pipe.set_adapters("style")
    pipe.fuse_lora(adapter_names="style")
    np.testing.assert_allclose(generate(pipe, RED), styled, atol=1e-4)
    with pytest.raises(InputError, match="fused into the weights: style"):
        pipe.delete_adapters("style")
    pipe.unfuse_lora()
    pipe.delete_adapters(["style"])
    np.testing.assert_allclose(generate(pipe, RED), plain, atol=1e-4)


def test_a_fused_adapter_is_neither_removed_nor_joined(pipe: Any, files: dict[str, Path], tmp_path: Path) -> None:
    plain = generate(pipe, RED)
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    save_adapter(
        pipe.transformer,
        tmp_path / "stated",
        metadata={"base": "tiny", "fingerprint": base_fingerprint(pipe.transformer)},
        adapter_name="layout",
    )
    with_layout = generate(pipe, RED)
    pipe.fuse_lora()
    fused = generate(pipe, RED)
    np.testing.assert_allclose(fused, with_layout, atol=1e-4)
    for call in (
        lambda: remove_adapter(pipe.transformer, "layout"),
        lambda: pipe.delete_adapters("layout"),
        lambda: pipe.transformer.delete_adapters(["layout"]),
        lambda: pipe.set_adapters("layout", 0.5),  # would be unfused by half
        lambda: pipe.transformer.set_adapters("layout", 0.5),
        lambda: pipe.fuse_lora(lora_scale=0.5),
        lambda: load_adapter(pipe.transformer, tmp_path / "stated", adapter_name="again"),
        lambda: pipe.load_lora_weights(tmp_path / "stated"),
        lambda: pipe.load_lora_weights(lora_of(pipe, TO_Q)),
        lambda: add_layout_lora(pipe.transformer),
        lambda: pipe.transformer.add_adapter(peft.LoraConfig(target_modules=["attn.to_q"])),
    ):
        with pytest.raises(InputError, match=r"fused into the weights: layout\n  hint: call `unfuse_lora\(\)` first"):
            call()
    assert np.array_equal(generate(pipe, RED), fused)
    pipe.unfuse_lora()
    np.testing.assert_allclose(generate(pipe, RED), with_layout, atol=1e-4)
    pipe.fuse_lora()
    pipe.unload_lora_weights()  # diffusers' way to keep it in the weights
    np.testing.assert_allclose(generate(pipe, RED), with_layout, atol=1e-4)
    assert differ(with_layout, plain)
    with pytest.raises(InputError, match="layout was fused into them, and unloaded"):
        load_adapter(pipe.transformer, tmp_path / "stated")


@pytest.mark.parametrize("scale", [float("nan"), 1e300, 3000, "x", None, True])
def test_only_a_number_scales_what_is_fused(pipe: Any, files: dict[str, Path], scale: Any) -> None:
    load_adapter(pipe.transformer, files["layout"], adapter_name="layout")
    for target in (pipe, pipe.transformer):
        with pytest.raises(InputError, match="lora_scale: is "):
            target.fuse_lora(lora_scale=scale)
        with pytest.raises(InputError, match="'nope': no such adapter\n  hint: loaded: layout"):
            target.fuse_lora(adapter_names=["layout", "nope"])
    with pytest.raises(InputError, match="'vae' carries no LoRA"):
        pipe.fuse_lora(["vae"])
    assert not any(m.merged for m in pipe.transformer.modules() if isinstance(m, BaseTunerLayer))


@pytest.mark.parametrize("name", ["a.b", "", 5, None, "keys", ["a"]])
def test_an_adapter_has_a_name_that_a_module_can_have(pipe: Any, files: dict[str, Path], name: Any) -> None:
    config = peft.LoraConfig(target_modules=["attn.to_q"])
    calls = [
        lambda: load_adapter(pipe.transformer, files["layout"], adapter_name=name),
        lambda: add_layout_lora(pipe.transformer, adapter_name=name),
        lambda: pipe.transformer.add_adapter(config, name),
    ]
    if name is not None:  # which is diffusers' own word for any name
        calls += [
            lambda: pipe.load_lora_weights(files["layout"], adapter_name=name),
            lambda: pipe.load_lora_weights(files["style"], adapter_name=name),
            lambda: pipe.transformer.load_lora_adapter({}, adapter_name=name),
        ]
    for call in calls:
        with pytest.raises(InputError, match="adapter_name: is "):
            call()
    assert pipe.get_list_adapters() == {}
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_a_pipeline_that_peft_wrapped_says_so(pipe: Any, files: dict[str, Path]) -> None:
    pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, str(files["layout"]))
    wrapped = generate(pipe, RED)
    for call, model in (
        (lambda: load_adapter(pipe.transformer, files["layout"]), "model"),
        (lambda: remove_adapter(pipe.transformer), "model"),
        (lambda: add_layout_lora(pipe.transformer), "model"),
        (lambda: pipe.load_lora_weights(files["layout"]), "pipe.transformer"),
        (lambda: pipe.load_lora_weights(files["style"]), "pipe.transformer"),
    ):
        with pytest.raises(InputError) as refusal:
            call()
        assert f"{model}: is a PeftModel around a " in str(refusal.value)
        assert f"has adapters already: default\n  hint: take `{model}.get_base_model()`" in str(refusal.value)
    pipe.transformer = pipe.transformer.get_base_model()
    assert np.array_equal(generate(pipe, RED), wrapped)
    with pytest.raises(InputError, match="on the model already, as 'default'"):
        load_adapter(pipe.transformer, files["layout"], adapter_name="again")
    pipe.load_lora_weights(files["style"], adapter_name="style")
    pipe.delete_adapters("style")
    assert np.array_equal(generate(pipe, RED), wrapped)


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
    before = tuple(pipe.encode_caption("a red circle").values())
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
    after = tuple(pipe.encode_caption("a red circle").values())
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
    plain = generate(pipe, prompt="a red circle")
    for each in (pipe, stock):
        each.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    styled = generate(pipe, prompt="a red circle")
    assert differ(styled, plain)
    assert np.array_equal(styled, generate(stock, "a red circle"))
    places = {name for name, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(places) == 5
    assert not any("layout" in name for name in places)
