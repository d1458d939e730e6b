"""`resize`: lossless where the rank allows it, the best approximation where not, and PEFT loads what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from mmdit_lora.analysis.resize import resize_adapter
from mmdit_lora.analysis.updates import open_adapter
from mmdit_lora.cli.main import main
from mmdit_lora.lora import read_adapter_config, read_adapter_header
from tests.adapter_makers import make_adapter, rank_four
from tests.tiny import tiny_transformer, velocity

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"r": 8, "rank_pattern": {"fc2": 5}, "alpha_pattern": {"layout_processor.layout_mlp.fc1": 3}},
    "DoRA": {"use_dora": True, "magnitude": 1.2},
    "negative": {"lora_alpha": -8},
}


@torch.no_grad()
def by_peft(adapter: Path) -> Tensor:
    """What PEFT alone makes of an adapter folder."""
    return velocity(peft.PeftModel.from_pretrained(tiny_transformer(), str(adapter)).eval())


@pytest.mark.parametrize("kind", KINDS)
def test_rank_four_stored_at_sixteen_loses_nothing(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four, **KINDS[kind])
    report = resize_adapter(adapter, tmp_path / "small", rank=4)
    assert report.error <= 1e-6
    assert all(module.error <= 1e-6 and module.new_rank == 4 for module in report.modules)
    with torch.no_grad():
        plain = velocity(tiny_transformer())
    large, small = by_peft(adapter), by_peft(tmp_path / "small")
    assert torch.allclose(large, small, atol=1e-5)
    assert (large - plain).abs().max() > 1e-2
    config = read_adapter_config(tmp_path / "small")
    assert config.r == 4
    assert config.use_dora == (kind == "DoRA")
    assert not config.rank_pattern
    # The scale of each linear is as it was.
    scales = [{u.name: u.scale for u in open_adapter(folder).updates()} for folder in (adapter, tmp_path / "small")]
    assert scales[0] == pytest.approx(scales[1], rel=1e-12)

    worse = resize_adapter(adapter, tmp_path / "three", rank=3)
    if kind != "DoRA":  # 1 of 30 parts is left out
        assert worse.error == pytest.approx(math.sqrt(1 / 30), rel=1e-4)
        assert all(module.error == pytest.approx(math.sqrt(1 / 30), rel=1e-4) for module in worse.modules)
    assert worse.error > 1e-2
    assert not torch.allclose(large, by_peft(tmp_path / "three"), atol=1e-4)


def test_energy_chooses_a_rank_for_each_linear(base: Path, tmp_path: Path) -> None:
    def two_spectra(name: str, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
        return rank_four(name, weight, r, (4, 3, 2, 1) if name.endswith("fc1") else (10, 1, 0.1, 0.1))

    adapter = make_adapter(tmp_path / "adapter", base, two_spectra)
    report = resize_adapter(adapter, tmp_path / "small", energy=0.95)
    ranks = {module.name: module.new_rank for module in report.modules}
    assert {name: 3 if name.endswith("fc1") else 1 for name in ranks} == ranks
    config = read_adapter_config(tmp_path / "small")
    assert {config.r, *config.rank_pattern.values()} == {1, 3}
    assert {config.lora_alpha, *config.alpha_pattern.values()} == {2, 6}  # alpha / r stays 2
    assert report.new_parameters == sum(
        value.numel() for update in open_adapter(tmp_path / "small").updates() for value in (update.up, update.down)
    )
    squares = {"fc1": (1, 30), "fc2": (1.02, 101.02)}  # left out, of
    for module in report.modules:
        left_out, whole = squares[module.name[-3:]]
        assert module.error == pytest.approx(math.sqrt(left_out / whole), rel=1e-3)
    with torch.no_grad():
        off = (by_peft(tmp_path / "small") - by_peft(adapter)).abs().max()
        change = (velocity(tiny_transformer()) - by_peft(adapter)).abs().max()
    assert 0 < off < 0.5 * change
    whole = resize_adapter(adapter, tmp_path / "whole", energy=1.0)
    assert whole.error <= 1e-6
    assert {module.new_rank for module in whole.modules} == {4}


def test_card_header_and_other_files_go_along(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four)
    (adapter / "samples.png").write_bytes(b"image")
    resize_adapter(adapter, tmp_path / "small", rank=4)
    resize_adapter(tmp_path / "small", tmp_path / "smaller", rank=2)
    assert (tmp_path / "smaller" / "samples.png").read_bytes() == b"image"
    before, after = read_adapter_header(adapter), read_adapter_header(tmp_path / "smaller")
    assert {key: after[key] for key in ("base", "fingerprint")} == {key: before[key] for key in ("base", "fingerprint")}
    assert (after["r"], after["alpha"]) == (2, 4)
    assert after["lora"].startswith("LoRA (r=2, alpha=4")
    assert after["resized"]["by"] == "rank 2"
    card = (tmp_path / "smaller" / "README.md").read_text()
    assert card.startswith("# A card\n\nText.\n")
    assert card.count("## Resized") == 1
    assert "From rank 4 to 2, by rank 2" in card
    config = json.loads((tmp_path / "smaller" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name


def test_an_alpha_of_zero_stays_an_update_of_nothing(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four, alpha_pattern={"fc2": 0})
    report = resize_adapter(adapter, tmp_path / "small", rank=4)
    assert report.error <= 1e-6
    assert torch.allclose(by_peft(tmp_path / "small"), by_peft(adapter), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # PEFT's, of every adapter with biases
def test_biases_of_an_update_stay(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four, lora_bias=True)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("lora_B.bias"):
            tensors[name] += 0.3
    save_file(tensors, file)  # without our header, as another tool would write it
    report = resize_adapter(adapter, tmp_path / "small", rank=4, base=str(base))
    assert report.error <= 1e-6
    assert torch.allclose(by_peft(tmp_path / "small"), by_peft(adapter), atol=1e-5)


def test_fidelity_is_measured_on_both(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, lambda name, w, r: rank_four(name, 30 * w, r, (40, 30, 20, 10)))
    argv = [
        "resize",
        str(adapter),
        "--out",
        str(tmp_path / "small"),
        "--rank",
        "1",
        "--data",
        str(data),
        "--steps",
        "1",
    ]
    assert main([*argv, "--json"]) == 0
    output = capsys.readouterr()
    fidelity = json.loads(output.out)["fidelity"]
    assert fidelity.keys() == {"base", "before", "after"}
    assert all(0 <= side["miou"] <= 1 and side["boxes"] > 12 for side in fidelity.values())
    assert "relative error" in output.err
    assert read_adapter_header(tmp_path / "small")["resized"]["fidelity"] == fidelity
    assert "before: miou" in (tmp_path / "small" / "README.md").read_text()


def test_what_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    small = ["--out", str(tmp_path / "small")]
    wrong = {
        "no adapter_config.json": [str(tmp_path / "empty"), "--rank", "2", *small],
        "is 17, and": [str(adapter), "--rank", "17", *small],
        "--rank or --energy": [str(adapter), *small],
        "--rank and --energy are given": [str(adapter), "--rank", "2", "--energy", "0.9", *small],
        "above 0, up to 1": [str(adapter), "--energy", "0", *small],
        "is 1.5": [str(adapter), "--energy", "1.5", *small],
        "is what is read: ADAPTER": [str(adapter), "--rank", "2", "--out", str(adapter)],
        "(it holds thesis.txt)": [str(adapter), "--rank", "2", "--out", str(tmp_path / "full")],
        "metadata.jsonl": [str(adapter), "--rank", "2", "--data", str(tmp_path / "empty"), *small],
    }
    for message, argv in wrong.items():
        assert main(["resize", *argv]) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
    assert read_adapter_config(adapter).r == 16
    assert main(["resize", str(adapter), "--rank", "4", *small]) == 0  # and what is right is not
