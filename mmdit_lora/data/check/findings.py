"""What a check found: plain data that the table, `check.json` and `check.html` are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmdit_lora.data.records import Record

Severity = Literal["error", "warning"]
Corners = tuple[float, float, float, float]

_DRAWN = 300  # boxes of one image: of more nothing is seen
EXAMPLES_KEPT = 12  # of one finding: what a page can show and a person looks at


@dataclass(frozen=True)
class Example:
    """One place where something was found.

    Args:
        location: `file:line` of the record.
        text: what is wrong there.
        image: the image, to be drawn; None where there is none to see.
        at_fault, others: boxes, xyxy in [0, 1] (at fault perhaps beyond), drawn strongly and faintly.
        record: whose image it is, where that is no file of its own.
    """

    location: str
    text: str
    image: Path | None = None
    at_fault: tuple[Corners, ...] = ()
    others: tuple[Corners, ...] = ()
    record: Record | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        image = None if self.image is None else str(self.image)
        return {
            "where": self.location,
            "text": self.text,
            "image": image,
            "boxes": [list(box) for box in self.at_fault],
        }


@dataclass(frozen=True)
class Finding:
    """One kind of fault, and where it is.

    Args:
        name: its stable name, e.g. "tiny-boxes".
        severity: an error stops a run, a warning does not.
        message: one sentence with the figures in it.
        cure: how to mend it.
        count, total: how many of how many `unit`.
        examples: the worst first, at most `EXAMPLES_KEPT`.
        places: `file:line` of every place, not of the examples alone.
        lines: full messages, one a fault, for errors that are reported singly.
    """

    name: str
    severity: Severity
    message: str
    hint: str
    count: int
    total: int
    unit: str
    examples: tuple[Example, ...] = ()
    places: tuple[str, ...] = field(default=(), repr=False)
    lines: tuple[str, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "severity": self.severity,
            "count": self.count,
            "total": self.total,
            "unit": self.unit,
            "message": self.message,
            "cure": self.hint,
            "examples": [example.to_dict() for example in self.examples],
            "places": list(self.places),
        }


def example(record: Record, text: str, boxes: Sequence[int] = ()) -> Example:
    """An example of a record, the boxes of these indices at fault."""
    every, chosen = record.layout.boxes, set(boxes)
    return Example(
        location=record.location,
        text=text,
        image=record.image,
        record=record,
        at_fault=tuple(every[n].xyxy for n in boxes[:_DRAWN]),
        others=tuple(box.xyxy for n, box in enumerate(every[:_DRAWN]) if n not in chosen),
    )


def finding(
    name: str,
    message: str,
    hint: str,
    examples: Iterable[Example],
    *,
    total: int,
    unit: str,
    count: int | None = None,
    severity: Severity = "warning",
    lines: Iterable[str] = (),
) -> list[Finding]:
    """A list of one finding, or of none where there is no example and no count. `{n}` and `{total}` are filled in."""
    found = list(examples)
    number = len(found) if count is None else count
    if not number:
        return []
    text = message.replace("{n}", str(number)).replace("{total}", str(total))
    kept = tuple(found[:EXAMPLES_KEPT])
    places = tuple(dict.fromkeys(one.location for one in found))
    return [Finding(name, severity, text, hint, number, total, unit, kept, places, tuple(lines))]
