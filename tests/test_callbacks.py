"""`train(config, callbacks=[...])`: what is called when, with which values, after a resume too; and the caller's world after it."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from mmdit_lora.errors import InputError
from mmdit_lora.training.callbacks import Callback
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.preflight import Preflight
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.trainer import train
from tests.test_trainer import make_config

LENGTH = {"max_steps": 5, "checkpoint_every": 2, "validate_every": 2, "log_every": 2}


class Diary(Callback):
    """Every call, in order, with its values."""

    def __init__(self, entries: list[tuple[Any, ...]] | None = None, name: str = "") -> None:
        self.entries: list[tuple[Any, ...]] = [] if entries is None else entries
        self.name = name
        self.records: list[StepRecord] = []
        self.metrics: dict[int, Mapping[str, float]] = {}

    def on_preflight(self, report: Preflight) -> None:
        self.entries.append((f"{self.name}preflight", not report.failed))

    def on_step(self, record: StepRecord) -> None:
        self.entries.append((f"{self.name}step", record.step))
        self.records.append(record)

    def on_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        self.entries.append((f"{self.name}validation", step))
        self.metrics[step] = metrics

    def on_save(self, folder: Path) -> None:
        assert folder.is_dir()
        self.entries.append((f"{self.name}save", folder.name))


def test_every_call_comes_once_in_order_with_the_values_of_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    diary = Diary()
    result = train(make_config(base, data, tmp_path, train=LENGTH), callbacks=[diary])
    names = [f"step_{step:07d}" for step in (2, 4, 5)]
    assert diary.entries == [
        ("preflight", True),
        ("step", 1),
        *[("step", 2), ("validation", 2), ("save", names[0])],
        ("step", 3),
        *[("step", 4), ("validation", 4), ("save", names[1])],
        *[("step", 5), ("validation", 5), ("save", names[2])],
        ("save", "adapter"),
    ]
    assert [bool(record.logged) for record in diary.records] == [False, True, False, True, True]
    for record in diary.records:
        assert record.loss == pytest.approx(record.losses.mean().item())
        if record.logged:
            assert record.logged["loss"] == record.loss
            assert {"learning_rate", "grad_norm", "speed/samples_per_s"} <= record.logged.keys()
    loss = result.report["held_out_loss"]
    assert diary.metrics[5]["held_out/loss"] == loss["trained"]
    assert diary.metrics[5]["held_out/loss_minus_base"] == loss["difference"]


def test_a_resumed_run_calls_from_the_step_after_the_checkpoint_on_with_the_same_values(
    base: Path, data: Path, tmp_path: Path
) -> None:
    class Ends(Exception):
        pass

    class EndsAt(Diary):
        def on_step(self, record: StepRecord) -> None:
            super().on_step(record)
            if record.step == 3:
                raise Ends

    whole, before, after = Diary(), EndsAt(), Diary()
    train(make_config(base, data, tmp_path / "whole", train=LENGTH), callbacks=[whole])
    config = make_config(base, data, tmp_path / "run", train=LENGTH)
    with pytest.raises(Ends):  # as any error ends it: what the last checkpoint holds is safe
        train(config, callbacks=[before])
    assert [checkpoint.step for checkpoint in checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    train(config, resume=True, callbacks=[after])
    assert [record.step for record in after.records] == [3, 4, 5]
    for one, two in zip(whole.records[2:], after.records, strict=True):
        assert (one.loss, one.grad_norm, one.learning_rate) == (two.loss, two.grad_norm, two.learning_rate)
        assert one.samples == two.samples
    assert {step: after.metrics[step] for step in (4, 5)} == {step: whole.metrics[step] for step in (4, 5)}


@pytest.mark.parametrize("method", ["on_preflight", "on_validation", "on_save"])
def test_an_error_in_a_callback_is_the_runs(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    class Broken(Exception):
        pass

    def fail(*_: Any) -> None:
        raise Broken

    callback = type("Fails", (Callback,), {method: fail})()
    with pytest.raises(Broken):
        train(make_config(base, data, tmp_path, train=LENGTH), callbacks=[callback])
    steps = [checkpoint.step for checkpoint in checkpoints(tmp_path / "checkpoints")]
    assert steps == ([2] if method == "on_save" else [])


def test_several_callbacks_are_called_in_their_order(base: Path, data: Path, tmp_path: Path) -> None:
    entries: list[tuple[Any, ...]] = []
    config = make_config(base, data, tmp_path, train={"max_steps": 1, "checkpoint_every": 0})
    train(config, callbacks=[Diary(entries, "first "), Diary(entries, "second ")])
    assert [entry[0] for entry in entries] == [
        f"{name} {what}" for what in ("preflight", "step", "validation", "save") for name in ("first", "second")
    ]


def test_a_config_may_be_a_mapping_or_a_file(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", train={"max_steps": 1})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    values = config.model_dump(mode="json")
    losses = []
    given: Any
    for number, given in enumerate([config, values, tmp_path / "run.yaml", str(tmp_path / "run.yaml")]):
        diary = Diary()
        train(given, callbacks=[diary])
        losses.append(diary.records[0].loss)
        (tmp_path / "run").rename(tmp_path / f"run_{number}")
    assert len(set(losses)) == 1
    with pytest.raises(InputError, match="data"):
        train({"base": str(base)})
    with pytest.raises(InputError, match="did you mean 'train'"):
        train(values | {"tain": {}})


# --- the caller's world -----------------------------------------------------------------------------------------------


def rows_of_generators() -> Any:
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]


WORLD: dict[str, Callable[[], Any]] = {
    "generators": rows_of_generators,
    "default dtype": torch.get_default_dtype,
    "deterministic": lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    ),
    "cudnn": lambda: (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.backends.cudnn.enabled),
    "threads": torch.get_num_threads,
    "gradients": torch.is_grad_enabled,
    "signals": lambda: [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
    "environment": lambda: dict(os.environ),
    "warnings": lambda: (list(warnings.filters), warnings.showwarning),
    "logging": lambda: {
        name: (logging.getLogger(name).level, list(logging.getLogger(name).handlers))
        for name in (None, "accelerate", "diffusers", "mmdit_lora", "peft", "torch", "transformers")
    },
    "streams": lambda: (sys.stdout, sys.stderr, sys.excepthook),
    "Accelerate": lambda: [id(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
    "folder": os.getcwd,
}


@pytest.fixture(scope="module")
def around(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What `WORLD` asks for, before and after a run in a world of unusual settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_CONFIG_DIR", str(tmp_path_factory.mktemp("wandb_config")))
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        torch.manual_seed(5), random.seed(6), np.random.seed(7)
        warnings.simplefilter("error", FutureWarning)
        before = {name: ask() for name, ask in WORLD.items()}
        config = make_config(
            base,
            data,
            tmp_path_factory.mktemp("world") / "run",
            train={"max_steps": 2, "sample_every": 1, "sample_count": 1},
            sample={"steps": 1},
            tracking={"tracker": "wandb", "wandb_mode": "offline"},
        )
        train(config)
        yield {name: (before[name], ask()) for name, ask in WORLD.items()}


@pytest.mark.parametrize("name", WORLD)
def test_a_run_leaves_its_callers_world_alone(around: dict[str, tuple[Any, Any]], name: str) -> None:
    before, after = around[name]
    assert before == after


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate as in a process that has not used it: other tests set runs up by `prepare_run` alone."""
    for state in (PartialState, AcceleratorState, GradientState):
        monkeypatch.setattr(state, "_shared_state", {})


@pytest.mark.usefixtures("fresh")
def test_the_callers_accelerator_is_what_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    own = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=3)
    model = own.prepare(torch.nn.Linear(2, 2))
    train(make_config(base, data, tmp_path, train={"max_steps": 1}))
    assert own.mixed_precision == "bf16"
    assert own.gradient_accumulation_steps == 3
    assert AcceleratorState().mixed_precision == "bf16"
    with own.accumulate(model), own.autocast():
        assert model(torch.ones(1, 2)).dtype == torch.float32  # Accelerate gives its outputs back in fp32
        assert not own.sync_gradients
    assert Accelerator(cpu=True).mixed_precision == "bf16"


@pytest.mark.usefixtures("fresh")
def test_a_run_that_fails_leaves_it_alone_too(base: Path, data: Path, tmp_path: Path) -> None:
    own, state = Accelerator(mixed_precision="bf16", cpu=True), torch.get_rng_state()
    with pytest.raises(InputError):
        train(make_config(base, data, tmp_path, lora={"targets": ["nothing"]}))
    assert own.mixed_precision == "bf16"
    assert torch.equal(torch.get_rng_state(), state)
    assert not (tmp_path / "report.json").exists()
