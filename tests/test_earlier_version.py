"""Files of an earlier version (commit 3839b07) open: `tests/golden/earlier_version` was written by its own `train`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmdit_lora
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import load_config
from mmdit_lora.errors import InputError
from mmdit_lora.lora import lora_state_dict
from mmdit_lora.pipelines import load_pipeline

FILES = Path(__file__).parent / "golden" / "earlier_version"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    shutil.copytree(FILES, tmp_path / "files")
    return tmp_path / "files"


def overrides(files: Path) -> list[str]:
    folders = {"output_dir": "run", "data.path": "data", "data.validation": "held_out"}
    return [f"{key}={files / folder}" for key, folder in folders.items()]


def test_a_run_resumes_to_the_weights_that_the_earlier_version_reached(files: Path) -> None:
    config = load_config(files / "run" / "config.yaml", [*overrides(files), "train.max_steps=3"])
    result = mmdit_lora.train(config, resume=True)
    assert result.report["steps"] == 3
    expected = load_file(FILES / "resumed_to_step_3.safetensors")
    # Captions were encoded one at a time then, and in batches now: the last bits differ.
    saved = load_file(files / "run" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)
    start = load_file(files / "run" / "checkpoints" / "step_0000001" / "trainable.safetensors")
    assert max((a - b).abs().max() for a, b in zip(start.values(), saved.values(), strict=True)) > 1e-5


def test_an_adapter_opens(files: Path) -> None:
    pipe = load_pipeline("data/tiny_base")
    mmdit_lora.load_adapter(pipe.transformer, files / "run" / "adapter")
    stored = load_file(files / "run" / "adapter" / "adapter_model.safetensors")
    loaded = lora_state_dict(pipe.transformer)
    assert sum(value.abs().sum() for value in loaded.values()) == sum(value.abs().sum() for value in stored.values())


def test_a_run_with_a_share_held_out_by_the_earlier_rule_is_refused(files: Path) -> None:
    run = files / "run_with_share"
    there = sorted(path for path in run.rglob("*") if path.is_file())
    config = load_config(run / "config.yaml", [f"output_dir={run}", f"data.path={files / 'data'}", "train.max_steps=3"])
    with pytest.raises(InputError, match="versions before held out") as caught:
        mmdit_lora.train(config, resume=True)
    assert "finish the run with the version that started it" in str(caught.value)
    assert sorted(path for path in run.rglob("*") if path.is_file()) == there


@pytest.mark.parametrize("method", ["ia3", "subspace"])
def test_a_config_with_a_method_of_a_study_is_refused(tmp_path: Path, method: str) -> None:
    text = (FILES / "run" / "config.yaml").read_text()
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("method: lora", f"method: {method}"))
    with pytest.raises(InputError, match="which only studies train") as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:3")


def test_an_evaluation_of_the_earlier_version_is_not_gone_on_with(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = files / "evaluation"
    before = (out / "evaluate.json").read_bytes()
    arguments = ["--base", "data/tiny_base", "--adapter", files / "run" / "adapter", "--data", files / "held_out"]
    assert main(["evaluate", *map(str, arguments), "--steps", "2", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "holds images of another evaluation" in said
    assert "give another folder, or remove this one" in said
    assert (out / "evaluate.json").read_bytes() == before
