"""OverLayBench: layouts whose boxes overlap. Where are the objects, are the overlaps right, is each what it should be?

Source: github.com/mlpc-ucsd/OverLayBench, 67073aa, overlaybenchpytools/utils.py and meter.py (paper: arXiv 2509.19282).

- Boxes lie on a square of 1024 pixels and are integers.
- Per category, the layout's boxes and the detected ones are paired greedily: the pair of the highest IoU first, each box
  once, pairs of IoU 0 too while both sides last. A box of the layout that is left is paired with [0, 0, 0, 0].
- mIoU: mean over images of the mean over the layout's boxes.
- O-mIoU: for each pair of `valid_overlap`, the IoU of the layout boxes' intersection with that of the detected ones; mean
  over pairs, then over images.
- SR_E, SR_R: share of all instances, and of all relations, for which the judge says yes.

Each for all images and for those of each split (simple, medium, hard; the paper calls them simple, regular, complex).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from mmdit_lora.boxes import box_iou
from mmdit_lora.data.formats.common import Context, items_of, key_of, need, need_text, text
from mmdit_lora.data.formats.layout_sets import OVERLAY_SIDE, overlay_bench_annotation, overlay_bench_boxes
from mmdit_lora.data.formats.tables import table_files
from mmdit_lora.errors import InputError, shown
from mmdit_lora.evaluation.protocols.base import (
    Case,
    Observation,
    Pairs,
    PublishedProtocol,
    Question,
    Region,
    raw_box,
    table_rows,
)
from mmdit_lora.files import write_json

SPLITS = ("simple", "medium", "hard")
Pixels = tuple[int, int, int, int]  # xyxy on the square of 1024


class OverLayBench(PublishedProtocol):
    """`cywang143/OverLayBench_Eval`; the authors have Qwen2.5-VL-32B both detect and judge.

    Its files are *.parquet (or .jsonl): image_id, annotation. The split begins the file's name (`simple-00000-of-...`).
    """

    name = "overlaybench"
    title = "OverLayBench"
    source = "github.com/mlpc-ucsd/OverLayBench 67073aa, overlaybenchpytools; arXiv 2509.19282"
    metrics = {  # noqa: RUF012
        "miou": "mean over images of the mean IoU of asked boxes with the found ones of their category, paired greedily",
        "o_miou": "the same for the intersections of the pairs that the set lists as overlapping",
        "sr_e": "share of instances that are as described, by the judge",
        "sr_r": "share of relations that are as described, by the judge",
    }
    parts = {split: f"{split}_{{}}" for split in SPLITS}  # noqa: RUF012
    detector = "optional"
    judge = "optional"
    several = True
    deviations = (
        "the authors have Qwen2.5-VL-32B list the boxes of each category; here any detector does",
        "the judge is asked for yes or no once an instance and once a relation, by the authors' rules; they ask for all of an "
        "image in one JSON answer",
        "two asked boxes that are equal keep their own pairs; the authors' code takes the first one's for both",
    )

    def _cases(self, path: Path) -> list[Case]:
        cases = []
        for file in table_files(Context(path), ".parquet", ".jsonl"):
            split = next((split for split in SPLITS if file.name.startswith(split)), "")
            cases += [_case(row, location, file, split) for location, row in table_rows(file)]
        # An image outside its split's folder is known by its id, if that is unique.
        counts = Counter(case.extra["image_id"] for case in cases)
        unique = [image_id for image_id, count in counts.items() if count == 1]
        return [
            replace(case, keys=tuple(dict.fromkeys((case.id, image_id)))) if image_id in unique else case
            for case in cases
            for image_id in [case.extra["image_id"]]
        ]

    def key(self, image: PurePath) -> str:
        """`split/id` of EXP/split/seed/id.png, `id` of an image elsewhere."""
        split = image.parts[-3] if len(image.parts) >= 3 else ""
        return f"{split}/{image.stem}" if split in SPLITS else image.stem

    def questions(self, case: Case, observation: Observation = Observation()) -> list[Question]:  # noqa: ARG002, B008
        """One per instance and one per relation, about the whole image, by the rules of the authors' prompts."""
        out = []
        boxes = {region.key: list(_asked(region)) for region in case.regions}
        for region in case.regions:
            asked = (
                f"Here are an instance's name, its bounding box [x1, y1, x2, y2] on an image of {OVERLAY_SIDE} x "
                f'{OVERLAY_SIDE} pixels and its description: "{region.key}", {boxes[region.key]}, "{region.detail}". Does the '
                "instance visually match its description? If it is clearly generated and not corrupted, and the key "
                "attributes of the description are present, answer Yes. If it is missing, corrupted, or the key attributes "
                "are not present, answer No. Strictly answer Yes or No."
            )
            out.append(Question(f"entity: {region.key}", asked))
        for pair, relation in case.extra["relations"].items():
            asked = (
                f"Here are the instances of an image with their bounding boxes [x1, y1, x2, y2] on {OVERLAY_SIDE} x "
                f'{OVERLAY_SIDE} pixels: {boxes}. Does the relationship of {pair} match the description "{relation}"? For '
                "proximity (near, beside, close to, next to), it matches if both are generated well (not corrupted or fused "
                "into one) and their boxes are close. For directions and positions (behind, in front of), check strictly "
                "that the arrangement in the image matches, because boxes alone are not enough. How well the boxes are "
                "aligned does not matter. Strictly answer Yes or No."
            )
            out.append(Question(f"relation: {pair}", asked))
        return out

    def _score(self, pairs: Pairs) -> dict[str, float]:
        out = _scores(pairs)
        for split, form in self.parts.items():
            of_split = [pair for pair in pairs if pair[0].extra["split"] == split]
            out |= {form.format(key): value for key, value in _scores(of_split).items()}
        return out

    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """baseline_bbox_predictions.json, entity_VQA.json and relation_VQA.json as meter.py writes them, in `split/seed/`.

        Seeds are the folders of the images; images without a folder have none.
        """
        files: dict[Path, dict[str, Any]] = {}
        for case, seen in zip(cases, observations, strict=True):
            folders, image_id = PurePath(seen.image).parts[:-1], case.extra["image_id"]
            folder = Path(out) / case.extra["split"] / (folders[-1] if folders else "")
            if seen.detections is not None:
                labels = sorted({region.label for region in case.regions})
                found = {label: [list(box) for box in _found(seen, label)] for label in labels}
                files.setdefault(folder / "baseline_bbox_predictions.json", {})[image_id] = found
            if seen.answers is not None:
                for kind, names in _asked_about(case).items():
                    answers = {name: "Yes" if seen.yes(f"{kind}: {name}") else "No" for name in names}
                    files.setdefault(folder / f"{kind}_VQA.json", {})[image_id] = answers
        for file, content in files.items():
            write_json(file, content)
        return list(files)


def _asked_about(case: Case) -> dict[str, list[str]]:
    return {"entity": [region.key for region in case.regions], "relation": list(case.extra["relations"])}


def _scores(pairs: Pairs) -> dict[str, float]:
    ious, overlaps = [], []
    answers: dict[str, list[bool]] = {"entity": [], "relation": []}
    for case, seen in pairs:
        if seen.detections is not None:
            found = _paired_boxes(case, seen)
            ious.append(_mean([_iou(_asked(region), found[region.key]) for region in case.regions]))
            if case.extra["overlaps"]:
                both = [(case.regions[one], case.regions[other]) for one, other in case.extra["overlaps"]]
                overlaps.append(
                    _mean(
                        [
                            _iou(_intersection(_asked(a), _asked(b)), _intersection(found[a.key], found[b.key]))
                            for a, b in both
                        ]
                    )
                )
        if seen.answers is not None:
            for kind, names in _asked_about(case).items():
                answers[kind] += [seen.yes(f"{kind}: {name}") for name in names]
    values: dict[str, Sequence[float]] = {
        "miou": ious,
        "o_miou": overlaps,
        "sr_e": answers["entity"],
        "sr_r": answers["relation"],
    }
    return {key: _mean(each) for key, each in values.items() if each}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _asked(region: Region) -> Pixels:
    x0, y0, x1, y1 = (int(v * OVERLAY_SIDE) for v in region.xyxy)  # the authors truncate these
    return x0, y0, x1, y1


def _found(seen: Observation, label: str) -> list[Pixels]:
    boxes = [[round(v * OVERLAY_SIDE) for v in detection.xyxy] for detection in seen.labelled(label)]
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]


def _paired_boxes(case: Case, seen: Observation) -> dict[str, Pixels]:
    """Key of a region -> the detected box that is paired with it."""
    out: dict[str, Pixels] = {region.key: (0, 0, 0, 0) for region in case.regions}
    for label in dict.fromkeys(region.label for region in case.regions):
        regions, found = [region for region in case.regions if region.label == label], _found(seen, label)
        iou = box_iou([_asked(region) for region in regions], found)
        for _ in range(min(iou.shape)):
            i, j = np.unravel_index(iou.argmax(), iou.shape)  # of equals the first region, then the first detection
            out[regions[int(i)].key] = found[int(j)]
            iou[i, :] = iou[:, j] = -1
    return out


def _iou(a: Pixels, b: Pixels) -> float:
    return float(box_iou([a], [b])[0, 0])


def _intersection(a: Pixels, b: Pixels) -> Pixels:
    """Of boxes that do not meet it is inverted, and `_iou` with it is 0."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _case(row: Any, location: str, path: Path, split: str) -> Case:
    annotation = overlay_bench_annotation(row, location)
    size = (OVERLAY_SIDE, OVERLAY_SIDE)
    regions = []
    for name, said in overlay_bench_boxes(annotation, location).items():
        label, detail = text(said.short, "category", said.location), said.phrase(True)
        regions.append(Region(raw_box(said, path, "pixel", size), label, detail, detail, name))
    relations = annotation.get("relations") or {}
    if not isinstance(relations, Mapping):
        raise InputError(f"relations is {type(relations).__name__}, not an object", location=location)
    overlaps = []
    for index, entry in enumerate(items_of(annotation, "valid_overlap", f"{location}: annotation")):
        place = f"{location}: valid_overlap[{index}]"
        pair = need(entry, "overlap_box", place)
        if not isinstance(pair, list | tuple) or len(pair) < 2 or not all(_is_index(v, len(regions)) for v in pair[:2]):
            what = f"overlap_box is {shown(pair)}, not two places among {len(regions)} boxes"
            raise InputError(what, location=place)
        overlaps.append((pair[0], pair[1]))
    image_id = str(key_of(row, "image_id", location))
    extra = {
        "split": split,
        "image_id": image_id,
        "relations": {str(pair): relation for pair, relation in relations.items()},
        "overlaps": overlaps,
    }
    id_ = f"{split}/{image_id}" if split else image_id
    names = (f"{split}/SEED/{image_id}.png", f"{image_id}.png") if split else (f"{image_id}.png",)
    caption = need_text(annotation, "caption", location)
    return Case(id_, caption, size, tuple(regions), names, (id_,), location, extra)


def _is_index(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
