"""Style LoRA files of every tool: the exact change of our weights, or a refusal that leaves everything as it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.lora import load_adapter, save_adapter
from mmdit_lora.lora.inject import add_layout_lora
from mmdit_lora.lora.style import StyleReport
from tests.pipeline_makers import RED, attention_kwargs_seen, differ, generate
from tests.style_makers import AB, ENCODERS, METHODS, NAMES, PLACES, Make, Maker, StyleFile, make_pipe
from tests.tiny import trained_adapter

CASES = [
    pytest.param(family, make, id=f"{family}: {kind}: {name}")
    for kind, table in (("names", NAMES), ("encoders", ENCODERS), ("method", METHODS))
    for family, dialects in table.items()
    for name, make in dialects.items()
]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {family: make_pipe(family, tmp_path_factory.mktemp(family)) for family in PLACES}


def load(pipe: Any, file: StyleFile, folder: Path, **options: Any) -> StyleReport:
    header = {"lora_adapter_metadata": json.dumps(file.metadata)} if file.metadata else {}
    save_file(file.tensors, folder / "adapter_model.safetensors", {"format": "pt", **header})
    if file.config:
        (folder / "adapter_config.json").write_text(json.dumps(file.config))
    return pipe.load_lora_weights(folder / "adapter_model.safetensors", adapter_name="style", **options)


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline's models that a load could change."""
    found: dict[str, Any] = {}
    for component in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        model: Any = getattr(pipe, component, None)
        if model is None:
            continue
        found[component] = {
            "numbers": {
                n: p.detach().numpy().tobytes() for n, p in (*model.named_parameters(), *model.named_buffers())
            },
            "trained": {n: p.requires_grad for n, p in model.named_parameters()},
            "modules": {n: (type(m), m.training, len(m._forward_hooks)) for n, m in model.named_modules()},
            "layers": {
                n: (list(m.active_adapters), dict(m.scaling), m.disable_adapters)
                for n, m in model.named_modules()
                if isinstance(m, BaseTunerLayer)
            },
            "adapters": sorted(getattr(model, "peft_config", {})),
            "config": hasattr(model, "peft_config"),
            "loaded": bool(getattr(model, "_hf_peft_config_loaded", False)),
        }
    return found


def changes(pipe: Any, report: StyleReport) -> StyleFile:
    """What the loaded layers would add to their weights."""
    found = StyleFile()
    for component, modules in report.used.items():
        model: Any = getattr(pipe, component)
        for name in modules:
            layer = model.get_submodule(name)
            before = layer.get_base_layer()
            weight, bias = before.weight.detach().double(), before.bias
            plain = None if bias is None else bias.detach().double()
            layer.double().merge(adapter_names=["style"])
            after = layer.get_base_layer()
            found.weights[component, name] = (after.weight.detach() - weight).flatten(1)
            if plain is not None and layer.lora_bias["style"]:
                found.biases[component, name] = after.bias.detach() - plain
            layer.unmerge()
            layer.float()
    return found


@pytest.mark.parametrize(("family", "make"), CASES)
def test_a_file_changes_the_weights_as_a_merge_by_hand(
    family: str, make: Make, pipes: dict[str, Any], tmp_path: Path
) -> None:
    pipe = pipes[family]
    maker, before = Maker(pipe), snapshot(pipe)
    make(maker)
    expected = maker.file
    report = load(pipe, expected, tmp_path)
    try:
        found = changes(pipe, report)
    finally:
        pipe.unload_lora_weights()
    assert found.weights.keys() == expected.weights.keys()
    assert not report.ignored
    for place, weight in expected.weights.items():
        scale = max(weight.abs().max().item(), 1.0)
        assert (found.weights[place] - weight).abs().max() <= 1e-6 * scale, place
        bias = expected.biases.get(place)
        if bias is not None:
            assert (found.biases[place] - bias).abs().max() <= 1e-6 * scale, place
        elif place in found.biases:
            assert not found.biases[place].any(), place
    after = snapshot(pipe)
    for component in before:
        assert after[component]["numbers"] == before[component]["numbers"]


def linears_of_double_and_single_blocks(transformer: Any) -> dict[str, tuple[str, ...]]:
    """The original code's name of every linear, as diffusers' conversion of weights has them, and ours."""
    found: dict[str, tuple[str, ...]] = {"img_in": ("x_embedder",), "txt_in": ("context_embedder",)}
    found |= {"final_layer.linear": ("proj_out",), "final_layer.adaLN_modulation.1": ("norm_out.linear",)}
    for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        for side, number in (("in", 1), ("out", 2)):
            found[f"{theirs}.{side}_layer"] = (f"time_text_embed.{ours}_embedder.linear_{number}",)
    for i in range(len(transformer.transformer_blocks)):
        old, new = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for side, ff, norm in (("img", "ff", "norm1"), ("txt", "ff_context", "norm1_context")):
            found |= {f"{old}.{side}_mlp.{n}": (f"{new}.{ff}.net.{m}",) for n, m in ((0, "0.proj"), (2, "2"))}
            found[f"{old}.{side}_mod.lin"] = (f"{new}.{norm}.linear",)
        found[f"{old}.img_attn.qkv"] = tuple(f"{new}.attn.to_{kind}" for kind in "qkv")
        found[f"{old}.txt_attn.qkv"] = tuple(f"{new}.attn.add_{kind}_proj" for kind in "qkv")
        found |= {f"{old}.{s}_attn.proj": (f"{new}.attn.{o}",) for s, o in (("img", "to_out.0"), ("txt", "to_add_out"))}
    for i in range(len(transformer.single_transformer_blocks)):
        old, new = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        found[f"{old}.linear1"] = (*(f"{new}.attn.to_{kind}" for kind in "qkv"), f"{new}.proj_mlp")
        found |= {f"{old}.linear2": (f"{new}.proj_out",), f"{old}.modulation.lin": (f"{new}.norm.linear",)}
    return found


def test_every_linear_of_double_and_single_blocks_has_its_place(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["flux"]
    maker = Maker(pipe)
    linears = linears_of_double_and_single_blocks(pipe.transformer)
    for theirs, ours in linears.items():
        maker.lora("lora_unet_" + theirs.replace(".", "_"), ours, swapped=theirs.startswith("final_layer.adaLN"))
    report = load(pipe, maker.file, tmp_path)
    try:
        found = changes(pipe, report)
    finally:
        pipe.unload_lora_weights()
    base = {n for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and "layout" not in n}
    assert {name for _, name in found.weights} == base
    for place, weight in maker.file.weights.items():
        assert (found.weights[place] - weight).abs().max() <= 1e-6, place


def test_a_style_for_all_parts_is_mixed_fused_and_taken_off(tmp_path: Path, pipes: dict[str, Any]) -> None:
    for family, pipe in pipes.items():
        maker = Maker(pipe)
        (NAMES[family]["sd-scripts"], ENCODERS[family]["sd-scripts"])[0](maker)
        ENCODERS[family]["sd-scripts"](maker)
        plain = generate(pipe, prompt="a red circle")
        load(pipe, maker.file, tmp_path)
        styled = generate(pipe, prompt="a red circle")
        assert differ(styled, plain)
        pipe.set_adapters(["style"], [0.0])
        np.testing.assert_allclose(generate(pipe, prompt="a red circle"), plain, atol=1e-6)
        pipe.set_adapters(["style"], [1.0])
        pipe.fuse_lora(adapter_names=["style"])
        fused = {c: getattr(pipe, c) for c in {component for component, _ in maker.file.weights}}
        assert all(any(isinstance(m, BaseTunerLayer) and m.merged for m in model.modules()) for model in fused.values())
        np.testing.assert_allclose(generate(pipe, prompt="a red circle"), styled, atol=1e-4)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        np.testing.assert_allclose(generate(pipe, prompt="a red circle"), plain, atol=1e-4)


@pytest.mark.parametrize("scale", [0, 0.5, -1.0, 2])
def test_the_scale_of_a_call_is_that_of_set_adapters_in_every_part(scale: float, pipes: dict[str, Any]) -> None:
    for family, pipe in pipes.items():
        whole, encoders, t5 = Maker(pipe), Maker(pipe), Maker(pipe)
        NAMES[family]["sd-scripts"](whole)
        ENCODERS[family]["sd-scripts"](encoders)
        component = "text_encoder_3" if family == "sd3" else "text_encoder_2"
        module = "encoder.block.0.layer.0.SelfAttention.v"
        t5.lora(f"lora_te3_{module.replace('.', '_')}", (module,), component=component)
        strong = {key: value * 2 for key, value in t5.file.tensors.items()}  # T5 says little in so small a base

        def seen(pipe: Any, **attention: Any) -> tuple[np.ndarray, Tensor]:
            options = {"guidance_scale": 3.0, "joint_attention_kwargs": attention}
            return generate(pipe, RED, **options), attention_kwargs_seen(pipe, RED, **options)[0][
                "layout"
            ].phrase_embeds

        for tensors in (strong, encoders.file.tensors, whole.file.tensors | encoders.file.tensors):
            pipe.load_lora_weights(tensors, adapter_name="style")
            try:
                full, full_phrases = seen(pipe)
                pipe.set_adapters("style", 0.75 * scale)
                expected, phrases = seen(pipe)
                prompt_embeds = pipe.encode_caption(RED.caption)["embeds"]
                pipe.set_adapters("style", 0.75)
                before = snapshot(pipe)
                scaled, scaled_phrases = seen(pipe, scale=scale)
                np.testing.assert_allclose(scaled, expected, atol=1e-5)
                torch.testing.assert_close(scaled_phrases, phrases, atol=1e-5, rtol=1e-4)
                assert np.abs(scaled - full).max() > 3e-4
                assert torch.equal(full_phrases, phrases) == (tensors is strong)  # CLIP reads them
                assert snapshot(pipe) == before  # after 0, diffusers' own would have forgotten the 0.75
                third = {"prompt_3": None} if family == "sd3" else {}
                options = {"device": "cpu", "max_sequence_length": pipe.config.max_sequence_length}
                found = pipe.encode_prompt(RED.caption, prompt_2=None, **third, **options, lora_scale=scale)[0]
                torch.testing.assert_close(found, prompt_embeds, atol=1e-5, rtol=1e-4)
            finally:
                pipe.unload_lora_weights()


def test_half_a_dora_is_half_the_way(pipes: dict[str, Any], tmp_path: Path) -> None:
    pipe = pipes["sd3"]
    maker = Maker(pipe)
    METHODS["sd3"]["DoRA of columns"](maker)
    report = load(pipe, maker.file, tmp_path)
    assert report.full_rank == len(maker.file.weights)
    pipe.set_adapters(["style"], [0.5])
    try:
        found = changes(pipe, report)
    finally:
        pipe.unload_lora_weights()
    for place, weight in maker.file.weights.items():
        assert (found.weights[place] - weight / 2).abs().max() <= 1e-6


def test_an_encoder_that_the_base_has_not_is_left_out_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = make_pipe("sd3", tmp_path)
    maker = Maker(pipe)
    NAMES["sd3"]["sd-scripts"](maker)
    ENCODERS["sd3"]["sd-scripts"](maker)
    t5 = [name for component, name in maker.file.weights if component == "text_encoder_3"]
    pipe.register_modules(text_encoder_3=None)
    maker.file.tensors["bundle_emb.word.clip_l"] = torch.ones(2, 16)
    with caplog.at_level(logging.WARNING, logger="mmdit_lora"):
        report = load(pipe, maker.file, tmp_path)
    assert [len(names) for names in report.ignored.values()] == [1, len(t5)]
    assert set(report.used) == {"transformer", "text_encoder", "text_encoder_2"}
    assert len(caplog.records) == 1
    assert f"left out: {len(t5)} (this base has no text_encoder_3)" in caplog.text


# -- refusals


def one(maker: Maker, **leaves: Tensor) -> dict[str, Tensor]:
    """One linear's tensors under sd-scripts' name; `__` stands for a dot."""
    _, theirs = PLACES[maker.family]["linear"]
    name = "lora_unet_" + theirs.replace(".", "_")
    return {f"{name}.{leaf.replace('__', '.')}": value for leaf, value in leaves.items()}


def nan(shape: tuple[int, ...]) -> Tensor:
    value = torch.ones(shape)
    value.view(-1)[-1] = float("nan")
    return value


PLAIN = {"lora_down__weight": torch.ones(2, 32), "lora_up__weight": torch.ones(32, 2)}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "GLoRA": ({"a1__weight": torch.ones(2, 2), "b1__weight": torch.ones(2, 2)}, "GLoRA"),
    "OFT": ({"oft_blocks": torch.ones(4, 8, 8)}, "OFT"),
    "BOFT": ({"boft_R": torch.ones(2, 4, 8, 8)}, "BOFT"),
    "IA3": ({"weight": torch.ones(32), "on_input": torch.tensor(1.0)}, "IA3"),
    "a norm": ({"w_norm": torch.ones(32)}, "w_norm"),
    "a replaced weight": ({**PLAIN, "set_weight": torch.ones(32, 32)}, "set_weight"),
    "a widened layer": ({**PLAIN, "reshape_weight": torch.tensor([32.0, 64.0])}, "reshape_weight"),
    "scaled fp8": ({**PLAIN, "scale_weight": torch.tensor(1.0)}, "scaled fp8"),
    "an unknown key": ({**PLAIN, "lora_other": torch.ones(2)}, "lora_other"),
    "half a LoRA": ({"lora_down__weight": torch.ones(2, 32)}, "lacks up"),
    "half a LoHa": ({"hada_w1_a": torch.ones(2, 2)}, "lacks hada_w1_b"),
    "half a LoKr": ({"lokr_w1": torch.ones(4, 4)}, "lacks lokr_w2"),
    "alpha alone": ({"alpha": torch.tensor(1.0)}, "alone"),
    "two methods": ({**PLAIN, "diff": torch.ones(32, 32)}, "diff"),
    "NaN": ({**PLAIN, "lora_up__weight": nan((32, 2))}, "NaN or infinity.*lora_up"),
    "infinity": ({**PLAIN, "lora_up__weight": torch.full((32, 2), float("inf"))}, "NaN or infinity.*lora_up"),
    "NaN in fp8": ({**PLAIN, "lora_up__weight": nan((32, 2)).to(torch.float8_e5m2)}, "NaN or infinity.*lora_up"),
    "alpha NaN": ({**PLAIN, "alpha": torch.tensor(float("nan"))}, "NaN or infinity.*alpha"),
    "alpha infinite": ({**PLAIN, "alpha": torch.tensor(float("-inf"))}, "NaN or infinity.*alpha"),
    "alpha of 1e300": ({**PLAIN, "alpha": torch.tensor(1e300, dtype=torch.float64)}, "not finite"),
    "alpha of 1e10": ({**PLAIN, "alpha": torch.tensor(1e10)}, "by 1e.10, more than 10000"),
    "factors of 1e15": (
        {"lora_down__weight": torch.full((2, 32), 1e15), "lora_up__weight": torch.full((32, 2), 1e15)},
        "more than 10000",
    ),
    "a factor of LoKr whole and in two": (
        {"lokr_w1": torch.ones(4, 4), "lokr_w1_a": torch.ones(4, 1), "lokr_w2": torch.ones(8, 8)},
        "lokr_w1 whole and as factors .lokr_w1_a",
    ),
    "alphas": ({**PLAIN, "alpha": torch.ones(3)}, "alpha has 3"),
    "dora_scale NaN": ({**PLAIN, "dora_scale": nan((32, 1))}, "NaN or infinity.*dora_scale"),
    "dora_scale of another shape": ({**PLAIN, "dora_scale": torch.ones(31, 1)}, "dora_scale has shape"),
    "integers": ({**PLAIN, "lora_up__weight": torch.ones(32, 2, dtype=torch.int8)}, "int8"),
    "other columns": (
        {"lora_down__weight": torch.ones(2, 35), "lora_up__weight": torch.ones(32, 2)},
        "32 x 35.*32 x 32",
    ),
    "other rows": ({"lora_down__weight": torch.ones(2, 32), "lora_up__weight": torch.ones(48, 2)}, "48 x 32.*32 x 32"),
    "two ranks": ({"lora_down__weight": torch.ones(2, 32), "lora_up__weight": torch.ones(32, 3)}, "do not belong"),
    "vectors": ({"lora_down__weight": torch.ones(32), "lora_up__weight": torch.ones(32)}, "do not belong"),
    "rank 0": ({"lora_down__weight": torch.ones(0, 32), "lora_up__weight": torch.ones(32, 0)}, "rank 0"),
    "a bias of another size": ({**PLAIN, "diff_b": torch.ones(31)}, "bias of shape"),
    "LoKr of another size": ({"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(9, 8)}, "36 x 32.*32 x 32"),
    "LoHa of two sizes": (
        {
            f"hada_w{i}_{s}": torch.ones(n, 2) if s == "a" else torch.ones(2, 32)
            for i, n in (("1", 32), ("2", 1))
            for s in "ab"
        },
        "do not belong",
    ),
}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pipelines with a layout adapter and another style on, in training mode."""
    made = {}
    for family in PLACES:
        pipe = make_pipe(family, tmp_path_factory.mktemp(family))
        maker = Maker(pipe, seed=3)
        ENCODERS[family]["diffusers"](maker)
        NAMES[family]["diffusers"](maker)
        add_layout_lora(pipe.transformer, adapter_name="layout")
        trained_adapter(pipe.transformer, "layout")
        pipe.load_lora_weights(maker.file.tensors, adapter_name="other")
        pipe.transformer.train()
        made[family] = pipe
    return made


def refuse(pipe: Any, tensors: Any, match: str, **options: Any) -> None:
    before = snapshot(pipe)
    with pytest.raises(InputError, match=match) as caught:
        pipe.load_lora_weights(tensors, **{"adapter_name": "style", **options})
    assert len(str(caught.value)) < 2000
    assert snapshot(pipe) == before


@pytest.mark.parametrize("family", PLACES)
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exact_is_refused_and_changes_nothing(family: str, case: str, adapted: dict[str, Any]) -> None:
    leaves, match = REFUSED[case]
    pipe = adapted[family]
    good = Maker(pipe)  # what is wrong stands beside what is right
    ENCODERS[family]["sd-scripts"](good)
    refuse(pipe, {**good.file.tensors, **one(good, **leaves)}, match)


@pytest.mark.parametrize("family", PLACES)
def test_names_that_this_base_has_not_are_named(family: str, adapted: dict[str, Any]) -> None:
    pipe = adapted[family]
    maker = Maker(pipe)
    NAMES[family]["diffusers"](maker)
    for name, match in (
        ("transformer.transformer_blocks.30.attn.to_q", r"30\.attn\.to_q \(this base has no block 30\)"),
        ("transformer.transformer_blocks.0.attn.to_x", r"attn\.to_x"),
        ("transformer.time_text_embed.timestep_embedder", "timestep_embedder"),
        ("lora_te1_text_model_encoder_layers_7_mlp_fc1", "no block 7"),
        ("lora_te3_encoder_block_9_layer_0_SelfAttention_q", "no block 9"),
        ("lora_unet_input_blocks_1_1_proj_in", "input_blocks"),
        ("unet.mid.to_q", "unet.mid.to_q"),
    ):
        lora = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
        refuse(pipe, {**maker.file.tensors, **lora}, match)
        refuse(pipe, lora, match)
    other = Maker(adapted["flux" if family == "sd3" else "sd3"])
    NAMES[other.family]["sd-scripts"](other)
    refuse(pipe, other.file.tensors, "modules have no place in this base|no LoRA for this pipeline")
    refuse(pipe, {}, "no LoRA for this pipeline")
    norm = {"flux": "transformer_blocks.0.attn.norm_q", "sd3": "pos_embed"}[family]
    refuse(pipe, {**maker.file.tensors, f"{norm}.diff": torch.ones(4, 4)}, norm)


def test_a_module_that_is_changed_twice_is_refused(adapted: dict[str, Any]) -> None:
    maker = Maker(adapted["sd3"])
    ours, theirs = PLACES["sd3"]["fused"]
    maker.lora(f"lora_unet_{theirs.replace('.', '_')}", ours)
    maker.lora(f"transformer.{ours[1]}", (ours[1],), leaves=AB)
    refuse(adapted["sd3"], maker.file.tensors, "changes .*to_k twice")
    ours, theirs = PLACES["sd3"]["linear"]
    tensors = {f"{ours[0]}.lora_A.weight": torch.ones(2, 32), f"{ours[0]}.lora_down.weight": torch.ones(2, 32)}
    refuse(adapted["sd3"], tensors, "gives down twice")


def test_names_of_adapters(adapted: dict[str, Any]) -> None:
    pipe = adapted["sd3"]
    maker = Maker(pipe)
    NAMES["sd3"]["diffusers"](maker)
    refuse(pipe, maker.file.tensors, "'layout' already", adapter_name="layout")
    refuse(pipe, maker.file.tensors, "without dots", adapter_name="a.b")
    refuse(pipe, maker.file.tensors, "no adapter 'style'", hotswap=True)


def test_files_and_what_stands_beside_them(adapted: dict[str, Any], tmp_path: Path) -> None:
    pipe = adapted["sd3"]
    maker = Maker(pipe)
    NAMES["sd3"]["PEFT"](maker)
    refuse(pipe, tmp_path / "none.safetensors", "cannot be read|no such")
    refuse(pipe, tmp_path, "holds 0 .safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00")
    refuse(pipe, tmp_path / "broken.safetensors", "cannot be read")
    save_file(maker.file.tensors, tmp_path / "two.safetensors")
    refuse(pipe, tmp_path, "holds 2 .safetensors files: broken.safetensors, two.safetensors")
    for config, match in (
        ("{", "is not JSON"),
        ("[]", "list"),
        ('{"peft_type": "LOHA"}', "LOHA"),
        ('{"lora_alpha": NaN}', "holds NaN"),
        ('{"lora_alpha": "4"}', "lora_alpha is '4'"),
        ('{"lora_alpha": 1e300}', "lora_alpha is 1e.300"),
        ('{"lora_alpha": 1, "alpha_pattern": {"(.*)*x": 4}}', "alpha_pattern"),
    ):
        (tmp_path / "adapter_config.json").write_text(config)
        refuse(pipe, tmp_path / "two.safetensors", match)
    (tmp_path / "adapter_config.json").unlink()
    report = pipe.load_lora_weights(tmp_path, weight_name="two.safetensors", adapter_name="style")
    assert report.adapter_name == "style"
    pipe.delete_adapters("style")


def test_a_load_that_fails_half_way_leaves_nothing(
    adapted: dict[str, Any], pipes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transformer has its part already when the text encoder's fails."""
    for pipe in (adapted["flux"], pipes["flux"]):
        maker = Maker(pipe)
        NAMES["flux"]["diffusers"](maker)
        ENCODERS["flux"]["diffusers"](maker)
        before = snapshot(pipe)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(peft, "set_peft_model_state_dict", fail)
            with pytest.raises(RuntimeError, match="out of memory"):
                pipe.load_lora_weights(maker.file.tensors, adapter_name="style")
        assert snapshot(pipe) == before


def test_an_alpha_that_was_given_as_an_integer_is_one(pipes: dict[str, Any]) -> None:
    pipe = pipes["sd3"]
    maker = Maker(pipe)
    pipe.load_lora_weights(one(maker, **PLAIN, alpha=torch.tensor(3)), adapter_name="style")
    layer = pipe.transformer.get_submodule(PLACES["sd3"]["linear"][0][0])
    assert layer.scaling["style"] == 1.5
    pipe.unload_lora_weights()


def test_headers_that_say_nothing_sensible(adapted: dict[str, Any], tmp_path: Path) -> None:
    pipe = adapted["sd3"]
    maker = Maker(pipe)
    NAMES["sd3"]["diffusers"](maker)
    for number, (header, match) in enumerate(
        (
            ("[1]", "no JSON object"),
            ("{", "cannot be read"),
            ('{"transformer.lora_alpha": [4]}', r"lora_alpha is \[4\]"),
            ('{"transformer.alpha_pattern": 4}', "alpha_pattern is 4"),
            ('{"transformer.use_rslora": "false", "transformer.lora_alpha": 4}', "use_rslora is 'false'"),
        )
    ):
        file = tmp_path / f"{number}.safetensors"
        save_file(maker.file.tensors, file, {"format": "pt", "lora_adapter_metadata": header})
        refuse(pipe, file, match)
    refuse(pipe, None, "is a NoneType")


def test_a_style_that_does_nothing_is_refused_and_keys_with_the_adapters_name_are_named(
    adapted: dict[str, Any],
) -> None:
    pipe = adapted["sd3"]
    maker = Maker(pipe)
    refuse(pipe, one(maker, **PLAIN, alpha=torch.tensor(0.0)), "every alpha in it is 0")
    key = "base_model.model.transformer_blocks.0.attn.to_q.lora_A.style.weight"
    refuse(pipe, {key: torch.ones(2, 32)}, r"no part of a LoRA .*lora_A\.style\.weight")


def test_a_layout_adapter_that_states_no_alpha_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = make_pipe("sd3", tmp_path / "a")
    add_layout_lora(pipe.transformer, adapter_name="layout")
    trained_adapter(pipe.transformer, "layout")
    found = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="layout")
    plain = {f"transformer.{name}": value.contiguous() for name, value in found.items()}
    pipe.transformer.unload_lora()
    save_file(plain, tmp_path / "plain.safetensors")
    targets = [name.removeprefix("transformer.").partition(".lora_")[0] for name in plain]
    stated = {"transformer.r": 16, "transformer.lora_alpha": 32, "transformer.target_modules": sorted(set(targets))}
    save_file(plain, tmp_path / "stated.safetensors", {"format": "pt", "lora_adapter_metadata": json.dumps(stated)})
    for source, warned in (
        (plain, True),
        (tmp_path / "plain.safetensors", True),
        (tmp_path / "stated.safetensors", False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="mmdit_lora"):
            pipe.load_lora_weights(source, adapter_name="layout")
        assert ("no alpha is stated" in caplog.text) == warned
        pipe.transformer.unload_lora()


def test_weights_are_put_in_place_of_others(pipes: dict[str, Any]) -> None:
    pipe = pipes["flux"]
    makers = [Maker(pipe, seed=seed) for seed in (1, 2)]
    for maker in makers:
        NAMES["flux"]["sd-scripts"](maker)
    pipe.load_lora_weights(makers[0].file.tensors, adapter_name="style")
    report = pipe.load_lora_weights(makers[1].file.tensors, adapter_name="style", hotswap=True)
    assert pipe.transformer.active_adapters() == ["style"]
    try:
        found = changes(pipe, report)
    finally:
        pipe.unload_lora_weights()
    for place, weight in makers[1].file.weights.items():
        assert (found.weights[place] - weight).abs().max() <= 1e-6, place


def test_the_callers_tensors_are_neither_changed_nor_shared(pipes: dict[str, Any]) -> None:
    pipe = pipes["sd3"]
    maker = Maker(pipe)
    NAMES["sd3"]["sd-scripts"](maker)
    kept = {key: value.clone() for key, value in maker.file.tensors.items()}
    pipe.load_lora_weights(maker.file.tensors, adapter_name="style")
    own = {p.data_ptr() for p in pipe.transformer.parameters()}
    assert len(own) == len(list(pipe.transformer.parameters()))
    assert not own & {value.data_ptr() for value in maker.file.tensors.values()}
    pipe.unload_lora_weights()
    assert all(torch.equal(value, kept[key]) for key, value in maker.file.tensors.items())


def test_a_layout_adapter_saved_by_diffusers_loads_as_with_load_adapter(tmp_path: Path) -> None:
    pipe = make_pipe("sd3", tmp_path / "a")
    add_layout_lora(pipe.transformer, adapter_name="layout")
    trained_adapter(pipe.transformer, "layout")
    save_adapter(pipe.transformer, tmp_path / "adapter", metadata={}, adapter_name="layout")
    pipe.transformer.unload_lora()
    weights: dict[str, dict[str, Tensor]] = {}
    for way in ("load_adapter", "load_lora_weights"):
        if way == "load_adapter":
            load_adapter(pipe.transformer, tmp_path / "adapter", adapter_name="layout")
        else:
            pipe.load_lora_weights(tmp_path / "adapter", adapter_name="layout")
        layers = {n: m for n, m in pipe.transformer.named_modules() if isinstance(m, BaseTunerLayer)}
        weights[way] = {n: m.get_delta_weight("layout").detach() for n, m in layers.items()}
        assert {type(m.lora_dropout["layout"]) for m in layers.values()} <= {nn.Identity, nn.Dropout}
        pipe.transformer.unload_lora()
    assert weights["load_adapter"].keys() == weights["load_lora_weights"].keys()
    assert all(torch.equal(value, weights["load_lora_weights"][n]) for n, value in weights["load_adapter"].items())
