"""A detector and a judge look at the images of a protocol's cases; what they saw is kept, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from mmdit_lora.data.formats.common import SUFFIXES, items_of, need, text
from mmdit_lora.data.images import load_image
from mmdit_lora.errors import InputError, listed
from mmdit_lora.evaluation.protocols.common import XYXY, Case, Detected, PublishedProtocol, Question, Seen
from mmdit_lora.files import inside, require_file, write_text
from mmdit_lora.json_files import numbered_lines, parse_object, read_json
from mmdit_lora.layout import Layout

_BATCH = 8  # images that are open at once


class Looks(Protocol):
    """A detector. `detect` gives one list of detections an image; open ones look for the layout's phrases."""

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> Sequence[Sequence[Detected]]: ...


class Judges(Protocol):
    """A judge. `ask` gives one list of answers an image, one answer a question: yes, no, or None for neither."""

    def ask(self, images: Sequence[Image.Image], questions: Sequence[list[str]]) -> Sequence[Sequence[bool | None]]: ...


@dataclass(frozen=True)
class Found:
    """A detection as it is kept."""

    xyxy: XYXY
    label: str
    score: float


def find_images(protocol: PublishedProtocol, cases: Sequence[Case], folder: str | Path) -> list[tuple[Case, Path]]:
    """The images of every case, relative to the folder, in the order of the cases.

    Files are looked for anywhere below the folder, with any suffix of an image. Folders named `*with_layout` (drawn layouts,
    which the authors' scripts leave beside the images) and hidden ones are left out. In a folder that `mmdit-lora sample`
    wrote, the images are those whose layout in sample.json is the case's.

    Raises:
        InputError: no such folder; images are missing (the first names, and how many); or a case has several and the
            protocol counts one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "no such folder", location=str(folder), hint="give the folder of the painted images with --images"
        )
    sampled = _sampled(folder, cases) if (folder / "sample.json").is_file() else None
    by_key: dict[str, list[Path]] = {}
    for image in _images_below(folder) if sampled is None else ():
        if key := protocol.key(image):
            by_key.setdefault(key, []).append(image)
    pairs: list[tuple[Case, Path]] = []
    missing = []
    for case in cases:
        if sampled is None:
            found = [image for key in case.keys for image in by_key.get(key, ())]
        else:
            found = sampled[case.id]
        if not found:
            missing.append(case.images[0])
        if len(found) > 1 and not protocol.several:
            raise InputError(
                f"holds {len(found)} images of {case.id} ({found[0]}, {found[1]}), and {protocol.title} counts one",
                location=str(folder),
                hint="give the folder that holds one of each",
            )
        pairs += [(case, image) for image in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(cases)} images are missing: {listed(missing)}",
            location=str(folder),
            hint=f"paint them first; {protocol.title}'s own tools expect these names",
        )
    return pairs


def _sampled(folder: Path, cases: Sequence[Case]) -> dict[str, list[Path]]:
    """Id of a case -> the images that `sample` painted of its layout. Cases of one layout share its images in turn."""
    file = folder / "sample.json"
    painted: dict[Layout, list[Path]] = {}
    for index, entry in enumerate(items_of(read_json(file), "images", str(file))):
        location = f"{file}: images[{index}]"
        try:
            layout = Layout.from_dict(need(entry, "layout", location))
        except InputError as error:
            raise error.at(location) from None
        image = Path(text(need(entry, "file", location), "file", location))
        require_file(inside(folder, str(image), location=location, what="image"), what="image")
        painted.setdefault(layout, []).append(image)
    sharing: dict[Layout, list[str]] = {}
    for case in cases:
        sharing.setdefault(case.layout, []).append(case.id)
    return {
        id_: painted.get(layout, [])[turn :: len(ids)]
        for layout, ids in sharing.items()
        for turn, id_ in enumerate(ids)
    }


def _images_below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith("with_layout"))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(place) / name).relative_to(folder)


def look_at(
    protocol: PublishedProtocol,
    pairs: Sequence[tuple[Case, Path]],
    folder: str | Path,
    *,
    detector: Looks | None,
    judge: Judges | None,
    kept: str | Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Seen]:
    """What is seen in each image.

    Args:
        pairs: cases and their images, relative to `folder` (`find_images`).
        kept: a file of JSON lines. What it holds of the same image (its bytes), case, detector and judge is not looked
            for again; what is new is added as it comes. The last line may be torn: it is dropped.
        on_progress: called with the number of images that are done.

    Raises:
        InputError: the protocol needs a detector or a judge and has none, or an image cannot be read.
    """
    require(protocol, detector=detector is not None, judge=judge is not None)
    detector = None if protocol.detector == "unused" else detector
    judge = None if protocol.judge == "unused" else judge
    log = Path(kept) if kept is not None else None
    known = _read_kept(log) if log else {}
    seen: list[Seen] = []
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        keys = [_key(protocol, case, Path(folder) / image, detector, judge) for case, image in part]
        fresh = [pair for pair, key in zip(part, keys, strict=True) if key not in known]
        looked = iter(_look(protocol, fresh, Path(folder), detector, judge))
        new = {key: next(looked) for key in keys if key not in known} if fresh else {}
        if log and new:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open(
                "a", encoding="utf-8"
            ) as file:  # a line at once: what a kill leaves is whole but for the last
                file.writelines(_line(key, one) for key, one in new.items())
        known |= new
        for (_, image), key in zip(part, keys, strict=True):
            one = known[key]
            seen.append(Seen(one.detections, one.answers, one.measured, image.as_posix()))
        if on_progress:
            on_progress(len(seen))
    return seen


def require(protocol: PublishedProtocol, *, detector: bool, judge: bool) -> None:
    """Refuse a protocol without what it needs. Raises `InputError`."""
    for kind, given, option in ((protocol.detector, detector, "--detector"), (protocol.judge, judge, "--judge")):
        if kind == "needed" and not given:
            raise InputError(f"{protocol.title} needs one", location=option, hint=f"give one with {option}")
    if not detector and not judge:
        raise InputError(
            f"{protocol.title} needs a detector or a judge", location="--detector, --judge", hint="give one, or both"
        )


def _look(
    protocol: PublishedProtocol,
    pairs: Sequence[tuple[Case, Path]],
    folder: Path,
    detector: Looks | None,
    judge: Judges | None,
) -> list[Seen]:
    if not pairs:
        return []
    images = [load_image(folder / image) for _, image in pairs]
    detections: list[list[Found] | None] = [None] * len(pairs)
    if detector is not None:
        raw = detector.detect(images, [protocol.queries(case) for case, _ in pairs])
        detections = [[_found(one) for one in of_image] for of_image in raw]
    out = []
    for (case, _), image, found in zip(pairs, images, detections, strict=True):
        seen = Seen(found, None, protocol.measure(case, image))
        answers = None if judge is None else _ask(protocol.questions(case, seen), image, judge)
        out.append(Seen(found, answers, seen.measured))
    return out


def _ask(questions: Sequence[Question], image: Image.Image, judge: Judges) -> dict[str, bool | None]:
    """The answers; a question that hangs on another is asked only after a yes to that, in a later round."""
    answers: dict[str, bool | None] = {}
    while ready := [q for q in questions if q.key not in answers and (q.after is None or answers.get(q.after) is True)]:
        parts: dict[XYXY | None, list[Question]] = {}
        for question in ready:
            parts.setdefault(question.xyxy, []).append(question)
            answers[question.key] = None
        crops = {part: image if part is None else _crop(image, part) for part in parts}
        seen = {part: crop for part, crop in crops.items() if crop is not None}
        replies = judge.ask(list(seen.values()), [[q.text for q in parts[part]] for part in seen]) if seen else []
        for part, of_part in zip(seen, replies, strict=True):
            answers |= {question.key: reply for question, reply in zip(parts[part], of_part, strict=True)}
    return answers


def _crop(image: Image.Image, xyxy: XYXY) -> Image.Image | None:
    """The part of an image, its sides cut to whole pixels as the authors' scripts do; None where nothing is left."""
    x0, x1 = (min(max(int(v * image.width), 0), image.width) for v in xyxy[::2])
    y0, y1 = (min(max(int(v * image.height), 0), image.height) for v in xyxy[1::2])
    return image.crop((x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def _found(one: Detected) -> Found:
    x0, y0, x1, y1 = (float(v) for v in one.xyxy)
    return Found((x0, y0, x1, y1), str(one.label), float(one.score))


def _key(protocol: PublishedProtocol, case: Case, image: Path, detector: Looks | None, judge: Judges | None) -> str:
    """What a line is kept under: the image's bytes, the case, and who looked."""
    digest = hashlib.sha256(image.read_bytes())
    who = [_name(detector), _name(judge)]
    told = [
        protocol.name,
        case.id,
        case.layout.caption,
        case.things,
        sorted(case.extra.get("relations", {}).items()),
        who,
    ]
    digest.update(repr(told).encode())
    return digest.hexdigest()


def _name(one: object) -> str | None:
    fingerprint = getattr(one, "fingerprint", None)
    return None if one is None else str(fingerprint()) if callable(fingerprint) else type(one).__qualname__


def _line(key: str, seen: Seen) -> str:
    found = None if seen.detections is None else [asdict(_found(one)) for one in seen.detections]
    entry = {"key": key, "detections": found, "answers": seen.answers, "measured": seen.measured}
    return json.dumps(entry) + "\n"


def _read_kept(log: Path) -> dict[str, Seen]:
    """What a file of kept lines holds. A last line that a kill tore is taken away, so that the next one is not glued to it."""
    if not log.is_file():
        return {}
    content = log.read_text(encoding="utf-8", errors="replace")
    whole = content[: content.rfind("\n") + 1]
    if whole != content:
        write_text(log, whole)
    known: dict[str, Seen] = {}
    for number, line in numbered_lines(whole):
        try:
            entry = parse_object(line, location="it")
            found = entry["detections"]
            detections = None if found is None else [Found(tuple(f["xyxy"]), f["label"], f["score"]) for f in found]
            known[entry["key"]] = Seen(detections, entry["answers"], entry["measured"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "is no line of kept detections",
                location=f"{log}:{number}",
                hint="remove the file; the images are looked at anew",
            ) from None
    return known
