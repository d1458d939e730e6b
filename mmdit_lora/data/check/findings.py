"""What a check finds: each kind of fault stated once, the places where it was found, and plain data for table and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mmdit_lora.boxes import BBOX_UNITS, EDGE_RULE, Four
from mmdit_lora.data.images import MAX_PIXELS
from mmdit_lora.data.records import Record

Severity = Literal["error", "warning"]

TINY = 0.01  # of the image's side
SAME_IOU = 0.95
EXAMPLES_KEPT = 12  # of one finding: what a page can show and a person looks at
_DRAWN = 300  # boxes of one image: of more nothing is seen


class Kind(NamedTuple):
    """One kind of fault. An error stops a run. `{n}`, `{total}`, `{places}` and the values of `Findings.add` are filled in."""

    severity: Severity
    unit: str
    message: str
    hint: str


_E: Literal["error"] = "error"
_W: Literal["warning"] = "warning"
_BACKGROUND = "put them on the background that you want to be learnt"
_LEAK = "remove them from one of the two: a figure of the held-out set would measure what was learnt by heart"
KINDS: dict[str, Kind] = {
    # what a reader refuses
    "inverted-boxes": Kind(
        _E, "records", "{n} lines hold an inverted or empty box", "check the order of the four numbers"
    ),
    "outside-boxes": Kind(
        *(_E, "records", "{n} lines hold a box outside its image"),
        f"correct it, or declare its units: bbox_units is one of {', '.join(BBOX_UNITS)} ({EDGE_RULE})",
    ),
    "wrong-size": Kind(
        _E, "records", "{n} annotations declare another size than their image has", "annotate it as it is"
    ),
    "empty-phrases": Kind(_E, "records", "{n} lines hold an empty phrase", "give each box a phrase"),
    "missing-images": Kind(_E, "records", "{n} lines name an image that does not exist", "restore it, or remove them"),
    "unreadable-lines": Kind(
        _E, "records", "{n} lines cannot be read", "correct them as the messages say, or remove them"
    ),
    # image files
    "empty-file": Kind(_E, "images", "{n} image files hold 0 bytes", "restore them, or leave their lines out"),
    "decompression-bomb": Kind(
        *(_E, "images"),
        f"{{n}} images declare more than {MAX_PIXELS // 10**6} million pixels, which is not safe to decode",
        "scale them down, or leave their lines out: nothing was decoded",
    ),
    "undecodable": Kind(_E, "images", "{n} images cannot be decoded", "restore the files, or leave their lines out"),
    "exif-rotation": Kind(
        *(_W, "images", "{n} images are stored turned (EXIF orientation)"),
        "they are turned upright here: check on the images below that the boxes were drawn on upright ones",
    ),
    "cmyk": Kind(
        *(_W, "images", "{n} images are CMYK: converted without a colour profile, colours shift"),
        "convert them to sRGB with their profile",
    ),
    "palette-transparency": Kind(
        _W, "images", "{n} images have a palette with transparency: what is transparent becomes white", _BACKGROUND
    ),
    "transparency": Kind(_W, "images", "{n} images are transparent: what is transparent becomes white", _BACKGROUND),
    "16-bit": Kind(
        *(_W, "images", "{n} images have more than 8 bits a channel: scaled to 8"),
        "check on the images below that they are not dark or clipped",
    ),
    "animated": Kind(
        *(_W, "images", "{n} images are animated: only the first frame is used"),
        "save the frame that the boxes were drawn on",
    ),
    # how boxes are written
    "box-format": Kind(_W, "boxes", "{what} ({evidence})", "look at the boxes below; {declare}"),
    "declared-size": Kind(
        *(_W, "records", "{n} lines declare another size than their image has"),
        "check that each line belongs to its image, and to this size of it: boxes in pixels would be wrong",
    ),
    "misspelt-column": Kind(_W, "records", "the column {variant!r} is ignored: did you mean {meant!r}?", "rename it"),
    # boxes
    "tiny-boxes": Kind(
        *(_W, "boxes", "{n} of {total} boxes are less than 1 % of the image wide or high"),
        "remove them: they are smaller than what the model can draw",
    ),
    "duplicate-boxes": Kind(
        _W, "boxes", "{n} boxes repeat another one of their image, phrase and all", "remove the second"
    ),
    "near-identical-boxes": Kind(
        *(_W, "boxes", f"{{n}} pairs of boxes with the same phrase overlap by more than {SAME_IOU:g} (IoU)"),
        "keep one of each pair: a thing was probably boxed twice",
    ),
    "same-box-other-phrase": Kind(
        *(_W, "boxes", f"{{n}} pairs of boxes with different phrases overlap by more than {SAME_IOU:g} (IoU)"),
        "keep the right phrase: one thing was probably named twice",
    ),
    "no-boxes": Kind(
        *(_W, "records", "{n} records have no box: the layout stream learns nothing there"),
        "box them, or leave them out",
    ),
    # sizes in training
    "no-bucket": Kind(
        *(_E, "images", "{n} images are smaller than an image token, and fit no bucket"),
        "leave them out, or set data.buckets.upscale: true",
    ),
    "small-images": Kind(
        *(_W, "images"),
        "{n} of {total} images are smaller than the size they are trained at and are scaled up, which blurs them",
        "leave them out, train at {fitting} pixels, or use data.buckets, which enlarge none",
    ),
    "below-buckets": Kind(
        *(_W, "images"),
        "{n} of {total} images are smaller than every bucket of their shape and get a smaller size of their own",
        "add a lower data.buckets.resolutions for them, or leave them out",
    ),
    "sparse-buckets": Kind(
        *(_W, "buckets"),
        "{n} of {total} buckets hold fewer records than a batch of {batch}: their batches repeat images",
        "fewer data.buckets.ratios or resolutions, or a smaller batch",
    ),
    "cropped-boxes": Kind(
        *(_W, "boxes", "{n} of {total} boxes, in {places} records, are lost to the {crop} crop"),
        "they are dropped with their phrase where less than {visible:.0%} is left; captions still name them. {advice}",
    ),
    # texts
    "empty-captions": Kind(
        *(_W, "records", "{n} records have an empty caption"),
        "write one: the text stream has nothing to go by",
    ),
    "long-captions": Kind(
        *(_W, "records", "{n} captions are {beyond}"),
        "shorten them, or put what matters first (a base with T5 still reads the rest there)",
    ),
    "long-phrases": Kind(_W, "boxes", "{n} phrases are {beyond}", "shorten them: a phrase is what one box shows"),
    "caption-without-box": Kind(
        _W, "records", "{n} captions name what no box shows", "box it, or take it out of the caption"
    ),
    "box-without-caption": Kind(
        *(_W, "boxes", "{n} boxes, in {places} records, show what the caption leaves out, though it names others"),
        "name all of them, or none",
    ),
    "label-imbalance": Kind(
        *(_W, "boxes", "{many} boxes say {most!r}, {few} say {least!r}: {times:.1f} times as many"),
        "add images of the rare ones, or repeat their lines",
    ),
    # the set as a whole, and another one
    "duplicate-records": Kind(
        *(_W, "records", "{n} records repeat an earlier one, image and layout"),
        "remove them: a repeated line counts more in training",
    ),
    "duplicate-images": Kind(
        *(_W, "images", "{n} images have the same bytes as another one"),
        "keep one file, with all of its boxes",
    ),
    "near-duplicate-images": Kind(
        *(_W, "images", "{n} images look the same as another one (perceptual hash, compared at 16 x 16)"),
        "keep one of each: the same image, scaled or saved again, counts more in training",
    ),
    "leakage": Kind(_E, "images", "{n} of {total} images are in the other set too, byte for byte", _LEAK),
    "near-leakage": Kind(_W, "images", "{n} of {total} images look the same as one of the other set", _LEAK),
}


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
    at_fault: tuple[Four, ...] = ()
    others: tuple[Four, ...] = ()
    record: Record | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, record: Record, text: str, boxes: Sequence[int] = ()) -> Example:
        """An example of a record, the boxes of these indices at fault."""
        every, chosen = record.layout.boxes, set(boxes)
        others = tuple(box.xyxy for n, box in enumerate(every[:_DRAWN]) if n not in chosen)
        return cls(record.location, text, record.image, tuple(every[n].xyxy for n in boxes[:_DRAWN]), others, record)

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
        name: key of `KINDS`. message: one sentence with the figures in it. hint: what to do about it.
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
        plain = asdict(self) | {"cure": self.hint, "places": list(self.places)}
        plain["examples"] = [example.to_dict() for example in self.examples]
        return {
            key: plain[key]
            for key in ("name", "severity", "count", "total", "unit", "message", "cure", "examples", "places")
        }


class _Places:
    def __init__(self) -> None:
        self.count = 0
        self.examples: list[tuple[float, Example]] = []
        self.lines: list[str] = []
        self.values: dict[str, Any] = {}


class Findings:
    """Collects places by kind. `totals`: unit -> how many there are in all."""

    def __init__(self, totals: Mapping[str, int]) -> None:
        self.totals = totals
        self._found: dict[tuple[str, str], _Places] = {}

    def add(
        self,
        name: str,
        at: Record | Example | None,
        text: str = "",
        boxes: Sequence[int] = (),
        *,
        count: int = 1,
        rank: float = 0,
        line: str | None = None,
        variant: str = "",
        **values: Any,
    ) -> None:
        """Note one place.

        Args:
            name: key of `KINDS`. at: where; text, boxes: of its example (`Example.of`).
            count: faults there. rank: examples of the lowest come first; of equals, those added first.
            line: the full message of an error that is reported singly.
            variant: of several findings of one kind. values: what the kind's sentences name; `total` replaces that of the unit.
        """
        place = self._found.setdefault((name, variant), _Places())
        place.count += count
        place.values |= values | {"variant": variant}
        place.lines += [line] if line else []
        if isinstance(at, Record):
            # Of an image with hundreds of boxes in one place a few examples tell it all; all pairs would fill the memory.
            if len(place.examples) >= EXAMPLES_KEPT and place.examples[-1][1].location == at.location:
                return
            at = Example.of(at, text, boxes)
        if at is not None:
            place.examples.append((rank, at))

    def result(self) -> list[Finding]:
        """The errors, then the warnings, each in the order of `KINDS`."""
        order = list(KINDS)
        found = [self._finding(name, place) for (name, _), place in self._found.items() if place.count]
        return sorted(found, key=lambda f: (f.severity != "error", order.index(f.name)))

    def _finding(self, name: str, place: _Places) -> Finding:
        kind = KINDS[name]
        examples = [example for _, example in sorted(place.examples, key=lambda pair: pair[0])]
        places = tuple(dict.fromkeys(example.location for example in examples))
        values = {"total": self.totals.get(kind.unit, 0), **place.values, "n": place.count, "places": len(places)}
        message, hint = kind.message.format(**values), kind.hint.format(**values)
        kept = tuple(examples[:EXAMPLES_KEPT])
        return Finding(
            *(name, kind.severity, message, hint, place.count, values["total"], kind.unit),
            *(kept, places, tuple(place.lines)),
        )
