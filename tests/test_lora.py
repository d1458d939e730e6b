"""LoRA on the layout stream: what trains and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from mmdit_lora.errors import InputError
from mmdit_lora.lora import (
    add_layout_lora,
    default_lora_config,
    describe_lora,
    load_adapter,
    lora_parameters,
    refuse_zero_gates,
    remove_adapter,
    save_adapter,
)
from mmdit_lora.models import LayoutSD3Transformer2DModel
from tests.tiny import SD3_MEDIUM, tiny_inputs, tiny_layout, tiny_transformer, trained_adapter, velocity

INPUTS, LAYOUT = tiny_inputs(), tiny_layout()


# -- trap 1: freezing after injecting


def test_the_blog_recipe_trains_nothing_and_ours_does() -> None:
    blog = tiny_transformer()
    for block in blog.transformer_blocks[:-1]:
        stream = block.layout_stream
        stream.layout_mlp = peft.get_peft_model(stream.layout_mlp, peft.LoraConfig(target_modules=["fc1", "fc2"]))
    blog.requires_grad_(False)
    assert any("lora_A" in name for name, _ in blog.named_parameters())
    assert not any(p.requires_grad for p in blog.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        velocity(blog).square().mean().backward()

    ours = tiny_transformer()
    ours.requires_grad_(True)  # whatever the model came with
    add_layout_lora(ours)
    trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
    modules = [f"transformer_blocks.{i}.layout_stream.layout_mlp" for i in range(2)] + ["layout_processor.layout_mlp"]
    assert trainable == {f"{m}.fc{k}.lora_{ab}.default.weight" for m in modules for k in (1, 2) for ab in "AB"}
    before = {name: p.clone() for name, p in ours.named_parameters()}
    velocity(ours).square().mean().backward()
    torch.optim.SGD(lora_parameters(ours), lr=1.0).step()
    assert {n for n, p in ours.named_parameters() if not torch.equal(p, before[n])} == {
        n for n in trainable if "lora_B" in n
    }


# -- trap 2: dead gates


def test_zero_gates_are_listed_starve_the_lora_and_are_refused() -> None:
    fresh = tiny_transformer(open_gates=False)
    report = add_layout_lora(fresh)
    assert report.zero_gates == [f"transformer_blocks.{i}.layout_stream.out_proj" for i in range(3)]
    assert report.dead_targets == report.targets
    trained_adapter(fresh)  # even then
    velocity(fresh).square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in lora_parameters(fresh))
    with pytest.raises(InputError, match="pretrain the layout stream first") as refusal:
        refuse_zero_gates(report)
    assert "method: layout_stream" in str(refusal.value)
    assert "import" in str(refusal.value)

    trained = add_layout_lora(tiny_transformer())
    assert trained.zero_gates == trained.dead_targets == []
    refuse_zero_gates(trained)


def test_targets_behind_the_last_open_gate_are_dead() -> None:
    model = tiny_transformer()
    torch.nn.init.zeros_(model.transformer_blocks[2].layout_stream.out_proj.weight)
    assert add_layout_lora(model).zero_gates == []  # its bias is not zero
    remove_adapter(model)
    torch.nn.init.zeros_(model.transformer_blocks[2].layout_stream.out_proj.bias)
    report = add_layout_lora(model)
    assert report.zero_gates == ["transformer_blocks.2.layout_stream.out_proj"]
    assert report.dead_targets == [f"transformer_blocks.1.layout_stream.layout_mlp.fc{k}" for k in (1, 2)]
    velocity(model).square().mean().backward()
    starved = [n.partition(".lora_B")[0] for n, p in model.named_parameters() if "lora_B" in n and not p.grad.any()]
    assert starved == report.dead_targets
    with pytest.raises(InputError, match="2 targets would never get a gradient"):
        refuse_zero_gates(report)
    # Leaving them out is a cure.
    remove_adapter(model)
    live = peft.LoraConfig(
        target_modules=["transformer_blocks.0.layout_stream.layout_mlp.fc1", "layout_processor.layout_mlp.fc1"]
    )
    refuse_zero_gates(add_layout_lora(model, live))


def test_the_last_text_query_is_a_dead_target() -> None:
    model = tiny_transformer()
    report = add_layout_lora(model, peft.LoraConfig(target_modules=["layout_stream.attn.add_q_proj"]))
    assert report.dead_targets == ["transformer_blocks.2.layout_stream.attn.add_q_proj"]
    velocity(model).square().mean().backward()
    grads = [model.transformer_blocks[i].layout_stream.attn.add_q_proj.lora_B["default"].weight.grad for i in range(3)]
    assert [bool(g is not None and g.any()) for g in grads] == [True, True, False]


# -- trap 3: the exact size on SD3-medium


def test_sd3_medium_has_48_targets_and_5_73_million_parameters() -> None:
    with torch.device("meta"):
        model = LayoutSD3Transformer2DModel(**SD3_MEDIUM)
    assert len(model.transformer_blocks) == 24
    assert sum(hasattr(b.layout_stream, "layout_mlp") for b in model.transformer_blocks) == 23
    report = add_layout_lora(model)
    assert len(report.targets) == 48
    assert not any(name.startswith("transformer_blocks.23.") or "phrase_mlp" in name for name in report.targets)
    # r (in + out), two linears 1536 <-> 6144 a block; 1600 -> 768 -> 1536 in the processor.
    expected = 16 * (23 * 2 * (1536 + 6144) + (1600 + 768) + (768 + 1536))
    assert report.trainable_params == expected == 5_727_232
    assert report.adapter_bytes == 4 * expected
    assert (
        report.total_params == sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n) == 3_308_630_912
    )
    assert report.zero_gates == []  # values are unknown on meta
    assert "48 linears" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["trainable_params"] == expected


# -- trap 4: which gradients arrive when


def test_lora_b_learns_first_then_lora_a_and_nothing_else() -> None:
    model = tiny_transformer().train()
    add_layout_lora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(2):
        velocity(model).square().mean().backward()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                assert parameter.grad.any(), name
            elif "lora_A" in name:
                assert bool(parameter.grad.any()) == (step > 0), name
            else:
                assert parameter.grad is None, name
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name


# -- trap 10: PEFT's silences, and what is not a layout LoRA


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["layout_mlp.fc1", "layout_mlp.fc3"]}, "'layout_mlp.fc3' matches no module"),
        ({"target_modules": r".*layout_mlp\.fc3"}, "matches no module"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"target_modules": ["layout_mlp"]}, "is a LayoutMLP"),
        ({"rank_pattern": {"layout_mlp.fc4": 4}}, "rank_pattern 'layout_mlp.fc4' matches no module"),
        ({"alpha_pattern": {"fc7": 4}}, "alpha_pattern 'fc7' matches no module"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save is set"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"layers_to_transform": [9], "layers_pattern": "transformer_blocks"}, "matches no module"),
    ],
)
def test_a_wrong_config_is_refused_and_leaves_the_model_alone(config: dict[str, Any], message: str) -> None:
    model = tiny_transformer()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        add_layout_lora(model, peft.LoraConfig(**{"target_modules": ["layout_mlp.fc1", "layout_mlp.fc2"], **config}))
    assert [name for name, _ in model.named_parameters()] == names
    assert all(p.requires_grad for p in model.parameters())


def test_the_refusal_names_the_nearest_modules() -> None:
    with pytest.raises(InputError, match=r"did you mean .*'layout_mlp\.fc1'"):
        add_layout_lora(tiny_transformer(), peft.LoraConfig(target_modules=["layout_mlp.fc1", "layout_mpl.fc1"]))


def test_the_config_given_is_not_changed_and_an_existing_name_is_refused() -> None:
    model, config = tiny_transformer(), default_lora_config()
    config.base_model_name_or_path = "mine"
    add_layout_lora(model, config)
    assert config.base_model_name_or_path == "mine"
    with pytest.raises(InputError, match="adapter 'default' already"):
        add_layout_lora(model)
    second = add_layout_lora(model, adapter_name="second")
    assert second.trainable_params == add_layout_lora(tiny_transformer()).trainable_params
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".second." in n
    }


@pytest.mark.parametrize(
    ("change", "extra"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"lora_bias": True}, "lora_B.default.bias"),
        ({"use_rslora": True}, None),
    ],
)
def test_variants_of_lora_round_trip(tmp_path: Path, change: dict[str, Any], extra: str | None) -> None:
    config = peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=["layout_mlp.fc1"],
        rank_pattern={"layout_processor.layout_mlp.fc1": 2},
        **change,
    )
    model = tiny_transformer()
    add_layout_lora(model, config)
    trained_adapter(model)
    assert extra is None or any(extra in name for name, _ in model.named_parameters())
    save_adapter(model, tmp_path / "a", metadata={})
    again = tiny_transformer()
    load_adapter(again, tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(velocity(again), velocity(model))
        assert not torch.allclose(velocity(again), velocity(tiny_transformer()), atol=1e-4)


def test_a_bf16_base_gets_fp32_lora() -> None:
    model = tiny_transformer().to(torch.bfloat16)
    add_layout_lora(model)
    assert {p.dtype for p in lora_parameters(model)} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "lora_" not in n} == {torch.bfloat16}
    inputs = tiny_inputs(dtype=torch.bfloat16)
    model(**inputs, layout=LAYOUT).sample.float().square().mean().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_an_eval_model_does_not_drop_out_when_an_adapter_is_added(tiny_adapter: Path) -> None:
    model = tiny_transformer()
    load_adapter(model, tiny_adapter, trainable=True)
    assert torch.equal(velocity(model), velocity(model))
    model.train()
    assert not torch.equal(velocity(model), velocity(model))  # the dropout of the config is there


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "LoRA (r=16, alpha=32, dropout=0.1)"),
        ({"lora_dropout": 0.0, "lora_alpha": 2.5}, "LoRA (r=16, alpha=2.5)"),
        ({"use_dora": True, "use_rslora": True}, "DoRA (r=16, alpha=32, dropout=0.1, rank-stabilised)"),
        (
            {"rank_pattern": {"fc1": 4, "processor": 4, "fc2": 8}, "alpha_pattern": {"fc1": 8}},
            "LoRA (r=16, alpha=32, dropout=0.1, r=4 on fc1, processor, r=8 on fc2, alpha=8 on fc1)",
        ),
        ({"target_modules": ["out_proj", "fc2"]}, "LoRA (r=16, alpha=32, dropout=0.1, on fc2, out_proj)"),
        ({"target_modules": r".*fc\d"}, r"LoRA (r=16, alpha=32, dropout=0.1, on modules that match .*fc\d)"),
        (
            {"layers_to_transform": [0, 1], "exclude_modules": ["fc1"], "lora_bias": True},
            "LoRA (r=16, alpha=32, dropout=0.1, layers [0, 1] only, not on fc1, with biases of its own)",
        ),
    ],
)
def test_what_an_adapter_is_says_every_setting_that_is_not_the_default(changes: dict[str, Any], expected: str) -> None:
    config = default_lora_config().to_dict() | changes
    config = peft.LoraConfig(
        **{key: value for key, value in config.items() if key not in ("peft_type", "peft_version")}
    )
    assert describe_lora(config) == expected
    assert describe_lora(config, lora_plus=16.0).startswith(expected[:4])
    assert "LoRA+ 16" in describe_lora(config, lora_plus=16.0)


def test_a_card_of_its_own_names_the_patterns(tmp_path: Path) -> None:
    model = tiny_transformer()
    config = default_lora_config()
    config.rank_pattern = {"layout_processor.layout_mlp.fc1": 4}
    add_layout_lora(model, config)
    save_adapter(model, tmp_path / "adapter", metadata={"base": "tiny"})
    assert "r=4 on layout_processor.layout_mlp.fc1" in (tmp_path / "adapter" / "README.md").read_text()
