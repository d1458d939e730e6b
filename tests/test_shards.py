"""Tar shards: what goes in comes out, wherever they lie; what is damaged says where; a run on them is a run on the folder."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.buckets import make_buckets, record_bucket
from mmdit_lora.data.dataset import sizes_of
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.sampler import epoch_order
from mmdit_lora.data.shards import ShardedRecords, Subset, is_sharded, open_shards, spread
from mmdit_lora.data.shards.store import expand, find
from mmdit_lora.data.shards.tar import ShardWriter, write_shards
from mmdit_lora.data.split import fingerprint_records
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout
from mmdit_lora.training.setup import read_data
from mmdit_lora.training.trainer import train
from tests.test_trainer import stop_after

LINE = {"caption": "a square", "objects": {"bbox": [[0.1, 0.2, 0.5, 0.6]], "phrase": ["a red square"]}}


def image(shade: int = 0, size: tuple[int, int] = (8, 4), ending: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade % 256, shade // 256, 0)).save(file, ending)
    return file.getvalue()


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def as_json(**changes: Any) -> bytes:
    return json.dumps({**LINE, **changes}).encode()


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", read_dataset(data), size=20_000)
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1
    return tmp_path / "shards"


def without_index(folder: Path) -> None:
    for index in folder.glob("*.index.safetensors"):
        index.unlink()


def same(records: ShardedRecords, others: list[Record]) -> bool:
    return len(records) == len(others) and all(
        one.layout == other.layout
        and one.read_bytes() == other.read_bytes()
        and one.size() == other.size()
        and one.load().tobytes() == other.load().tobytes()
        for one, other in zip(records, others, strict=True)
    )


def test_shards_hold_what_the_folder_held_with_and_without_their_index(shards: Path, data: Path) -> None:
    others = read_dataset(data)
    written = {path.name: path.read_bytes() for path in shards.glob("*.safetensors")}
    assert same(open_shards(shards), others)
    assert {path.name: path.read_bytes() for path in shards.glob("*.safetensors")} == written
    without_index(shards)
    assert same(open_shards(shards), others)
    assert {path.name: path.read_bytes() for path in shards.glob("*.safetensors")} == written
    assert open_shards(shards)[-1].layout == others[-1].layout
    with pytest.raises(IndexError):
        open_shards(shards)[len(others)]


def test_the_same_records_give_the_same_bytes(shards: Path, data: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", read_dataset(data), size=20_000)
    for shard in shards.glob("*.tar"):
        assert (tmp_path / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_a_folder_with_anything_else_is_not_replaced(shards: Path, data: Path) -> None:
    write_shards(shards, read_dataset(data), size=10**9)
    assert [path.name for path in sorted(shards.glob("*.tar"))] == ["shard-000000.tar"]
    (shards / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        write_shards(shards, read_dataset(data), size=10**9)
    assert (shards / "notes.txt").read_text() == "mine"


def test_members_as_others_write_them(tmp_path: Path) -> None:
    pixel = as_json(objects={"bbox": [[2, 1, 4, 2]], "phrase": ["x"]}, bbox_format="xywh", bbox_units="pixel", id=7)
    path = tar_of(
        tmp_path / "other.tar",
        {
            "a/1.jpg": image(ending="JPEG"),
            "a/1.txt": b"a caption\n",
            "a/1.json": json.dumps({"objects": LINE["objects"]}).encode(),
            "a/1.cls": b"3",
            "b/1.seg.v2.json": b"{}",  # another ending, and of no meaning here
            "b/1.json": pixel,
            "b/1.webp": image(ending="WEBP"),
        },
    )
    first, second = open_shards(path)
    assert (first.layout.caption, first.location) == ("a caption", f"{path}:a/1")
    assert second.layout.boxes == (Box(xyxy=(0.25, 0.25, 0.75, 0.75), phrase="x"),)
    assert (second.name, second.extra) == ("1.webp", ("id",))


@pytest.mark.parametrize(
    ("members", "place", "what"),
    [
        ({"1.jpg": image()}, "1", "has no .json"),
        ({"1.json": as_json()}, "1", "has no image"),
        ({"1.png": b"", "1.json": as_json()}, "1", "0 bytes"),
        ({"1.png": b"\x89PNG", "1.json": as_json()}, "1", "no readable image"),
        ({"1.png": image(), "1.json": b"{"}, "1", "is not JSON"),
        ({"1.png": image(), "1.json": b"\xff"}, "1", "not UTF-8"),
        ({"1.png": image(), "1.json": b"[]"}, "1", "not an object"),
        ({"1.png": image(), "1.json": b'{"caption": "x"}'}, "1", "'objects' is missing"),
        ({"1.png": image(), "1.json": as_json(objects={"bbox": [[0, 0, 2, 1]], "phrase": ["x"]})}, "1", "2"),
        ({"1.png": image(), "1.jpg": image(), "1.json": as_json()}, "1", "two members"),
        ({"1.png": image(), "2.png": image(), "1.json": as_json(), "2.json": as_json()}, "1", "has no .json"),
        (
            {"1.png": image(), "1.json": as_json(), "2.png": image(), "2.json": as_json(), "1.txt": b""},
            "1",
            "twice",
        ),
        ({"1.cls": b"1"}, None, "no record"),
    ],
)
def test_a_wrong_record_is_named_with_shard_and_key(
    members: dict[str, bytes], place: str | None, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"0.png": image(), "0.json": as_json()} if place else {}
    path = tar_of(tmp_path / "wrong.tar", {**good, **members})
    assert main(["data", "stats", str(path)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert str(path) in message
    assert f"{path.name}:{place}: " in message if place else f"{path.name}: " in message
    assert what in message
    assert not list(tmp_path.glob("*.safetensors"))


@given(
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_is_an_input_error_or_a_set_that_can_be_read(
    flips: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.tar"
    without_index(tmp_path)
    tar_of(path, {"1.png": image(), "1.json": as_json(), "2.txt": b"x", "2.png": image(7), "2.json": as_json()})
    damaged = bytearray(path.read_bytes().rstrip(b"\0") + bytes(1024))
    for place, flip in flips:
        damaged[place % len(damaged)] ^= flip
    path.write_bytes(damaged[: len(damaged) - cut % len(damaged)] if cut % 3 == 0 else damaged)
    told = str(path)
    try:
        for record in open_shards(path):
            record.load()
    except InputError as error:
        told = str(error)
    assert told.startswith(str(path))


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_shard_is_refused(shards: Path, left: float, capsys: pytest.CaptureFixture[str]) -> None:
    shard = min(shards.glob("*.tar"))
    whole = shard.read_bytes()
    end = len(whole.rstrip(b"\0"))
    shard.write_bytes(whole[: int(end * left)])
    assert main(["data", "stats", str(shards)]) == 2
    assert str(shard) in capsys.readouterr().err.replace("\n", "")


def test_a_shard_that_is_cut_between_two_records_is_refused(tmp_path: Path) -> None:
    path = tar_of(
        tmp_path / "x.tar",
        {f"{n}.{kind}": part for n in range(3) for kind, part in (("png", image(n)), ("json", as_json()))},
    )
    with tarfile.open(path) as tar:
        third = tar.getmember("2.png").offset
    path.write_bytes(path.read_bytes()[:third])
    with pytest.raises(InputError, match="end-of-archive") as caught:
        open_shards(path)
    assert caught.value.location == str(path)


def test_a_stale_index_is_made_anew(shards: Path) -> None:
    shard = max(shards.glob("*.tar"))
    before = len(open_shards(shard))
    tar_of(shard, {"new.png": image(), "new.json": as_json(caption="other")})
    (record,) = open_shards(shard)
    assert before > 1
    assert record.layout.caption == "other"


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-1],
        lambda b: b[:20],
        lambda _: b"",
        lambda b: b"\xff" * len(b),
        lambda b: b[:-40] + b"?" + b[-39:],
        lambda b: b.replace(b"json_bytes", b"json_bites"),
    ],
)
def test_a_damaged_index_is_made_anew(shards: Path, data: Path, damage: Callable[[bytes], bytes]) -> None:
    for index in shards.glob("*.safetensors"):
        index.write_bytes(damage(index.read_bytes()))
    assert same(open_shards(shards), read_dataset(data))


def test_other_conventions_are_not_served_by_the_index(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"1.png": image(), "1.json": as_json()})
    corners = open_shards(path)[0].layout.boxes[0].xyxy
    sides = open_shards(path, bbox_format="xywh")[0].layout.boxes[0].xyxy
    assert corners == (0.1, 0.2, 0.5, 0.6)
    assert sides == pytest.approx((0.1, 0.2, 0.6, 0.8))
    wide = as_json(objects={"bbox": [[0.5, 0, 0.5, 1]], "phrase": ["x"]})
    path = tar_of(tmp_path / "y.tar", {"1.png": image(), "1.json": wide})
    assert open_shards(path, bbox_format="xywh")[0].layout.boxes[0].xyxy == (0.5, 0, 1, 1)
    with pytest.raises(InputError, match="its width is 0"):
        open_shards(path)


def test_bytes_that_change_during_a_run_are_noticed(shards: Path) -> None:
    records = open_shards(shards)
    shard = min(shards.glob("*.tar"))
    record = records[0]
    content = record.read_bytes()
    shard.write_bytes(shard.read_bytes().replace(content, content[:-1] + b"?"))
    with pytest.raises(InputError, match="is not what it was") as caught:
        records[0].load()
    assert caught.value.location == record.location


def test_an_index_that_cannot_be_kept_costs_one_remark(
    shards: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_index(shards)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("mmdit_lora.data.shards.tar.save_index", refuse)
    records = open_shards(shards)
    assert len(records.parts) > 1
    assert len(records.remarks) == 1
    assert "Permission denied" in records.remarks[0]
    assert same(records, read_dataset(data))


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    for number in range(3):
        tar_of(tmp_path / f"set-{number:03d}.tar", {"1.png": image(number), "1.json": as_json()})
    names = [str(tmp_path / f"set-{number:03d}.tar") for number in range(3)]
    for pattern in (str(tmp_path), str(tmp_path / "*.tar"), str(tmp_path / "set-{000..002}.tar")):
        assert expand(pattern, ".tar") == names
        assert is_sharded(pattern)
        assert len(open_shards(pattern)) == 3
    assert expand(str(tmp_path / "set-{000,002}.tar"), ".tar") == [names[0], names[2]]
    for pattern, what in (
        ("set-{002..000}.tar", "backwards"),
        ("no-*.tar", "there is no"),
        ("set-{000,000}.tar", "twice"),
    ):
        with pytest.raises(InputError, match=what):
            expand(str(tmp_path / pattern), ".tar")
    with pytest.raises(InputError, match=r"set-003\.tar"):
        open_shards(tmp_path / "set-{000..003}.tar")


def test_memory_store(shards: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(_: float) -> None:
        raise AssertionError("an index that is not there was asked for again")

    monkeypatch.setattr("mmdit_lora.data.shards.store.time.sleep", waits)
    memory = fsspec.filesystem("memory")
    for shard in shards.glob("*.tar"):
        memory.pipe_file(f"/{shards.parent.name}/{shard.name}", shard.read_bytes())
    url = f"memory://{shards.parent.name}"
    for pattern in (url, f"{url}/*.tar"):
        records = open_shards(pattern)
        assert same(records, read_dataset(data))
    assert len(records.remarks) == 1  # every shard was read through
    for file in shards.glob("*.tar.*"):
        memory.pipe_file(f"/{shards.parent.name}/{file.name}", file.read_bytes())
    records = open_shards(url)
    assert records.remarks == []
    assert same(records, read_dataset(data))
    other = tar_of(shards.parent / "other.tar", {"1.png": image(), "1.json": as_json()})
    size, length = min(shards.glob("*.tar")).stat().st_size, other.stat().st_size
    memory.pipe_file(
        f"/{shards.parent.name}/{min(shards.glob('*.tar')).name}", other.read_bytes() + bytes(size - length)
    )
    with pytest.raises(InputError, match="is not what it was"):
        open_shards(url)[0]  # of the same size, and another: its hashes tell
    assert records.is_remote
    assert sum(records.blocks or ()) == len(records)
    assert records.fingerprint() == open_shards(shards).fingerprint()
    assert not open_shards(shards).is_remote


class Ranges(BaseHTTPRequestHandler):
    """Files of `folder` with ranged reads; `fails` of the coming answers are errors."""

    folder: ClassVar[Path]
    fails: ClassVar[int] = 0
    ranged: ClassVar[bool] = True
    served: ClassVar[list[int]] = []

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        kind = type(self)
        if body and kind.fails > 0:
            kind.fails -= 1
            self.send_error(503)
            return
        path = kind.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        data, part = path.read_bytes(), re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        whole = len(data)
        if part and kind.ranged:
            first, last = int(part[1]), min(int(part[2]), whole - 1)
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        else:
            self.send_response(200)
        if kind.ranged:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            kind.served.append(len(data))
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, type[Ranges]]]:
    """(URL, its handler) of a server of `folder`."""
    kind = type("Served", (Ranges,), {"folder": folder, "served": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", kind
        http.shutdown()


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, type[Ranges]]]:
    with serving(shards) as served:
        yield served


def test_http_store_by_ranged_reads_that_are_tried_again(
    server: tuple[str, type[Ranges]], shards: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("mmdit_lora.data.shards.store._FIRST_WAIT", 0.001)
    url, kind = server
    last = len(list(shards.glob("*.tar"))) - 1
    records = open_shards(f"{url}/shard-{{000000..{last:06d}}}.tar")
    assert same(records, read_dataset(data))
    kind.served.clear()
    kind.fails = 2
    assert records[3].load().size == (64, 64)
    assert kind.fails == 0
    (served,) = kind.served  # json and image in one request, and not the whole shard
    assert served < find(str(min(shards.glob("*.tar")))).size / 2
    kind.fails = 99
    with pytest.raises(InputError, match="cannot be read") as caught:
        records[3].load()
    assert caught.value.location == records.parts[0].name + ":000000003"
    kind.fails, kind.ranged = 0, False
    with pytest.raises(InputError, match="whole file"):
        records[3].load()
    with pytest.raises(InputError, match="no such file"):
        find(f"{url}/none.tar")
    with pytest.raises(InputError, match=r"cannot be read \(Cannot connect"):
        find("http://127.0.0.1:9/x.tar")


def test_a_store_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(InputError, match="s3://") as caught:
        open_shards("s3://bucket/set-{000..001}.tar")
    assert "pip install s3fs" in str(caught.value)
    with pytest.raises(InputError, match="nonsense://"):
        open_shards("nonsense://bucket/x.tar")


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thousand")
    writer = ShardWriter(folder, size=300_000)
    for number in range(1000):
        writer.add(image(number), "png", Layout(caption=str(number), boxes=[]))
    writer.close()
    assert writer.shards > 4
    return folder


@pytest.mark.parametrize("blocked", [False, True])
def test_two_ranks_of_three_workers_see_each_record_once_an_epoch(thousand: Path, blocked: bool) -> None:
    """As the trainer takes positions: step, rank and place in the batch are counted through; workers share a batch."""
    ranks, workers, batch, steps = 2, 3, 5, 100
    records = open_shards(thousand)
    blocks = tuple(len(part) for part in records.parts) if blocked else None
    seen: dict[int, list[str]] = {}
    for epoch in range(2):
        order = epoch_order(0, epoch, len(records), blocks)
        seen[epoch] = []
        for rank in range(ranks):
            positions = [(step * ranks + rank) * batch + n for step in range(steps) for n in range(batch)]
            with ThreadPool(workers) as pool:
                seen[epoch] += pool.map(lambda p, order=order: records[int(order[p])].layout.caption, positions)
    assert len(seen[0]) == len(seen[1]) == 1000
    assert set(seen[0]) == set(seen[1]) == {str(number) for number in range(1000)}
    assert seen[0] != seen[1]


def test_the_split_is_by_content_and_stays_when_others_come(thousand: Path, tmp_path: Path) -> None:
    records = open_shards(thousand)
    places = [record.layout.caption for record in spread(records, 100)]
    assert places == [str(number) for number in range(0, 1000, 10)]
    training, held_out = records.split(0.1)
    both = [{record.layout.caption for record in side} for side in (training, held_out)]
    assert (len(training), len(held_out)) == (900, 100)
    assert both[0] | both[1] == {str(n) for n in range(1000)}
    assert not both[0] & both[1]
    assert [training[i].layout.caption for i in (0, 450, -1)] == [training[:][i].layout.caption for i in (0, 450, -1)]
    writer = ShardWriter(tmp_path, size=10**9)
    for number in [*range(1000), *range(1000, 1100), *range(50)]:  # some new ones, and copies
        writer.add(image(number), "png", Layout(caption=str(number), boxes=[]))
    writer.close()
    grown = open_shards(tmp_path)
    assert grown.split(0.0)[0].fingerprint() != training.fingerprint()
    more_training, more_held = grown.split(0.1)
    assert not {r.layout.caption for r in more_training} & {r.layout.caption for r in more_held}
    assert len(both[1] & {r.layout.caption for r in more_held}) > 80
    assert len(more_training) + len(more_held) == len(grown)
    with pytest.raises(InputError, match="too few"):
        open_shards(tar_of(tmp_path / "one.tar", {"1.png": image(), "1.json": as_json()})).split(0.1)


def test_blocks_of_a_side_count_what_is_left_of_each(thousand: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedRecords, "blocks", property(lambda self: tuple(len(p) for p in self.parts)))
    records = open_shards(thousand)
    training, held_out = records.split(0.2)
    for side in (training, held_out):
        assert side.blocks is not None
        counted = [sum(r.location.startswith(part.name) for r in side) for part in records.parts]
        assert list(side.blocks) == counted
    assert side.pixels().shape == (200, 2)


def test_buckets_of_shards_come_from_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, size=5_000)
    for number in range(60):
        writer.add(image(number, (64 + 16 * (number % 3), 64)), "png", Layout(caption=str(number), boxes=[]))
    writer.close()
    training, _ = open_shards(tmp_path).split(0.2)
    buckets = make_buckets([64], [1.0, 1.5], multiple=8)
    wanted = [record_bucket(record, buckets) for record in training]
    assert len(set(wanted)) > 1
    asked: list[int] = []
    get = Subset.__getitem__
    monkeypatch.setattr(Subset, "__getitem__", lambda self, index: asked.append(index) or get(self, index))
    assert sizes_of(training, buckets) == wanted
    assert len(asked) == 3  # a record of each size, not all


def config_of(base: Path, path: Path, out: Path, **data: Any) -> Config:
    values = {
        "base": str(base),
        "output_dir": str(out),
        "data": {"path": str(path), "validation_share": 0.0, **data},
        "train": {
            "max_steps": 5,
            "batch_size": 4,
            "sample_every": 0,
            "checkpoint_every": 3,
            "learning_rate": 1e-2,
            "log_every": 1,
        },
    }
    return Config.model_validate(values)


def test_training_from_shards_gives_the_bits_of_training_from_the_folder(
    base: Path, data: Path, shards: Path, tmp_path: Path
) -> None:
    adapters = []
    for name, source in (("folder", data), ("shards", shards)):
        result = train(config_of(base, source, tmp_path / "runs" / name))
        assert result.report["images"] == 12
        adapters.append(load_file(tmp_path / "runs" / name / "adapter" / "adapter_model.safetensors"))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(adapters[0][key].equal(adapters[1][key]) for key in adapters[0])


def test_a_run_on_shards_resumes_to_the_bits_of_an_undisturbed_one(base: Path, shards: Path, tmp_path: Path) -> None:
    train(config_of(base, shards, tmp_path / "whole"))
    config = config_of(base, shards, tmp_path / "stopped")
    stop_after(config, step=4)  # its checkpoint is of step 3
    train(config, resume=True)
    whole, stopped = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "stopped"))
    assert all(whole[key].equal(stopped[key]) for key in whole)


def test_a_run_knows_its_shards_by_their_content(base: Path, shards: Path, data: Path, tmp_path: Path) -> None:
    held = read_data(config_of(base, shards, tmp_path / "run", validation_share=0.25))
    assert (len(held.records), len(held.held_out)) == (9, 3)
    before = fingerprint_records(held.records)
    write_shards(tmp_path / "other", read_dataset(data), size=10**9)  # cut in another way
    again = read_data(config_of(base, tmp_path / "other", tmp_path / "run", validation_share=0.25))
    assert fingerprint_records(again.records) == before
    write_shards(tmp_path / "other", read_dataset(data)[1:], size=10**9)
    fewer = read_data(config_of(base, tmp_path / "other", tmp_path / "run", validation_share=0.25))
    assert fingerprint_records(fewer.records) != before


def test_a_filter_in_the_config_is_refused_and_one_in_writing_is_applied(
    base: Path, shards: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match="does not act on shards"):
        read_data(config_of(base, shards, tmp_path / "run", filter={"max_boxes": 1}))
    out = tmp_path / "filtered"
    assert main(["data", "shard", str(data), "--out", str(out), "--filter", "max_boxes=1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["records"], told["shards"]) == (12, 1)
    assert open_shards(out).boxes == told["filter"]["boxes"] == 12 < open_shards(shards).boxes


def test_the_verbs_that_look_at_data_look_at_shards(
    shards: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for source in (data, shards):
        assert main(["data", "stats", str(source), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert main(["data", "show", str(shards), "--out", str(tmp_path / "sheet.png"), "--count", "4"]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 64
    assert main(["data", "check", str(shards), "--out", str(tmp_path / "check"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["records"], report["images"]) == (12, 12)
    assert "12 of 12 records" in " ".join(report["notes"])


@pytest.mark.parametrize("verb", ["split", "shard"])
def test_the_verbs_that_copy_a_folder_say_that_they_need_one(
    verb: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", verb, str(shards), "--out", str(tmp_path / "out")]) == 2
    assert "tar shards" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
