"""What a set of very many records costs, in tar shards: `scripts/benchmark.py data --records 1000000`.

The records are simulated: 256 procedural scenes of 64 x 64 pixels as PNG, each with a number behind the image's end, so that
no two files are alike, and its scene's layout. What is measured, is measured in processes of their own: "opening" is the
data part alone, "first batch" is `prepare_run` on the embedded base and the first training batch, once on the whole set
and once on one of 256 records; the difference is what the set costs. Files lie in the page cache.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCENES, SHARD, READS, BATCH = 256, 100 * 10**6, 20_000, 8
BASE = Path(__file__).resolve().parent.parent / "data" / "tiny_base"
SCANNED = 2  # shards that are looked through without their index


def scale(records: int) -> dict[str, Any]:
    """The whole report. Needs about 3 kB of disk a record in the temporary folder."""
    with tempfile.TemporaryDirectory() as work:
        full, few = Path(work) / "full", Path(work) / "few"
        shards, seconds = _write(full, records)
        _write(few, SCENES)
        size = sum(path.stat().st_size for path in full.glob("*.tar"))
        index = sum(path.stat().st_size for path in full.glob("*.safetensors"))
        opened = _measured("opening", full)
        scanned = _measured("scanning", _linked(full, Path(work) / "scanned"))
        whole, small = _measured("first_batch", full), _measured("first_batch", few)
    cost = round(whole["peak_rss_mb"] - small["peak_rss_mb"], 1)
    return {
        "command": f"OMP_NUM_THREADS=1 uv run python scripts/benchmark.py data --records {records}",
        "machine": {"cores": os.cpu_count(), "arch": platform.machine()},
        "records": records,
        "shards": shards,
        "shard_bytes": size,
        "index_bytes": index,
        "index_bytes_a_record": round(index / records, 1),
        "write_s": round(seconds, 1),
        "write_records_per_s": round(records / seconds),
        "opening": opened,
        "without_index": {
            **scanned,
            "whole_set_s_by_that_rate": round(records / scanned["records_per_s"], 1),
        },
        "first_batch": {"whole_set": whole, f"{SCENES}_records": small, "set_costs_mb": cost},
        "data_part_below_500_mb": opened["peak_rss_mb"] < 500 and cost < 500,
        "first_batch_below_5_s_in_process": whole["prepare_and_first_batch_s"] < 5,
        "computed_for_10_million": _computed(10**7, index / records),
    }


def _computed(records: int, index_bytes: float) -> dict[str, Any]:
    """Not measured: sizes of what is kept, in bytes."""
    from mmdit_lora.data.split import MOST_HELD_OUT

    return {
        "index_on_disk_mapped": round(records * index_bytes),
        "order_of_two_epochs": 2 * 4 * records,
        "split": 2 * 8 * MOST_HELD_OUT,
        "at_start_only": {"hashes_of_images_and_their_sorted_copy": 3 * 8 * records},
        "a_list_of_records_would_be": "about 1 kB each, 10 GB",
    }


def _write(folder: Path, records: int) -> tuple[int, float]:
    from mmdit_lora.data.records import read_dataset
    from mmdit_lora.data.shapes import DOMAINS, write_dataset
    from mmdit_lora.data.shards.tar import ShardWriter

    with tempfile.TemporaryDirectory() as scenes:
        write_dataset(Path(scenes) / "set", DOMAINS["basic"], count=SCENES, seed=0)
        made = [(record.read_bytes(), record.layout) for record in read_dataset(Path(scenes) / "set")]
    folder.mkdir()
    start = time.perf_counter()
    writer = ShardWriter(folder, size=SHARD)
    for number in range(records):
        image, layout = made[number % SCENES]
        writer.add(image + number.to_bytes(8, "big"), "png", layout)
    writer.close()
    return writer.shards, time.perf_counter() - start


def _linked(full: Path, folder: Path) -> Path:
    """The first shards without their index."""
    folder.mkdir()
    for shard in sorted(full.glob("*.tar"))[:SCANNED]:
        (folder / shard.name).hardlink_to(shard)
    return folder


def _measured(part: str, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, part, str(folder)], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _memory() -> dict[str, float]:
    """MB: the most that was resident, and of what is now, private and of mapped files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"peak_rss_mb": "VmHWM", "private_mb": "RssAnon", "mapped_files_mb": "RssFile"}
    return {name: round(int(status[key].split()[0]) / 1024, 1) for name, key in names.items()}


def _opening(folder: Path) -> dict[str, Any]:
    """Open, split, fingerprint, records at random; then, with torch, the order of an epoch and records of it."""
    import random

    from mmdit_lora.data.shards import open_shards

    before = _memory()
    times: dict[str, float] = {}

    def timed(name: str, call: Any) -> Any:
        start = time.perf_counter()
        value = call()
        times[name] = round(time.perf_counter() - start, 3)
        return value

    records = timed("open_s", lambda: open_shards(folder))
    training, held_out = timed("split_s", lambda: records.split(0.1))
    timed("fingerprint_s", training.fingerprint)
    reads = min(READS, len(training))
    for index in random.Random(0).sample(range(len(training)), reads):
        training[index].load()
    after = _memory()
    from mmdit_lora.data.sampler import epoch_order

    order = timed("order_s", lambda: epoch_order(0, 0, len(training)))
    chosen = [int(index) for index in order[:reads]]
    timed("read_s", lambda: [training[index].read_bytes() and None for index in chosen])
    timed("read_and_decode_s", lambda: [training[index].load() and None for index in chosen])
    return {
        **times,
        "training": len(training),
        "held_out": len(held_out),
        "reads_per_s": round(reads / times["read_s"]),
        "reads_and_decodes_per_s": round(reads / times["read_and_decode_s"]),
        "peak_rss_mb": after["peak_rss_mb"],
        "peak_rss_mb_before_opening": before["peak_rss_mb"],
        "private_mb_added": round(after["private_mb"] - before["private_mb"], 1),
        "mapped_files_mb_added": round(after["mapped_files_mb"] - before["mapped_files_mb"], 1),
    }


def _scanning(folder: Path) -> dict[str, Any]:
    from mmdit_lora.data.shards import open_shards

    start = time.perf_counter()
    records = open_shards(folder)
    seconds = time.perf_counter() - start
    return {
        "shards": SCANNED,
        "records": len(records),
        "open_s": round(seconds, 2),
        "records_per_s": round(len(records) / seconds),
    }


def _first_batch(folder: Path) -> dict[str, Any]:
    begun = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    from mmdit_lora.config.loading import Config
    from mmdit_lora.training.trainer import prepare_run

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        values = {"base": str(BASE), "output_dir": f"{out}/run", "data": str(folder), "train": {"batch_size": BATCH}}
        run = prepare_run(Config.model_validate(values))
        prepared = time.perf_counter()
        run.examples.batch(range(BATCH))
    done = time.perf_counter()
    return {
        "import_s": round(imported - begun, 2),
        "prepare_s": round(prepared - imported, 2),
        "batch_s": round(done - prepared, 2),
        "prepare_and_first_batch_s": round(done - imported, 2),
        "with_imports_s": round(done - begun, 2),
        **_memory(),
    }


if __name__ == "__main__":
    parts = {"opening": _opening, "scanning": _scanning, "first_batch": _first_batch}
    found = parts[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write("\n" + json.dumps(found) + "\n")
