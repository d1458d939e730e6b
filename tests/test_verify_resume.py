"""`verify-resume`: equal where resume is exact; where something is broken, it names what differs first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.sampler import BatchPlan
from mmdit_lora.errors import InputError, Stopped
from mmdit_lora.training import setup as run_module
from mmdit_lora.training import verify_resume as verify_module
from mmdit_lora.training.ema import EMA
from mmdit_lora.training.setup import Run
from mmdit_lora.training.verify_resume import end_difference, first_difference, read_rows, verify_resume
from tests.test_trainer import make_config


def row(step: int, **changes: Any) -> dict[str, Any]:
    values = {"samples": ["d/metadata.jsonl:1", "d/metadata.jsonl:2"], "times": [0.25, 0.5], "losses": [1.0, 2.0]}
    return {"step": step, **values, "loss": 1.5, "learning_rate": 1e-3, "grad_norm": 0.5, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"samples": ["d/metadata.jsonl:1", "d/metadata.jsonl:7"]},
            "step 2: the samples differ: metadata.jsonl:2 against",
        ),
        ({"times": [0.25, 0.75]}, "step 2: the times differ, at metadata.jsonl:2: 0.5 against 0.75"),
        ({"losses": [1.5, 2.0]}, "step 2: the losses differ, at metadata.jsonl:1: 1.0 against 1.5"),
        ({"learning_rate": 2e-3, "grad_norm": 1.0}, "step 2: the learning rate differs: 0.001 against 0.002"),
        ({"grad_norm": 0.75}, "step 2: the grad norm differs"),
    ],
)
def test_the_first_step_that_differs_is_named_with_what_came_first(changes: dict[str, Any], said: str) -> None:
    one = [row(1), row(2), row(3)]
    assert first_difference(one, [row(1), row(2), row(2), row(3)]) is None  # a step that was done again
    # The later step stands before it, as after a kill; and the second time only.
    found = first_difference(one, [row(3, loss=9.0), row(1), row(2), row(2, **changes)])
    assert found is not None
    assert found.startswith(said)


def test_steps_that_only_one_run_came_to_are_told() -> None:
    assert first_difference([row(1), row(2)], [row(1)]) == "step 2: only the undisturbed run came to it"
    assert first_difference([row(1)], [row(1), row(2)]) == "step 2: the undisturbed run ended before it"


def test_a_row_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(json.dumps(row(1)) + "\n" + json.dumps(row(2))[:20])
    assert read_rows(tmp_path / "rows") == [row(1)]
    assert read_rows(tmp_path / "none") == []


@pytest.fixture
def config(base: Path, data: Path, tmp_path: Path) -> Config:
    """With everything whose state a checkpoint must hold; its own output folder is never made."""
    train = {"ema_decay": 0.9, "validate_every": 100, "warmup_steps": 50, "early_stop": 1, "max_steps": 1000}
    data_section = {"path": str(data), "validation_share": 0.25, "crop": "random", "flip": True}
    return make_config(base, data, tmp_path / "run", train=train, data=data_section)


@pytest.mark.slow
def test_a_resumed_run_is_found_equal_and_one_with_kills_too(config: Config, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    verdict = verify_resume(config, steps=3, kills=1, on_progress=lambda phase, done, *_: told.append((phase, done)))
    assert verdict.equal, verdict
    assert [trial.differs for trial in verdict.trials] == [None, None]
    assert len(verdict.kills) == 1
    assert verdict.crossed == [
        "a warm-up of 3 steps (cut from 50)",
        "the end of an epoch in step 3",
        "validations every 3 steps",
    ]
    assert len(verdict.sha256) == 64
    assert [done for phase, done in told if phase == "resumed"] == [4, 5, 6], "the second half went on from step 3"
    assert ("to be resumed", 4) in told
    assert not (tmp_path / "run").exists()


def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time that a run is set up: by then, a process may have been started anew."""
    count: list[int] = []
    prepare = run_module.check_output

    def counted(*args: Any) -> None:
        count.append(1)
        prepare(*args)

    monkeypatch.setattr(run_module, "check_output", counted)
    return count


def test_a_sampler_that_counts_starts_is_caught_and_its_samples_are_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = starts(monkeypatch)
    record = BatchPlan.record
    # The second half of the resumed run is the third start; the undisturbed ones are the first and the fourth.
    monkeypatch.setattr(BatchPlan, "record", lambda self, at: record(self, at + 1 if len(count) == 3 else at))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["verify-resume", str(tmp_path / "run.yaml"), "--steps", "3", "--kills", "0", "--json"]) == 1
    out, said = capsys.readouterr()
    report = json.loads(out)
    assert not report["equal"]
    assert report["undisturbed_differs"] is None
    assert report["trials"][0]["differs"].startswith("step 4: the samples differ: metadata.jsonl:")
    assert "error: a resumed run of this config is another run" in said
    assert "two undisturbed runs are equal" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_where_undisturbed_runs_differ_it_is_not_resume(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = starts(monkeypatch)
    step = torch.optim.AdamW.step

    def shaky(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        for group in self.param_groups:
            group["lr"] *= 1 + 1e-3 * len(count)
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", shaky)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["verify-resume", str(tmp_path / "run.yaml"), "--steps", "2", "--kills", "0"]) == 1
    assert "error: not resume: two undisturbed runs differ too" in capsys.readouterr().err


def forget_average(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMA, "load", lambda *_: None)


def mistake_best(patch: pytest.MonkeyPatch) -> None:
    load = Run.load

    def wrong(self: Run, checkpoint: Any) -> None:
        load(self, checkpoint)
        self.state.best = 0.5  # minus a loss is below 0: nothing is better

    patch.setattr(Run, "load", wrong)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("forget", "said"),
    [(forget_average, "average.safetensors differs in"), (mistake_best, "the checkpoint of step 4: best")],
)
def test_state_that_no_step_shows_is_compared_at_the_end(
    config: Config, monkeypatch: pytest.MonkeyPatch, forget: Callable[[pytest.MonkeyPatch], None], said: str
) -> None:
    forget(monkeypatch)
    verdict = verify_resume(config, steps=2, kills=0)
    assert verdict.trials[0].differs is not None
    assert said in verdict.trials[0].differs
    assert verdict.undisturbed_differs is None


def test_a_flipped_bit_in_a_result_is_found(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts: list[str | None] = []

    def flipped(one: Path, two: Path) -> str | None:
        file = two / "adapter" / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        verdicts.append(end_difference(one, two))
        return None

    monkeypatch.setattr(verify_module, "end_difference", flipped)
    verify_resume(config, steps=1, kills=0)
    assert verdicts[0] is not None
    assert verdicts[0].startswith("adapter/adapter_model.safetensors differs in 1 of")


def test_wrong_input_is_refused_as_by_train(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-resume", str(tmp_path / "none.yaml")]) == 2
    assert "no such config file" in capsys.readouterr().err
    config = make_config(base, data, tmp_path, lora={"targets": ["no_such"]})
    with pytest.raises(InputError, match="no_such"):
        verify_resume(config, steps=1, kills=0)


@pytest.mark.slow
def test_a_child_that_cannot_train_is_told(config: Config, tmp_path: Path) -> None:
    broken = config.model_copy(update={"base": str(tmp_path / "no_base")})
    with pytest.raises(Stopped, match=r"ended by itself \(exit code 1\).*"):
        verify_module._killed(broken, 1, 1, 0.1, tmp_path, [], lambda *_: None)
