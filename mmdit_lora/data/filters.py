"""Which boxes of a data set are used (`data.filter`), and which of them the crop leaves; both counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from mmdit_lora.config.loading import parse_yaml
from mmdit_lora.config.schema import FilterSection
from mmdit_lora.data.buckets import Buckets, Size, record_bucket
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError, unknown_key
from mmdit_lora.layout import Box, Layout

TOO_SMALL, TOO_MANY = "below min_area", "beyond max_boxes"
NOT_INCLUDED, EXCLUDED = "not in include_phrases", "in exclude_phrases"


class Filtered(NamedTuple):
    """What a filter leaves.

    Args:
        records: with the boxes that stay, in their order. A record that had boxes and keeps none is not among them; one
            that never had any is.
        emptied: the records that are not, as they were.
        left_out: boxes left out, by the first reason that holds; those of `emptied` are among them.
        boxes: that stay; None where they are not counted.
    """

    records: Sequence[Record]
    emptied: Sequence[Record]
    left_out: dict[str, int]
    boxes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Numbers alone: {"records", "records_left_out", "boxes", "boxes_left_out": {reason: count}}."""
        return {
            "records": len(self.records),
            "records_left_out": len(self.emptied),
            "boxes": self.boxes,
            "boxes_left_out": self.left_out,
        }

    @property
    def summary(self) -> str | None:
        """One line for people; None where nothing was left out."""
        if not self.left_out:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        emptied = f"; layouts that keep no box, and are not used: {len(self.emptied)}" if self.emptied else ""
        return f"data.filter left out {sum(self.left_out.values())} boxes ({reasons}){emptied}"


def filter_records(records: Sequence[Record], rules: FilterSection, *, location: str = "data.filter") -> Filtered:
    """Leave out boxes by `rules`, with their phrases.

    Args:
        location: what the rules are called in messages.

    Raises:
        InputError: a pattern is no regular expression, or no record is left.
    """
    include = _patterns(rules.include_phrases, f"{location}.include_phrases")
    exclude = _patterns(rules.exclude_phrases, f"{location}.exclude_phrases")

    def reason(box: Box) -> str | None:
        if box.area < rules.min_area:
            return TOO_SMALL
        if include and not any(pattern.search(box.phrase) for pattern in include):
            return NOT_INCLUDED
        return EXCLUDED if any(pattern.search(box.phrase) for pattern in exclude) else None

    left_out: Counter[str] = Counter()
    kept, emptied = [], []
    for record in records:
        boxes = record.layout.boxes
        reasons = [reason(box) for box in boxes]
        passing = [index for index, why in enumerate(reasons) if why is None]
        # Of equal ones the first stay: sorting is stable.
        for index in sorted(passing, key=lambda index: -boxes[index].area)[rules.max_boxes or len(boxes) :]:
            reasons[index] = TOO_MANY
        left_out.update(why for why in reasons if why is not None)
        stay = tuple(box for box, why in zip(boxes, reasons, strict=True) if why is None)
        if boxes and not stay:
            emptied.append(record)
        else:
            layout = record.layout if len(stay) == len(boxes) else Layout(record.layout.caption, stay)
            kept.append(replace(record, layout=layout))
    if not kept:
        hint = "loosen it; `mmdit-lora data stats` shows what the set holds"
        raise InputError(f"leaves none of {len(records)} layouts a box", location=location, hint=hint)
    counts = {why: left_out[why] for why in (TOO_SMALL, NOT_INCLUDED, EXCLUDED, TOO_MANY) if left_out[why]}
    return Filtered(kept, emptied, counts, sum(len(record.layout.boxes) for record in kept))


def parse_filter(pairs: Sequence[str], *, location: str = "--filter") -> FilterSection:
    """Rules as the command line gives them: `min_area=0.01`, `include_phrases=[cell]`; values are YAML, the last one wins.

    Raises:
        InputError: no `key=value`, an unknown key, a value out of range.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip()
        if not equals:
            raise InputError(f"is {pair!r}", location=location, hint=f"write for example {location} min_area=0.01")
        if key not in FilterSection.model_fields:
            raise unknown_key(key, FilterSection.model_fields, location=location)
        value, _ = parse_yaml(text, location=f"{location} {pair!r}", numbered=False)
        lists = key.endswith("_phrases")
        values[key] = [value] if lists and isinstance(value, str) else value  # one pattern needs no brackets here
        try:
            FilterSection.model_validate(values)
        except ValidationError as error:
            meaning = FilterSection.model_fields[key].description
            message = error.errors()[0]["msg"].replace("Input should", "it should")
            raise InputError(f"{pair!r}: {message}", location=location, hint=f"give {key}: {meaning}") from None
    return FilterSection.model_validate(values)


class CropLoss(NamedTuple):
    """Boxes that a centre crop drops. `images`: layouts counted; `boxes`: theirs before the crop; `lost`: dropped by it;
    `emptied`: layouts that had boxes and lose all of them."""

    images: int
    boxes: int
    lost: int
    emptied: int

    def to_dict(self) -> dict[str, int]:
        return self._asdict()

    @property
    def summary(self) -> str | None:
        """One line for people; None where no box is lost."""
        if not self.lost:
            return None
        emptied = f"; layouts that lose all of theirs: {self.emptied}" if self.emptied else ""
        return f"a centre crop loses {self.lost} of {self.boxes} boxes (of {self.images} layouts){emptied}"


def crop_loss(records: Sequence[Record], buckets: Buckets, *, min_visible: float, most: int = 10_000) -> CropLoss:
    """What cutting images to their buckets from the middle costs; of each image only the header is read.

    A random crop loses others each time, and on average more. At most the first `most` records are counted.

    Raises:
        InputError: a file is no image, or one is too small for any bucket.
    """
    counted = records[:most]
    pairs = []  # (boxes, lost) of each layout with boxes
    for record in counted:
        if record.layout.boxes:
            width, height = record.size()
            lost = lost_boxes(record.layout, (height, width), record_bucket(record, buckets), min_visible)
            pairs.append((len(record.layout.boxes), len(lost)))
    emptied = sum(boxes == lost for boxes, lost in pairs)
    return CropLoss(len(counted), sum(boxes for boxes, _ in pairs), sum(lost for _, lost in pairs), emptied)


def lost_boxes(layout: Layout, image: Size, size: Size, min_visible: float) -> list[int]:
    """Which boxes the centre crop of an image (height, width) to `size` drops: those of which less than `min_visible` is
    left. Whole pixels, as in transforms.py."""
    scale = max(side / length for side, length in zip(size, image, strict=True))
    resized = [max(side, round(length * scale)) for side, length in zip(size, image, strict=True)]
    (north, south), (west, east) = (
        ((length - side) // 2 / length, ((length - side) // 2 + side) / length)
        for side, length in zip(size, resized, strict=True)
    )
    lost = []
    for n, box in enumerate(layout.boxes):
        left, top, right, bottom = box.xyxy
        across, down = min(right, east) - max(left, west), min(bottom, south) - max(top, north)
        if max(across, 0) * max(down, 0) < (min_visible - 1e-9) * box.area:  # exactly this share is kept
            lost.append(n)
    return lost


def _patterns(texts: Sequence[str], location: str) -> list[re.Pattern[str]]:
    patterns = []
    for text in texts:
        try:
            patterns.append(re.compile(text, re.IGNORECASE))
        except (re.error, OverflowError, RecursionError) as error:
            hint = "write a plain word, or a regular expression as Python's `re` reads it"
            raise InputError(f"holds {text!r}, no regular expression ({error})", location=location, hint=hint) from None
    return patterns
