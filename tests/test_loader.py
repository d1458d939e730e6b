"""Reading by workers: what a position gives depends on it alone, so the bits of a run do not know how many there are."""

from __future__ import annotations

import json
import multiprocessing
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

from mmdit_lora.config.loading import Config
from mmdit_lora.data.buckets import make_buckets
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.data.collate import Batch, LayoutCollator
from mmdit_lora.data.dataset import LayoutDataset, load, loader_workers
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.sampler import micro_batches
from mmdit_lora.data.shards.tar import write_shards
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
from mmdit_lora.training.setup import run_buckets
from mmdit_lora.training.trainer import train
from tests.test_trainer import adapter_of, make_config, stop_after

CPU = torch.device("cpu")
DRAWN = {"crop": "random", "flip": True, "box_jitter": 0.1}


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, tuple) and not hasattr(one, "to_dict"):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def same(one: Batch, two: Batch) -> bool:
    layouts = (one.layout, two.layout)
    plain = [
        {k: v for k, v in vars(batch).items() if k not in ("layout", "texts")} | batch.texts for batch in (one, two)
    ]
    return all(equal(a[k], b[k]) for a, b in (plain, [vars(layout) for layout in layouts]) for k in a)


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", read_dataset(data), size=20_000)
    return tmp_path / "shards"


def test_a_sample_depends_on_its_position_alone(data: Path) -> None:
    options: dict[str, Any] = DRAWN | {"caption_dropout": 0.3, "layout_dropout": 0.3, "latents": (4, 8), "seed": 5}
    one, other = (LayoutDataset(data, size=32, **options) for _ in range(2))
    forwards = [one[position] for position in range(30)]
    backwards = [other[position] for position in reversed(range(30))]
    assert all(equal(a, b) for a, b in zip(forwards, backwards[::-1], strict=True))
    assert {len({s.record for s in forwards[start : start + 12]}) for start in (0, 12)} == {12}  # each once an epoch
    assert any(s.drops_layout for s in forwards)
    assert any(not s.caption for s in forwards)
    assert not all(s.drops_layout or not s.caption for s in forwards)
    assert len(one) == 12
    assert len(LayoutDataset(data, size=32, samples=40)) == 40
    assert not torch.equal(LayoutDataset(data, size=32, **options | {"seed": 6})[0].t, forwards[0].t)


def test_processes_take_disjoint_positions_from_any_number_on() -> None:
    parts = [list(micro_batches(3, range(4), world=2, process=process)) for process in (0, 1)]
    assert sorted(position for part in parts for each in part for position in each) == list(range(24))
    assert list(micro_batches(3, range(2, 4), world=2, process=1)) == parts[1][2:]


def test_buckets_give_batches_of_one_size(data: Path) -> None:
    buckets = make_buckets([64], [1.0, 2.0, 0.5], multiple=8)
    dataset = LayoutDataset(data, size=buckets, batch=4)
    for batch in torch.utils.data.DataLoader(dataset, batch_size=4, collate_fn=LayoutCollator()):
        assert batch.pixels.shape[0] == len(batch.layout) == 4
        assert batch.pixels.min() >= -1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shards", "folder with a cache", "held out"])
def test_batches_have_the_same_bits_for_any_number_of_workers(
    kind: str, base: Path, data: Path, shards: Path, tmp_path: Path
) -> None:
    pipe = load_pipeline(str(base))
    cached = kind == "folder with a cache"
    section = {"path": str(data), **DRAWN} | ({"cache_variants": 2} if cached else {})
    config = Config.model_validate({"base": str(base), "data": section})
    found = []
    for workers in (0, 1, 2):
        cache = EncodingCache(tmp_path / f"cache{workers}") if cached else None
        source = LayoutDataset(shards if kind == "shards" else data, size=32).records
        encoded = EncodedDataset(
            source,
            LayoutEncoder(pipe, cache, base=str(base)),
            config,
            buckets=run_buckets(config, pipe),
            stream="held out" if kind == "held out" else "train",
            workers=workers,
        )
        positions = micro_batches(3, range(8))  # two epochs: images that are known by then are not read
        found.append(list(encoded.batches(positions, CPU)))
        again = list(encoded.batches(micro_batches(3, range(5, 8)), CPU))  # from a position on
        assert all(same(a, b) for a, b in zip(again, found[-1][5:], strict=True))
        assert same(encoded.batch(range(3)), found[-1][0])
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*found, strict=True))
    assert len(found[0]) == 8
    if cached:
        each = [EncodingCache(tmp_path / f"cache{workers}").size() for workers in (0, 1, 2)]
        assert each[0] == each[1] == each[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_run_with_workers_has_the_bits_of_one_without_and_resumes_to_them(
    kind: str, base: Path, data: Path, shards: Path, tmp_path: Path
) -> None:
    def config(out: str, workers: int | None) -> Config:
        section = {"path": str(data if kind == "folder" else shards), "validation_share": 0.25, "workers": workers}
        return make_config(
            base,
            data,
            tmp_path / out,
            data=section | DRAWN,
            train={"max_steps": 4, "batch_size": 2},
        )

    report = train(config("none", None)).report
    stop_after(config("stopped", 2), step=3)
    resumed = train(config("stopped", 1), resume=True).report
    assert report["held_out_loss"] == resumed["held_out_loss"]
    none, stopped = (adapter_of(tmp_path / out) for out in ("none", "stopped"))
    assert all(torch.equal(none[name], stopped[name]) for name in none)
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_its_batch_is_taken(workers: int, data: Path, tmp_path: Path) -> None:
    records = read_dataset(data)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    records[3] = type(records[3])(image=bad, layout=records[3].layout, location="set:4")
    dataset = LayoutDataset(records, size=32)
    place = next(position for position in range(12) if dataset.request(position).record == 3)
    requests = [[dataset.request(position)] for position in range(12)]
    batches = load(dataset, requests, LayoutCollator(), workers=workers)
    assert [list(next(batches).position) for _ in range(place)] == [[n] for n in range(place)]
    with pytest.raises(InputError, match="no readable image") as caught:
        next(batches)
    assert caught.value.location is not None
    assert caught.value.location.startswith("set:4")
    assert "Traceback" not in str(caught.value)


def test_workers_leave_signals_to_the_main_process(data: Path) -> None:
    dataset = LayoutDataset(data, size=32)
    batches = load(dataset, ([dataset.request(p)] for p in range(400)), LayoutCollator(), workers=2)
    next(batches)
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            assert worker.pid is not None
            os.kill(worker.pid, number)
    assert [list(next(batches).position) for _ in range(100)] == [[n] for n in range(1, 101)]
    assert all(worker.is_alive() for worker in workers)
    batches.close()  # type: ignore[attr-defined]
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


CHILD = """
import itertools, multiprocessing, sys
from mmdit_lora.data.collate import LayoutCollator
from mmdit_lora.data.dataset import LayoutDataset, load
heavy = {"diffusers", "transformers", "peft", "accelerate"} & set(sys.modules)
dataset = LayoutDataset(sys.argv[1], size=32)
for samples in load(dataset, ([dataset.request(p)] for p in itertools.count()), LayoutCollator(), workers=2):
    print(sorted(heavy), *[child.pid for child in multiprocessing.active_children()], flush=True)
"""


@pytest.mark.slow
def test_workers_of_a_killed_process_end_and_import_no_base(data: Path, tmp_path: Path) -> None:
    """The script has no `if __name__`: a worker that ran it again would start workers of its own."""
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    root = Path(__file__).parent.parent
    command = [sys.executable, str(script), str(data)]
    child = subprocess.Popen(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    heavy, *pids = child.stdout.readline().split()
    assert heavy == "[]"
    assert len(pids) == 2
    child.kill()
    child.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.slow
def test_ctrl_c_for_the_whole_group_saves_the_run(base: Path, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    section = {"path": str(data), "validation_share": 0.25, "workers": 2, **DRAWN}
    config = make_config(
        base, data, tmp_path / "run", data=section, train={"max_steps": 100_000, "checkpoint_every": 5}
    )
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "mmdit_lora", "train", str(path)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "run").glob("checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGINT)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 130, said
    assert "is saved" in said
    assert json.loads(max((tmp_path / "run").glob("checkpoints/step_*")).joinpath("state.json").read_text())
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-g", str(child.pid)]).returncode == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert subprocess.run(["pgrep", "-g", str(child.pid)]).returncode == 1, "something of it is left"


def test_how_many_workers_where_nobody_says() -> None:
    assert loader_workers(None, CPU, 1) == 0
    assert loader_workers(3, CPU, 1) == 3
    assert loader_workers(0, torch.device("cuda"), 1) == 0
    cores = len(os.sched_getaffinity(0))
    assert loader_workers(None, torch.device("cuda"), 1) == max(0, min(4, cores - 1))
    assert loader_workers(None, torch.device("cuda"), 10_000) == 0
