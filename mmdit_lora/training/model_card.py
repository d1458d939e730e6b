"""The adapter's model card: what it is, how to load it, how it was trained, what was measured. Front matter as the hub reads it."""

from __future__ import annotations

import json
import shlex
from typing import Any

import yaml

from mmdit_lora.config.loading import Config
from mmdit_lora.files import public_name
from mmdit_lora.lora import describe_lora
from mmdit_lora.training.trainable import lora_config
from mmdit_lora.visual.pages import code_markdown

IMAGES = "samples.png"


def adapter_card(config: Config, report: dict[str, Any], pipeline: str, *, images: bool = False) -> str:
    """README.md of an adapter.

    Args:
        report: of the run.
        pipeline: name of the class that opens its base.
        images: whether `IMAGES` lies beside it.
    """
    base = public_name(config.base)
    front = {
        "base_model": base,
        "library_name": "peft",
        "license": config.license,
        "tags": ["lora", "layout-to-image", "mmdit", f"base_model:adapter:{base}"],
    }
    lora, targets = lora_config(config.lora), ", ".join(map(code_markdown, config.lora.targets))
    lora.target_modules = None  # they follow, each as code
    described = code_markdown(describe_lora(lora, lora_plus=config.train.lora_plus))
    shown = f"![Held-out layouts with their boxes]({IMAGES})\n\nHeld-out layouts, boxes drawn.\n" if images else ""
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# Layout LoRA for {code_markdown(base)}

A {described} on {targets} of the layout stream:
{report["trainable_params"]:,} of {report["total_params"]:,} parameters, trained for {report["steps"]:,} steps on
{report["images"]:,} images{_chosen(report)}. It makes the base obey boxes with phrases.

{shown}
## Use

    mmdit-lora sample --base {shlex.quote(" ".join(base.split()))} --adapter . --layout layout.json --out images

    from peft import PeftModel
    from mmdit_lora.pipelines import {pipeline}
    pipe = {pipeline}.from_pretrained({json.dumps(base, ensure_ascii=False)})
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")

Boxes are [left, top, right, bottom] in [0, 1] of the image's width and height.

## Measured

{_measured(report)}

## Trained

| | |
| --- | --- |
{_table(config, report)}
"""


def _chosen(report: dict[str, Any]) -> str:
    step = report["adapter_step"]
    return "" if step == report["steps"] else f" (the weights are those of step {step:,}, the best)"


def _measured(report: dict[str, Any]) -> str:
    lines = []
    if fidelity := report.get("fidelity"):
        values = ", ".join(f"{name} {value:.3f}" for name, value in fidelity["values"].items())
        lines.append(f"Fidelity of {fidelity['images']} images sampled at step {fidelity['step']:,}: {values}.")
    if loss := report["held_out_loss"]:
        interval = ""
        if loss["interval"] is not None:
            interval = ", 95 % interval [{:+.4f}, {:+.4f}]".format(*loss["interval"])
        lines.append(
            f"Denoising loss on {loss['images']} held-out images, same noise and times: base {loss['base']:.4f}, with "
            f"the adapter {loss['trained']:.4f}; difference {loss['difference']:+.4f}{interval}."
        )
    return "\n\n".join(lines) or "No images were held out, so nothing was measured."


def _table(config: Config, report: dict[str, Any]) -> str:
    train, flow = config.train, config.flow
    average = f", moving average {train.ema_decay:g}" if train.ema_decay else ""
    scheduler = " times the scheduler's" if flow.scheduler_shift else ""
    rows = {
        "optimizer": f"{train.optimizer}, learning rate {train.learning_rate:g}, {train.lr_schedule}{average}",
        "samples a step": report["samples_a_step"],
        "precision": train.mixed_precision + ("" if train.quantization == "none" else f", base {train.quantization}"),
        "timesteps": f"{flow.timesteps}, shift {flow.shift:g}{scheduler}, weighting {flow.weighting}",
        "sizes": ", ".join(list(report["buckets"])[:8]) + (", ..." if len(report["buckets"]) > 8 else ""),
        "seed": train.seed,
        "time": f"{report['seconds']:,.0f} s",
    }
    if (start := report["start"]) is not None:
        rows["started from"] = f"the adapter {start['name']}"
    rows |= {f"{name} fingerprint": f"`{digest}`" for name, digest in report["fingerprints"].items()}
    return "\n".join(f"| {name} | {value} |" for name, value in rows.items())
