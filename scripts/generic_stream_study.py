"""The generic layout stream against the built-in one, at equal steps on the embedded base with its stream taken off.

    OMP_NUM_THREADS=1 uv run python scripts/generic_stream_study.py

Every variant is trained by `method: layout_stream` with the same data, steps and schedule, from three seeds; then held-out loss,
fidelity on 96 held-out layouts, and the time of a step, all variants in turn in one process. What is done is not done again, so
the script goes on where it was stopped. It writes `data/benchmarks/generic_stream.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from stream_comparison import log, once, run_config, trained, without_stream

from mmdit_lora.config.loading import Config
from mmdit_lora.config.ranges import COUNT
from mmdit_lora.data.shapes import open_scenes
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.files import write_json
from mmdit_lora.models.generic_stream import StreamModel
from mmdit_lora.pipelines import SamplingConfig, load_pipeline
from mmdit_lora.training.loss import flow_matching_loss
from mmdit_lora.training.trainer import prepare_run
from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

TRAINING, HELD_OUT = "shapes://basic?count=4000&seed=21", "shapes://basic?count=96&seed=22"
VARIANTS = {
    "built-in siamese, copied": ["stream.init=copy_text"],
    "built-in siamese, random": ["stream.init=random"],
    "generic siamese": ["stream.init=null", "stream.kind=generic"],
    "generic siamese, half width": ["stream.init=null", "stream.width=64"],
    "generic cross": ["stream.init=null", "stream.kind=generic", "stream.attention=cross"],
}
FIGURES = ("miou", "iou50", "color_acc", "shape_acc")
TIMED_STEPS, WARM_UP_STEPS = 30, 5


def config_of(work: Path, variant: str, seed: int, steps: int) -> Config:
    return run_config(
        "configs/layout_stream.yaml",
        work,
        *VARIANTS[variant],
        f"data.path={TRAINING}",
        f"data.validation={HELD_OUT}",
        f"train.max_steps={steps}",
        f"train.validate_every={steps}",
        f"train.seed={seed}",
        f"output_dir={folder_of(work, variant, seed)}",
    )


def folder_of(work: Path, variant: str, seed: int) -> Path:
    return work / f"{variant.replace(',', '').replace(' ', '_')}_{seed}"


def run_one(work: Path, variant: str, seed: int, steps: int) -> None:
    """Train and evaluate; `figures.json` in its folder says what came of it."""
    config = config_of(work, variant, seed, steps)
    report, folder = trained(config), Path(config.output_dir)

    def measure() -> dict[str, Any]:
        stream = folder / "stream"
        pipe = (
            load_pipeline(str(work / "plain"), stream=stream)
            if stream.exists()
            else load_pipeline(str(folder / "base"))
        )
        result = evaluate(pipe, list(open_scenes(HELD_OUT)), SamplingConfig(), seed=0)
        side = result.conditions["base"]
        colors = phrase_colors(result.layouts)
        shown = [
            draw_boxes(image, layout, colors=colors)
            for image, layout in zip(side.images[:8], result.layouts, strict=False)
        ]
        save_png(contact_sheet(shown, columns=8), folder / "images.png")
        return {
            "parameters": report["trainable_params"],
            "held_out_loss": report["held_out_loss"]["trained"],
            **{name: side.fidelity[name] for name in FIGURES},
            "ceiling": result.conditions["ground_truth"].fidelity["miou"],
            "floor": result.conditions["shuffled"].fidelity["miou"],
        }

    log(f"{variant}, seed {seed}: {once(folder / 'figures.json', measure)}")


def seconds_per_step(work: Path, steps: int) -> dict[str, Any]:
    """Forward, backward and update, the variants in turn on the same batches; over that of the built-in stream."""
    runs = {}
    for name in VARIANTS:
        config = config_of(work, name, 0, steps)
        runs[name] = prepare_run(config.model_copy(update={"output_dir": str(work / "timing" / name)}))
        assert isinstance(runs[name].pipe.transformer, StreamModel) == name.startswith("generic")
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        for name, run in runs.items() if step % 2 else reversed(runs.items()):
            size = run.config.train.batch_size
            batch = run.examples.batch(range(step * size, (step + 1) * size))
            start = time.perf_counter()
            flow_matching_loss(run.model, batch).mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            if step >= WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    reference = seconds["built-in siamese, copied"]
    return {
        name: {
            "median_seconds": round(statistics.median(values), 4),
            "over_built_in": round(statistics.median(a / b for a, b in zip(values, reference, strict=True)), 3),
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/generic_stream_study"))
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/generic_stream.json"))
    parser.add_argument("--steps", type=COUNT.parse, default=500)
    parser.add_argument("--seeds", type=COUNT.parse, default=3)
    parser.add_argument("--jobs", type=COUNT.parse, default=2, help="processes at a time")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    work: Path = args.work
    if args.one:
        run_one(work, args.one[0], int(args.one[1]), args.steps)
        return
    without_stream(Path("data/tiny_base"), work / "plain")
    timing = once(work / "timing.json", lambda: seconds_per_step(work, args.steps))
    runs = [(variant, seed) for seed in range(args.seeds) for variant in VARIANTS]

    def start(run: tuple[str, int]) -> None:
        options = ["--work", str(work), "--steps", str(args.steps), "--one", run[0], str(run[1])]
        subprocess.run([sys.executable, __file__, *options], check=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, runs))
    variants: dict[str, Any] = {}
    for variant in VARIANTS:
        each = [json.loads((folder_of(work, variant, s) / "figures.json").read_text()) for s in range(args.seeds)]
        names = ("held_out_loss", *FIGURES)
        variants[variant] = {
            "parameters": each[0]["parameters"],
            "mean": {name: round(statistics.fmean(run[name] for run in each), 4) for name in names},
            "seeds": [{name: round(run[name], 4) for name in names} for run in each],
            **timing[variant],
        }
    write_json(
        args.out,
        {
            "command": "OMP_NUM_THREADS=1 uv run python scripts/generic_stream_study.py",
            "base": "the embedded base with its layout stream taken off",
            "steps": args.steps,
            "data": {"training": TRAINING, "held_out": HELD_OUT},
            "ceiling_miou": round(each[0]["ceiling"], 4),
            "floor_miou": round(each[0]["floor"], 4),
            "variants": variants,
            "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
            "torch": torch.__version__,
        },
    )
    log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
