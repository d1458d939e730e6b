"""What a run leaves behind: the adapter with its card, or the trained base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mmdit_lora import __version__
from mmdit_lora.config import Config
from mmdit_lora.files import atomic_folder
from mmdit_lora.lora import save_adapter
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.opening import stored_dtype, stream_options


def save_result(pipe: LayoutPipeline, config: Config, report: dict[str, Any]) -> Path:
    """Write `<output_dir>/adapter` (method lora) or `<output_dir>/base` (the others), all or nothing; returns it."""
    folder = Path(config.output_dir)
    if config.method != "lora":
        with atomic_folder(folder / "base") as temporary, quiet():
            whole_base(pipe, config).save_pretrained(temporary)
        return folder / "base"
    metadata = {
        "base": config.base,
        "fingerprint": report["fingerprints"]["base"],
        "data_fingerprint": report["fingerprints"]["data"],
        "family": pipe.transformer.family,
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "targets": config.lora.targets,
        "box_convention": "xyxy in [0, 1] of width and height",
        "quantization": config.train.quantization,
        "version": __version__,
    }
    save_adapter(
        pipe.transformer, folder / "adapter", metadata=metadata, card=adapter_card(config, report, type(pipe).__name__)
    )
    return folder / "adapter"


def whole_base(pipe: LayoutPipeline, config: Config) -> LayoutPipeline:
    """The pipeline to save: what was trained, and beside it the base as it is stored, neither rounded nor quantised."""
    if config.train.mixed_precision == "no" and config.train.quantization == "none":
        return pipe
    fresh = load_pipeline(config.base, dtype=stored_dtype(config.base), **stream_options(config))
    own = dict(fresh.transformer.named_parameters())
    with torch.no_grad():
        for name, parameter in trainable_parameters(pipe.transformer).items():
            own[name].copy_(parameter)
    return fresh


def adapter_card(config: Config, report: dict[str, Any], pipeline: str) -> str:
    """The adapter's README.md: what it is, how to load it, how it was trained, what was measured.

    Args:
        pipeline: name of the class that opens its base.
    """
    loss = report["held_out_loss"]
    measured = "No pictures were held out, so nothing was measured."
    if loss:
        low, high = loss["interval"] or (float("nan"), float("nan"))
        measured = (
            f"Denoising loss on {loss['pictures']} held-out pictures, same noise and times: base {loss['base']:.4f}, "
            f"with the adapter {loss['trained']:.4f}; difference {loss['difference']:+.4f}, 95 % interval "
            f"[{low:+.4f}, {high:+.4f}]."
        )
    return f"""---
base_model: {config.base}
library_name: peft
tags: [lora, layout-to-image, mmdit]
---

# Layout LoRA for `{config.base}`

A LoRA (r={config.lora.r}, alpha={config.lora.alpha:g}, dropout={config.lora.dropout:g}) on {", ".join(f"`{t}`" for t in config.lora.targets)}
of the layout stream: {report["trainable_params"]:,} of {report["total_params"]:,} parameters, trained for
{report["steps"]:,} steps on {report["pictures"]:,} pictures. {measured}

    mmdit-lora sample --base {config.base} --adapter . --layout layout.json --out pictures

    from peft import PeftModel
    from mmdit_lora.pipelines import {pipeline}
    pipe = {pipeline}.from_pretrained("{config.base}")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")

Boxes are [left, top, right, bottom] in [0, 1] of the picture's width and height.
"""
