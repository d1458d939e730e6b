"""A killed and resumed run is one curve: one run id, steps going up, no gap, no repeat, read back from the trackers' files."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdit_lora.config.loading import Config
from mmdit_lora.layout import Layout
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.resumable_tracker import JOURNAL, resumable
from mmdit_lora.training.tracking import Tracker
from mmdit_lora.training.trainer import train
from tests.test_kill import train_here
from tests.test_trainer import make_config
from tests.wandb_reader import read_offline_runs, records

STEPS = 9
Rows = list[tuple[int, str]]


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_DIR", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))


def kill_at(config: Config, step: int) -> None:
    """Train in another process, killed once the row of `step` is written down."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_kill"])
    process = context.Process(target=train_here, args=(config.model_dump(),))
    process.start()
    journal = Path(config.output_dir) / JOURNAL
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if journal.is_file() and f'{{"step": {step}, ' in journal.read_text():
            break
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -9


def wandb_rows(folder: Path) -> Rows:
    runs = read_offline_runs(folder)
    assert len(runs) >= 2
    # Of a start that is killed before 32 KiB are full, W&B's file holds nothing at all.
    assert len({run.run_id for run in runs if run.history}) == 1
    assert len(list(folder.glob(f"wandb/offline-run-*-{runs[-1].run_id}"))) == len(runs)
    return [(row["step"], key) for run in runs for row in run.history for key in row if key != "step"]


def tensorboard_rows(folder: Path) -> Rows:
    """Of every event in the files, whether TensorBoard would show it or not."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (run,) = (folder / "tensorboard").iterdir()
    files = sorted(run.glob("events*"), key=lambda file: file.stat().st_mtime_ns)  # their names have whole seconds
    events = [event for file in files for event in EventFileLoader(str(file)).Load()]
    assert sum(event.HasField("file_version") for event in events) >= 2
    pairs = ((event.step, value.tag) for event in events for value in event.summary.value)
    return [(step, tag) for step, tag in pairs if "text_summary" not in tag]


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
@pytest.mark.parametrize("killed_at", [2, 7])  # before the first checkpoint, and behind it
def test_a_killed_and_resumed_run_is_one_curve(
    base: Path, data: Path, tmp_path: Path, tracker: str, killed_at: int
) -> None:
    config = make_config(
        base,
        data,
        tmp_path / "run",
        train={"max_steps": STEPS, "checkpoint_every": 4, "validate_every": 3, "sample_every": 6, "sample_count": 1},
        sample={"steps": 1},
        tracking={"tracker": tracker},
    )
    kill_at(config, killed_at)
    assert bool(checkpoints(tmp_path / "run" / "checkpoints")) == (killed_at > 4)
    if tracker == "wandb":
        time.sleep(1.1)  # W&B names the folder by id and second
    train(config, resume=True)
    rows = wandb_rows(tmp_path / "run") if tracker == "wandb" else tensorboard_rows(tmp_path / "run")
    assert len(rows) == len(set(rows)), "a step stands there twice"
    assert [step for step, key in rows if key == "loss"] == list(range(1, STEPS + 1))
    assert [step for step, _ in rows] == sorted(step for step, _ in rows)
    keys = {key for _, key in rows}
    assert {"grad_norm", "grad_norm/layout_processor", "grad_norm/transformer_blocks.00", "speed/samples_per_s"} <= keys
    for key in ["held_out/loss", *(f"held_out/loss_t{n}" for n in range(4)), "layout/shuffled_minus_true"]:
        assert [step for step, name in rows if name == key] == [3, 6, 9], key
    images = "samples" if tracker == "wandb" else "samples/0"
    shown = [step for step, name in rows if name == images]
    # W&B loses what does not fill 32 KiB; the best validation, of step 6, is a checkpoint too, so that it is not done again.
    assert shown == ([] if (tracker, killed_at) == ("wandb", 7) else [6])


def test_a_wandb_run_holds_fingerprints_and_the_adapter_with_its_card(base: Path, data: Path, tmp_path: Path) -> None:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    report = train(make_config(base, data, tmp_path, tracking={"tracker": "wandb"})).report
    (run,) = read_offline_runs(tmp_path)
    assert run.config["fingerprints"] == report["fingerprints"]
    assert set(run.config["fingerprints"]) == {"base", "encoders", "data", "validation", "split"}
    assert run.config["train"]["max_steps"] == 4
    (file,) = (path for path in tmp_path.rglob("run-*.wandb") if not path.parent.is_symlink())
    kept = [r.request.log_artifact.artifact for r in map(Record.FromString, records(file.read_bytes()))]
    kept += [r.artifact for r in map(Record.FromString, records(file.read_bytes())) if r.HasField("artifact")]
    (artifact,) = [one for one in kept if one.type == "model"]
    assert artifact.name == f"adapter-{run.run_id}"
    names = {entry.path for entry in artifact.manifest.contents}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert json.loads(artifact.metadata)["steps"] == 4


class Remembers(Tracker):
    """Keeps rows in memory; `there` is what earlier starts left."""

    def __init__(self, run_id: str | None, there: set[tuple[int, str]] | None) -> None:
        self._id, self.there, self.rows, self.shown = run_id or "new", there, [], []
        self.rows: list[tuple[int, dict[str, float]]]

    run_id = property(lambda self: self._id)  # type: ignore[assignment]

    def logged(self) -> set[tuple[int, str]] | None:
        return self.there

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.rows.append((step, dict(scalars)))

    def log_images(self, step: int, key: str, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> None:
        assert len(images) == len(layouts)
        self.shown.append((step, key))

    def summary(self, values: Mapping[str, Any]) -> None: ...

    def finish(self, *, failed: bool = False) -> None: ...


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder with the journal of a run that was killed while it wrote its fourth row."""
    tracker = resumable(tmp_path, "wandb", lambda _: Remembers("one", set()), run_id=None, step=0, resume=False)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": step / 2})
    tracker.log_images(3, "samples", [], [])
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"step": 4, "sca')
    return tmp_path


def resumed(folder: Path, there: set[tuple[int, str]] | None, name: str = "wandb", **options: Any) -> Any:
    options = {"run_id": None, "step": 2, "resume": True} | options
    return resumable(folder, name, lambda run_id: Remembers(run_id, there), **options)


def test_rows_that_the_tracker_lost_are_logged_again_and_others_are_not(begun: Path) -> None:
    tracker = resumed(begun, {(1, "loss")})
    assert tracker.run_id == "one"
    assert tracker.tracker.rows == [(2, {"loss": 1.0})], "the checkpoint is of step 2: step 3 will be done again"
    tracker.log(3, {"loss": 1.5})
    tracker.log(3, {"loss": 1.5, "held_out/loss": 0.5})
    tracker.log_images(3, "samples", [], [])
    tracker.log(4, {"loss": 2.0})
    assert tracker.tracker.rows[1:] == [(3, {"loss": 1.5}), (3, {"held_out/loss": 0.5}), (4, {"loss": 2.0})]
    assert tracker.tracker.shown == [(3, "samples")], "lost images of a step that is done again are shown again"
    lines = [json.loads(line) for line in (begun / JOURNAL).read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 2, 3, 3, 3, 4]


def test_rows_behind_the_checkpoint_that_the_tracker_has_are_not_logged_again(begun: Path) -> None:
    tracker = resumed(begun, {(1, "loss"), (2, "loss"), (3, "loss"), (3, "samples")}, step=0)
    for step in (1, 2, 3, 4):
        tracker.log(step, {"loss": step / 2})
    tracker.log_images(3, "samples", [], [])
    assert tracker.tracker.rows == [(4, {"loss": 2.0})]
    assert tracker.tracker.shown == []


def test_rows_of_a_start_that_finished_are_not_logged_again_and_those_of_one_that_was_killed_are(
    tmp_path: Path,
) -> None:
    first = resumable(tmp_path, "wandb", lambda _: Remembers("one", set()), run_id=None, step=0, resume=False)
    first.log(1, {"loss": 0.5})
    first.finish()
    second = resumed(tmp_path, set(), step=1)
    assert second.tracker.rows == []
    second.log(2, {"loss": 1.0})  # and is killed
    third = resumed(tmp_path, set(), step=2)
    assert third.tracker.rows == [(2, {"loss": 1.0})], "it may stand there twice, and is not missing"
    third.log(2, {"loss": 1.0})
    third.log(3, {"loss": 1.5})
    assert third.tracker.rows[1:] == [(3, {"loss": 1.5})]


def test_where_nobody_can_tell_the_journal_is_believed(begun: Path) -> None:
    tracker = resumed(begun, None)
    tracker.log(3, {"loss": 1.5})
    tracker.log_images(3, "samples", [], [])
    tracker.log(4, {"loss": 2.0})
    assert tracker.tracker.rows == [(4, {"loss": 2.0})]
    assert tracker.tracker.shown == []


@pytest.mark.parametrize("change", [{"name": "tensorboard", "run_id": "one"}, {"resume": False}])
def test_another_tracker_or_a_new_run_begins_anew(begun: Path, change: dict[str, Any]) -> None:
    tracker = resumed(begun, set(), **change)
    assert tracker.run_id == "new"
    assert tracker.tracker.rows == []
    tracker.log(1, {"loss": 0.5})
    assert tracker.tracker.rows == [(1, {"loss": 0.5})]
    assert len((begun / JOURNAL).read_text().splitlines()) == 2


def test_no_tracker_writes_no_journal(tmp_path: Path) -> None:
    tracker = resumed(tmp_path, None, name="none", resume=False)
    tracker.log(1, {"loss": 0.5})
    assert not (tmp_path / JOURNAL).exists()
