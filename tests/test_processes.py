"""Two processes give what one gives with the same global batch; killed with two, a run goes on with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mmdit_lora.cli.main import main
from mmdit_lora.training.checkpoint import checkpoints

pytestmark = pytest.mark.slow

STEPS = 20


def write_config(folder: Path, name: str, base: Path, images: Path, **changes: dict[str, Any]) -> Path:
    train = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3, "validate_every": 10, "checkpoint_every": 5}
    content = {
        "base": str(base),
        "output_dir": str(folder / name),
        "data": {"path": str(images), "validation_share": 0.25, "crop": "random", "flip": True},
        "lora": {"dropout": 0.1},  # by sample: the same in any process
        "train": train | {"sample_every": 10, "sample_count": 2, "log_every": 1},
        "tracking": {"tracker": "tensorboard", "run_name": "run"},
        "sample": {"steps": 2},
    }
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values  # type: ignore[operator]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def two_processes(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "-m",
        "mmdit_lora",
        "train",
    ]
    return subprocess.Popen(
        [*command, str(config), "train.batch_size=2", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers(process: subprocess.Popen[str]) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path) -> None:
    deadline = time.monotonic() + 300
    while not checkpoints(folder) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def losses_of(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "run"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars("loss")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"quantization": "int8"}},
        {"data": {"buckets": {"ratios": ["1:1", "4:3"], "group_boxes": True}}},
        {"prior": {"batch_size": 2}},
    ],
    ids=["plain", "int8", "buckets", "prior"],
)
def test_two_processes_train_what_one_does(base: Path, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    if "quantization" in changes.get("train", {}):
        pytest.importorskip("torchao")
    if "prior" in changes:
        old = {"caption": "old", "boxes": [{"xyxy": [0.1, 0.1, 0.5, 0.6], "phrase": "a red circle"}]}
        (tmp_path / "old.jsonl").write_text((json.dumps(old) + "\n") * 4)
        changes = {"prior": {"layouts": str(tmp_path / "old.jsonl"), "batch_size": 2}}
    one = write_config(tmp_path, "one", base, data, **changes)
    assert main(["train", str(one)]) == 0
    halved = ["prior.batch_size=1"] if "prior" in changes else []
    process = two_processes(write_config(tmp_path, "two", base, data, **changes), *halved)
    _, said = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert said.count("wrote ") == 1, "only the main process speaks and writes"
    before, after = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert list(before) == list(after) == list(range(1, STEPS + 1))
    assert max(abs(before[step] - after[step]) for step in before) < 1e-5
    alone, together = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert alone.keys() == together.keys()
    assert max((alone[name] - together[name]).abs().max().item() for name in alone) < 1e-4
    assert any(tensor.abs().max() > 1e-3 for name, tensor in alone.items() if "lora_B" in name)


def test_killed_with_two_processes_and_gone_on_with_one(base: Path, data: Path, tmp_path: Path) -> None:
    assert main(["train", str(write_config(tmp_path, "one", base, data))]) == 0
    config = write_config(tmp_path, "mixed", base, data)
    process = two_processes(config)
    folder = tmp_path / "mixed" / "checkpoints"
    wait_for_checkpoint(process, folder)
    for child in [process.pid, *workers(process)]:  # they have a session of their own
        os.kill(child, signal.SIGKILL)
    process.communicate()
    assert checkpoints(folder)
    assert not (tmp_path / "mixed" / "adapter").exists(), "the run was over before it was killed"
    assert main(["train", str(config), "--resume", "latest"]) == 0
    one, mixed = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "mixed")
    assert max((one[name] - mixed[name]).abs().max().item() for name in one) < 1e-4


def test_a_rank_that_dies_ends_all_with_a_message(base: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", base, data, train={"max_steps": 100_000})
    process = two_processes(config)
    folder = tmp_path / "run" / "checkpoints"
    wait_for_checkpoint(process, folder)
    children = workers(process)
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    _, said = process.communicate(timeout=60)  # not for ever
    assert process.returncode != 0
    assert "SIGKILL" in said or "exitcode" in said
    assert all(not Path(f"/proc/{child}").exists() for child in children)
    for checkpoint in checkpoints(folder):
        checkpoint.state()


def test_a_signal_to_one_process_stops_all_after_the_same_step(base: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, "run", base, data, train={"max_steps": 100_000})
    process = two_processes(config)
    folder = tmp_path / "run" / "checkpoints"
    wait_for_checkpoint(process, folder)
    os.kill(workers(process)[1], signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    newest = checkpoints(folder)[-1]
    newest.state()
    assert f"step {newest.step} is saved" in said
    assert process.returncode != 0
