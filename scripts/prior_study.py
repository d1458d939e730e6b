"""What prior preservation costs and keeps, on the quickstart: the same adapter with and without it, several seeds.

    OMP_NUM_THREADS=1 uv run python scripts/prior_study.py --out outputs/prior

trains `configs/quickstart.yaml` for every seed and weight, judges each adapter on held-out layouts of the new domain and of
the old one, and writes DIR/prior.json and DIR/prior.png (committed under data/benchmarks/). A finished run is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from mmdit_lora.config.ranges import COUNT, SEED, Range

NEW, OLD = "page", "basic"
IMAGES, HELD_OUT, PRIOR = 2000, 96, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data, the runs and the result")
    parser.add_argument("--seeds", type=SEED.parse, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=Range(0, 1e6).parse, nargs="+", default=[0.0, 1.0], help="0 = without it")
    parser.add_argument("--steps", type=COUNT.parse, default=None, help="default: those of the config")
    args = parser.parse_args()
    data = make_data(args.out / "data")
    runs = [one_run(args.out, data, seed, weight, args.steps) for weight in args.weights for seed in args.seeds]
    result = {
        "command": "OMP_NUM_THREADS=1 uv run python scripts/prior_study.py --out outputs/prior",
        "machine": {"cores": os.cpu_count(), "arch": platform.machine()},
        "domains": {"new": NEW, "old": OLD},
        "held_out_layouts": HELD_OUT,
        "prior_layouts": PRIOR,
        "runs": runs,
    }
    from mmdit_lora.files import write_json

    write_json(args.out / "prior.json", result)
    plot(runs, args.out / "prior.png")


def make_data(folder: Path) -> dict[str, Path]:
    """The quickstart's own data, and layouts of the old domain that no other set has."""
    from mmdit_lora.data.shapes import DOMAINS, write_dataset

    sets = {"train": (NEW, IMAGES, 11), "held_out": (NEW, HELD_OUT, 12), "old": (OLD, HELD_OUT, 13)}
    for name, (domain, count, seed) in (sets | {"prior": (OLD, PRIOR, 14)}).items():
        if not (folder / name / "metadata.jsonl").is_file():
            write_dataset(folder / name, DOMAINS[domain], count=count, seed=seed)
    return {path.name: path for path in folder.iterdir()}


def one_run(out: Path, data: dict[str, Path], seed: int, weight: float, steps: int | None) -> dict[str, Any]:
    """Train and judge, or read what an earlier call found."""
    folder = out / f"weight_{weight:g}_seed_{seed}"
    if (folder / "judged.json").is_file():
        return json.loads((folder / "judged.json").read_text())  # type: ignore[no-any-return]
    from mmdit_lora.config.loading import load_config
    from mmdit_lora.data.records import read_dataset
    from mmdit_lora.evaluation.evaluate import evaluate
    from mmdit_lora.files import write_json
    from mmdit_lora.pipelines import SamplingConfig
    from mmdit_lora.training.trainer import train

    overrides = [
        f"data.path={data['train']}",
        f"data.validation={data['held_out']}",
        f"output_dir={folder}",
        f"train.seed={seed}",
        "train.validate_every=0",
        "train.sample_every=0",
        *([f"prior.layouts={data['prior']}", "prior.batch_size=32", f"prior.weight={weight}"] if weight else []),
        *([f"train.max_steps={steps}"] if steps else []),
    ]
    start = time.perf_counter()
    result = train(load_config("configs/quickstart.yaml", overrides), resume=True)
    seconds = time.perf_counter() - start
    result.pipe.transformer.eval()
    found: dict[str, Any] = {"weight": weight, "seed": seed, "train_s": round(seconds, 1)}
    for name in ("held_out", "old"):
        judged = evaluate(result.pipe, read_dataset(data[name]), SamplingConfig(), seed=0)
        found["new" if name == "held_out" else "old"] = {side: one.fidelity for side, one in judged.conditions.items()}
    write_json(folder / "judged.json", found)
    print(json.dumps({k: found[k] for k in ("weight", "seed", "train_s")}), flush=True)
    return found


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """mIoU of the two domains, a point a run, their mean as a number; base and ceiling as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
    weights = sorted({run["weight"] for run in runs})
    for axis, domain, title in zip(axes, ("new", "old"), (f"new domain ({NEW})", f"old domain ({OLD})"), strict=True):
        for x, weight in enumerate(weights):
            values = [run[domain]["adapter"]["miou"] for run in runs if run["weight"] == weight]
            beside = [x + 0.06 * (n - (len(values) - 1) / 2) for n in range(len(values))]
            axis.plot(beside, values, "o", color="#0072B2", alpha=0.8, markersize=6)
            mean = sum(values) / len(values)
            axis.annotate(f"{mean:.3f}", (x, min(values) - 0.012), fontsize=9, color="#0072B2", va="top", ha="center")
        for side, style, above in (("base", "--", False), ("ground_truth", ":", True)):
            value = runs[0][domain][side]["miou"]
            axis.axhline(value, color="#666666", linestyle=style, linewidth=1)
            name = "ground truth (ceiling)" if above else "base"
            place = (len(weights) - 0.52, value + (0.004 if above else -0.004))
            axis.annotate(name, place, fontsize=8, color="#444444", va="bottom" if above else "top", ha="right")
        axis.set_xticks(range(len(weights)), ["without" if not w else f"weight {w:g}" for w in weights])
        axis.set_xlim(-0.5, len(weights) - 0.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("prior preservation")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mIoU of the boxes, held-out layouts")
    axes[0].set_ylim(0.55, 1)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
