"""What an image shows, and how well that is the layout that was asked for."""

from mmdit_lora.evaluation.detectors.common import Detection
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
