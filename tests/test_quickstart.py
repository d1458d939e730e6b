"""The embedded base: small, without pickles, with the exact trainable set; and it obeys layouts."""

from __future__ import annotations

from pathlib import Path

import torch

from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.lora import add_layout_lora
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, SamplingConfig, load_pipeline

ROOT = Path(__file__).parent.parent
BASE = ROOT / "data" / "tiny_base"


def test_the_embedded_base_is_small_and_holds_no_pickle() -> None:
    files = [file for file in BASE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md", ".png", ".txt"}


def test_the_trainable_set_on_the_embedded_base_is_exact() -> None:
    model = load_pipeline(str(BASE)).transformer
    report = add_layout_lora(model)
    blocks = [f"transformer_blocks.{i}.layout_stream.layout_mlp.{fc}" for i in range(3) for fc in ("fc1", "fc2")]
    expected = {"layout_processor.layout_mlp.fc1", "layout_processor.layout_mlp.fc2", *blocks}
    assert set(report.targets) == expected
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{side}.default.weight" for name in expected for side in "AB"}
    assert not report.zero_gates
    assert not report.dead_targets


def test_the_embedded_base_obeys_layouts(tmp_path: Path) -> None:
    from mmdit_lora.data.records import read_dataset
    from mmdit_lora.data.shapes import DOMAINS, write_dataset

    write_dataset(tmp_path / "scenes", DOMAINS["basic"], count=16, seed=21)
    result = evaluate(load_pipeline(str(BASE)), read_dataset(tmp_path / "scenes"), SamplingConfig(steps=12))
    sides = {name: side.fidelity for name, side in result.conditions.items()}
    assert sides["base"]["miou"] > 0.8
    assert sides["base"]["color_acc"] > 0.9
    assert sides["base"]["shape_acc"] > 0.8
    assert sides["ground_truth"]["miou"] > 0.95
    assert sides["shuffled"]["miou"] < 0.35


def test_the_embedded_base_opens_in_one_dtype() -> None:
    for dtype in (None, torch.float32, torch.bfloat16):
        pipe = LayoutStableDiffusion3Pipeline.from_pretrained(BASE, dtype=dtype)
        modules = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
        assert {p.dtype for module in modules for p in module.parameters()} == {dtype or torch.float32}
