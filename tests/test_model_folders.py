"""Model folders: a plain base, damage, and saving."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file

from mmdit_lora.errors import InputError
from mmdit_lora.models import LayoutSD3Transformer2DModel
from tests.tiny import VARIANTS, plain_twin, tiny_inputs, tiny_layout, tiny_transformer

INPUTS, LAYOUT = tiny_inputs(), tiny_layout()
WEIGHTS = "diffusion_pytorch_model.safetensors"


@torch.no_grad()
def velocity(model: torch.nn.Module, inputs: dict[str, Any] = INPUTS, **kwargs: Any) -> torch.Tensor:
    return model(**inputs, **kwargs).sample


# -- trap 7: a plain base folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    plain_twin(tiny_transformer()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_base_gets_a_seeded_stream_of_one_dtype(plain_folder: Path, dtype: torch.dtype) -> None:
    rng = torch.get_rng_state()
    first, second = (
        LayoutSD3Transformer2DModel.from_pretrained(str(plain_folder), torch_dtype=dtype) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), rng)  # the caller's random numbers are not used up
    assert {p.dtype for p in first.parameters()} == {dtype}
    assert not any(p.is_meta for p in first.parameters())
    assert not any(module.training for module in first.modules())
    weights = second.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    other = LayoutSD3Transformer2DModel.from_pretrained(
        str(plain_folder), torch_dtype=dtype, layout_seed=1
    ).state_dict()
    differ = {name for name, value in first.state_dict().items() if not torch.equal(value, other[name])}
    assert "layout_processor.layout_mlp.fc1.weight" in differ
    assert all("layout" in name for name in differ)
    assert not any(b.layout_stream.out_proj.weight.any() for b in first.transformer_blocks)
    if dtype is torch.float32:
        base = SD3Transformer2DModel.from_pretrained(plain_folder)
        assert torch.equal(velocity(first, layout=LAYOUT), velocity(base))


def test_only_our_own_line_is_logged(plain_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = diffusers_logging.get_logger("diffusers.models.modeling_utils")
    level, lines = diffusers_logging.get_verbosity(), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    source.addHandler(handler)
    try:
        LayoutSD3Transformer2DModel.from_pretrained(str(plain_folder))
        assert lines == []
        ours = [r.getMessage() for r in caplog.records if r.name == "mmdit_lora"]
        assert len(ours) == 1
        assert "has no layout stream" in ours[0]
        source.warning("Some weights of another model")  # the user's own loads warn as before
        assert lines == ["Some weights of another model"]
    finally:
        source.removeHandler(handler)
    assert diffusers_logging.get_verbosity() == level


Edit = Callable[[dict[str, torch.Tensor]], Any]
DAMAGE: dict[str, tuple[Edit, list[str]]] = {
    "missing in the base": (lambda s: s.pop("proj_out.weight"), ["1 missing", "proj_out.weight"]),
    "missing in the stream": (lambda s: s.pop("layout_processor.null_box"), ["1 missing", "layout_processor.null_box"]),
    "unexpected": (lambda s: s.update(foo=torch.ones(1)), ["1 unexpected", "foo"]),
    "two faults": (lambda s: (s.pop("proj_out.weight"), s.update(foo=torch.ones(1))), ["proj_out.weight", "foo"]),
    "misshapen": (lambda s: s.update({"proj_out.weight": torch.ones(3, 3)}), ["proj_out.weight", "[3, 3]"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_refused_with_the_names(case: str, tmp_path: Path) -> None:
    damage, messages = DAMAGE[case]
    tiny_transformer().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    damage(state)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError) as refusal:
        LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path))
    assert all(message in str(refusal.value) for message in [*messages, str(tmp_path)])


def test_a_plain_base_with_a_missing_weight_is_refused(plain_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    state = load_file(plain_folder / WEIGHTS)
    del state["proj_out.weight"]
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing: proj_out\.weight$"):  # not the whole layout stream too
        LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path))


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-50])
    with pytest.raises(InputError, match="does not hold this model"):
        LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path))


# -- saving


@pytest.mark.parametrize("variant", VARIANTS)
def test_saving_keeps_everything(variant: str, tmp_path: Path) -> None:
    model = tiny_transformer(**VARIANTS[variant], mask_padding=False, layout_slots=10, phrase_dim=20)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    known = set(inspect.signature(LayoutSD3Transformer2DModel).parameters)
    assert set(inspect.signature(SD3Transformer2DModel).parameters) < known
    assert {key for key in config if not key.startswith("_")} == known
    assert (config["num_layers"], config["mask_padding"], config["layout_slots"], config["phrase_dim"]) == (
        3,
        False,
        10,
        20,
    )
    again = LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path))
    dual = ("dual_attention_layers", tuple(again.config["dual_attention_layers"]))  # JSON has no tuples
    assert {k: v for k, v in [*again.config.items(), dual] if not k.startswith("_")} == {
        k: v for k, v in model.config.items() if not k.startswith("_")
    }
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    layout = tiny_layout(width=20)
    assert torch.equal(velocity(again, layout=layout), velocity(model, layout=layout))


def test_a_folder_saved_in_fp16_opens_as_fp32(tmp_path: Path) -> None:
    model = tiny_transformer().half()
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / WEIGHTS)["proj_out.weight"].dtype is torch.float16
    again = LayoutSD3Transformer2DModel.from_pretrained(str(tmp_path), torch_dtype=torch.float32)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(velocity(again, layout=LAYOUT), velocity(model.float(), layout=LAYOUT))
