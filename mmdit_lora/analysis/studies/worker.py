"""One run of a study: train, measure, write `figures.json`. In a process of its own, so that its peak memory is its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmdit_lora.analysis.studies.setup import Arm, Setup
from mmdit_lora.config.loading import Config
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import NonFiniteError, Stopped
from mmdit_lora.evaluation.detectors.shapes import per_image, readable, summarise
from mmdit_lora.files import write_json
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate
from mmdit_lora.training.encoding import EncodedDataset, LayoutEncoder
from mmdit_lora.training.held_out import held_out_losses
from mmdit_lora.training.load_base import DTYPES, load_base
from mmdit_lora.training.run_dir import CHECKPOINTS
from mmdit_lora.training.setup import read_data, run_buckets
from mmdit_lora.training.stopping import Diverged, Interrupted
from mmdit_lora.training.trainer import train

FIGURES = "figures.json"


def run_arm(setup: Setup, arm: Arm) -> None:
    """Train an arm from its newest checkpoint, or its start, and measure it.

    Raises:
        InputError: the config, the base or the data do not allow it. Interrupted: it goes on at the next start. Diverged:
            a loss is no finite number, and it is no trial.
    """
    config = arm.config(setup)
    folder = Path(config.output_dir)
    resumed = (folder / CHECKPOINTS).is_dir()
    before, start = _memory(), time.perf_counter()
    figures: dict[str, Any] = {"setting": arm.setting, "seed": arm.seed, "base": config.base, "resumed": resumed}
    if arm.changes is None:
        pipe, _ = load_base(config, DTYPES[config.train.mixed_precision])
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
        figures |= {"trainable_params": 0, "bytes": 0, "learning_rate": None, "loss_minus_base": None}
    else:
        try:
            result = train(config, resume=True, method=arm.folded)
        except Diverged:
            if not arm.trial:
                raise
            nothing = {"diverged": True, "loss_minus_base": None, "fidelity": None, "learning_rate": None}
            write_json(folder / FIGURES, figures | nothing | {"seconds": round(time.perf_counter() - start, 2)})
            return
        pipe, report = result.pipe, result.report
        comparison = result.comparison
        figures |= {
            "learning_rate": config.train.learning_rate,
            "steps": report["steps"],
            "trainable_params": report["trainable_params"],
            "bytes": 4 * report["trainable_params"],
            "loss_minus_base": None if comparison is None else list(comparison.differences),
            "held_out_loss": report["held_out_loss"],
            "train_seconds": round(report["seconds"], 2),
        }
        figures["peak_memory"] = _memory() - before
    pipe.transformer.eval()
    if arm.trial:
        figures |= {"fidelity": None, "ious": None}
    else:
        figures |= _fidelity(pipe, config, read_data(config).held_out, setup.images, "")
    if setup.old is not None and not arm.trial:
        old = read_dataset(setup.old)
        figures |= _fidelity(pipe, config, old, setup.images, "old_")
        figures["old_losses"] = _losses(pipe, config, old)
    figures["seconds"] = round(time.perf_counter() - start, 2)
    write_json(folder / FIGURES, figures)
    # The figures are what is kept, and the adapter; whole bases would fill the disk.
    for name in (CHECKPOINTS, "base"):
        shutil.rmtree(folder / name, ignore_errors=True)
    del pipe
    gc.collect()


def run_alone(setup: Setup, arm: Arm) -> None:
    """`run_arm` in a process that ends when the one that asked for it is gone."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)  # the trainer then saves; otherwise two would write to one folder

    threading.Thread(target=watch, daemon=True).start()
    try:
        run_arm(setup, arm)
    except (
        Interrupted,
        NonFiniteError,
    ) as error:  # their arguments are no message: they come through no pipe as they are
        raise Stopped(str(error)) from None


def _fidelity(
    pipe: LayoutPipeline, config: Config, records: Sequence[Record], count: int, prefix: str
) -> dict[str, Any]:
    """Fidelity over boxes, and each image's mean IoU; None where the reader does not know the phrases."""
    chosen = [records[index] for index in range(min(count, len(records)))]
    none = {f"{prefix}fidelity": None, f"{prefix}ious": None}
    if not readable(record.layout for record in chosen):
        return none
    sample = config.sample
    side = config.data.resolution or pipe.default_side
    layouts = [prepare(record.load(), record.layout, (side, side))[1] for record in chosen]
    layouts = [layout for layout in layouts if layout.boxes]
    settings = SamplingConfig(
        steps=sample.steps,
        guidance_scale=sample.guidance_scale,
        layout_scale=sample.layout_scale,
        layout_window=sample.layout_window,
        size=(side, side),
    )
    with torch.no_grad():
        images = generate(pipe, layouts, settings, seed=sample.seed)
    readings = per_image(images, layouts)
    return {
        f"{prefix}fidelity": summarise([box for boxes in readings for box in boxes]).to_dict(),
        f"{prefix}ious": [float(np.mean([box.iou for box in boxes])) for boxes in readings],
    }


def _losses(pipe: LayoutPipeline, config: Config, records: Sequence[Record]) -> list[float]:
    """Loss of each image, at times and noises that are the same for every run, whatever its seed."""
    slots = pipe.transformer.layout_slots
    encoder = LayoutEncoder(pipe, EncodingCache(config.data.cache), base=config.base, slots=slots)
    dataset = EncodedDataset(records, encoder, config, buckets=run_buckets(config, pipe), stream="held out")
    found = held_out_losses(pipe.transformer, dataset, pipe.device)
    return [float(loss) for loss in found.per_image]


def _memory() -> int:
    """Peak bytes so far: allocated on the GPU, or resident where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
