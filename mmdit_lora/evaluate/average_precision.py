"""COCO's average precision and recall, by pycocotools (cocodataset.org, "Detection Evaluation")."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100")


def coco_figures(
    images: Sequence[dict[str, Any]],
    categories: Sequence[dict[str, Any]],
    truth: Sequence[dict[str, Any]],
    found: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """COCO's figures by name, without those that no thing decides (e.g. `ap_small` without small things).

    Args:
        images, categories: as in COCO's files. truth, found: `image_id`, `category_id`, `bbox` (xywh in pixels), `area`; the
            found also `score`. Numbers of annotations are given here.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    sides: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        for entries in (truth, found):
            sides.append(COCO())
            # pycocotools takes an id of 0 for none, and its own `loadRes` takes no empty list.
            numbered = [entry | {"id": n, "iscrowd": 0} for n, entry in enumerate(entries, start=1)]
            sides[-1].dataset = {"images": list(images), "categories": list(categories), "annotations": numbered}
            sides[-1].createIndex()
        run = COCOeval(*sides, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return {name: float(value) for name, value in zip(NAMES, run.stats, strict=False) if value >= 0}
