"""The exact reader of procedural scenes as a detector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy
from PIL import Image

from mmdit_lora.data.shapes import COLORS, SHAPES, phrase_attributes
from mmdit_lora.errors import InputError, listed
from mmdit_lora.evaluate import ink, reader
from mmdit_lora.evaluate.detectors.common import Detection, Detector, Options, digest, digest_of_files, same_number
from mmdit_lora.layout import Layout


class Shapes(Detector):
    """Reads coloured shapes on grey without a learned network (`evaluate.reader`). Knows phrases like "a red circle"."""

    name = "shapes"
    by_label = False
    attributes = True

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """As `Detector.detect`, but the largest first: all are as sure."""
        same_number(pictures, layouts)
        strange = sorted({box.phrase for layout in layouts for box in layout.boxes if not self.knows(box.phrase)})
        if strange:
            raise InputError(
                f"the exact reader does not know {listed(map(repr, strange))}",
                where=self.name,
                cure=f"it reads phrases like 'a red circle' ({', '.join(COLORS)}; {', '.join(SHAPES)}); for others take "
                "another detector",
            )
        return reader.detect_all(pictures)

    def knows(self, phrase: str) -> bool:
        return phrase_attributes(phrase) is not None

    def fingerprint(self) -> str:
        code = digest_of_files(Path(ink.__file__), Path(reader.__file__))
        return digest(self.name, code, np.__version__, scipy.__version__)


def open_shapes(target: str | None, options: Options, *, spec: str, device: str | None) -> Shapes:  # noqa: ARG001
    """Raises InputError where something is given to it: it takes nothing."""
    if target is not None:
        raise InputError(f"takes nothing, and {target!r} is given", where=spec, cure="write `shapes`")
    return Shapes()
