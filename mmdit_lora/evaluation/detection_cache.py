"""What a detector saw, kept by content, so that an evaluation that was stopped does not look twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from mmdit_lora.evaluation.detectors import Detection, Detector
from mmdit_lora.files import write_json
from mmdit_lora.json_files import read_cached, warn_damaged
from mmdit_lora.layout import Layout

_KEPT = TypeAdapter(list[list[Detection]])


class DetectionCache:
    """`folder/<key>.json`: the detections of a few images. The key is made of the detector's fingerprint, the pixels and the
    layouts: whatever of these changes is looked at again, and nothing is ever stale."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def detect(
        self, detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]
    ) -> list[list[Detection]]:
        """As `Detector.detect`."""
        path = self.folder / f"{_key(detector, images, layouts)}.json"
        if (kept := read_cached(path, list)) is not None:
            try:
                found = _KEPT.validate_python(kept)
                if len(found) == len(images):
                    return found
                warn_damaged(path, f"it is of {len(found)} images, not {len(images)}")
            except ValidationError as error:
                warn_damaged(path, error)
        seen = detector.detect(images, layouts)
        write_json(path, [[asdict(thing) for thing in things] for things in seen])
        return seen


def _key(detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> str:
    found = hashlib.sha256(detector.fingerprint().encode())
    for image, layout in zip(images, layouts, strict=True):
        found.update(repr((image.mode, image.size)).encode())
        found.update(image.tobytes())
        found.update(json.dumps(layout.to_dict(), ensure_ascii=False).encode())
    return found.hexdigest()[:32]
