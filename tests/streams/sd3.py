"""A small SD3."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.tiny import SD3_CONFIG, tiny_pipeline

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 8}
CHECKPOINTS = ("sd3-medium", "sd3.5-large")


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(**SD3_CONFIG).eval()


def pipeline(transformer: Any) -> StableDiffusion3Pipeline:
    with tempfile.TemporaryDirectory() as folder:  # of the tokenizer's files, which are read
        parts = {name: part for name, part in tiny_pipeline(Path(folder)).components.items() if name != "transformer"}
    return StableDiffusion3Pipeline(**parts, transformer=transformer)
