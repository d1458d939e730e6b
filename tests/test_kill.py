"""SIGKILL at moments that nobody chose, then `--resume latest`: the adapter is that of an undisturbed run, to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from mmdit_lora.training.checkpoint import checkpoints

STEPS = 120

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("cached", [False, True])
def test_killed_and_resumed_equals_undisturbed(base: Path, data: Path, tmp_path: Path, cached: bool) -> None:
    configs = {}
    for name in ("whole", "killed"):
        configs[name] = tmp_path / f"{name}.yaml"
        train = {"max_steps": STEPS, "batch_size": 2, "checkpoint_every": 1, "sample_every": 0, "validate_every": 0}
        # The undisturbed run has no cache, the killed one fills its own as it goes.
        drawn = {"crop": "random", "flip": True, "cache_variants": 2} if cached else {}
        section = {"path": str(data), **drawn}
        if cached and name == "killed":
            section["cache"] = str(tmp_path / "cache")
        content = {"base": str(base), "output_dir": str(tmp_path / name), "data": section, "train": train}
        configs[name].write_text(yaml.safe_dump(content))

    whole = start(configs["whole"])
    assert whole.wait(timeout=300) == 0

    folder = tmp_path / "killed" / "checkpoints"
    chance = random.Random(0)
    kills, reached = 0, 0
    for _ in range(4):
        process = start(configs["killed"], resume=True)
        # Wait until this run has written a checkpoint of its own, then for a moment more.
        deadline = time.monotonic() + 120
        while process.poll() is None and newest(folder) <= reached and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=60)
        for checkpoint in checkpoints(folder):
            checkpoint.state()  # raises for one that is not whole
        assert newest(folder) >= reached
        reached = newest(folder)
    assert kills >= 2, "the run was too short to be killed"
    assert start(configs["killed"], resume=True).wait(timeout=300) == 0

    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)
    assert not list(folder.glob(".*")), "leftovers of a kill were not removed"
    assert len(checkpoints(folder)) == 2


def start(config: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-m",
        "mmdit_lora.cli",
        "train",
        str(config),
        *(["--resume", "latest"] if resume else []),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, start_new_session=True, env=environment, stderr=subprocess.DEVNULL)


def newest(folder: Path) -> int:
    found = checkpoints(folder)
    return found[-1].step if found else 0
