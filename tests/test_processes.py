"""Two processes give what one gives with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmdit_lora.cli import main

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_two_processes_train_what_one_does(base: Path, data: Path, tmp_path: Path, quantization: str) -> None:
    if quantization != "none":
        pytest.importorskip("torchao")
    train = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-3, "validate_every": 2, "checkpoint_every": 2}
    content = {
        "base": str(base),
        "output_dir": str(tmp_path / "one"),
        "data": {"path": str(data), "validation_share": 0.25},
        "lora": {"dropout": 0.0},  # each process draws its own
        "train": train | {"sample_every": 2, "sample_count": 2, "quantization": quantization},
        "sample": {"steps": 2},
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(content))
    assert main(["train", str(config)]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "mmdit_lora.cli", "train"]
    overrides = [f"output_dir={tmp_path / 'two'}", "train.batch_size=2"]
    done = subprocess.run(
        [*command, str(config), *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wrote ") == 1, "only the main process speaks and writes"
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)
    assert any(tensor.abs().max() > 1e-4 for name, tensor in one.items() if "lora_B" in name)
