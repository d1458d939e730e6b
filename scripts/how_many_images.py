"""How many images does a layout stream want, and an adapter? Own ones, and ones that the base generated itself.

    OMP_NUM_THREADS=1 uv run python scripts/how_many_images.py

On the second embedded base, `data/tiny_flux2`. Streams are trained on 100 to 16,000 images, at equal steps: on scenes, and on what
`mmdit-lora data synthesize` makes of captions (the exact reader as detector). Two are trained for longer, one on 4,000 of either.
Adapters for a new domain are trained on the longer one of scenes. All are measured on 256 held-out scenes. What is done is not
done again, so the script goes on where it was stopped. It writes `data/benchmarks/how_many_images.json` and `.png`, and
`how_many_images_samples.png`: layouts by captions alone, by the stream, and by the adapter on it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from stream_comparison import log, once, trained

from mmdit_lora.cli.main import main as mmdit_lora
from mmdit_lora.config.loading import load_config
from mmdit_lora.config.ranges import COUNT
from mmdit_lora.data.records import read_dataset, write_dataset
from mmdit_lora.data.shapes import open_scenes
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.files import write_json
from mmdit_lora.layout import Layout
from mmdit_lora.lora import load_adapter
from mmdit_lora.pipelines import SamplingConfig, generate, load_pipeline
from mmdit_lora.visual import contact_sheet, draw_boxes, phrase_colors, save_png

BASE = "data/tiny_flux2"
COUNTS = (100, 300, 1_000, 4_000, 16_000)
LONG = 4_000  # images of the two that are trained for longer
CAPTIONS = "shapes://sparse?count=16000&seed=41"
HELD_OUT = {"stream": "shapes://sparse?count=256&seed=22", "adapter": "shapes://page?count=256&seed=21"}
FIGURES = ("miou", "iou50", "color_acc", "shape_acc")
COLORS = {"scenes": "#0072B2", "synthesized": "#D55E00", "adapter": "#009E73"}


def synthesized(work: Path, steps: int) -> Path:
    """The data set that the base made of captions."""
    out = work / "made"
    arguments = ["--base", BASE, "--captions", CAPTIONS, "--detector", "shapes", "--steps", str(steps)]
    if not (out / "report.json").exists():
        code = mmdit_lora(["data", "synthesize", *arguments, "--batch-size", "64", "--out", str(out)])
        assert code == 0
    return out


def data_of(work: Path, source: str, count: int) -> str:
    """`count` images of a source, for `data.path`."""
    if source == "scenes":
        return f"shapes://sparse?count={count}&seed=31"
    folder = work / f"made_{count}"
    if not folder.exists():
        records = read_dataset(work / "made")[:count]
        write_dataset(folder, ((f"{n:05d}.png", r.image, r.layout) for n, r in enumerate(records)))
    return str(folder)


def run_one(work: Path, kind: str, source: str, count: int, steps: int, long_steps: int) -> None:
    """Train and measure; `figures.json` in its folder says what came of it."""
    folder = work / f"{kind}_{source}_{count}_{steps}"
    changes = [
        f"train.max_steps={steps}",
        f"train.validate_every={steps}",
        "train.sample_every=0",
        f"output_dir={folder}",
    ]
    longest = work / f"stream_scenes_{LONG}_{long_steps}" / "stream"  # that adapters are trained on
    if kind == "stream":
        config = load_config("configs/tiny_flux2_stream.yaml", [*changes, f"data.path={data_of(work, source, count)}"])
    else:
        path = f"shapes://page?count={count}&seed=11"
        config = load_config("configs/tiny_flux2.yaml", [*changes, f"data.path={path}", f"stream_weights={longest}"])
    report = trained(config)

    def measure() -> dict[str, Any]:
        pipe = load_pipeline(BASE, stream=folder / "stream" if kind == "stream" else longest)
        if kind == "adapter":
            load_adapter(pipe.transformer, folder / "adapter")
            pipe.transformer.eval()
        result = evaluate(pipe, list(open_scenes(HELD_OUT[kind])), SamplingConfig(), seed=0)
        sides = result.to_dict()
        side = result.conditions["base" if kind == "stream" else "adapter"]
        save_png(contact_sheet(drawn(side.images[:16], result.layouts[:16]), columns=8), folder / "images.png")
        own = sides["base" if kind == "stream" else "adapter"]
        return {
            **{name: round(own[name], 4) for name in FIGURES},
            "miou_interval": own["intervals"]["miou"],
            "held_out_loss": report["held_out_loss"],
            "seconds": round(report["seconds"]),
            **({"without": round(sides["base"]["miou"], 4)} if kind == "adapter" else {}),
            "ceiling": round(sides["ground_truth"]["miou"], 4),
            "floor": round(sides["shuffled"]["miou"], 4),
        }

    log(f"{folder.name}: {once(folder / 'figures.json', measure)}")


def figures_of(work: Path, kind: str, source: str, count: int, steps: int) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((work / f"{kind}_{source}_{count}_{steps}" / "figures.json").read_text())
    return {"images": count, "steps": steps, **figures}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, names in zip(axes, (("scenes", "synthesized"), ("adapter",)), strict=True):
        for name in names:
            rows = report["streams"][name] if name != "adapter" else report["adapters"]
            images, miou = [row["images"] for row in rows], [row["miou"] for row in rows]
            spread = [
                [row["miou"] - row["miou_interval"]["low"] for row in rows],
                [row["miou_interval"]["high"] - row["miou"] for row in rows],
            ]
            axis.errorbar(images, miou, yerr=spread, fmt="o-", capsize=3, color=COLORS[name], label=name)
            if name != "adapter":
                row = report["longer"][name]
                axis.plot(
                    row["images"],
                    row["miou"],
                    "*",
                    markersize=13,
                    color=COLORS[name],
                    label=f"{name}, {row['steps']:,} steps",
                )
        axis.set(xscale="log", xlabel="images", ylim=(0, 1))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower right")
    axes[0].set(title=f"layout stream, {report['stream_steps']} steps", ylabel="mIoU on 256 held-out scenes")
    axes[1].axhline(report["adapters"][0]["without"], color="#999999", linestyle="--")
    axes[1].text(
        report["adapters"][0]["images"], report["adapters"][0]["without"] + 0.02, "without adapter", color="#777777"
    )
    axes[1].set(title=f"adapter for a new domain, {report['adapter_steps']} steps")
    figure.savefig(path, dpi=110)


def pictures(stream: Path, adapter: Path, path: Path, columns: int = 8) -> None:
    """Rows of held-out layouts: captions alone and the stream on the domain that it learned; the stream and the adapter on the
    adapter's."""
    pipe = load_pipeline(BASE, stream=stream)
    shown = []
    for kind, scales in (("stream", (0.0, 1.0)), ("adapter", (1.0,))):
        layouts = [record.layout for record in open_scenes(HELD_OUT[kind])[:columns]]
        for scale in scales:
            shown += drawn(generate(pipe, layouts, SamplingConfig(layout_scale=scale), seed=0), layouts)
    load_adapter(pipe.transformer, adapter)
    pipe.transformer.eval()
    shown += drawn(generate(pipe, layouts, SamplingConfig(), seed=0), layouts)
    save_png(contact_sheet(shown, columns=columns), path)


def drawn(images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[Image.Image]:
    """With the boxes of their layouts."""
    colors = phrase_colors(layouts)
    return [draw_boxes(image, layout, colors=colors) for image, layout in zip(images, layouts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/how_many_images"))
    parser.add_argument("--out", type=Path, default=Path("data/benchmarks/how_many_images.json"))
    parser.add_argument("--steps", type=COUNT.parse, default=500, help="of streams")
    parser.add_argument("--long-steps", type=COUNT.parse, default=1500, help="of the two on 4,000 images")
    parser.add_argument("--adapter-steps", type=COUNT.parse, default=300)
    parser.add_argument("--sampling-steps", type=COUNT.parse, default=8, help="of what is synthesized")
    parser.add_argument("--jobs", type=COUNT.parse, default=2, help="processes at a time")
    parser.add_argument("--one", nargs=4, metavar=("KIND", "SOURCE", "IMAGES", "STEPS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    work: Path = args.work
    if args.one:
        run_one(work, args.one[0], args.one[1], int(args.one[2]), int(args.one[3]), args.long_steps)
        return
    made = json.loads((synthesized(work, args.sampling_steps) / "report.json").read_text())
    counts = {"scenes": list(COUNTS), "synthesized": [n for n in COUNTS if n <= made["kept"]]}
    if len(counts["synthesized"]) < len(COUNTS):
        counts["synthesized"].append(made["kept"])

    def start(run: tuple[str, str, int, int]) -> None:
        options = ["--work", str(work), "--long-steps", str(args.long_steps), "--one", *map(str, run)]
        subprocess.run([sys.executable, __file__, *options], check=True)

    streams = [("stream", source, LONG, args.long_steps) for source in counts]
    streams += [("stream", source, count, args.steps) for source, each in counts.items() for count in each]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(start, streams))
        list(pool.map(start, [("adapter", "scenes", count, args.adapter_steps) for count in COUNTS]))
    report = {
        "command": "OMP_NUM_THREADS=1 uv run python scripts/how_many_images.py",
        "base": BASE,
        "stream_steps": args.steps,
        "adapter_steps": args.adapter_steps,
        "synthesized": made | {"captions": CAPTIONS, "sampling_steps": args.sampling_steps},
        "held_out": HELD_OUT,
        "streams": {s: [figures_of(work, "stream", s, n, args.steps) for n in each] for s, each in counts.items()},
        "longer": {source: figures_of(work, "stream", source, LONG, args.long_steps) for source in counts},
        "adapters": [figures_of(work, "adapter", "scenes", count, args.adapter_steps) for count in COUNTS],
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "processor": platform.machine()},
        "torch": torch.__version__,
    }
    write_json(args.out, report)
    plot(report, args.out.with_suffix(".png"))
    best = work / f"stream_scenes_{LONG}_{args.long_steps}" / "stream"
    adapter = work / f"adapter_scenes_{COUNTS[-1]}_{args.adapter_steps}" / "adapter"
    pictures(best, adapter, args.out.with_name(f"{args.out.stem}_samples.png"))
    log(f"wrote {args.out}")


if __name__ == "__main__":
    main()
