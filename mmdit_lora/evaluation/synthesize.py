"""A data set for a layout stream without anybody's images: the base generates captions, a detector boxes what it generated.

The images are of the base's own kind, so a stream that learns from them leaves the base's look as it is. Others did so by hand:
LaySyn of Laytrol (arXiv 2511.07934), Qwen-Image-EliGen V2 (DiffSynth-Studio).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import TypeAdapter

from mmdit_lora.config.sampling import SamplingConfig
from mmdit_lora.data.captions import Caption
from mmdit_lora.data.records import METADATA, layout_columns
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.cache import ImageCache
from mmdit_lora.evaluation.detectors import Detection, Detector, known_layouts
from mmdit_lora.files import json_text, write_json, write_text
from mmdit_lora.json_files import read_cached
from mmdit_lora.layout import Box, Layout
from mmdit_lora.models.fingerprint import base_fingerprint
from mmdit_lora.pipelines import LayoutPipeline

PLAN, PARTS, REPORT = "synthesize.json", "parts", "report.json"
PART = 1024  # captions that one process generates and detects before it writes what came of them
_WHOLE = (0.0, 0.0, 1.0, 1.0)
MISSING, UNNAMED, NOTHING = "an object was not found", "an object that the caption does not name", "nothing was found"


@dataclass(frozen=True)
class Synthesis:
    """What came of it.

    Args:
        kept: images in the data set. boxes: of them. dropped: images left out, by reason.
        examples: for each reason, and for "kept", a few images: (file below the folder, layout).
    """

    kept: int
    boxes: int
    dropped: dict[str, int]
    examples: dict[str, list[tuple[str, Layout]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "boxes": self.boxes, "dropped": self.dropped}


@dataclass(frozen=True)
class _Entry:
    """One image. `reason` says why it is dropped, None = it is kept."""

    file: str
    layout: dict[str, Any]
    reason: str | None


_ENTRIES = TypeAdapter(list[_Entry])


def synthesize(
    pipe: LayoutPipeline,
    captions: Sequence[Caption],
    detector: Detector,
    out: Path,
    settings: SamplingConfig,
    *,
    seed: int = 0,
    min_score: float = 0.4,
    on_progress: Callable[[int], None] | None = None,
) -> Synthesis:
    """Generate every caption, and write a data set of the images with the boxes that the detector finds in them.

    A call that was stopped continues; with several processes (`accelerate launch`) each takes every so many-th part of 1,024
    captions, and the first one writes the data set when all have ended. Image number i starts from the noise of `seed + i`.

    Args:
        out: holds `images/`, `metadata.jsonl` and `report.json` afterwards.
        settings: of sampling; a layout acts nowhere.
        min_score: of the stated phrase of a caption that is found worst. An image below is dropped.

    Raises:
        InputError: `out` holds other images; the detector cannot look for a stated phrase; nothing is left.
    """
    # One process waits for all others, which may generate for days.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))
    settings = replace(settings, layout_scale=0.0)
    if unknown := sorted({p for c in captions if c.stated for p in c.phrases if not detector.knows(p)}):
        what = f"cannot look for {unknown[0]!r}" + (f" and {len(unknown) - 1} more phrases" if len(unknown) > 1 else "")
        raise InputError(what, location="--detector", hint="take another detector, or captions that it knows")
    plan = {
        "base": base_fingerprint(pipe.transformer, with_stream=False),
        "captions": [[c.text, *c.phrases] for c in captions],
        "settings": asdict(settings),
        "seed": seed,
        "detector": detector.fingerprint(),
        "min_score": min_score,
    }
    cache = ImageCache(out, plan, name=PLAN, what="synthesis")
    if state.is_main_process:
        cache.begin()
    state.wait_for_everyone()

    def report(before: int, count: int) -> None:
        if on_progress is not None:
            on_progress(before + count)

    parts, done = math.ceil(len(captions) / PART), 0
    for number in range(state.process_index, parts, state.num_processes):
        start = number * PART
        part = captions[start : start + PART]
        path = _part(out, number)
        if read_cached(path, list) is None:
            layouts = [Layout(c.text, tuple(Box(_WHOLE, phrase) for phrase in c.phrases)) for c in part]
            images = cache.generate(
                path.stem,
                pipe,
                [Layout(c.text) for c in part],
                settings,
                seed=seed + start,
                on_progress=partial(report, done),
            )
            entries = []
            for first in range(0, len(part), settings.batch_size):
                batch = slice(first, first + settings.batch_size)
                found = detector.detect(images[batch], known_layouts(detector, layouts[batch]))
                for index, (caption, detections) in enumerate(zip(part[batch], found, strict=True), first):
                    boxes, reason = boxes_of(caption, detections, detector, min_score)
                    file = f"images/{path.stem}/{index:05d}.png"
                    entries.append(_Entry(file, Layout(caption.text, tuple(boxes)).to_dict(), reason))
            write_json(path, [asdict(entry) for entry in entries])
        done += len(part)
        report(done, 0)
    state.wait_for_everyone()
    return _collect(out, parts, write=state.is_main_process)


def boxes_of(
    caption: Caption, detections: Sequence[Detection], detector: Detector, min_score: float
) -> tuple[list[Box], str | None]:
    """The boxes of one image with their phrases, and why it is doubtful; None = it is not.

    A detection takes the caption's phrase that it agrees with, one that none has taken yet before others; where none agrees its
    own label, or, of a detector that sees every object and its attributes, the image is doubtful.
    """
    boxes: list[Box] = []
    named, taken = Counter(caption.phrases), Counter[str]()
    best = dict.fromkeys(caption.phrases, 0.0)
    for found in detections:
        agreeing = [phrase for phrase in named if detector.agrees(found.label, phrase)]
        phrase = min(agreeing, key=lambda each: taken[each] >= named[each], default=found.label)
        taken[phrase] += 1
        best[phrase] = max(best.get(phrase, 0.0), found.score)
        boxes.append(Box(found.xyxy, phrase))
    if not boxes:
        return boxes, NOTHING
    if caption.stated:
        missing = named - taken if detector.attributes else [phrase for phrase in named if not taken[phrase]]
        if missing or min(best[phrase] for phrase in named) < min_score:
            return boxes, MISSING
        if detector.attributes and taken - named:
            return boxes, UNNAMED
    return boxes, None


def _collect(out: Path, parts: int, *, write: bool) -> Synthesis:
    entries = [
        entry for number in range(parts) for entry in _ENTRIES.validate_python(read_cached(_part(out, number), list))
    ]
    kept = [entry for entry in entries if entry.reason is None]
    dropped = Counter(entry.reason for entry in entries if entry.reason is not None)
    if not kept:
        reasons = ", ".join(f"{reason} ({count}x)" for reason, count in dropped.most_common())
        what = f"all {len(entries)} images are doubtful: {reasons}"
        raise InputError(
            what, location=str(out), hint="look at them in its images/; lower --min-score, or other captions"
        )
    layouts = {entry.file: Layout.from_dict(entry.layout) for entry in kept}
    if write:
        lines = ({"file_name": file} | layout_columns(layout) for file, layout in layouts.items())
        write_text(out / METADATA, "".join(json_text(line) + "\n" for line in lines))
    examples: dict[str, list[tuple[str, Layout]]] = {}
    for entry in entries:
        shown = examples.setdefault(entry.reason or "kept", [])
        if len(shown) < 16:
            shown.append((entry.file, layouts.get(entry.file) or Layout.from_dict(entry.layout)))
    boxes = sum(len(layout.boxes) for layout in layouts.values())
    result = Synthesis(len(kept), boxes, dict(dropped.most_common()), examples)
    if write:
        write_json(out / REPORT, result.to_dict())
    return result


def _part(out: Path, number: int) -> Path:
    return out / PARTS / f"{number:04d}.json"
