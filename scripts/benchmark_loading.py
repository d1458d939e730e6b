"""What reading costs a run, and what its captions cost: `scripts/benchmark.py data --loading [--before CHECKOUT]`.

"train": the embedded base on JPEG files of 768 x 768 pixels on disk, without a cache, crops and flips new each time: every
sample is read, decoded, resized and encoded by the VAE. `samples_per_s` is of the whole run without its first steps;
`waiting` is the share of its time in which the main process waits for images, or reads them itself. Files lie in the page cache.
"captions": 2,000 short captions, all different, through `LayoutEncoder.prompts`, in calls of 8 as a run of that
batch size makes them, and in one call as `data cache` makes them.

Medians of rounds, each in a process of its own. `--before` names a checkout of an earlier version of the package, which takes
turns with this one.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "data" / "tiny_base"
IMAGES, SIDE, BATCH, CAPTIONS = 200, 768, 8, 2000
STEPS, WARM_UP, ROUNDS = 45, 15, 2


def loading(before: Path | None) -> dict[str, Any]:
    """The whole report."""
    versions = {"after": ROOT} | ({} if before is None else {"before": before.resolve()})
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    with tempfile.TemporaryDirectory() as work:
        _write_images(Path(work) / "images")
        for _ in range(ROUNDS):
            for name, package in versions.items():
                rounds[name].append(_measured(package, Path(work)))
    medians = {name: {key: statistics.median(r[key] for r in each) for key in each[0]} for name, each in rounds.items()}
    report: dict[str, Any] = {
        "command": "OMP_NUM_THREADS=1 uv run python scripts/benchmark.py data --loading --before CHECKOUT > "
        "data/benchmarks/loading.json",
        "machine": {
            "cores": os.cpu_count(),
            "arch": platform.machine(),
            "load": [round(x, 1) for x in os.getloadavg()],
        },
        "train": {"images": IMAGES, "side": SIDE, "batch_size": BATCH, "steps": STEPS - WARM_UP},
        "captions": CAPTIONS,
        "medians": {name: {key: round(value, 3) for key, value in each.items()} for name, each in medians.items()},
        "all_rounds": {name: [{k: round(v, 3) for k, v in r.items()} for r in each] for name, each in rounds.items()},
    }
    if before is not None:
        after, earlier = medians["after"], medians["before"]
        report["times_before"] = {
            key: round(earlier[key] / value if key.endswith("_s") and "per" not in key else value / earlier[key], 2)
            for key, value in after.items()
            if not key.endswith("waiting")
        }
    return report


def _write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from mmdit_lora.data.records import write_dataset
    from mmdit_lora.data.shapes import open_scenes

    grain = np.random.default_rng(0).integers(0, 24, (SIDE, SIDE, 3), dtype=np.uint8)  # as photographs have
    (folder.parent / "jpeg").mkdir()
    items = []
    for number, record in enumerate(open_scenes(f"shapes://basic?count={IMAGES}&seed=0")):
        pixels = np.asarray(record.load().resize((SIDE, SIDE))) // 2 + np.roll(grain, number, axis=0)
        path = folder.parent / "jpeg" / f"{number:04d}.jpg"
        Image.fromarray(pixels).save(path, quality=92)
        items.append((path.name, path, record.layout))
    write_dataset(folder, items)


def _measured(package: Path, work: Path) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(package)}
    done = subprocess.run(
        [sys.executable, __file__, str(work)], stdout=subprocess.PIPE, text=True, env=environment, check=True, cwd=work
    )
    return json.loads(done.stdout.splitlines()[-1])


def _all(work: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    waited, out = _waiting(), {}
    for workers in (0, 1, 2):
        for key, value in _train(workers, work, waited).items():
            out[f"workers_{workers}_{key}"] = value
    return out | _captions()


def _train(workers: int, work: Path, waited: list[float]) -> dict[str, float]:
    try:
        from mmdit_lora.config.loading import Config
    except ImportError:  # before
        from mmdit_lora.config import Config
    from mmdit_lora.training.trainer import train

    marks: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as out:
        data = {
            "path": str(work / "images"),
            "validation_share": 0.0,
            "crop": "random",
            "flip": True,
            "workers": workers,
        }
        quiet = {
            "checkpoint_every": 0,
            "sample_every": 0,
            "validate_every": 0,
            "log_every": WARM_UP,
            "preflight": False,
        }
        values = {"base": str(BASE), "output_dir": f"{out}/run", "data": data}
        settings = {"max_steps": STEPS, "batch_size": BATCH} | quiet
        config = Config.model_validate(values | {"train": settings})
        train(config, **_logged(lambda: marks.append((time.perf_counter(), waited[0]))))
    passed = marks[-1][0] - marks[0][0]
    return {"samples_per_s": (STEPS - WARM_UP) * BATCH / passed, "waiting": (marks[-1][1] - marks[0][1]) / passed}


def _logged(call: Callable[[], None]) -> dict[str, Any]:
    """For `train`: `call` at every step that is logged."""
    try:
        from mmdit_lora.training.callbacks import Callback
    except ImportError:  # before
        return {"on_progress": lambda *_: call()}

    class Logged(Callback):
        def on_step(self, record: Any) -> None:
            if record.logged:
                call()

    return {"callbacks": [Logged()]}


def _waiting() -> list[float]:
    """Seconds in which the main process waited for images, or read them: one number that grows."""
    waited = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                waited[0] += time.perf_counter() - start

        return wrapped

    try:
        from mmdit_lora.training import encoding
    except ImportError:  # before
        from mmdit_lora.training.examples import Examples

        Examples._prepare = timed(Examples._prepare)  # type: ignore[method-assign]
        return waited
    load = encoding.load

    def loaded(*args: Any, **options: Any) -> Iterator[Any]:
        batches = load(*args, **options)
        following = timed(lambda: next(batches, None))
        while (batch := following()) is not None:
            yield batch

    encoding.load = loaded  # type: ignore[assignment]
    return waited


def _captions() -> dict[str, float]:
    from mmdit_lora.pipelines import load_pipeline

    try:
        from mmdit_lora.training.encoding import LayoutEncoder
    except ImportError:  # before
        from mmdit_lora.training.encode import Encoder as LayoutEncoder
    pipe, out = load_pipeline(str(BASE)), {}
    words = ("red", "green", "blue", "large", "small", "circle", "square", "triangle", "on the left", "at the top")
    captions = [f"scene {n}: a {words[n % 5]} {words[5 + n % 3]} {words[8 + n % 2]}" for n in range(CAPTIONS)]
    for size in (BATCH, CAPTIONS):
        encoder = LayoutEncoder(pipe)
        encoder.prompts(["warm", "up"])
        start = time.perf_counter()
        for first in range(0, CAPTIONS, size):
            encoder.prompts(captions[first : first + size])
        out[f"captions_in_calls_of_{size}_s"] = time.perf_counter() - start
    return out


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(_all(Path(sys.argv[1]))) + "\n")
