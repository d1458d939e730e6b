"""OverLayBench: layouts whose boxes overlap. Where are the things, are the overlaps right, is each thing what it should be?

Source: github.com/mlpc-ucsd/OverLayBench, 67073aa, overlaybenchpytools/utils.py and meter.py (paper: arXiv 2509.19282).

- Boxes lie on a square of 1024 pixels and are whole numbers.
- Per category, asked boxes and found ones are paired greedily: the pair of the highest IoU first, each box once, pairs of
  IoU 0 too while both sides last. An asked box that is left is paired with [0, 0, 0, 0].
- mIoU: mean over images of the mean over asked boxes.
- O-mIoU: for each pair of `valid_overlap`, the IoU of the asked boxes' intersection with the found boxes'; mean over pairs,
  then over images.
- SR_E, SR_R: share of all instances, and of all relations, of which the judge says yes.

Each for all images and for those of each split (simple, medium, hard; the paper calls them simple, regular, complex).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from mmdit_lora.data.formats.common import Context, items_of, key_of, need, text
from mmdit_lora.data.formats.layout_sets import OVERLAY_SIDE, overlay_bench_annotation, overlay_bench_boxes
from mmdit_lora.data.formats.tables import rows, table_files
from mmdit_lora.errors import InputError, shown
from mmdit_lora.evaluation.protocols.common import (
    Case,
    PublishedProtocol,
    Question,
    Seen,
    Thing,
    checked,
    iou,
    labelled,
    layout_of,
    paired,
    raw_box,
    yes,
)
from mmdit_lora.files import write_json

SPLITS = ("simple", "medium", "hard")
Whole = tuple[int, int, int, int]  # xyxy in pixels of the square of 1024


class OverLayBench(PublishedProtocol):
    """`cywang143/OverLayBench_Eval`; the authors have Qwen2.5-VL-32B both detect and judge."""

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
        "the judge is asked for yes or no once an instance and once a relation, by the authors' rules; they ask for all of a "
        "image in one JSON answer",
        "two asked boxes that are equal keep their own pairs; the authors' code takes the first one's for both",
    )

    def read(self, path: str | Path) -> list[Case]:
        """Rows of *.parquet (or .jsonl): image_id, annotation. The split is how the file's name begins (`simple-00000-of-...`)."""
        path = Path(path)
        cases = []
        for file in table_files(Context(path), ".parquet", ".jsonl"):
            split = next((split for split in SPLITS if file.name.startswith(split)), "")
            cases += [_case(row, location, file, split) for location, row in rows([file], without=("image",))]
        counts = Counter(case.extra["image_id"] for case in cases)
        for index, case in enumerate(
            cases
        ):  # an image outside its split's folder is known by its name, where that is enough
            if counts[case.extra["image_id"]] == 1:
                cases[index] = replace(case, keys=tuple(dict.fromkeys((case.id, case.extra["image_id"]))))
        return checked(cases, path)

    def key(self, image: PurePath) -> str:
        """`split/id` of EXP/split/seed/id.png, `id` of an image elsewhere."""
        split = image.parts[-3] if len(image.parts) >= 3 else ""
        return f"{split}/{image.stem}" if split in SPLITS else image.stem

    def questions(self, case: Case, seen: Seen = Seen()) -> list[Question]:  # noqa: ARG002, B008
        """One an instance and one a relation, about the whole image, by the rules of the authors' prompts."""
        out = []
        boxes = {thing.key: list(_whole(thing.xyxy, truncate=True)) for thing in case.things}
        for thing in case.things:
            asked = (
                f"Here are an instance's name, its bounding box [x1, y1, x2, y2] on an image of {OVERLAY_SIDE} x "
                f'{OVERLAY_SIDE} pixels and its description: "{thing.key}", {boxes[thing.key]}, "{thing.detail}". Does the '
                "instance visually match its description? If it is clearly generated and not corrupted, and the key "
                "attributes of the description are present, answer Yes. If it is missing, corrupted, or the key attributes "
                "are not present, answer No. Strictly answer Yes or No."
            )
            out.append(Question(f"entity: {thing.key}", asked))
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

    def score(self, cases: Sequence[Case], seen: Sequence[Seen]) -> dict[str, float]:
        """mIoU and O-mIoU where a detector looked, SR_E and SR_R where a judge was asked; of all images and by split."""
        pairs = paired(cases, seen)
        out = _scores(pairs)
        for split in SPLITS:
            of_split = [pair for pair in pairs if pair[0].extra["split"] == split]
            out |= {self.parts[split].format(key): value for key, value in _scores(of_split).items()}
        return out

    def write_results(self, cases: Sequence[Case], seen: Sequence[Seen], out: str | Path) -> list[Path]:
        """baseline_bbox_predictions.json, entity_VQA.json and relation_VQA.json as meter.py writes them, in `split/seed/`.

        Seeds are the folders that the images lay in; images that lay in none have none.
        """
        folders: dict[Path, dict[str, dict[str, Any]]] = {}
        for case, one in paired(cases, seen):
            split, parts = case.extra["split"], PurePath(one.image).parts
            seed = parts[-2] if len(parts) > 1 else ""
            files = folders.setdefault(Path(out) / split / seed, {})
            image_id = case.extra["image_id"]
            if one.detections is not None:
                found = {
                    label: [list(b) for b in _found(one, label)] for label in sorted({t.label for t in case.things})
                }
                files.setdefault("baseline_bbox_predictions.json", {})[image_id] = found
            if one.answers is not None:
                entities = {t.key: _word(yes(one, f"entity: {t.key}")) for t in case.things}
                relations = {pair: _word(yes(one, f"relation: {pair}")) for pair in case.extra["relations"]}
                files.setdefault("entity_VQA.json", {})[image_id] = entities
                files.setdefault("relation_VQA.json", {})[image_id] = relations
        written = []
        for folder, files in folders.items():
            for name, content in files.items():
                write_json(folder / name, content)
                written.append(folder / name)
        return written


def _word(answer: bool) -> str:
    return "Yes" if answer else "No"


def _scores(pairs: Sequence[tuple[Case, Seen]]) -> dict[str, float]:
    out: dict[str, float] = {}
    looked = [pair for pair in pairs if pair[1].detections is not None]
    if looked:
        matched = [(case, _matched(case, seen)) for case, seen in looked]
        means = [sum(iou(_asked(t), found[t.key]) for t in case.things) / len(case.things) for case, found in matched]
        out["miou"] = sum(means) / len(means)
        overlaps = [_overlap(case, found) for case, found in matched if case.extra["overlaps"]]
        if overlaps:
            out["o_miou"] = sum(overlaps) / len(overlaps)
    asked = [pair for pair in pairs if pair[1].answers is not None]
    for key, kind in (("sr_e", "entity"), ("sr_r", "relation")):
        answers = [
            yes(seen, f"{kind}: {name}")
            for case, seen in asked
            for name in ([t.key for t in case.things] if kind == "entity" else case.extra["relations"])
        ]
        if answers:
            out[key] = sum(answers) / len(answers)
    return out


def _whole(xyxy: Sequence[float], *, truncate: bool) -> Whole:
    """A relative box in whole pixels of the square. The authors cut asked boxes; found ones are the detector's, rounded."""
    x0, y0, x1, y1 = (int(v * OVERLAY_SIDE) if truncate else round(v * OVERLAY_SIDE) for v in xyxy)
    return x0, y0, x1, y1


def _asked(thing: Thing) -> Whole:
    return _whole(thing.xyxy, truncate=True)


def _found(seen: Seen, label: str) -> list[Whole]:
    return [_whole(one.xyxy, truncate=False) for one in labelled(seen, label)]


def _matched(case: Case, seen: Seen) -> dict[str, Whole]:
    """Key of a thing -> the found box that is paired with it."""
    out = {thing.key: (0, 0, 0, 0) for thing in case.things}
    for label in dict.fromkeys(thing.label for thing in case.things):
        things, found = [thing for thing in case.things if thing.label == label], _found(seen, label)
        table = [(iou(_asked(t), b), i, j) for i, t in enumerate(things) for j, b in enumerate(found)]
        things_left, found_left = set(range(len(things))), set(range(len(found)))
        for _, i, j in sorted(table, key=lambda entry: -entry[0]):  # stable: of equals the first asked, the first found
            if i in things_left and j in found_left:
                out[things[i].key] = found[j]
                things_left.remove(i)
                found_left.remove(j)
    return out


def _overlap(case: Case, found: Mapping[str, Whole]) -> float:
    values = []
    for one, other in case.extra["overlaps"]:
        a, b = case.things[one], case.things[other]
        values.append(iou(_intersection(_asked(a), _asked(b)), _intersection(found[a.key], found[b.key])))
    return sum(values) / len(values)


def _intersection(a: Whole, b: Whole) -> Whole:
    """Of boxes that do not meet it is inverted, and `iou` with it is 0."""
    return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])


def _case(row: Any, location: str, path: Path, split: str) -> Case:
    if isinstance(row, InputError):
        raise row
    annotation = overlay_bench_annotation(row, location)
    size = (OVERLAY_SIDE, OVERLAY_SIDE)
    things = []
    for name, said in overlay_bench_boxes(annotation, location).items():
        label, detail = text(said.short, "category", said.location), said.phrase(True)
        things.append(Thing(raw_box(said, path, "pixel", size), label, detail, detail, name))
    relations = annotation.get("relations") or {}
    if not isinstance(relations, Mapping):
        raise InputError(f"relations is {type(relations).__name__}, not an object", location=location)
    overlaps = []
    for index, entry in enumerate(items_of(annotation, "valid_overlap", f"{location}: annotation")):
        place = f"{location}: valid_overlap[{index}]"
        pair = need(entry, "overlap_box", place)
        if not isinstance(pair, list | tuple) or len(pair) < 2 or not all(_place(v, things) for v in pair[:2]):
            raise InputError(f"overlap_box is {shown(pair)}, not two places among {len(things)} boxes", location=place)
        overlaps.append((pair[0], pair[1]))
    image_id = str(key_of(row, "image_id", location))
    extra = {
        "split": split,
        "image_id": image_id,
        "relations": {str(pair): relation for pair, relation in relations.items()},
        "overlaps": tuple(overlaps),
    }
    caption = text(need(annotation, "caption", location), "caption", location)
    id_ = f"{split}/{image_id}" if split else image_id
    names = (f"{split}/SEED/{image_id}.png", f"{image_id}.png") if split else (f"{image_id}.png",)
    return Case(id_, layout_of(caption, things, location), size, tuple(things), names, (id_,), location, extra)


def _place(value: object, things: Sequence[Thing]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(things)
