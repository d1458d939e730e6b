"""SIGKILL at moments that nobody chose, then on from the newest checkpoint: the adapter is the undisturbed one's, to the bit.

The processes are forked from one that has imported everything (multiprocessing's fork server), so that a start costs a
second and not ten; what is killed is a real process that runs a real training.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mmdit_lora.config.loading import Config
from mmdit_lora.files import RESERVED
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.trainer import train
from tests.test_trainer import make_config

KEEP = 2
Moment = Callable[[Path], bool]  # whether the time to kill has come, for a run's folder of checkpoints


def train_here(config: dict[str, Any]) -> None:
    """The whole life of a process."""
    import torch

    torch.set_num_threads(1)
    train(Config.model_validate(config), resume=True)


def run(forks: Any, config: Config) -> BaseProcess:
    process: BaseProcess = forks.Process(target=train_here, args=(config.model_dump(),))
    process.start()
    return process


def newest(folder: Path) -> int:
    found = checkpoints(folder)
    return found[-1].step if found else 0


def hidden(folder: Path) -> list[Path]:
    """What is being written, or being removed."""
    return list(folder.glob(f"{RESERVED}*-*"))


def kill_and_check(forks: Any, config: Config, moment: Moment, *, goal: int) -> bool:
    """One life: killed when the checkpoint of step `goal` is there and `moment` has come; whether it was killed at all."""
    folder = Path(config.output_dir) / "checkpoints"
    reached = newest(folder)
    process = run(forks, config)
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if newest(folder) >= goal and moment(folder):
            break
        time.sleep(0.001)
    process.kill()
    process.join(60)
    found = checkpoints(folder)
    for checkpoint in found:
        checkpoint.state()  # raises for one that is not whole
    assert [c.folder for c in found] == sorted(folder.glob("step_*")), "a folder without its state"
    # The best is among those that are kept, beside them; one is just written or half; what is being removed is hidden.
    assert len(found) + len(hidden(folder)) <= KEEP + 1 + 1
    assert newest(folder) >= reached
    assert process.exitcode in (0, -9), process.exitcode
    return process.exitcode == -9


def disturbed_equals_undisturbed(
    forks: Any, base: Path, data: Path, tmp_path: Path, moments: list[Callable[[], Moment]], steps: int
) -> None:
    train_section = {
        "max_steps": steps,
        "batch_size": 2,
        "checkpoint_every": 1,
        "keep_checkpoints": KEEP,
        "ema_decay": 0.9,
        "validate_every": max(2, steps // 10),
        "final": "best",
    }
    drawn = {"path": str(data), "validation_share": 0.25, "crop": "random", "flip": True, "cache_variants": 2}
    settings = {"train": train_section, "data": drawn}
    whole = run(forks, make_config(base, data, tmp_path / "whole", **settings))
    # The undisturbed run has no cache on disk, the killed one fills its own as it goes.
    cached = settings | {"data": drawn | {"cache": str(tmp_path / "cache")}}
    config = make_config(base, data, tmp_path / "killed", **cached)
    folder = tmp_path / "killed" / "checkpoints"
    killed = 0
    for number, moment in enumerate(moments):
        goal = 0 if moment is START else max(newest(folder) + 1, number * steps // (len(moments) + 1))
        killed += kill_and_check(forks, config, moment(), goal=goal)
    assert killed == len(moments)
    whole.join(300)
    assert whole.exitcode == 0
    last = run(forks, config)
    last.join(300)
    assert last.exitcode == 0
    one, two = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)
    assert not list((tmp_path / "killed").rglob(f"{RESERVED}*")), "leftovers of a kill were not removed"
    kept = {c.step for c in checkpoints(folder)}
    assert {steps - 1, steps} <= kept
    assert len(kept) <= KEEP + 1


def at_any_time(longest: float) -> Callable[[], Moment]:
    """A moment up to `longest` seconds after the goal."""

    def make() -> Moment:
        until: list[float] = []

        def moment(_: Path) -> bool:
            until[:] = until or [time.monotonic() + CHANCE.uniform(0, longest)]
            return time.monotonic() >= until[0]

        return moment

    return make


def while_saving() -> Moment:
    """As soon as a checkpoint is being written."""
    return lambda folder: bool(hidden(folder))


def while_pruning() -> Moment:
    """As soon as one is being removed, or a little too late."""
    return lambda folder: (
        len(checkpoints(folder)) > KEEP + 1 or (len(checkpoints(folder)) >= KEEP and bool(hidden(folder)))
    )


CHANCE = random.Random(0)
STEP = at_any_time(0.15)  # in a step, a checkpoint, a validation
START = at_any_time(1.0)  # while everything is set up
KINDS = [START, STEP, while_saving, while_pruning, STEP]


@pytest.mark.slow
def test_four_kills_change_no_bit(forks: Any, base: Path, data: Path, tmp_path: Path) -> None:
    disturbed_equals_undisturbed(forks, base, data, tmp_path, [START, while_saving, STEP, while_pruning], steps=24)


@pytest.mark.slow
def test_fifty_kills_change_no_bit(forks: Any, base: Path, data: Path, tmp_path: Path) -> None:
    disturbed_equals_undisturbed(forks, base, data, tmp_path, KINDS * 10, steps=200)
