"""What a picture shows, and how well that is the layout that was asked for."""

from mmdit_lora.evaluate.detectors.common import Detection
from mmdit_lora.evaluate.reader import (
    Fidelity,
    detect,
    detect_all,
    measure,
    per_picture,
    readable,
    summarise,
)

__all__ = [
    "Detection",
    "Fidelity",
    "detect",
    "detect_all",
    "measure",
    "per_picture",
    "readable",
    "summarise",
]
