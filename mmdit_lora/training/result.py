"""What a run leaves behind: the adapter with its card, or the trained base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdit_lora import __version__
from mmdit_lora.config.loading import Config
from mmdit_lora.files import public_name
from mmdit_lora.lora import describe_lora, save_adapter
from mmdit_lora.models.generic_stream import StreamModel
from mmdit_lora.models.stream_files import save_layout_stream
from mmdit_lora.outputs import new_folder
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline, quiet
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.load_base import stored_dtype, stream_options
from mmdit_lora.training.model_card import IMAGES, adapter_card
from mmdit_lora.training.run_dir import SAMPLES, VERB
from mmdit_lora.training.trainable import lora_config


def save_result(
    pipe: LayoutPipeline,
    config: Config,
    report: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    *,
    fold: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> Path:
    """Write `<output_dir>/adapter` (method lora), `<output_dir>/stream` (layout_stream, where the stream is a generic one) or
    `<output_dir>/base` (the others), all or nothing; returns it.

    Args:
        weights: of the trainable parameters, by name, where the model has only a part of each.
        fold: of a `FoldedMethod`.
    """
    folder = Path(config.output_dir)
    if config.method != "lora" and isinstance(pipe.transformer, StreamModel):
        save_layout_stream(
            pipe.transformer,
            folder / "stream",
            base=config.base,
            base_fingerprint=pipe.stock_fingerprint,
            weights=weights,
            verb=VERB,
        )
        return folder / "stream"
    if config.method != "lora":
        folded = fold(pipe.transformer) if fold is not None else None
        with new_folder(folder / "base", verb=VERB) as temporary, quiet():
            whole_base(pipe, config, folded).save_pretrained(temporary)
        return folder / "base"
    metadata = {
        "base": config.base,
        "fingerprint": report["fingerprints"]["base"],
        "data_fingerprint": report["fingerprints"]["data"],
        **({"start": start} if (start := report["start"]) is not None else {}),
        "family": pipe.transformer.family,
        **({} if config.stream_weights is None else {"stream": public_name(config.stream_weights)}),
        "lora": describe_lora(lora_config(config.lora), lora_plus=config.train.lora_plus),
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "targets": config.lora.targets,
        "box_convention": "xyxy in [0, 1] of width and height",
        "quantization": config.train.quantization,
        "version": __version__,
    }
    sheets = sorted((folder / SAMPLES).glob("step_*.png"))
    card = adapter_card(config, report, type(pipe).__name__, images=bool(sheets))
    beside = {IMAGES: sheets[-1].read_bytes()} if sheets else {}
    save_adapter(
        pipe.transformer,
        folder / "adapter",
        metadata=metadata,
        card=card,
        beside=beside,
        weights=weights,
        verb=VERB,
    )
    return folder / "adapter"


def whole_base(pipe: LayoutPipeline, config: Config, folded: Mapping[str, Tensor] | None = None) -> LayoutPipeline:
    """The pipeline to save: what was trained, and beside it the base as it is stored, neither rounded nor quantised.

    Args:
        folded: weights that training changed without training them themselves, by name.
    """
    if config.train.mixed_precision == "no" and config.train.quantization == "none":
        return pipe
    fresh = load_pipeline(config.base, dtype=stored_dtype(config.base), **stream_options(config))
    own = dict(fresh.transformer.named_parameters())
    with torch.no_grad():
        for name, value in (folded or trainable_parameters(pipe.transformer)).items():
            own[name].copy_(value)
    return fresh
