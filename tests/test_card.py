"""The adapter's card: front matter that the hub reads, figures of the run, its images."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from PIL import Image
from safetensors import safe_open

from mmdit_lora.training.trainer import train
from tests.test_trainer import make_config


def test_the_card_says_what_the_run_was(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"sample_every": 2, "sample_count": 2, "validate_every": 2, "ema_decay": 0.9}
    config = make_config(base, data, tmp_path / "run", train=settings, sample={"steps": 2}, license="cc-by-4.0")
    report = train(config).report
    folder = tmp_path / "run" / "adapter"
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc-by-4.0"
    assert yaml.safe_load(front)["base_model"] == base.name
    for value in report["fingerprints"].values():
        assert f"`{value}`" in body
    assert f"{report['trainable_params']:,} of {report['total_params']:,} parameters" in body
    assert f"base {report['held_out_loss']['base']:.4f}" in body
    assert f"miou {report['fidelity']['values']['miou']:.3f}" in body
    assert "moving average 0.9" in body
    with Image.open(folder / "samples.png") as image:
        assert image.size == Image.open(tmp_path / "run" / "samples" / "step_0000004.png").size
    assert "samples.png" in body


def test_a_card_without_images_or_held_out_ones_says_so(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", data={"path": str(data), "validation_share": 0.0})
    train(config)
    text = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "nothing was measured" in text
    assert "samples.png" not in text
    assert sorted(path.name for path in (tmp_path / "run" / "adapter").iterdir()) == [
        ".mmdit_lora.json",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_card_and_header_tell_every_setting_of_the_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    lora = {
        "targets": ["layout_mlp.fc1", "layout_stream.attn.add_q_proj"],
        "rank_pattern": {"layout_mlp.fc1": 4},
        "alpha_pattern": {"layout_mlp.fc1": 2.0},
        "rslora": True,
        "dora": True,
        "dropout": 0.25,
    }
    train(make_config(base, data, tmp_path / "run", train={"max_steps": 1, "lora_plus": 8.0}, lora=lora))
    folder = tmp_path / "run" / "adapter"
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["mmdit_lora"])["lora"]
    card = (folder / "README.md").read_text()
    for text in (card, header):
        assert "DoRA (r=" in text
        for word in (
            "rank-stabilised",
            "dropout=0.25",
            "LoRA+ 8",
            "r=4 on layout_mlp.fc1",
            "alpha=2 on layout_mlp.fc1",
        ):
            assert word in text
        assert "layout_stream.attn.add_q_proj" in text
    assert " on `layout_mlp.fc1`, `layout_stream.attn.add_q_proj` of the layout stream" in card
