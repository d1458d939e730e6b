"""A quantised frozen base: close to the base itself, the stream untouched, exactly the LoRA trains, nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.export.read_back import outputs
from mmdit_lora.lora import base_fingerprint, load_adapter, merge_adapter, read_adapter_header
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.load_base import NEVER_QUANTISED, check_quantization, load_base
from mmdit_lora.training.loss import flow_matching_loss
from mmdit_lora.training.trainer import prepare_run, train
from tests.test_layout_stream_method import stock_sd3, weights_of
from tests.test_trainer import adapter_of, make_config
from tests.tiny import tiny_pipeline, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

torchao = pytest.importorskip("torchao", reason="int8 on CPU and GPU is by torchao, the extra `quant`")

BASES: dict[str, Callable[[Path], Any]] = {
    "two streams": lambda folder: tiny_pipeline(folder, tiny_transformer()),
    "single blocks": lambda folder: tiny_flux_pipeline(
        folder, tiny_flux_transformer(layout_single_blocks=True, phrase_tokens=3)
    ),
}
# Measured: relative error of the velocity (Frobenius norm) 0.004 and 0.006 in fp32 (0.009 and 0.011 in bf16); weights of 32 columns and one scale a row.
TOLERANCE = 0.02


@pytest.fixture(scope="module", params=BASES)
def int8_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quant")
    BASES[request.param](folder / "vocabulary").save_pretrained(folder / "base")
    return folder / "base"


def int8_config(base: Path, data: Path, out: Path, **changes: Any) -> Config:
    quant = {"quantization": "int8", "max_steps": 3} | changes.pop("train", {})
    size = {"path": str(data), "validation_share": 0.25, "resolution": 32}
    return make_config(base, data, out, train=quant, data=size, **changes)


def is_quantised(parameter: torch.Tensor) -> bool:
    return type(parameter.data).__name__ != "Tensor"


def test_outputs_are_close_and_every_linear_but_the_streams_is_int8(
    int8_base: Path, data: Path, tmp_path: Path
) -> None:
    base = load_pipeline(str(int8_base)).transformer
    pipe, fingerprint = load_base(int8_config(int8_base, data, tmp_path), torch.float32)
    assert fingerprint == base_fingerprint(base)
    weights = {f"{name}.weight" for name, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    streams = {name for name in weights if any(part in name for part in NEVER_QUANTISED)}
    assert streams
    assert {name for name, p in pipe.transformer.named_parameters() if is_quantised(p)} == weights - streams
    with torch.no_grad():
        want, found = outputs(base), outputs(pipe.transformer)
    error = ((found - want).norm() / want.norm()).item()
    assert 0 < error < TOLERANCE
    own = dict(base.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in pipe.transformer.named_parameters() if "layout" in name)


def test_gradients_reach_all_of_the_lora_and_nothing_else(int8_base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(int8_config(int8_base, data, tmp_path))
    model = run.pipe.transformer
    trained = set(trainable_parameters(model))
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert {name.split(".lora_")[0].rsplit(".", 2)[-2] for name in trained} == {"layout_mlp"}
    for step in range(2):
        flow_matching_loss(run.model, run.examples.batch(range(3 * step, 3 * step + 3))).mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert gradients.keys() == trained
        reached = {name for name, gradient in gradients.items() if gradient.any()}
        assert reached == {name for name in trained if step or "lora_B" in name}
        run.optimizer.step()
        run.optimizer.zero_grad()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_adapter_of_the_quantised_base_fits_and_merges_into_the_base_itself(
    int8_base: Path, data: Path, tmp_path: Path, precision: str
) -> None:
    def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        named = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if "lora_" not in name}
        return {name: p.detach().dequantize() if is_quantised(p) else p.detach().clone() for name, p in named.items()}

    config = int8_config(int8_base, data, tmp_path, train={"mixed_precision": precision})
    before = values(load_base(config, torch.bfloat16 if precision == "bf16" else torch.float32)[0].transformer)
    result = train(config)
    after = values(result.pipe.transformer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.any() for name, value in adapter_of(tmp_path).items() if "lora_B" in name)
    header = read_adapter_header(tmp_path / "adapter")
    assert header["quantization"] == "int8"

    base = load_pipeline(str(int8_base)).transformer
    plain = outputs(base)
    load_adapter(base, tmp_path / "adapter", expect_fingerprint=base_fingerprint(base))
    adapted = outputs(base.eval())
    assert (adapted - plain).abs().max() > 1e-4
    torch.testing.assert_close(outputs(merge_adapter(base)), adapted, atol=1e-5, rtol=0)
    assert json.loads((tmp_path / "report.json").read_text())["fingerprints"]["base"] == header["fingerprint"]


def test_a_stream_pretrained_on_a_quantised_base_is_saved_beside_the_base_itself(data: Path, tmp_path: Path) -> None:
    base = stock_sd3(tmp_path)
    config = int8_config(base, data, tmp_path / "run", method="layout_stream")
    fresh = load_base(
        config.model_copy(update={"train": config.train.model_copy(update={"quantization": "none"})}), torch.float32
    )
    copied = dict(fresh[0].transformer.named_parameters())
    started = dict(load_base(config, torch.float32)[0].transformer.named_parameters())
    assert all(torch.equal(started[name], copied[name]) for name in copied if "layout" in name)

    train(config)
    before, after = weights_of(base), weights_of(tmp_path / "run" / "base")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(value.any() for name, value in after.items() if name.endswith("layout_stream.out_proj.weight"))
    train(int8_config(tmp_path / "run" / "base", data, tmp_path / "lora"))
    assert adapter_of(tmp_path / "lora")


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where no GPU is")
def test_nf4_without_a_gpu_is_refused_before_anything_is_opened(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="CUDA"):
        prepare_run(int8_config(tmp_path / "no such base", data, tmp_path / "run", train={"quantization": "nf4"}))


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmdit_lora.training.load_base.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"torchao[\s\S]*uv sync --extra quant"):
        check_quantization("int8")
    check_quantization("none")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantises on a GPU only")
def test_nf4_trains_exactly_the_lora(int8_base: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = int8_config(int8_base, data, tmp_path, train={"quantization": "nf4", "mixed_precision": "bf16"})
    run = prepare_run(config)
    assert set(trainable_parameters(run.pipe.transformer)) == {
        name for name, _ in run.pipe.transformer.named_parameters() if "lora_" in name
    }
    assert any(p.dtype is torch.uint8 for p in run.pipe.transformer.parameters())
    train(config)
    base = load_pipeline(str(int8_base)).transformer
    load_adapter(base, tmp_path / "adapter", expect_fingerprint=base_fingerprint(base))
