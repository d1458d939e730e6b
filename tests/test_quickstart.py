"""The promise of the README, on the embedded base, by the command that it names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdit_lora.cli.main import main
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


@pytest.mark.slow
def test_quickstart_keeps_its_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    torch.set_num_threads(2)
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["layouts"] >= 96
    assert report["adapter"]["miou"] - report["base"]["miou"] >= 0.15
    assert report["ground_truth"]["miou"] > report["adapter"]["miou"] > report["shuffled"]["miou"]
    assert report["old_domain"]["adapter"]["miou"] > 0.7
    assert report["export_max_abs_diff"] <= 1e-4
    assert report["adapter_bytes"] < 500_000
    assert report["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert Image.open(out / "before_after.png").width >= 1500

    # The Python of the README, with the paths of this run.
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    code = next(block for block in blocks if "outputs/quickstart/adapter" in block)
    code = code.replace("outputs/quickstart", str(out)).replace("page.png", str(tmp_path / "page.png"))
    exec(code, {})
    assert Image.open(tmp_path / "page.png").size == (64, 64)
