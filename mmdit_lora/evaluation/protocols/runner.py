"""Score a folder of images by a published protocol: a detector and a judge observe the images, and what they say is kept in
`seen.jsonl`, so that a run that was killed continues."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from mmdit_lora.data.formats.common import SUFFIXES, items_of, need, text
from mmdit_lora.data.images import load_image
from mmdit_lora.errors import InputError, listed
from mmdit_lora.evaluation.detectors import Detection, Detector, Judge
from mmdit_lora.evaluation.protocols import find_protocol
from mmdit_lora.evaluation.protocols.base import XYXY, Case, Observation, PublishedProtocol, Question
from mmdit_lora.evaluation.protocols.published import beside, to_dicts
from mmdit_lora.evaluation.protocols.report import protocol_pages
from mmdit_lora.files import inside, json_text, require_file, write_json, write_text
from mmdit_lora.json_files import numbered_lines, parse_object, read_json
from mmdit_lora.layout import Layout
from mmdit_lora.outputs import open_folder

LOG = "seen.jsonl"
# What is written, the files of all protocols' own tools among it.
_WRITTEN = [LOG, "report.json", "report.md", "report.html", "simple/", "medium/", "hard/", "metric_mmdit_lora.json"]
_WRITTEN += ["minicpm-vqa.json", "minicpm-vqa-score.txt", "lgs_score_detailed.json", "lgs_score.txt"]
_WRITTEN += [f"detections_{split}_mmdit_lora_results.json" for split in ("train2017", "val2017")]
_WRITTEN += [f"instances_{split}_filtered.json" for split in ("train2017", "val2017")]
_BATCH = 8  # images that are open at once


def score_protocol(
    name: str,
    annotations: str | Path,
    images_dir: str | Path,
    out: str | Path,
    detector: Detector | None = None,
    judge: Judge | None = None,
    published: bool = True,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a folder of images by a published protocol.

    Writes `out`/report.json, report.md and report.html, the files that the protocol's own tools write, and seen.jsonl: the
    observations of each image, from which a run that was killed continues.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. images_dir: the generated images.
        detector: has `detect(images, layouts)`; judge: has `ask(images, questions)`; see `evaluation.detectors`.
        published: put the published figures beside.
        on_progress: called with the number of images that are done.

    Returns:
        The content of report.json; `scores` are shares in [0, 1].

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; a needed detector or judge is missing; missing
            images (the first names, and how many). Nothing is written then.
    """
    protocol = find_protocol(name)
    _require(protocol, detector, judge)
    detector = None if protocol.detector == "unused" else detector
    judge = None if protocol.judge == "unused" else judge
    all_cases = protocol.read(annotations)
    pairs = find_images(protocol, all_cases, images_dir)
    out, inputs = Path(out), {"--annotations": annotations, "--images": images_dir}
    with open_folder(out, verb="evaluate", names=_WRITTEN, inputs=inputs, logs=[LOG]):
        seen = observe(protocol, pairs, Path(images_dir), detector, judge, out / LOG, on_progress)
        cases = [case for case, _ in pairs]
        scores = protocol.score(cases, seen)
        results = protocol.write_results(cases, seen, out)
        rows = beside(name, scores) if published else []
        answers = [answer for one in seen for answer in (one.answers or {}).values()]
        report = {
            "protocol": protocol.name,
            "source": protocol.source,
            "deviations": list(protocol.deviations),
            "cases": len(all_cases),
            "images": len(seen),
            "boxes": sum(len(case.regions) for case in all_cases),
            "questions": len(answers),
            "unanswered": sum(answer is None for answer in answers),
            "annotations": str(annotations),
            "images_folder": str(images_dir),
            "detector": _name(detector, "name"),
            "judge": _name(judge, "name"),
            "scores": scores,
            "results": [file.relative_to(out).as_posix() for file in results],
            "published": to_dicts(rows[1:]),
        }
        write_json(out / "report.json", report)
        for file, content in protocol_pages(protocol, report, rows).items():
            write_text(out / file, content)
        return report


def write_layouts(name: str, annotations: str | Path, out: str | Path) -> int:
    """Write a benchmark's layouts as a layout file, one per line, for `sample --layout`; returns their number.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. out: a .jsonl file.

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; `out` is no .jsonl.
    """
    if Path(out).suffix != ".jsonl":
        raise InputError("is no .jsonl file", location=str(out), hint="many layouts stand in a .jsonl, one a line")
    cases = find_protocol(name).read(annotations)
    write_text(out, "".join(json_text(case.layout.to_dict()) + "\n" for case in cases))
    return len(cases)


def _require(protocol: PublishedProtocol, detector: Detector | None, judge: Judge | None) -> None:
    for kind, given, option in ((protocol.detector, detector, "--detector"), (protocol.judge, judge, "--judge")):
        if kind == "needed" and given is None:
            raise InputError(f"{protocol.title} needs one", location=option, hint=f"give one with {option}")
    if detector is None and judge is None:
        what = f"{protocol.title} needs a detector or a judge"
        raise InputError(what, location="--detector, --judge", hint="give one, or both")


# -- images --------------------------------------------------------------------------------------------------------------


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
        hint = "give the folder of the generated images with --images"
        raise InputError("no such folder", location=str(folder), hint=hint)
    if (folder / "sample.json").is_file():
        found = _sampled(folder, cases)
    else:
        by_key: dict[str, list[Path]] = {}
        for image in _images_below(folder):
            by_key.setdefault(protocol.key(image), []).append(image)
        by_key.pop("", None)
        found = [[image for key in case.keys for image in by_key.get(key, ())] for case in cases]
    for case, images in zip(cases, found, strict=True):
        if len(images) > 1 and not protocol.several:
            raise InputError(
                f"holds {len(images)} images of {case.id} ({images[0]}, {images[1]}), and {protocol.title} counts one",
                location=str(folder),
                hint="give the folder that holds one of each",
            )
    if missing := [case.images[0] for case, images in zip(cases, found, strict=True) if not images]:
        raise InputError(
            f"{len(missing)} of {len(cases)} images are missing: {listed(missing)}",
            location=str(folder),
            hint=f"generate them first; {protocol.title}'s own tools expect these names",
        )
    return [(case, image) for case, images in zip(cases, found, strict=True) for image in images]


def _sampled(folder: Path, cases: Sequence[Case]) -> list[list[Path]]:
    """The images that `sample` generated of each case's layout. Cases of one layout share its images in turn."""
    file = folder / "sample.json"
    sampled: dict[Layout, list[Path]] = {}
    for index, entry in enumerate(items_of(read_json(file), "images", str(file))):
        location = f"{file}: images[{index}]"
        try:
            layout = Layout.from_dict(need(entry, "layout", location))
        except InputError as error:
            raise error.at(location) from None
        image = text(need(entry, "file", location), "file", location)
        require_file(inside(folder, image, location=location, what="image"), what="image")
        sampled.setdefault(layout, []).append(Path(image))
    sharing: dict[Layout, list[Case]] = {}
    for case in cases:
        sharing.setdefault(case.layout, []).append(case)
    turns = {case.id: (turn, len(same)) for same in sharing.values() for turn, case in enumerate(same)}
    return [sampled.get(case.layout, [])[turns[case.id][0] :: turns[case.id][1]] for case in cases]


def _images_below(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith("with_layout"))
        for name in sorted(names):
            if name.endswith(SUFFIXES) and not name.startswith("."):
                yield (Path(place) / name).relative_to(folder)


# -- observations --------------------------------------------------------------------------------------------------------


def observe(
    protocol: PublishedProtocol,
    pairs: Sequence[tuple[Case, Path]],
    folder: Path,
    detector: Detector | None,
    judge: Judge | None,
    log: Path,
    on_progress: Callable[[int], None] | None = None,
) -> list[Observation]:
    """The observations of each image.

    Args:
        pairs: cases and their images, relative to `folder` (`find_images`).
        log: a file of JSON lines. What it holds of the same image (its bytes), case, detector and judge is not observed
            again; new lines are added batch by batch. A torn last line is dropped.
        on_progress: called with the number of images that are done.

    Raises:
        InputError: an image cannot be read, or the log is damaged.
    """
    known = _read_log(log)
    out: list[Observation] = []
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        keys = [_key(protocol, case, folder / image, detector, judge) for case, image in batch]
        missing = {key: pair for key, pair in zip(keys, batch, strict=True) if key not in known}
        if missing:
            new = dict(
                zip(missing, _observe_batch(protocol, [*missing.values()], folder, detector, judge), strict=True)
            )
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a", encoding="utf-8") as file:  # whole lines at once: a kill tears the last one at most
                file.writelines(_line(key, one) for key, one in new.items())
            known |= new
        out += [replace(known[key], image=image.as_posix()) for (_, image), key in zip(batch, keys, strict=True)]
        if on_progress:
            on_progress(len(out))
    return out


def _observe_batch(
    protocol: PublishedProtocol,
    pairs: Sequence[tuple[Case, Path]],
    folder: Path,
    detector: Detector | None,
    judge: Judge | None,
) -> list[Observation]:
    images = [load_image(folder / image) for _, image in pairs]
    detections: Sequence[Sequence[Detection] | None] = [None] * len(pairs)
    if detector is not None:
        detections = detector.detect(images, [protocol.queries(case) for case, _ in pairs])
    out = []
    for (case, _), image, found in zip(pairs, images, detections, strict=True):
        seen = Observation(found, None, protocol.measure(case, image))
        answers = None if judge is None else _ask(protocol.questions(case, seen), image, judge)
        out.append(replace(seen, answers=answers))
    return out


def _ask(questions: Sequence[Question], image: Image.Image, judge: Judge) -> dict[str, bool | None]:
    """The answers; a question that depends on another is asked only after a yes to that, in a later round."""
    answers: dict[str, bool | None] = {}
    while ready := [q for q in questions if q.key not in answers and (q.after is None or answers.get(q.after) is True)]:
        parts: dict[XYXY | None, list[Question]] = {}
        for question in ready:
            parts.setdefault(question.xyxy, []).append(question)
            answers[question.key] = None
        crops = {part: image if part is None else _crop(image, part) for part in parts}
        shown = {part: crop for part, crop in crops.items() if crop is not None}
        replies = judge.ask(list(shown.values()), [[q.text for q in parts[part]] for part in shown]) if shown else []
        for part, of_part in zip(shown, replies, strict=True):
            answers |= {question.key: reply for question, reply in zip(parts[part], of_part, strict=True)}
    return answers


def _crop(image: Image.Image, xyxy: XYXY) -> Image.Image | None:
    """The part of an image, its sides cut to whole pixels as the authors' scripts do; None if nothing is left."""
    x0, x1 = (min(max(int(v * image.width), 0), image.width) for v in xyxy[::2])
    y0, y1 = (min(max(int(v * image.height), 0), image.height) for v in xyxy[1::2])
    return image.crop((x0, y0, x1, y1)) if x0 < x1 and y0 < y1 else None


def _key(protocol: PublishedProtocol, case: Case, image: Path, detector: Detector | None, judge: Judge | None) -> str:
    """The key of a line: the image's bytes, the case, and who observed it."""
    digest = hashlib.sha256(image.read_bytes())
    observers = [_name(detector, "fingerprint"), _name(judge, "fingerprint")]
    relations = sorted(case.extra.get("relations", {}).items())
    digest.update(repr([protocol.name, case.id, case.caption, case.regions, relations, observers]).encode())
    return digest.hexdigest()


def _name(observer: object, attribute: str) -> str | None:
    """An attribute of a detector or judge, or its result; the class's name if it has none."""
    value = getattr(observer, attribute, type(observer).__qualname__)
    return None if observer is None else str(value() if callable(value) else value)


def _line(key: str, seen: Observation) -> str:
    found = None
    if seen.detections is not None:
        found = [{"xyxy": [*map(float, d.xyxy)], "label": d.label, "score": float(d.score)} for d in seen.detections]
    entry = {"key": key, "detections": found, "answers": seen.answers, "measured": seen.measured}
    return json.dumps(entry) + "\n"


def _read_log(log: Path) -> dict[str, Observation]:
    """The observations of a log. A last line that a kill tore is removed, so that the next one is not glued to it."""
    if not log.is_file():
        return {}
    content = log.read_text(encoding="utf-8", errors="replace")
    complete = content[: content.rfind("\n") + 1]
    if complete != content:
        write_text(log, complete)
    known: dict[str, Observation] = {}
    for number, line in numbered_lines(complete):
        try:
            entry = parse_object(line, location="it")
            found = entry["detections"]
            detections = None if found is None else [Detection(tuple(f["xyxy"]), f["label"], f["score"]) for f in found]
            known[entry["key"]] = Observation(detections, entry["answers"], entry["measured"])
        except (ValueError, KeyError, TypeError):
            raise InputError(
                "is no line of kept detections",
                location=f"{log}:{number}",
                hint="remove the file; the images are looked at anew",
            ) from None
    return known
