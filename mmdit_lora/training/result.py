"""What a run leaves behind: the adapter with its card, or the trained base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdit_lora import __version__
from mmdit_lora.config import Config
from mmdit_lora.files import atomic_folder
from mmdit_lora.lora import save_adapter
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline, quiet


def save_result(pipe: LayoutStableDiffusion3Pipeline, config: Config, report: dict[str, Any]) -> Path:
    """Write `<output_dir>/adapter` (method lora) or `<output_dir>/base` (the others), all or nothing; returns it."""
    folder = Path(config.output_dir)
    if config.method != "lora":
        with atomic_folder(folder / "base") as temporary, quiet():
            pipe.save_pretrained(temporary)
        return folder / "base"
    metadata = {
        "base": config.base,
        "fingerprint": report["fingerprints"]["base"],
        "data_fingerprint": report["fingerprints"]["data"],
        "family": "sd3",
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "targets": config.lora.targets,
        "box_convention": "xyxy in [0, 1] of width and height",
        "version": __version__,
    }
    save_adapter(pipe.transformer, folder / "adapter", metadata=metadata, card=adapter_card(config, report))
    return folder / "adapter"


def adapter_card(config: Config, report: dict[str, Any]) -> str:
    """The adapter's README.md: what it is, how to load it, how it was trained, what was measured."""
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
    from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline
    pipe = LayoutStableDiffusion3Pipeline.from_pretrained("{config.base}")
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, ".")

Boxes are [left, top, right, bottom] in [0, 1] of the picture's width and height.
"""
