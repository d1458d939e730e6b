"""Detect objects in images, and measure how well they obey layouts."""

from mmdit_lora.evaluation.detectors.base import Detection
from mmdit_lora.evaluation.detectors.shapes import (
    Fidelity,
    detect,
    detect_all,
    measure,
    per_image,
    readable,
    summarise,
)

__all__ = [
    "Detection",
    "Fidelity",
    "detect",
    "detect_all",
    "measure",
    "per_image",
    "readable",
    "summarise",
]
