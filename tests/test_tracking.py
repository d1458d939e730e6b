"""Trackers: what was logged is on the disk, read back from the files that W&B and TensorBoard wrote."""

from __future__ import annotations

import io
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.errors import InputError
from mmdit_lora.training.tracking import NullTracker, Tracker, make_tracker
from tests.wandb_reader import OfflineRun, read_offline_run, read_offline_runs

LAYOUTS = [
    Layout("two things", [Box((0.1, 0.2, 0.5, 0.6), "a red circle"), Box((0.5, 0.5, 1.0, 1.0), "a blue square")]),
    Layout("nothing", []),
    Layout("one thing", [Box((0.0, 0.0, 0.25, 0.5), "a blue square")]),
]
CONFIG = {"lora": {"r": 16, "targets": ["fc1", "fc2"]}, "output_dir": Path("out"), "seed": None}


@pytest.fixture(autouse=True)
def no_account_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


def start(tracker: str, folder: Path, **changes: Any) -> Tracker:
    values = {"project": "layouts", "run_name": "try", "mode": "offline", "folder": folder, "config": CONFIG} | changes
    return make_tracker(tracker, **values)


def images(size: tuple[int, int] = (64, 64)) -> list[Image.Image]:
    return [Image.new("RGB", size, color) for color in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def wandb_run(folder: Path) -> OfflineRun:
    tracker = start("wandb", folder, run_id="abc123")
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step, "learning_rate": 1e-4 * step})
        tracker.log_images(step, "samples", images(), LAYOUTS)
    tracker.log(3, {"fidelity/miou": 0.75, "bad": math.nan, "worse": math.inf})
    sizes = [*images()[:1], *images((64, 32))[1:]]
    tracker.log_images(3, "mixed", sizes, LAYOUTS)
    tracker.log_images(3, "none", [], [])
    tracker.summary({"best_miou": 0.75, "adapter": Path("out/adapter")})
    assert tracker.run_id == "abc123"
    assert Path(tracker.location or "").is_dir()
    tracker.finish()
    return read_offline_run(folder)


def test_wandb_scalars(wandb_run: OfflineRun) -> None:
    assert wandb_run.run_id == "abc123"
    assert wandb_run.project == "layouts"
    assert wandb_run.series("loss") == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert wandb_run.series("learning_rate") == pytest.approx({1: 1e-4, 2: 2e-4, 3: 3e-4})
    assert wandb_run.series("fidelity/miou") == {3: 0.75}
    assert math.isnan(wandb_run.series("bad")[3])
    assert wandb_run.series("worse")[3] == math.inf
    assert wandb_run.exit_code == 0


def test_wandb_config_and_summary(wandb_run: OfflineRun) -> None:
    assert wandb_run.config == {"lora": {"r": 16, "targets": ["fc1", "fc2"]}, "output_dir": "out", "seed": None}
    assert wandb_run.summary["best_miou"] == 0.75
    assert wandb_run.summary["adapter"] == "out/adapter"
    assert wandb_run.summary["loss"] == pytest.approx(1 / 3)


def test_wandb_images_with_boxes(wandb_run: OfflineRun) -> None:
    logged = wandb_run.images("samples")
    assert sorted(logged) == [1, 2, 3]
    ids: dict[str, int] = {}
    for step in logged:
        for number, (entry, layout) in enumerate(zip(logged[step], LAYOUTS, strict=True)):
            with Image.open(entry["path"]) as image:
                assert image.size == (64, 64)
                assert image.getpixel((0, 0)) == images()[number].getpixel((0, 0))
            assert entry["caption"] == layout.caption
            assert len(entry["boxes"]) == len(layout.boxes)
            for item, box in zip(entry["boxes"], layout.boxes, strict=True):
                place = item["position"]
                assert (place["minX"], place["minY"], place["maxX"], place["maxY"]) == pytest.approx(box.xyxy)
                assert item.get("domain") is None  # relative to the image
                assert item["box_caption"] == box.phrase
                assert ids.setdefault(box.phrase, item["class_id"]) == item["class_id"]
    assert len(set(ids.values())) == 2


def test_wandb_images_of_several_sizes(wandb_run: OfflineRun) -> None:
    assert len(wandb_run.images("mixed_64x64")[3]) == 1
    assert [image["caption"] for image in wandb_run.images("mixed_64x32")[3]] == ["nothing", "one thing"]


def test_wandb_resume_drops_nothing(tmp_path: Path) -> None:
    first = start("wandb", tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.finish(failed=True)
    time.sleep(1.1)  # W&B names the folder by id and second
    second = start("wandb", tmp_path, run_id=first.run_id, config=CONFIG | {"seed": 1})
    for step in (2, 3, 4):  # from the checkpoint of step 1 on
        second.log(step, {"loss": step + 0.5})
    second.log(1, {"late": 1.0})  # not even a smaller step is dropped
    second.finish()
    runs = read_offline_runs(tmp_path)
    assert [run.run_id for run in runs] == [first.run_id] * 2
    assert [run.exit_code for run in runs] == [1, 0]
    assert runs[0].series("loss") == {1: 1, 2: 2, 3: 3}
    assert runs[1].series("loss") == {2: 2.5, 3: 3.5, 4: 4.5}
    assert runs[1].series("late") == {1: 1}


def test_wandb_is_quiet_and_needs_no_account(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout
    tracker = start("wandb", tmp_path, mode=None)  # no key: offline by itself
    assert sys.stdout is before
    tracker.log(1, {"loss": 1.0})
    tracker.finish()
    assert capfd.readouterr().out == ""
    assert read_offline_run(tmp_path).series("loss") == {1: 1.0}


def test_wandb_online_without_a_key_does_not_wait(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no API key") as caught:
        start("wandb", tmp_path, mode="online")
    assert "offline" in str(caught.value)
    assert not list(tmp_path.rglob("*.wandb"))


def test_wandb_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown W&B mode 'of'"):
        start("wandb", tmp_path, mode="of")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = start("wandb", tmp_path, mode=None)
    tracker.log(1, {"loss": 1.0})
    tracker.log_images(1, "samples", images(), LAYOUTS)
    tracker.summary({"a": 1})
    assert tracker.location is None
    tracker.finish()
    assert not list(tmp_path.rglob("*.wandb"))


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0}).Reload()


def test_tensorboard(tmp_path: Path) -> None:
    tracker = start("tensorboard", tmp_path)
    for step in range(1, 4):
        tracker.log(step, {"loss": 1 / step, "bad": math.nan, "worse": math.inf})
    tracker.log_images(3, "samples", images(), LAYOUTS)
    tracker.summary({"best_miou": 0.75})
    tracker.finish()
    assert tracker.run_id == "try"
    read = events(tmp_path / "tensorboard" / "try")
    assert {event.step: event.value for event in read.Scalars("loss")} == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert math.isnan(read.Scalars("bad")[0].value)
    assert read.Scalars("worse")[0].value == math.inf
    (event,) = read.Images("samples/0")
    with Image.open(io.BytesIO(event.encoded_image_string)) as image:
        assert image.size == (384, 384)
        assert len(set(image.convert("RGB").crop((30, 70, 200, 240)).get_flattened_data())) > 2  # a box is painted
    assert {f"samples/{number}" for number in range(3)} == set(read.Tags()["images"])
    texts = {tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in read.Tags()["tensors"]}
    assert json.loads(texts["config/text_summary"])["lora"]["r"] == 16
    assert json.loads(texts["summary/text_summary"]) == {"best_miou": 0.75}


def test_tensorboard_resume_replaces_the_obsolete_steps(tmp_path: Path) -> None:
    first = start("tensorboard", tmp_path)
    for step in (1, 2, 3):
        first.log(step, {"loss": float(step)})
    first.finish()
    second = start("tensorboard", tmp_path, run_id=first.run_id)
    second.log(2, {"loss": 2.5})
    second.finish()
    other = start("tensorboard", tmp_path)  # a new run of the same name is not mixed with the old one
    assert other.run_id == "try-2"
    read = events(tmp_path / "tensorboard" / "try")
    assert {event.step: event.value for event in read.Scalars("loss")} == {1: 1.0, 2: 2.5}


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="not installed") as caught:
        start("tensorboard", tmp_path)
    assert "uv pip install mmdit-lora[tensorboard]" in str(caught.value)
    assert not list(tmp_path.rglob("*"))


def test_none_and_unknown(tmp_path: Path) -> None:
    tracker = start("none", tmp_path)
    assert isinstance(tracker, NullTracker)
    assert tracker.run_id is None
    assert tracker.location is None
    tracker.log(1, {"loss": math.nan})
    tracker.log_images(1, "samples", images(), LAYOUTS)
    tracker.summary({})
    tracker.finish()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="unknown tracker 'mlflow'"):
        start("mlflow", tmp_path)


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_each_image_needs_its_layout(tmp_path: Path, name: str) -> None:
    tracker = start(name, tmp_path, mode="disabled")
    with pytest.raises(ValueError, match="3 images but 2 layouts"):
        tracker.log_images(1, "samples", images(), LAYOUTS[:2])
    tracker.finish()


def test_heavy_packages_are_imported_late() -> None:
    code = "import sys, mmdit_lora.training.tracking; print([m for m in ('wandb', 'torch', 'tensorboard') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
