"""What is in a data set and what is wrong with it, before a run is spent on it."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmdit_lora.boxes import Evidence, Reading
from mmdit_lora.data.buckets import MIN_VISIBLE, Buckets, size_counts
from mmdit_lora.data.check.boxes import box_findings, corners_of, fits, reading_findings
from mmdit_lora.data.check.findings import Example, Finding, Findings
from mmdit_lora.data.check.images import image_findings, inspect_images, leak_findings, set_findings
from mmdit_lora.data.check.sizes import size_findings
from mmdit_lora.data.check.texts import FEW_PHRASES, TokenCount, clip_tokens, few_phrases, text_findings
from mmdit_lora.data.records import COLUMNS, Record, Written, evidence_hint, set_evidence
from mmdit_lora.errors import InputError
from mmdit_lora.layout import BoxError

_PLAIN = Reading("xyxy", "relative")


@dataclass(frozen=True)
class CheckReport:
    """Plain data; `to_dict` is what `data check --json` prints and `check.json` holds.

    Args:
        records: lines that could be read. images: distinct files among them.
        image_sizes: "WIDTHxHEIGHT" -> how many images, the most frequent first.
        buckets: "WIDTHxHEIGHT" of training images -> how many, likewise; empty where there is one size, or none is known.
        boxes_per_image: number of boxes -> how many records.
        phrase_counts: phrase -> how many boxes, the most frequent first.
        tiny_boxes: boxes less than 1 % of a side wide or high.
        duplicate_records: lines that repeat an earlier one. duplicate_images: files with the bytes of another one.
        extra_columns: column that means nothing here -> in how many lines.
        left_out: what a converting reader left out, by reason.
        findings: the errors first, then the warnings, each with its examples.
        notes: no faults: the evidence for `bbox_format`, and which checks were left out, and why.
        errors, warnings: messages. An error stops a run, a warning does not.
        hint: what errors of boxes have in common: the shares under each reading, and what to declare.
    """

    records: int
    images: int
    boxes: int
    phrases: int
    image_sizes: dict[str, int]
    buckets: dict[str, int]
    boxes_per_image: dict[int, int]
    phrase_counts: dict[str, int] = field(repr=False)
    tiny_boxes: int
    undecodable_images: int
    duplicate_records: int
    duplicate_images: int
    extra_columns: dict[str, int]
    left_out: dict[str, int]
    findings: list[Finding]
    notes: list[str]
    errors: list[str]
    warnings: list[str]
    hint: str | None = None

    @property
    def ok(self) -> bool:
        return not self.errors

    def to_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in ("findings", "phrase_counts")}
        counts = dict(list(self.phrase_counts.items())[:FEW_PHRASES])
        return {"ok": self.ok, **plain, "phrase_counts": counts, "findings": [f.to_dict() for f in self.findings]}


def check_dataset(
    records: Iterable[Record],
    *,
    errors: Sequence[InputError] = (),
    left_out: dict[str, int] | None = None,
    warnings: Sequence[str] = (),
    written: Sequence[Written] | None = None,
    against: Iterable[Record] = (),
    tokens: TokenCount | None = None,
    buckets: Buckets | None = None,
    batch: int = 1,
    min_visible: float = MIN_VISIBLE,
) -> CheckReport:
    """Look at every record and decode every image once.

    Args:
        errors: what the reader could not read (`scan_dataset`).
        left_out: what it left out, by reason (`read_format`). warnings: what disagreed in the set (`read_format`).
        written: the boxes as they stand in the file (`read_written`); None = those of the records.
        against: records of another set, whose images this one must not hold.
        tokens: how texts are counted (`clip_tokens`); None = estimated.
        buckets, batch, min_visible: see `size_findings`.
    """
    records = list(records)
    images = inspect_images(records)
    boxes = [box for record in records for box in record.layout.boxes]
    lines = written
    if lines is None:  # a reader that converts: the boxes of its records, which are relative xyxy
        lines = [Written(r.location, r.image, _PLAIN, tuple(box.xyxy for box in r.layout.boxes)) for r in records]
    evidence = set_evidence(lines)
    found = Findings({"records": len(records), "images": len(images), "boxes": len(boxes)})
    _reader_findings(found, errors, len(records) + len(errors), {line.location: line for line in lines})
    image_findings(found, images)
    reading_findings(found, lines, evidence)
    extra = Counter(column for record in records for column in record.extra)
    for column, number in extra.items():
        if near := difflib.get_close_matches(column, COLUMNS, n=1, cutoff=0.8):
            found.add("misspelt-column", None, count=number, variant=column, meant=near[0])
    box_findings(found, records)
    trained = size_findings(found, records, images, buckets=buckets, batch=batch, min_visible=min_visible)
    text_findings(found, records, tokens or clip_tokens(None))
    set_findings(found, records, images)
    leak_findings(found, images, inspect_images(against))
    findings = found.result()
    wrong = [line for f in findings if f.severity == "error" for line in (f.lines or (f.message,))]
    mild = [f.message for f in findings if f.severity == "warning"]
    left = {what: count for what, count in (left_out or {}).items() if count}
    count = {f.name: f.count for f in findings}
    return CheckReport(
        records=len(records),
        images=len(images),
        boxes=len(boxes),
        phrases=len({box.phrase for box in boxes}),
        image_sizes=dict(Counter(f"{p.size[0]}x{p.size[1]}" for p in images if p.size and not p.error).most_common()),
        buckets={} if buckets is None or buckets.is_single else size_counts(list(trained.values())),
        boxes_per_image=dict(sorted(Counter(len(record.layout.boxes) for record in records).items())),
        phrase_counts=dict(Counter(box.phrase for box in boxes).most_common()),
        tiny_boxes=count.get("tiny-boxes", 0),
        undecodable_images=sum(p.error is not None for p in images),
        duplicate_records=count.get("duplicate-records", 0),
        duplicate_images=count.get("duplicate-images", 0),
        extra_columns=dict(extra),
        left_out=dict(left_out or {}),
        findings=findings,
        notes=_notes(records, evidence),
        hint=evidence_hint(evidence) if any(isinstance(error, BoxError) for error in errors) else None,
        errors=wrong,
        warnings=[*warnings, *mild, *(f"{number} {what} were left out" for what, number in left.items())],
    )


def _notes(records: Sequence[Record], evidence: Evidence | None) -> list[str]:
    notes = [evidence.line] if evidence else []
    if few_phrases(records) is None:
        notes.append(
            f"captions were not compared with phrases, nor phrases counted against one another: more than {FEW_PHRASES} distinct phrases"
        )
    return notes


# What a reader refuses, by what its message says.
_REFUSED = {
    "inverted-boxes": ("is inverted", "is empty: its"),
    "outside-boxes": ("leaves the image", "outside the image"),
    "wrong-size": ("(upright)",),
    "empty-phrases": ("the phrase is",),
    "missing-images": ("does not exist",),
    "unreadable-lines": ("",),
}


def _reader_findings(found: Findings, errors: Sequence[InputError], total: int, lines: Mapping[str, Written]) -> None:
    """What a reader refused, with the boxes that are wrong as the line declares them, where its numbers can be read."""
    for error in errors:
        name = next(name for name, parts in _REFUSED.items() if any(part in error.what for part in parts))
        location = error.location or ""
        shown, line = Example(location, error.what), lines.get(location.split(": ")[0])
        if line is not None:
            corners = corners_of(line)
            wrong = tuple(four for four in corners if not fits(four))
            shown = Example(location, error.what, line.image, wrong, tuple(four for four in corners if fits(four)))
        found.add(name, shown, line=str(error), total=total)
