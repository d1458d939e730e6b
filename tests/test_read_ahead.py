"""Reading ahead: the same records, in any order of arrival; an error where it is taken; the run's bits unchanged."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora.config.loading import Config
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.shards import open_shards
from mmdit_lora.data.shards.ahead import Prefetcher, held
from mmdit_lora.data.shards.write import write_shards
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.training.trainer import train
from tests.test_trainer import adapter_of


@dataclass
class Slow(Sequence[Record]):
    """Records that say when they are asked for; number 0 waits until number 3 was."""

    asked: list[int] = field(default_factory=list)
    others_come: threading.Event = field(default_factory=threading.Event)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        if index == 0:
            assert self.others_come.wait(10)
        if index == 3:
            self.others_come.set()
        if index == 4:
            raise InputError("is gone", location="record 4")
        return Record(Path(f"{index}.png"), Layout("c"), f"set:{index}")


def test_what_is_announced_comes_whatever_is_ready_first_and_once() -> None:
    records = Slow()
    reader = Prefetcher(records, threads=4)
    reader.announce([0, 1, 2, 3])
    reader.announce([0, 1])
    assert [reader.take(n).location for n in range(4)] == [f"set:{n}" for n in range(4)]
    assert sorted(records.asked) == [0, 1, 2, 3]
    assert reader.take(5).location == "set:5"  # never announced
    assert records.asked[-1] == 5


def test_an_error_is_raised_where_the_record_is_taken() -> None:
    reader = Prefetcher(Slow(), threads=2)
    reader.announce([4, 5])
    assert reader.take(5).location == "set:5"
    with pytest.raises(InputError, match="gone"):
        reader.take(4)


def test_no_more_than_the_most_wait_and_nothing_without_threads() -> None:
    records = Slow()
    reader = Prefetcher(records, threads=1, most=2)
    reader.announce([1, 2, 3])
    assert len(reader._coming) == 2
    idle = Prefetcher(unasked := Slow(), threads=0)
    idle.announce([1, 2])
    assert unasked.asked == []


@pytest.fixture
def shards(data: Path, tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", read_dataset(data), size=20_000)
    return tmp_path / "shards"


def test_a_held_record_is_read_once(shards: Path) -> None:
    reads = []
    record: Any = open_shards(shards)[0]
    counted = replace(record, read=lambda: reads.append(1) or record.read())
    once = held(counted)
    assert once.read_bytes() == once.read_bytes() == record.read_bytes()
    assert once.load().size == record.load().size
    assert len(reads) == 1
    plain = Record(Path("a.png"), Layout("c"), "w")
    assert held(plain) is plain


def test_a_run_that_reads_ahead_has_the_bits_of_one_that_does_not(base: Path, shards: Path, tmp_path: Path) -> None:
    def run(out: str, **section: Any) -> dict[str, torch.Tensor]:
        config = {
            "base": str(base),
            "output_dir": str(tmp_path / out),
            "data": {"path": str(shards), "validation_share": 0.25, "crop": "random", **section},
            "train": {"max_steps": 6, "batch_size": 2, "sample_every": 0, "validate_every": 0},
        }
        train(Config.model_validate(config))
        return adapter_of(tmp_path / out)

    plain, ahead = run("plain"), run("ahead", workers=3)
    assert all(torch.equal(plain[name], ahead[name]) for name in plain)
