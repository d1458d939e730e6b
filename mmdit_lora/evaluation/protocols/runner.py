"""A detector and a judge look at the pictures of a protocol's cases; what they saw is kept, so that a killed run goes on."""

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

_BATCH = 8  # pictures that are open at once


class Looks(Protocol):
    """A detector. `detect` gives one list of detections a picture; open ones look for the layout's phrases."""

    def detect(self, pictures: Sequence[Image.Image], layouts: Sequence[Layout]) -> Sequence[Sequence[Detected]]: ...


class Judges(Protocol):
    """A judge. `ask` gives one list of answers a picture, one answer a question: yes, no, or None for neither."""

    def ask(
        self, pictures: Sequence[Image.Image], questions: Sequence[list[str]]
    ) -> Sequence[Sequence[bool | None]]: ...


@dataclass(frozen=True)
class Found:
    """A detection as it is kept."""

    xyxy: XYXY
    label: str
    score: float


def find_pictures(protocol: PublishedProtocol, cases: Sequence[Case], folder: str | Path) -> list[tuple[Case, Path]]:
    """The pictures of every case, relative to the folder, in the order of the cases.

    Files are looked for anywhere below the folder, with any suffix of a picture. Folders named `*with_layout` (drawn layouts,
    which the authors' scripts leave beside the pictures) and hidden ones are left out. In a folder that `mmdit-lora sample`
    wrote, the pictures are those whose layout in sample.json is the case's.

    Raises:
        InputError: no such folder; pictures are missing (the first names, and how many); or a case has several and the
            protocol counts one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            "no such folder", where=str(folder), cure="give the folder of the painted pictures with --images"
        )
    sampled = _sampled(folder, cases) if (folder / "sample.json").is_file() else None
    by_key: dict[str, list[Path]] = {}
    for picture in _pictures_below(folder) if sampled is None else ():
        if key := protocol.key(picture):
            by_key.setdefault(key, []).append(picture)
    pairs: list[tuple[Case, Path]] = []
    missing = []
    for case in cases:
        if sampled is None:
            found = [picture for key in case.keys for picture in by_key.get(key, ())]
        else:
            found = sampled[case.id]
        if not found:
            missing.append(case.pictures[0])
        if len(found) > 1 and not protocol.several:
            raise InputError(
                f"holds {len(found)} pictures of {case.id} ({found[0]}, {found[1]}), and {protocol.title} counts one",
                where=str(folder),
                cure="give the folder that holds one of each",
            )
        pairs += [(case, picture) for picture in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(cases)} pictures are missing: {listed(missing)}",
            where=str(folder),
            cure=f"paint them first; {protocol.title}'s own tools expect these names",
        )
    return pairs


def _sampled(folder: Path, cases: Sequence[Case]) -> dict[str, list[Path]]:
    """Id of a case -> the pictures that `sample` painted of its layout. Cases of one layout share its pictures in turn."""
    file = folder / "sample.json"
    painted: dict[Layout, list[Path]] = {}
    for index, entry in enumerate(items_of(read_json(file), "pictures", str(file))):
        where = f"{file}: pictures[{index}]"
        try:
            layout = Layout.from_dict(need(entry, "layout", where))
        except InputError as error:
            raise error.at(where) from None
        picture = Path(text(need(entry, "file", where), "file", where))
        require_file(inside(folder, str(picture), where=where, what="picture"), what="picture")
        painted.setdefault(layout, []).append(picture)
    sharing: dict[Layout, list[str]] = {}
    for case in cases:
        sharing.setdefault(case.layout, []).append(case.id)
    return {
        id_: painted.get(layout, [])[turn :: len(ids)]
        for layout, ids in sharing.items()
        for turn, id_ in enumerate(ids)
    }


def _pictures_below(folder: Path) -> Iterator[Path]:
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
    """What is seen in each picture.

    Args:
        pairs: cases and their pictures, relative to `folder` (`find_pictures`).
        kept: a file of JSON lines. What it holds of the same picture (its bytes), case, detector and judge is not looked
            for again; what is new is added as it comes. The last line may be torn: it is dropped.
        on_progress: called with the number of pictures that are done.

    Raises:
        InputError: the protocol needs a detector or a judge and has none, or a picture cannot be read.
    """
    require(protocol, detector=detector is not None, judge=judge is not None)
    detector = None if protocol.detector == "unused" else detector
    judge = None if protocol.judge == "unused" else judge
    log = Path(kept) if kept is not None else None
    known = _read_kept(log) if log else {}
    seen: list[Seen] = []
    for start in range(0, len(pairs), _BATCH):
        part = pairs[start : start + _BATCH]
        keys = [_key(protocol, case, Path(folder) / picture, detector, judge) for case, picture in part]
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
        for (_, picture), key in zip(part, keys, strict=True):
            one = known[key]
            seen.append(Seen(one.detections, one.answers, one.measured, picture.as_posix()))
        if on_progress:
            on_progress(len(seen))
    return seen


def require(protocol: PublishedProtocol, *, detector: bool, judge: bool) -> None:
    """Refuse a protocol without what it needs. Raises `InputError`."""
    for kind, given, option in ((protocol.detector, detector, "--detector"), (protocol.judge, judge, "--judge")):
        if kind == "needed" and not given:
            raise InputError(f"{protocol.title} needs one", where=option, cure=f"give one with {option}")
    if not detector and not judge:
        raise InputError(
            f"{protocol.title} needs a detector or a judge", where="--detector, --judge", cure="give one, or both"
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
    pictures = [load_image(folder / picture) for _, picture in pairs]
    detections: list[list[Found] | None] = [None] * len(pairs)
    if detector is not None:
        raw = detector.detect(pictures, [protocol.queries(case) for case, _ in pairs])
        detections = [[_found(one) for one in of_picture] for of_picture in raw]
    out = []
    for (case, _), picture, found in zip(pairs, pictures, detections, strict=True):
        seen = Seen(found, None, protocol.measure(case, picture))
        answers = None if judge is None else _ask(protocol.questions(case, seen), picture, judge)
        out.append(Seen(found, answers, seen.measured))
    return out


def _ask(questions: Sequence[Question], picture: Image.Image, judge: Judges) -> dict[str, bool | None]:
    """The answers; a question that hangs on another is asked only after a yes to that, in a later round."""
    answers: dict[str, bool | None] = {}
    while ready := [q for q in questions if q.key not in answers and (q.after is None or answers.get(q.after) is True)]:
        parts: dict[XYXY | None, list[Question]] = {}
        for question in ready:
            parts.setdefault(question.xyxy, []).append(question)
            answers[question.key] = None
        crops = {part: picture if part is None else _crop(picture, part) for part in parts}
        seen = {part: crop for part, crop in crops.items() if crop is not None}
        replies = judge.ask(list(seen.values()), [[q.text for q in parts[part]] for part in seen]) if seen else []
        for part, of_part in zip(seen, replies, strict=True):
            answers |= {question.key: reply for question, reply in zip(parts[part], of_part, strict=True)}
    return answers


def _crop(picture: Image.Image, xyxy: XYXY) -> Image.Image | None:
    """The part of a picture, its sides cut to whole pixels as the authors' scripts do; None where nothing is left."""
    x0, x1 = (min(max(int(v * picture.width), 0), picture.width) for v in xyxy[::2])
    y0, y1 = (min(max(int(v * picture.height), 0), picture.height) for v in xyxy[1::2])
    return picture.crop((x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def _found(one: Detected) -> Found:
    x0, y0, x1, y1 = (float(v) for v in one.xyxy)
    return Found((x0, y0, x1, y1), str(one.label), float(one.score))


def _key(protocol: PublishedProtocol, case: Case, picture: Path, detector: Looks | None, judge: Judges | None) -> str:
    """What a line is kept under: the picture's bytes, the case, and who looked."""
    digest = hashlib.sha256(picture.read_bytes())
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
            entry = parse_object(line, where="it")
            found = entry["detections"]
            detections = None if found is None else [Found(tuple(f["xyxy"]), f["label"], f["score"]) for f in found]
            known[entry["key"]] = Seen(detections, entry["answers"], entry["measured"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "is no line of kept detections",
                where=f"{log}:{number}",
                cure="remove the file; the pictures are looked at anew",
            ) from None
    return known
