"""The look before a run: each way to train nothing is seen before step 1, and the look itself leaves no trace."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mmdit_lora
from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.outputs import MARKER
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training import preflight
from mmdit_lora.training import setup as run
from mmdit_lora.training.checkpoint import checkpoints, trainable_parameters
from mmdit_lora.training.preflight import Preflight, duration_text, events, size_text
from mmdit_lora.training.stopping import DiskFull, disk_full_as_error
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.test_trainer import adapter_of, stop_after
from tests.test_trainer import make_config as config_of
from tests.tiny import tiny_pipeline, tiny_transformer

Usage = namedtuple("Usage", "total used free")


def make_config(base: Path, path: Path, out: Path, **changes: Any) -> Config:
    """With the trial steps, which the other files' runs leave out."""
    return config_of(base, path, out, **{**changes, "train": {"preflight": True} | changes.get("train", {})})


def look(config: Config, **options: Any) -> Preflight:
    return preflight.preflight(prepare_run(config), **options)


def states(report: Preflight) -> dict[str, str]:
    return {check.name: check.state for check in report.checks}


def by_name(report: Preflight, name: str) -> str:
    return " ".join(check.found for check in report.checks if check.name == name)


def write_config(config: Config, path: Path) -> str:
    path.write_text(config.to_yaml())
    return str(path)


# --- a good run -------------------------------------------------------------------------------------------------------


def short_texts(data: Path, folder: Path) -> Path:
    """The same images with texts of a few tokens: the tiny base's encoders read 16."""
    shutil.copytree(data, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for entry in lines:
        entry |= {
            "caption": "some things",
            "objects": entry["objects"] | {"phrase": ["a thing"] * len(entry["objects"]["bbox"])},
        }
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_good_run_passes_every_check(base: Path, data: Path, tmp_path: Path) -> None:
    report = look(make_config(base, short_texts(data, tmp_path / "short"), tmp_path / "run"))
    assert set(states(report).values()) == {"ok"}
    assert list(states(report)) == ["data", "targets", "base", "gradients", "memory", "time", "disk", "tracker"]
    assert "9 images" in by_name(report, "data")
    assert 0 < report.seconds < 60
    report.refuse_failed()
    assert not (tmp_path / "run").exists()


def test_the_costly_part_can_be_left_out(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[Preflight] = []
    train(
        make_config(base, data, tmp_path / "run", train={"preflight": False}), callbacks=[Calls(preflight=seen.append)]
    )
    assert list(states(seen[0])) == ["data", "targets", "base", "disk", "tracker"]


@pytest.mark.parametrize("method", ["lora", "layout_stream", "full"])
def test_the_trial_puts_back_every_bit_and_every_generator(base: Path, data: Path, tmp_path: Path, method: str) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run", method=method, data=drawn(data)))
    model = ready.pipe.transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved: list[bool] = []
    original = preflight._move

    def move(trainable: dict[str, torch.nn.Parameter]) -> None:
        original(trainable)
        moved.append(any(not torch.equal(before[name], p.detach()) for name, p in trainable.items()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_move", move)
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        found = preflight.dry_run(ready)
    assert moved
    assert all(moved)
    assert found.alive > 0
    assert found.still == [n for n in found.still if n in preflight._expected_still(ready)]
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not ready.optimizer.state_dict()["state"]
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]  # type: ignore[index]


def drawn(data: Path) -> dict[str, Any]:
    return {"path": str(data), "validation_share": 0.25, "flip": True, "crop": "random"}


def test_a_run_is_bit_equal_with_and_without_it(base: Path, data: Path, tmp_path: Path) -> None:
    for name, wanted in (("with", True), ("without", False)):
        train(make_config(base, data, tmp_path / name, data=drawn(data), train={"preflight": wanted}))
    one, two = adapter_of(tmp_path / "with"), adapter_of(tmp_path / "without")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_check_only_says_all_in_a_table_and_in_json_and_writes_nothing(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = short_texts(data, tmp_path / "short")
    values = {"path": str(short), "validation_share": 0.25, "cache": str(tmp_path / "cache")}
    path = write_config(make_config(base, short, tmp_path / "run", data=values), tmp_path / "run.yaml")
    assert main(["train", path, "--check-only", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["ok"] is True
    assert found["images"] == 9
    assert {check["state"] for check in found["checks"]} == {"ok"}
    assert "ready to train" in said.err
    assert all(len(line) <= 80 for line in said.err.splitlines())
    assert {p.name for p in tmp_path.iterdir()} == {"run.yaml", "short"}
    assert main(["train", path, "--check-only", "--json", "train.batch_size=200"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["ok"] is False
    assert "FAILED" in said.err
    assert main(["train", path, "--check-only", "--json", "lora.targets=[layout_mlp.fc9]"]) == 2
    said = capsys.readouterr()
    (check,) = json.loads(said.out)["checks"]
    assert "layout_mlp.fc9" in check["found"]
    assert said.err.count("error:") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"run.yaml", "short"}


# --- each failure once ------------------------------------------------------------------------------------------------


def refused(path: str, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """What `train` says when it refuses a run; nothing is left behind."""
    before = sorted(Path(path).parent.rglob("*"))
    assert main(["train", path, *overrides]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    assert "hint: " in said
    assert sorted(Path(path).parent.rglob("*")) == before
    return " ".join(said.split("error: ")[1].split())


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["lora.targets=[no.such]"], "'no.such' matches no module"),
        (["lora.targets=[layout_mlp.fc1, layout_mlp.fc3]"], "'layout_mlp.fc3' matches no module"),
        (["train.batch_size=10"], "a step takes 10 images, and there are 9"),
        (["train.batch_size=5", "train.gradient_accumulation=2"], "a step takes 10 images"),
    ],
    ids=["wrong target", "one wrong among several", "batch larger than data", "accumulated batch larger than data"],
)
def test_wrong_settings_are_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], expected: str
) -> None:
    path = write_config(make_config(base, data, tmp_path / "run"), tmp_path / "run.yaml")
    assert expected in refused(path, capsys, *overrides)


def test_a_batch_as_large_as_the_data_is_taken(base: Path, data: Path, tmp_path: Path) -> None:
    assert not look(make_config(base, data, tmp_path / "run", train={"batch_size": 9}), costly=False).failed


def test_zero_gates_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = tmp_path / "plain"
    tiny_pipeline(tmp_path / "vocabulary", tiny_transformer(open_gates=False)).save_pretrained(closed)
    path = write_config(make_config(closed, data, tmp_path / "run"), tmp_path / "run.yaml")
    assert "gates (layout_stream.out_proj) are zero" in refused(path, capsys)
    # The method that opens them may start, and all of the stream moves in the trial.
    report = look(make_config(closed, data, tmp_path / "run", method="layout_stream"))
    assert states(report)["gradients"] == "ok"


def test_no_data_and_no_boxes_are_refused(
    base: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    path = write_config(make_config(base, tmp_path / "empty", tmp_path / "run"), tmp_path / "run.yaml")
    assert "empty" in refused(path, capsys)
    bare = tmp_path / "bare"
    shutil.copytree(data, bare)
    lines = [json.loads(line) for line in (bare / "metadata.jsonl").read_text().splitlines()]
    for line in lines:
        line["objects"] = {"bbox": [], "phrase": []}
    (bare / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "none of 9 images has a box" in refused(path, capsys, f"data.path={bare}")


def test_freezing_after_the_adapter_was_added_is_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.set_trainable

    def freeze_late(*given: Any) -> Any:
        report = original(*given)
        model = given[0]
        model.requires_grad_(False)
        return report

    path = write_config(make_config(base, data, tmp_path / "run"), tmp_path / "run.yaml")
    monkeypatch.setattr(run, "set_trainable", freeze_late)
    assert "everything is frozen" in refused(path, capsys)

    def free_late(*given: Any) -> Any:
        report = original(*given)
        model = given[0]
        model.proj_out.requires_grad_(True)
        return report

    monkeypatch.setattr(run, "set_trainable", free_late)
    assert "among them proj_out" in refused(path, capsys)


def test_an_adapter_that_reaches_no_loss_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    block = ready.pipe.transformer.transformer_blocks[0].layout_stream
    original = block.layout_mlp.fc1.forward
    block.layout_mlp.fc1.forward = lambda x: original(x).detach()  # as a block that was forgotten in a forward
    report = preflight.preflight(ready)
    assert states(report)["gradients"] == "failed"
    assert "transformer_blocks.0.layout_stream.layout_mlp.fc1" in by_name(report, "gradients")
    with pytest.raises(InputError, match="preflight, gradients"):
        report.refuse_failed()


def test_dead_targets_are_told_and_stop_several_processes_where_no_gradient_comes(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = ["layout_stream.attn.add_q_proj", "layout_mlp.fc1"]
    ready = prepare_run(make_config(base, data, tmp_path / "run", lora={"r": 2, "targets": targets}))
    report = preflight.preflight(ready)
    assert not report.failed
    assert "no gradient ever reaches transformer_blocks.2" in by_name(report, "targets")
    assert states(report)["gradients"] == "ok"
    # Nothing reads what they make, but a gradient of 0 comes: several processes go on. Without any, they would not.
    monkeypatch.setattr(type(ready.accelerator), "num_processes", property(lambda _: 2))
    monkeypatch.setattr(preflight, "gather_object", lambda mine: mine)
    assert not preflight.preflight(ready).failed
    stream = ready.pipe.transformer.transformer_blocks[2].layout_stream
    original = stream.attn.add_q_proj.forward
    stream.attn.add_q_proj.forward = lambda x: original(x).detach()
    (failed,) = preflight.preflight(ready).failed
    assert "DDP stops at the second step" in failed.found
    assert "transformer_blocks.2.layout_stream.attn.add_q_proj" in failed.found
    monkeypatch.setattr(type(ready.accelerator), "num_processes", property(lambda _: 1))
    assert not preflight.preflight(ready).failed


def test_a_gradient_outside_the_adapter_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    odd = preflight.DryRun(loss=1.0, outside=["proj_out.weight"], alive=3)
    report = Preflight()
    report.add("gradients", preflight._check_gradients(ready, odd))
    assert "proj_out.weight" in report.failed[0].found


def test_a_loss_that_is_no_number_is_refused_with_its_image(base: Path, data: Path, tmp_path: Path) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    with torch.no_grad():
        ready.pipe.transformer.proj_out.weight.fill_(float("inf"))
    (failed,) = preflight.preflight(ready).failed
    assert failed.name == "gradients"
    assert "metadata.jsonl:" in failed.found


def test_what_fails_in_one_process_fails_in_all(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    full = preflight.Check("disk", "failed", "no room", "make some")
    monkeypatch.setattr(type(ready.accelerator), "num_processes", property(lambda _: 2))
    monkeypatch.setattr(preflight, "gather_object", lambda mine: [*mine, (1, full)])
    (failed,) = preflight.preflight(ready).failed
    assert failed.found == "in process 1: no room"


@pytest.mark.parametrize("what", ["base", "data"])
def test_a_run_goes_on_with_what_it_was_begun_with_only(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    own_base, own_data = tmp_path / "base", tmp_path / "data"
    shutil.copytree(base, own_base)
    shutil.copytree(data, own_data)
    config = make_config(own_base, own_data, tmp_path / "run")
    path = write_config(config, tmp_path / "run.yaml")
    stop_after(config, step=3)
    if what == "base":
        pipe = load_pipeline(str(own_base))
        with torch.no_grad():
            pipe.transformer.proj_out.bias.add_(1e-3)
        pipe.save_pretrained(own_base)
    else:
        write_dataset(own_data, DOMAINS["basic"], count=12, seed=9)
    said = refused(path, capsys, "--resume", "latest")
    assert f"the {what} is not the one that this run was started with" in said
    assert main(["train", path, "--resume", "latest", "--check-only"]) == 2
    assert [c.step for c in checkpoints(tmp_path / "run" / "checkpoints")] == [2]


def test_steps_of_another_number_of_samples_are_seen_before_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(base, data, tmp_path / "run", train={"batch_size": 2, "gradient_accumulation": 1})
    path = write_config(config, tmp_path / "run.yaml")
    stop_after(config, step=3)
    for option in ([], ["--check-only"]):
        assert main(["train", path, "train.batch_size=1", "--resume", "latest", *option]) == 2
        said = capsys.readouterr().err
        assert "train.batch_size: a step has 1 samples over all processes, and had 2" in " ".join(said.split())


# --- memory, time, disk, tracker --------------------------------------------------------------------------------------


def test_want_of_memory_is_told_with_what_helps(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))

    def burst(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("of the GPU")

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "flow_matching_loss", burst)
        (failed,) = preflight.preflight(ready).failed
    assert failed.name == "memory"
    assert "gradient_checkpointing" in str(failed.hint)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: namedtuple("Memory", "available")(-(10**9)))
    (failed,) = preflight.preflight(ready).failed
    assert failed.name == "memory"


def test_the_forecast_of_time_counts_what_the_run_will_do(base: Path, data: Path, tmp_path: Path) -> None:
    every = {"max_steps": 100, "validate_every": 30, "sample_every": 50, "sample_count": 2, "batch_size": 3}
    ready = prepare_run(make_config(base, data, tmp_path / "run", train=every, sample={"steps": 10}))
    measured = preflight.DryRun(step_seconds=3.0, data_seconds=1.0, encode_seconds=0.3)
    assert preflight.estimate_seconds(ready, measured, done=40) == pytest.approx(
        {
            "steps": 60 * 4.0,
            "encoding": 3 * 0.3,  # nine images, three a batch, each once
            "validation": (3 * 14 + 8) * 3 / 3,  # after 60, 90 and 100, and once of the base; three images
            "sampling": 2 * 2 * 10 * 2 / 3,  # after 50 and 100; two passes a step for guidance
        }
    )
    settings = ready.config.train
    assert [events(settings, 30, done, last=True) for done in (0, 29, 30, 90, 100)] == [4, 4, 3, 1, 0]
    assert events(settings, 0, 0, last=True) == 0
    assert [duration_text(s) for s in (0.1, 45, 700, 12_000, 187_200)] == [
        "1 s",
        "45 s",
        "12 min",
        "3 h 20 min",
        "2 d 4 h",
    ]
    assert [size_text(n) for n in (12, 1500, 3.2e9, 4e12)] == ["12 B", "1.5 kB", "3.2 GB", "4.0 TB"]


def test_a_disk_that_is_too_small_is_refused(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(base, data, tmp_path / "run", data={"path": str(data), "cache": str(tmp_path / "cache")})
    path = write_config(config, tmp_path / "run.yaml")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(10**9, 10**9, 1000))
    report = look(config, write_cache=False)
    assert [check.name for check in report.failed] == ["disk", "disk"]
    assert report.failed[1].found.startswith("cache: ")
    assert "1.0 kB free" in refused(path, capsys, "data.cache=null")


def test_the_forecast_of_disk_covers_what_a_run_leaves(base: Path, data: Path, tmp_path: Path) -> None:
    chosen = {"checkpoint_every": 1, "keep_checkpoints": 3, "ema_decay": 0.9, "sample_every": 2, "sample_count": 4}
    config = make_config(base, data, tmp_path / "run", train=chosen, sample={"steps": 1})
    forecast = preflight._output_bytes(prepare_run(config), done=0)
    train(config)
    left = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*.safetensors"))
    assert left < forecast < 3 * left


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="there is no mount")
def test_a_disk_that_fills_up_ends_the_run_cleanly_and_it_can_go_on(
    base: Path,
    data: Path,
    small_disk: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = {"checkpoint_every": 1, "max_steps": 6, "keep_checkpoints": 100}
    config = make_config(base, data, small_disk / "run", train=length)
    path = write_config(config, tmp_path / "run.yaml")
    ballast = small_disk / "ballast"
    folder = small_disk / "run" / "checkpoints"

    def fill(step: int, _: dict[str, float]) -> None:
        """Somebody else's file takes all but a part of a checkpoint."""
        if step == 4:
            one = sum(file.stat().st_size for file in (folder / "step_0000003").iterdir())
            ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - one // 2))

    with monkeypatch.context() as patch:
        patch.setattr(mmdit_lora, "train", lambda config, **_: train(config, callbacks=[Calls(logged=fill)]))
        assert main(["train", path]) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "the disk is full" in said
    assert "step 3 is saved" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in folder.iterdir()) == [f"step_000000{n}" for n in (1, 2, 3)]
    checkpoints(folder)[-1].state()  # whole, by its sums
    assert sorted(p.name for p in (small_disk / "run").iterdir()) == [MARKER, "checkpoints", "config.yaml"]
    assert main(["train", path, "--resume", "latest"]) == 2, "the look before it sees that there is no room"
    capsys.readouterr()
    ballast.unlink()
    assert main(["train", path, "--resume", "latest"]) == 0
    train(make_config(base, data, tmp_path / "whole", train=length))
    one, two = adapter_of(small_disk / "run"), adapter_of(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_only_a_want_of_space_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="no checkpoint yet"), disk_full_as_error(tmp_path):
        raise OSError(28, "No space left on device")
    with pytest.raises(DiskFull, match="quota"), disk_full_as_error(tmp_path):
        raise OSError(122, "Disk quota exceeded")
    with pytest.raises(PermissionError), disk_full_as_error(tmp_path):
        raise PermissionError(13, "Permission denied")
    with pytest.raises(RuntimeError, match="other"), disk_full_as_error(tmp_path):
        raise RuntimeError("other (os error 2)")


def test_the_tracker_is_asked_before_the_work(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def found(**tracking: str) -> tuple[str, str]:
        ready.config = make_config(base, data, tmp_path / "run", tracking=tracking)
        report = Preflight()
        report.add("tracker", preflight.check_tracker(ready))
        (check,) = report.checks
        return check.state, check.found

    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    assert found(tracker="wandb") == ("ok", "W&B, offline; `wandb sync` uploads it later")
    monkeypatch.setattr(wandb, "login", lambda **_: False)
    assert found(tracker="wandb", wandb_mode="online") == ("failed", "W&B is to be online, and there is no API key")
    monkeypatch.setattr(wandb, "login", lambda **_: True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        state, text = found(tracker="wandb", wandb_mode="online")  # bound, and nobody listens
        assert (state, "cannot be reached" in text) == ("failed", True)
        listening.listen()
        assert found(tracker="wandb", wandb_mode="online") == ("ok", "W&B, online at 127.0.0.1")
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    assert found(tracker="tensorboard") == ("failed", "the package tensorboard is not installed")
    assert found(tracker="none") == ("ok", "none")


def test_trainable_set_is_the_one_the_trial_looks_at(base: Path, data: Path, tmp_path: Path) -> None:
    ready = prepare_run(make_config(base, data, tmp_path / "run"))
    found = preflight.dry_run(ready)
    assert found.alive == len(trainable_parameters(ready.pipe.transformer))
    assert found.step_seconds > 0
    assert found.peak_bytes > 0
