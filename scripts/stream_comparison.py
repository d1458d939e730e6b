"""A layout stream from nothing, siamese against cross: loss, fidelity, seconds per step, and LoRA on either result.

    uv run python scripts/stream_comparison.py --work outputs/stream_comparison

The base is the embedded one with its stream taken off. Each stream is pretrained by `method: layout_stream` with the same
data, steps and seed; then `method: lora` adapts it to a new domain. Stages that are done are not done again, so the script
goes on where it was stopped. It writes `data/benchmarks/stream_siamese_vs_cross.json`. About 25 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.config.ranges import COUNT
from mmdit_lora.data.records import read_dataset
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.files import atomic_folder, write_json
from mmdit_lora.models import LayoutModelMixin
from mmdit_lora.pipelines import SamplingConfig, load_pipeline
from mmdit_lora.training.callbacks import Callback
from mmdit_lora.training.loss import flow_matching_loss
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.trainer import prepare_run, train
from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

ATTENTIONS = ("siamese", "cross")
# domain, images, seed
SETS = {
    "basic": ("basic", 4000, 21),
    "basic_held_out": ("basic", 96, 22),
    "page": ("page", 2000, 11),
    "page_held_out": ("page", 96, 12),
}
TIMED_STEPS, WARM_UP_STEPS = 40, 5


def log(message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {message}", flush=True)


def without_stream(base: Path, out: Path) -> None:
    """A folder of stock classes with the base's weights; how it wants to be sampled stays in model_index.json."""
    if out.exists():
        return
    model = load_pipeline(str(base)).transformer
    classes = type(model).__mro__
    stock: Any = next(
        c for c in classes if not issubclass(c, LayoutModelMixin) and c.__module__.startswith("diffusers.")
    )
    plain = stock.from_config(
        {k: v for k, v in model.config.items() if "layout" not in k and k not in ("phrase_dim", "mask_padding")}
    )
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "layout" not in name})
    index = json.loads((base / "model_index.json").read_text())
    index["_class_name"] = index["_class_name"].removeprefix("Layout")
    index["transformer"] = ["diffusers", stock.__name__]
    with atomic_folder(out) as temporary:
        shutil.copytree(
            base, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", "*.png", "*.md")
        )
        plain.save_pretrained(temporary / "transformer")
        (temporary / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def run_config(file: str, work: Path, *overrides: str) -> Config:
    return load_config(file, [f"base={work / 'plain'}", "train.sample_every=0", *overrides])


class LogLoss(Callback):
    def on_step(self, record: StepRecord) -> None:
        if record.logged:
            log(f"  {record.step} loss {record.loss:.4f}")


def trained(config: Config) -> dict[str, Any]:
    """The report of a run, which is taken up again where it was stopped."""
    report = Path(config.output_dir) / "report.json"
    if not report.exists():
        train(config, resume=True, callbacks=[LogLoss()])
    return json.loads(report.read_text())


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` answers, kept at `path`."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def fidelity(base: Path, data: Path, *, adapter: Path | None = None, sheet: Path | None = None) -> dict[str, Any]:
    """mIoU, colour and shape of the base, or with its adapter; also the ceiling (ground truth) and floor (shuffled)."""
    from mmdit_lora.lora import load_adapter

    pipe = load_pipeline(str(base))
    if adapter is not None:
        load_adapter(pipe.transformer, adapter)
        pipe.transformer.eval()
    result = evaluate(pipe, read_dataset(data), SamplingConfig(), seed=0)
    if sheet is not None:
        side = result.conditions["adapter" if adapter else "base"]
        colors = phrase_colors(result.layouts)
        shown = [
            draw_boxes(p, layout, colors=colors) for p, layout in zip(side.images[:16], result.layouts, strict=False)
        ]
        save_png(contact_sheet(shown), sheet)
    return {name: side.fidelity for name, side in result.conditions.items()}


def seconds_per_step(work: Path) -> dict[str, Any]:
    """Forward, backward and update of `method: layout_stream`, the two attentions in turn, on the same batches."""
    runs = {
        name: prepare_run(stream_config(work, name).model_copy(update={"output_dir": str(work / "timing" / name)}))
        for name in ATTENTIONS
    }
    seconds: dict[str, list[float]] = {name: [] for name in ATTENTIONS}
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        for name in ATTENTIONS if step % 2 else reversed(ATTENTIONS):
            run = runs[name]
            size = run.config.train.batch_size
            batch = run.examples.batch(range(step * size, (step + 1) * size))
            start = time.perf_counter()
            flow_matching_loss(run.model, batch).mean().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            if step >= WARM_UP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    ratios = sorted(s / c for s, c in zip(seconds["siamese"], seconds["cross"], strict=True))
    quarter = len(ratios) // 4
    return {
        "steps": TIMED_STEPS,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "siamese_over_cross": {
            "median": statistics.median(ratios),
            "quartiles": [ratios[quarter], ratios[-1 - quarter]],
        },
    }


def stream_config(work: Path, attention: str) -> Config:
    return run_config(
        "configs/layout_stream.yaml",
        work,
        f"data.path={work / 'basic'}",
        f"data.validation={work / 'basic_held_out'}",
        f"stream.attention={attention}",
        f"output_dir={work / attention}",
    )


def lora_config(work: Path, attention: str, steps: int) -> Config:
    return run_config(
        "configs/quickstart.yaml",
        work,
        f"base={work / attention / 'base'}",
        f"data.path={work / 'page'}",
        f"data.validation={work / 'page_held_out'}",
        f"output_dir={work / attention / 'lora'}",
        f"train.max_steps={steps}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("data/tiny_base"))
    parser.add_argument("--work", type=Path, default=Path("outputs/stream_comparison"))
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/stream_siamese_vs_cross.json"))
    parser.add_argument("--lora-steps", type=COUNT.parse, default=300)
    args = parser.parse_args()
    work: Path = args.work
    without_stream(args.base, work / "plain")
    for name, (domain, count, seed) in SETS.items():
        if not (work / name).exists():
            write_dataset(work / name, DOMAINS[domain], count=count, seed=seed)

    log("seconds per step")
    timing = once(work / "timing.json", lambda: seconds_per_step(work))
    log("fidelity before: the base with a new stream")
    before = once(work / "before.json", lambda: fidelity(work / "plain", work / "basic_held_out"))
    sides: dict[str, Any] = {}
    for name in ATTENTIONS:
        config = stream_config(work, name)
        log(f"{name}: layout stream")
        stream = trained(config)
        folder = work / name
        after = once(
            folder / "after.json",
            lambda folder=folder: fidelity(folder / "base", work / "basic_held_out", sheet=folder / "after.png"),
        )
        log(f"{name}: {after['base']}")
        log(f"{name}: LoRA on the new domain")
        lora = trained(lora_config(work, name, args.lora_steps))
        page = once(
            folder / "page.json",
            lambda folder=folder: fidelity(
                folder / "base",
                work / "page_held_out",
                adapter=folder / "lora" / "adapter",
                sheet=folder / "page.png",
            ),
        )
        log(f"{name}: {page['base']} -> {page['adapter']}")
        sides[name] = {
            "stream_params": stream["trainable_params"],
            "training_seconds": stream["seconds"],
            "held_out_loss": stream["held_out_loss"],
            "fidelity_before": before["base"],
            "fidelity_after": after["base"],
            "lora": {
                "params": lora["trainable_params"],
                "held_out_loss": lora["held_out_loss"],
                "fidelity_before": page["base"],
                "fidelity_after": page["adapter"],
            },
        }
    config = stream_config(work, "siamese")
    report = {
        "base": "the embedded base with its layout stream taken off",
        "init": config.stream.init or "copy_text",
        "steps": config.train.max_steps,
        "batch_size": config.train.batch_size,
        "learning_rate": config.train.learning_rate,
        "lora_steps": args.lora_steps,
        "data": {name: {"domain": d, "images": n, "seed": s} for name, (d, n, s) in SETS.items()},
        "ground_truth": {"basic": before["ground_truth"], "page": page["ground_truth"]},
        "shuffled": {"basic": before["shuffled"], "page": page["shuffled"]},
        **sides,
        "seconds_per_step": timing,
        "caveats": [
            "The embedded base was trained together with a siamese stream, before that was taken off.",
            "One seed. Fidelity is compared after the same number of steps, not after the same time.",
        ],
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        "torch": torch.__version__,
    }
    write_json(args.out, report)
    log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
