"""Adapters as files: what a folder must be, what is refused, merging."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file, save, save_file

from mmdit_lora.errors import InputError
from mmdit_lora.export.export import verify_adapter
from mmdit_lora.lora import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    add_layout_lora,
    base_fingerprint,
    load_adapter,
    lora_parameters,
    lora_state_dict,
    merge_adapter,
    read_adapter,
    read_adapter_config,
    read_adapter_header,
    reading,
    remove_adapter,
    save_adapter,
)
from mmdit_lora.lora.storage import _in_order
from mmdit_lora.models import LayoutSD3Transformer2DModel
from mmdit_lora.outputs import MARKER
from mmdit_lora.pipelines import load_pipeline
from tests.tiny import tiny_inputs, tiny_layout, tiny_transformer, trained_adapter, velocity

INPUTS, LAYOUT = tiny_inputs(), tiny_layout()


# -- adapters as files


def test_the_folder_is_what_peft_reads(tiny_adapter: Path, adapted: torch.Tensor) -> None:
    assert {p.name for p in tiny_adapter.iterdir()} == {CONFIG_FILE, WEIGHTS_FILE, "README.md", MARKER}
    config = json.loads((tiny_adapter / CONFIG_FILE).read_text())
    assert (config["base_model_name_or_path"], config["r"], config["lora_alpha"]) == ("tiny", 16, 32)
    with safe_open(tiny_adapter / WEIGHTS_FILE, framework="pt") as file:
        assert "base_model.model.transformer_blocks.0.layout_stream.layout_mlp.fc1.lora_A.weight" in file.keys()  # noqa: SIM118
        assert file.metadata()["format"] == "pt"
    assert read_adapter_header(tiny_adapter)["base"] == "tiny"

    wrapped = peft.PeftModel.from_pretrained(tiny_transformer(), str(tiny_adapter))
    with torch.no_grad():
        assert torch.equal(velocity(wrapped), adapted)
        assert (velocity(tiny_transformer()) - adapted).abs().max() > 1e-2  # alpha / r = 2 counts too:
    wrapped.base_model.model.transformer_blocks[0].layout_stream.layout_mlp.fc1.scaling["default"] = 1.0
    with torch.no_grad():
        assert not torch.allclose(velocity(wrapped), adapted, atol=1e-4)


def test_save_and_load_give_the_same_adapter(tiny_adapter: Path, adapted: torch.Tensor, tmp_path: Path) -> None:
    model = tiny_transformer()
    load_adapter(model, tiny_adapter, expect_fingerprint=base_fingerprint(model))
    assert not any(p.requires_grad for p in lora_parameters(model))
    save_adapter(model, tmp_path / "again", metadata=read_adapter_header(tiny_adapter), card="# Card\n")
    for name in (CONFIG_FILE, "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tiny_adapter / name).read_bytes(), name
    assert read_adapter_header(tmp_path / "again") == read_adapter_header(tiny_adapter)
    before, after = (load_file(folder / WEIGHTS_FILE) for folder in (tiny_adapter, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    trains = tiny_transformer()
    load_adapter(trains, tiny_adapter, trainable=True)
    assert {n for n, p in trains.named_parameters() if p.requires_grad} == {
        n for n, _ in trains.named_parameters() if "lora_" in n
    }
    assert torch.equal(velocity(trains).detach(), adapted)

    half = tiny_transformer().to(torch.bfloat16)
    load_adapter(half, tiny_adapter, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_loading_to_look_does_not_stop_what_trains(tiny_adapter: Path) -> None:
    model = tiny_transformer()
    model.requires_grad_(False)
    model.proj_out.requires_grad_(True)
    load_adapter(model, tiny_adapter)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"proj_out.weight", "proj_out.bias"}


def test_several_adapters_mix(tiny_adapter: Path, adapted: torch.Tensor, tmp_path: Path) -> None:
    other = tiny_transformer()
    add_layout_lora(other, peft.LoraConfig(r=2, target_modules=["layout_mlp.fc2"]))
    trained_adapter(other, seed=6)
    save_adapter(other, tmp_path / "other", metadata={})
    model = tiny_transformer()
    load_adapter(model, tiny_adapter, adapter_name="one")
    load_adapter(model, tmp_path / "other", adapter_name="two")
    with torch.no_grad():
        both = velocity(model)  # loading one more leaves the first one active
        assert (both - adapted).abs().max() > 1e-3
        assert (both - velocity(other)).abs().max() > 1e-3
        model.set_adapters(["one", "two"], [1.0, 1.0])
        assert torch.equal(velocity(model), both)
        model.set_adapters(["one", "two"], [1.0, 0.0])
        assert torch.allclose(velocity(model), adapted, atol=1e-6)
        model.set_adapters(["two"])
        assert torch.equal(velocity(model), velocity(other))
    remove_adapter(model, "two")
    with pytest.raises(InputError, match="'two': no such adapter") as caught:
        remove_adapter(model, "two")
    assert "loaded: one" in str(caught.value)
    remove_adapter(model, "one")
    with pytest.raises(InputError, match="loaded: none"):
        remove_adapter(model, "one")
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in tiny_transformer().named_parameters()]


def test_lora_parameters_and_state_are_in_one_order(tiny_adapter: Path) -> None:
    model = tiny_transformer()
    load_adapter(model, tiny_adapter, adapter_name="b")
    load_adapter(model, tiny_adapter, adapter_name="a", allow_same=True)
    state = lora_state_dict(model, "a")
    assert list(state) == sorted(state)
    assert [tuple(v.shape) for v in state.values()] == [tuple(p.shape) for p in lora_parameters(model, "a")]
    assert len(lora_parameters(model)) == 2 * len(lora_parameters(model, "a")) == 24


def test_fingerprint() -> None:
    model = tiny_transformer()
    print_ = base_fingerprint(model)
    assert len(print_) == 64
    add_layout_lora(model)
    trained_adapter(model)
    assert base_fingerprint(model) == print_  # LoRA is no part of it
    assert base_fingerprint(tiny_transformer().to(torch.bfloat16)) == print_
    half = tiny_transformer().half()
    assert base_fingerprint(half) == base_fingerprint(half.float())
    other = tiny_transformer()
    with torch.no_grad():
        other.proj_out.bias[0] += 0.1
    assert base_fingerprint(other) != print_
    assert base_fingerprint(tiny_transformer(seed=1)) != print_
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        base_fingerprint(tiny_transformer(open_gates=False))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any], header: str = "{}") -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / WEIGHTS_FILE)
        state = change(state) or state
        save_file(state, folder / WEIGHTS_FILE, metadata={"mmdit_lora": header})

    return edit


def with_pattern(kind: str, pattern: str, value: Any) -> Callable[[Path], None]:
    return edit_config(**{kind: {pattern: value}})


SLOW = "((((a*)*)*)*)*b"  # backtracks for ever on any name that has some a
KEY = "base_model.model.layout_processor.layout_mlp.fc1.lora_A.weight"
MALFORMED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / CONFIG_FILE).unlink(), "no adapter_config.json"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), "no such file"),
    "config is not JSON": (lambda f: (f / CONFIG_FILE).write_text('{"r": 16,'), "is not JSON"),
    "config is not text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "is not whole UTF-16 text"),
    "config is a list": (lambda f: (f / CONFIG_FILE).write_text("[]"), "holds list, not a JSON object"),
    "config of another method": (edit_config(peft_type="LOHA"), "peft_type is 'LOHA'"),
    "rank zero": (edit_config(r=0), "not a valid LoraConfig"),
    "rank is text": (edit_config(r="16"), "not a valid LoraConfig"),
    "alpha is missing a value": (edit_config(lora_alpha=None), "not a valid LoraConfig"),
    "rank is negative": (edit_config(r=-4), "r is -4, not a whole number from 1"),
    "rank is true": (edit_config(r=True), "r is True"),
    "rank is huge": (edit_config(r=10**30), "r is 1000000"),
    "alpha is NaN": (edit_config(lora_alpha=float("nan")), "lora_alpha is nan, not a finite number"),
    "alpha is infinite": (edit_config(lora_alpha=float("-inf")), "lora_alpha is -inf, not a finite number"),
    "alpha is absurd": (edit_config(lora_alpha=1e300), "lora_alpha is 1e+300, not a finite number up to"),
    "alpha is a whole number beyond floats": (edit_config(lora_alpha=10**400), "not a valid LoraConfig"),
    "alpha is zero": (edit_config(lora_alpha=0), "lora_alpha is 0, with which the adapter does nothing"),
    "alpha is a zero below": (edit_config(lora_alpha=-0.0), "lora_alpha is 0, with which"),
    "alpha is text": (edit_config(lora_alpha="32"), "lora_alpha is '32'"),
    "an alpha of some is NaN": (with_pattern("alpha_pattern", "fc1", float("nan")), "alpha_pattern['fc1'] is nan"),
    "a rank of some is 0": (with_pattern("rank_pattern", "fc1", 0), "rank_pattern['fc1'] is 0"),
    "patterns are a list": (edit_config(rank_pattern=["fc1"]), "not a valid LoraConfig"),
    "dropout of 7": (edit_config(lora_dropout=7), "lora_dropout is 7, not a share"),
    "dropout of all": (edit_config(lora_dropout=1.0), "lora_dropout is 1.0, not a share"),
    "dropout is NaN": (edit_config(lora_dropout=float("nan")), "lora_dropout is nan"),
    "rank pattern is no expression": (with_pattern("rank_pattern", "(", 4), "rank_pattern '(' is no regular expression"),
    "alpha pattern is no expression": (with_pattern("alpha_pattern", "*", 4), "alpha_pattern '*' is no regular expression"),
    "alpha pattern is endless": (with_pattern("alpha_pattern", "x" * 2000 + "*", 4), "longer than 1,000 characters"),
    "rslora is text": (edit_config(use_rslora="yes"), "use_rslora is 'yes'"),
    "targets are no expression": (edit_config(target_modules="("), "target_modules '(' is no regular expression"),
    "targets are numbers": (edit_config(target_modules=[1]), "target_modules are no names"),
    "too many targets": (edit_config(target_modules=[f"a{i}" for i in range(5000)]), "5,000 entries"),
    "an absurd weight": (edit_weights(lambda s: s.update({KEY: s[KEY] * 1e9})), "its update of 1 linears is larger than"),
    "a weight whose product overflows": (edit_weights(lambda s: s.update({KEY: s[KEY] * 1e37})), "is larger than"),
    "another rank": (edit_config(r=8), "12 of another shape"),
    "target of another base": (edit_config(target_modules=["ff_bbox.net.2"]), "does not fit this base"),
    "biases": (edit_config(bias="all"), "bias is 'all'"),
    "junk bytes": (lambda f: (f / WEIGHTS_FILE).write_bytes(b"not a safetensors file"), "is not a safetensors file"),
    "empty weights": (lambda f: (f / WEIGHTS_FILE).write_bytes(b""), "is not a safetensors file"),
    "cut short": (lambda f: (f / WEIGHTS_FILE).write_bytes((f / WEIGHTS_FILE).read_bytes()[:-100]), "is not a safetensors file"),
    "missing name": (edit_weights(lambda s: {k: v for k, v in s.items() if k != KEY}), f"1 missing: {KEY}"),
    "unexpected name": (edit_weights(lambda s: s.update({"base_model.model.foo": torch.ones(1)})), "1 unexpected: base_model.model.foo"),
    "misshapen": (edit_weights(lambda s: s.update({KEY: torch.ones(3, 3)})), "(3, 3), not (16, 96)"),
    "no prefix": (edit_weights(lambda s: {k.removeprefix("base_model.model."): v for k, v in s.items()}), "begin with 'base_model.model.'"),
    "NaN": (edit_weights(lambda s: s.update({KEY: s[KEY] * float("nan")})), "at a lower learning rate, or get it anew"),
    "integers": (edit_weights(lambda s: s.update({KEY: s[KEY].int()})), "1 not finite"),
    "header is not JSON": (edit_weights(lambda _: None, header="{base"), "is not JSON"),
    "header is a list": (edit_weights(lambda _: None, header="[1]"), "holds list, not a JSON object"),
    "another base": (edit_weights(lambda _: None, header='{"base": "other", "fingerprint": "00ff"}'), "trained on another base: 'other'"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_adapter_is_refused_whole(case: str, tiny_adapter: Path, tmp_path: Path) -> None:
    spoil, message = MALFORMED[case]
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in tiny_adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    model = tiny_transformer()
    names = [name for name, _ in model.named_parameters()]
    fingerprint = base_fingerprint(model)
    spoil(folder)
    with pytest.raises(InputError) as refusal:
        load_adapter(model, folder, expect_fingerprint=fingerprint)
    assert message in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert [name for name, _ in model.named_parameters()] == names
    assert not getattr(model, "peft_config", {})


def test_nothing_half_written_is_left(tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_transformer()
    load_adapter(model, tiny_adapter)
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match="JSON compliant"):
        save_adapter(model, folder, metadata={"loss": float("nan")})
    with pytest.raises(InputError, match="no adapter 'other'"):
        save_adapter(model, folder, metadata={}, adapter_name="other")
    assert list(tmp_path.iterdir()) == []

    save_adapter(model, folder, metadata={"base": "first"})
    lora_parameters(model)[0].data[0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinity"):
        save_adapter(model, folder, metadata={"base": "second"})
    lora_parameters(model)[0].data[0, 0] = 0.0

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mmdit_lora.lora.storage.save", full_disk)
        with pytest.raises(OSError, match="no space"):
            save_adapter(model, folder, metadata={"base": "second"})
    assert read_adapter_header(folder) == {"base": "first"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    save_adapter(model, folder, metadata={"base": "second"})
    assert read_adapter_header(folder) == {"base": "second"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# -- merging


def test_merged_is_the_same_function_and_an_ordinary_model(
    tiny_adapter: Path, adapted: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_transformer()
    load_adapter(model, tiny_adapter)
    merged = merge_adapter(model)
    assert [n for n, _ in merged.named_parameters()] == [n for n, _ in tiny_transformer().named_parameters()]
    merged.save_pretrained(tmp_path / "merged")
    reopened = LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path / "merged"))
    with torch.no_grad():
        assert (velocity(merged) - adapted).abs().max() < 1e-5
        assert torch.equal(velocity(reopened), velocity(merged))
        assert torch.equal(velocity(model), adapted)  # a copy was merged
        assert (velocity(tiny_transformer()) - adapted).abs().max() > 1e-2
    assert merge_adapter(model, in_place=True) is model
    assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.raises(InputError, match="no adapter to merge"):
        merge_adapter(model)


def test_the_same_adapter_is_the_same_file_in_every_process() -> None:
    """safetensors writes the entries of its metadata in another order at every start."""
    content = save({"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16)}, {"x": "1", "format": "pt"})
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    orders = []
    for names in (["x", "format"], ["format", "x"]):
        text = json.dumps(
            {"__metadata__": {n: header["__metadata__"][n] for n in names}} | {"a": header["a"], "b": header["b"]}
        )
        orders.append(len(text).to_bytes(8, "little") + text.encode() + content[8 + size :])
    assert orders[0] != orders[1]
    one, two = (_in_order(each) for each in orders)
    assert one == two
    assert int.from_bytes(one[:8], "little") % 8 == 0
    assert all(torch.equal(load(one)[name], load(content)[name]) for name in "ab")
    assert json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])["__metadata__"] == {"x": "1", "format": "pt"}


# -- what is in a file and on a model


@pytest.mark.parametrize("spell", [r".*\.layout_mlp\.(fc1|fc2)", "all-linear"])
def test_targets_by_an_expression_are_those_of_the_tensors(
    tiny_adapter: Path, adapted: torch.Tensor, tmp_path: Path, spell: str
) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    edit_config(target_modules=spell, exclude_modules=SLOW)(tmp_path / "adapter")
    model = tiny_transformer()
    stored = load_adapter(model, tmp_path / "adapter")
    assert sorted(stored.config.target_modules or ()) == sorted(
        {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in stored.tensors}
    )
    with torch.no_grad():
        assert torch.equal(velocity(model), adapted)


def test_alphas_by_an_expression_are_peft_s_own(tiny_adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    patterns = {
        r".*blocks\.[01]\..*fc1": 4,
        "layout_processor.layout_mlp.fc1": 7,
        r"^layout_processor\.layout_mlp\.fc2": 9,
        "fc2": 3,
    }
    edit_config(alpha_pattern=patterns)(tmp_path / "adapter")
    model = tiny_transformer()
    load_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(tiny_transformer(), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(velocity(model), velocity(wrapped))


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("(.|..)+[A-Z]", "takes too long to match"), ("fc7", "matches no module"), (".*fc[789]", "matches no module")],
)
def test_an_alpha_pattern_that_cannot_be_matched_is_refused(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, says: str
) -> None:
    monkeypatch.setattr("mmdit_lora.lora.reading._MATCHING_SECONDS", 0.2)
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    edit_config(alpha_pattern={pattern: 4})(tmp_path / "adapter")
    with pytest.raises(InputError) as refusal:
        load_adapter(tiny_transformer(), tmp_path / "adapter")
    assert says in str(refusal.value)
    assert "alpha_pattern" in str(refusal.value)


OPTIONS: dict[str, Any] = {
    "alora_invocation_tokens": [1],
    "arrow_config": {"top_k": 1},
    "corda_config": {"a": 1},
    "ensure_weight_tying": True,
    "eva_config": {"rho": 0},
    "fan_in_fan_out": True,
    "kasa_config": {"beta": -1},
    "layer_replication": [[0, 1]],
    "loftq_config": {"loftq_bits": 4},
    "lora_ga_config": 3,
    "megatron_config": {"tensor_model_parallel_size": 1},
    "megatron_core": "os",
    "modules_to_save": ["proj_out"],
    "monteclora_config": {"num_samples": 0},
    "qalora_group_size": 8,
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_parameters": "proj_out.weight",
    "trainable_token_indices": [1],
    "use_bdlora": "yes",
    "use_qalora": 1,
    "velora_config": [1],
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_option_beyond_plain_lora_is_refused_by_name(
    tiny_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("PEFT saw the option")

    monkeypatch.setattr(peft.LoraConfig, "__post_init__", never)
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    edit_config(**{name: OPTIONS[name]})(tmp_path / "adapter")
    with pytest.raises(InputError, match=f"{name} is set") as refusal:
        read_adapter_config(tmp_path / "adapter")
    assert str(tmp_path) in str(refusal.value)


def test_every_field_of_peft_is_plain_or_refused() -> None:
    """A field that a new PEFT brings is refused until it is known here."""
    known = set(OPTIONS) | reading._PLAIN_FIELDS
    assert known == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_defaults_and_unknown_keys_are_passed_over(
    tiny_adapter: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    empty = {"arrow_config": None, "loftq_config": {}, "modules_to_save": [], "use_qalora": False}
    edit_config(**empty, megatron_core="megatron.core", **{"k" * 3_000_000: 1})(tmp_path / "adapter")
    assert read_adapter_config(tmp_path / "adapter") == read_adapter_config(tiny_adapter)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target_modules": "(a+)+$"}, "target_modules '(a+)+$' does not match"),
        ({"target_modules": "layout_mlp.fc1"}, "does not match"),  # the end of a name is not the name
        ({"target_modules": r".*layout_mlp\.fc1"}, "does not match"),
        ({"exclude_modules": r".*\.fc2"}, "exclude_modules '.*\\\\.fc2' leaves out"),
        ({"target_modules": SLOW}, "does not match"),
        ({"layers_to_transform": [0], "layers_pattern": ["transformer_blocks"]}, "layers_to_transform [0]"),
        ({"layers_to_transform": 99}, "layers_to_transform 99 leaves out"),
        ({"layers_to_transform": [0, 1]}, "leaves out layout_processor"),
        ({"rank_pattern": None, "alpha_pattern": None}, None),
        ({"target_modules": r".*\.layout_mlp\.(fc1|fc2)", "exclude_modules": "x"}, None),
        ({"target_modules": "all-linear"}, None),
        ({}, None),
    ],
)
def test_whether_peft_can_load_by_the_expressions(
    tiny_adapter: Path, tmp_path: Path, changes: dict[str, Any], says: str | None
) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    edit_config(**changes)(tmp_path / "adapter")
    if says is None:
        assert read_adapter(tmp_path / "adapter", tiny_transformer()).modules
        return
    with pytest.raises(InputError) as refusal:
        load_adapter(tiny_transformer(), tmp_path / "adapter")
    assert says in str(refusal.value)


@pytest.mark.parametrize("value", [5, True, {"a": 1}, [1], [None]])
@pytest.mark.parametrize("key", ["exclude_modules", "layers_pattern", "layers_to_transform"])
def test_what_selects_modules_has_the_kind_that_peft_reads(
    tiny_adapter: Path, tmp_path: Path, key: str, value: object
) -> None:
    if key == "layers_to_transform" and value in (5, [1]) and value is not True:
        pytest.skip("numbers of layers")
    shutil.copytree(tiny_adapter, tmp_path / "adapter")
    edit_config(**{key: value})(tmp_path / "adapter")
    with pytest.raises(InputError, match=key):
        read_adapter_config(tmp_path / "adapter")


def test_verify_refuses_targets_that_peft_cannot_load(tmp_path: Path) -> None:
    base = str(Path(__file__).resolve().parent.parent / "data" / "tiny_base")
    model = load_pipeline(base).transformer
    fingerprint = base_fingerprint(model)
    add_layout_lora(model)
    trained_adapter(model)
    save_adapter(model, tmp_path / "adapter", metadata={"base": base, "fingerprint": fingerprint})
    edit_config(target_modules="(a+)+$")(tmp_path / "adapter")
    with pytest.raises(InputError, match=r"target_modules .* does not match"):
        verify_adapter(tmp_path / "adapter", base=base)


def test_the_same_adapter_is_refused_a_second_time(tiny_adapter: Path, adapted: torch.Tensor, tmp_path: Path) -> None:
    shutil.copytree(tiny_adapter, tmp_path / "copy")
    edit_config(lora_dropout=0.0)(tmp_path / "copy")  # the same content all the same
    model = tiny_transformer()
    load_adapter(model, tiny_adapter)
    model.set_adapters(["default"], [1.0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match="on the model already, as 'default'"):
        load_adapter(model, tmp_path / "copy", adapter_name="again")
    with pytest.raises(InputError, match="'default' already"):
        load_adapter(model, tmp_path / "copy")
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == before.keys()
    with torch.no_grad():
        assert torch.equal(velocity(model), adapted)
    # At another strength it is another adapter.
    edit_config(lora_alpha=8)(tmp_path / "copy")
    load_adapter(model, tmp_path / "copy", adapter_name="weaker")


def test_the_base_is_checked_unless_told_otherwise(tiny_adapter: Path) -> None:
    other = tiny_transformer()
    with torch.no_grad():
        other.proj_out.bias[0] += 0.1
    with pytest.raises(InputError, match="trained on another base: 'tiny'"):
        load_adapter(other, tiny_adapter)
    assert not getattr(other, "peft_config", {})
    load_adapter(other, tiny_adapter, check_base=False)


def test_a_kept_fingerprint_follows_every_change() -> None:
    model = tiny_transformer()
    prints = [base_fingerprint(model)]
    assert base_fingerprint(model) == prints[0]
    weight = model.proj_out.weight
    for change in (
        lambda: weight.data.add_(1.0),  # no version is counted
        lambda: weight.data.neg_(),
        lambda: setattr(weight, "data", weight.data.clone() + 1.0),
        lambda: model.proj_out.bias.data.fill_(2.0),
        lambda: weight.detach().numpy().__setitem__((0, 0), 7.0),
    ):
        change()
        prints.append(base_fingerprint(model))
        fresh = copy.deepcopy(model)
        del fresh._mmdit_lora_fingerprint
        assert base_fingerprint(fresh) == prints[-1]
    assert len(set(prints)) == len(prints)


def test_a_load_that_fails_half_way_leaves_the_model_as_it_was(
    tiny_adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_transformer()
    model.requires_grad_(False)
    model.proj_out.requires_grad_(True)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmdit_lora.lora.storage.peft.set_peft_model_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(model, tiny_adapter, trainable=True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.requires_grad == before[name][0] and torch.equal(p, before[name][1]) for name, p in after.items())
    assert not getattr(model, "peft_config", {})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    alpha=st.floats(width=64) | st.integers(),
    factor=st.floats(width=32),
    r=st.sampled_from([16, 16, 16, 0, -1, 2**31]),
    rslora=st.booleans(),
)
def test_an_adapter_s_numbers_are_refused_or_paint_finite_numbers(
    tiny_adapter: Path, alpha: float, factor: float, r: int, rslora: bool
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "adapter"
        shutil.copytree(tiny_adapter, folder)
        edit_config(lora_alpha=alpha, r=r, use_rslora=rslora)(folder)
        edit_weights(lambda state: {name: value * factor for name, value in state.items()})(folder)
        model = tiny_transformer()
        refusal = None
        try:
            load_adapter(model, folder)
        except InputError as error:
            refusal = str(error)
        if refusal is None:
            with torch.no_grad():
                assert velocity(model).isfinite().all()
        else:
            assert str(folder) in refusal
            assert len(refusal) < 2000
            assert not getattr(model, "peft_config", {})
