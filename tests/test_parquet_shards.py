"""Parquet shards as `datasets` writes them: rows come by row groups, each read once an epoch, from anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.records import Record, layout_columns, read_dataset
from mmdit_lora.data.sampler import WINDOW, epoch_order
from mmdit_lora.data.shards import is_sharded, open_shards, spread
from mmdit_lora.data.shards.parquet import KEPT, ParquetPart
from mmdit_lora.data.split import split_records
from mmdit_lora.errors import InputError
from mmdit_lora.training.trainer import train
from tests.test_shards import serving

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def row_of(record: Record) -> dict[str, Any]:
    return {"image": {"bytes": record.read_bytes(), "path": record.name}, **layout_columns(record.layout)}


def write(
    path: Path, rows: Sequence[dict[str, Any]], *, group: int = 2, metadata: dict[str, str] | None = None
) -> Path:
    table = pyarrow.Table.from_pylist(list(rows))
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group)
    return path


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    rows = [row_of(record) for record in read_dataset(data)]
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train-00000-of-00002.parquet", rows[:7])
    write(tmp_path / "set" / "train-00001-of-00002.parquet", rows[7:])
    return tmp_path / "set"


def same(records: Sequence[Record], others: Sequence[Record]) -> bool:
    return len(records) == len(others) and all(
        (one.name, one.layout, one.size(), one.read_bytes()) == (two.name, two.layout, two.size(), two.read_bytes())
        and one.load().tobytes() == two.load().tobytes()
        for one, two in zip(records, others, strict=True)
    )


def test_rows_are_the_records_of_the_folder_wherever_they_lie(shards: Path, data: Path) -> None:
    memory = fsspec.filesystem("memory")
    for shard in shards.glob("*.parquet"):
        memory.pipe_file(f"/parquet/{shard.name}", shard.read_bytes())
    found = {}
    for path in (str(shards), f"{shards}/train-0000{{0..1}}-of-00002.parquet", "memory://parquet/train-*.parquet"):
        assert is_sharded(path)
        records = open_shards(path)
        assert same(records, read_dataset(data))
        assert records.blocks == (2, 2, 2, 1, 2, 2, 1)
        found[path] = records.fingerprint()
    assert len(set(found.values())) == 1
    assert records.boxes is None
    training, held_out = records.split(0.25)
    assert (len(training), len(held_out)) == (9, 3)
    assert {r.location for r in training}.isdisjoint(r.location for r in held_out)


def test_over_http_only_what_is_asked_for_is_read(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    (first,) = read_dataset(data)[:1]
    noise = os.urandom(3_000_000)  # behind the image's end, where no decoder looks
    row = row_of(first) | {"image": {"bytes": first.read_bytes() + noise, "path": first.name}}
    write(tmp_path / "x.parquet", [row] * 6, group=2)
    size = (tmp_path / "x.parquet").stat().st_size
    with serving(tmp_path) as (url, kind):
        records = open_shards(f"{url}/x.parquet")
        assert sum(kind.served) < size / 2
        assert records[5].layout == first.layout
        assert records[4].load().tobytes() == first.load().tobytes()
        assert 3_000_000 < sum(kind.served) < size


def test_each_row_group_is_read_once_an_epoch(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row_of(record) for record in read_dataset(data)]
    write(tmp_path / "x.parquet", [rows[n % 12] for n in range(400)], group=4)
    reads: list[int] = []
    read_group = ParquetPart.read_group
    monkeypatch.setattr(ParquetPart, "read_group", lambda self, n: reads.append(n) or read_group(self, n))
    records = open_shards(tmp_path / "x.parquet")
    assert len(records.blocks or ()) == 100
    assert KEPT >= WINDOW
    for index in epoch_order(0, 0, 400, records.blocks).tolist():
        records[index]
    assert sorted(reads) == list(range(100))
    reads.clear()
    for index in epoch_order(0, 0, 400).tolist():
        records[index]
    assert len(reads) > 200  # what the order in blocks saves
    reads.clear()
    looked_at = spread(open_shards(tmp_path / "x.parquet"), 40)
    assert len({record.location for record in looked_at}) == 40
    assert len(reads) == 10


def test_classes_get_their_names_and_pixels_their_size(data: Path, tmp_path: Path) -> None:
    features = {"objects": {"category": {"feature": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    image = {"bytes": read_dataset(data)[0].read_bytes(), "path": None}
    rows = [{"image": image, "objects": {"bbox": [[16.0, 16, 32, 16]], "category": [1]}}]
    path = write(tmp_path / "x.parquet", rows, metadata={"huggingface": json.dumps({"info": {"features": features}})})
    (record,) = open_shards(path, bbox_format="xywh", bbox_units="pixel")
    assert record.layout.to_dict() == {"caption": "", "boxes": [{"xyxy": [0.25, 0.25, 0.75, 0.5], "phrase": "dog"}]}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"image": {"bytes": None, "path": "a.png"}}, "holds no bytes"),
        ({"image": {"bytes": b"no image", "path": "a.png"}}, "no readable image"),
        ({"objects": {"bbox": [[0.0, 0.0, 2.0, 1.0]], "phrase": ["x"]}}, "box"),
        ({"objects": {"bbox": [[0.0, 0.0, 1.0, 1.0]], "phrase": []}}, "as many phrases as boxes"),
        ({"objects": None}, "objects"),
    ],
)
def test_a_wrong_row_is_named_with_its_number(
    change: dict[str, Any], what: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = row_of(read_dataset(data)[0])
    path = write(tmp_path / "x.parquet", [good, good | change])
    assert main(["data", "stats", str(path)]) == 2
    message = capsys.readouterr().err.replace("\n", " ")
    assert f"{path}: row 1" in message
    assert what in message
    assert message.count(f"{path}: row 1") == 1


def test_what_is_no_such_file_is_refused(shards: Path, tmp_path: Path) -> None:
    shard = min(shards.glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read") as caught:
        open_shards(shards)
    assert caught.value.location == str(shard)
    with pytest.raises(InputError, match="no column 'image'"):
        open_shards(write(tmp_path / "x.parquet", [{"caption": "x"}]))
    with pytest.raises(InputError, match=r"there is no \.parquet file"):
        open_shards(tmp_path / "none-*.parquet")


def test_training_takes_them(shards: Path, base: Path, tmp_path: Path) -> None:
    def config(out: str) -> Config:
        values = {"max_steps": 2, "batch_size": 4, "sample_every": 0, "checkpoint_every": 0}
        return Config.model_validate(
            {"base": str(base), "output_dir": str(tmp_path / out), "data": str(shards), "train": values}
        )

    reports = [train(config(out)).report for out in ("one", "two")]
    one, two = (load_file(tmp_path / out / "adapter" / "adapter_model.safetensors") for out in ("one", "two"))
    assert reports[0]["images"] == 11  # one of twelve is held out
    assert all(one[key].equal(two[key]) for key in one)


def test_rows_that_state_file_names_hold_out_the_folders_images(shards: Path, data: Path, tmp_path: Path) -> None:
    held = {record.name for record in split_records(read_dataset(data), 0.25)[1]}
    assert {record.name for record in open_shards(shards).split(0.25)[1]} == held
    nameless = [{**row_of(r), "image": {"bytes": r.read_bytes(), "path": None}} for r in read_dataset(data)]
    (tmp_path / "nameless").mkdir()
    write(tmp_path / "nameless" / "train.parquet", nameless)
    assert len(open_shards(tmp_path / "nameless").split(0.25)[1]) == 3
