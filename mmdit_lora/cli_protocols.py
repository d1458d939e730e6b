"""`evaluate --protocol`: painted pictures scored as a published benchmark's authors score theirs, the published figures beside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdit_lora.errors import InputError, clip
from mmdit_lora.files import json_text, write_json, write_text
from mmdit_lora.html import escape_markdown
from mmdit_lora.outputs import open_folder

if TYPE_CHECKING:
    from mmdit_lora.evaluate.protocols import Case, PublishedProtocol, Seen
    from mmdit_lora.evaluate.protocols.look import Judges, Looks


# What is written, the files of all protocols' own tools among it.
_WRITTEN: tuple[str, ...] = (
    "seen.jsonl",
    "report.json",
    "report.md",
    "report.html",
    "metric_mmdit_lora.json",
    "minicpm-vqa.json",
)
_WRITTEN += ("minicpm-vqa-score.txt", "lgs_score_detailed.json", "lgs_score.txt", "simple/", "medium/", "hard/")
_WRITTEN += tuple(f"detections_{split}_mmdit_lora_results.json" for split in ("train2017", "val2017"))
_WRITTEN += tuple(f"instances_{split}_filtered.json" for split in ("train2017", "val2017"))


def score_protocol(
    name: str,
    annotations: str | Path,
    images_dir: str | Path,
    out: str | Path,
    detector: Looks | None = None,
    judge: Judges | None = None,
    published: bool = True,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a folder of pictures by a published protocol.

    Writes `out`/report.json, report.md and report.html, the files that the protocol's own tools write, and seen.jsonl:
    what was seen in each picture, from which a run that was killed goes on.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. images_dir: the painted pictures.
        detector: has `detect(pictures, layouts)`; judge: has `ask(pictures, questions)`; see `evaluate.protocols.look`.
        published: put the published figures beside.
        on_progress: called with the number of pictures that are done.

    Returns:
        What report.json holds; `scores` are shares in [0, 1].

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; a detector or judge that it needs and has not;
            missing pictures (the first names, and how many). Nothing is written then.
    """
    from mmdit_lora.evaluate.protocols import find_protocol
    from mmdit_lora.evaluate.protocols.look import find_pictures, look_at, require
    from mmdit_lora.evaluate.protocols.published import PUBLISHED, as_html, beside, markdown, to_dicts

    protocol = find_protocol(name)
    require(protocol, detector=detector is not None, judge=judge is not None)
    cases = protocol.read(annotations)
    pairs = find_pictures(protocol, cases, images_dir)
    out, inputs = Path(out), {"--annotations": annotations, "--images": images_dir}
    with open_folder(out, verb="evaluate", names=_WRITTEN, inputs=inputs, logs=["seen.jsonl"]):
        seen = look_at(
            protocol,
            pairs,
            images_dir,
            detector=detector,
            judge=judge,
            kept=out / "seen.jsonl",
            on_progress=on_progress,
        )
        of_pictures = [case for case, _ in pairs]
        scores = protocol.score(of_pictures, seen)
        results = protocol.write_results(of_pictures, seen, out)
        rows = beside(name, scores) if published and PUBLISHED.is_file() else []  # a wheel has no data folder
        report = _report(protocol, cases, seen) | {
            "annotations": str(annotations),
            "images": str(images_dir),
            "detector": _named(detector) if protocol.detector != "unused" else None,
            "judge": _named(judge) if protocol.judge != "unused" else None,
            "scores": scores,
            "results": [file.relative_to(out).as_posix() for file in results],
            "published": to_dicts(rows[1:]),
        }
        write_json(out / "report.json", report)
        write_text(out / "report.md", _page(protocol, report, markdown(rows) if rows else ""))
        write_text(out / "report.html", _html_page(protocol, report, as_html(rows) if rows else ""))
        return report


def write_layouts(name: str, annotations: str | Path, out: str | Path) -> int:
    """Write a benchmark's layouts as a layout file, one a line, for `sample --layout`; returns their number.

    Args:
        name: a key of `PROTOCOLS`. annotations: the set's own file or folder. out: a .jsonl file.

    Raises:
        InputError: an unknown protocol; annotations that cannot be read; `out` is no .jsonl.
    """

    from mmdit_lora.evaluate.protocols import find_protocol

    if Path(out).suffix != ".jsonl":
        raise InputError("is no .jsonl file", where=str(out), cure="many layouts stand in a .jsonl, one a line")
    cases = find_protocol(name).read(annotations)
    write_text(out, "".join(json_text(case.layout.to_dict()) + "\n" for case in cases))
    return len(cases)


def _named(one: object) -> str | None:
    name = getattr(one, "name", None)
    return None if one is None else name if isinstance(name, str) else type(one).__name__


def _report(protocol: PublishedProtocol, cases: list[Case], seen: list[Seen]) -> dict[str, Any]:
    answers = [answer for one in seen for answer in (one.answers or {}).values()]
    return {
        "protocol": protocol.name,
        "source": protocol.source,
        "deviations": list(protocol.deviations),
        "cases": len(cases),
        "pictures": len(seen),
        "boxes": sum(len(case.things) for case in cases),
        "questions": len(answers),
        "unanswered": sum(answer is None for answer in answers),
    }


def _facts(report: dict[str, Any]) -> list[str]:
    facts = [f"Layouts: {report['cases']}; boxes: {report['boxes']}; pictures: {report['pictures']}."]
    facts += [f"{kind.capitalize()}: {clip(report[kind])}." for kind in ("detector", "judge") if report[kind]]
    if report["questions"]:
        facts.append(f"Questions: {report['questions']}; without yes or no (counted as no): {report['unanswered']}.")
    return [*facts, f"Computed as {report['source']}. What differs from what its authors run:"]


def _own_table(protocol: PublishedProtocol, scores: dict[str, float]) -> list[list[str]]:
    """Head and lines: a metric's figures over all pictures and over the parts that there are, and what it is."""
    parts = {
        part: form for part, form in protocol.parts.items() if any(form.format(m) in scores for m in protocol.metrics)
    }
    lines = [["", "all", *parts, "what it is"]]
    for metric, meaning in protocol.metrics.items():
        keys = [metric, *(form.format(metric) for form in parts.values())]
        if metric in scores:
            lines.append([metric, *(f"{100 * scores[key]:.2f}" if key in scores else "-" for key in keys), meaning])
    return lines


def _page(protocol: PublishedProtocol, report: dict[str, Any], tables: str) -> str:
    head, *lines = _own_table(protocol, report["scores"])
    page = [f"# {protocol.title}", ""]
    for fact in _facts(report):
        page += [escape_markdown(fact), ""]
    page += [*(f"- {deviation}" for deviation in report["deviations"]), ""]
    page += ["In percent:", "", "| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 2) + " --- |"]
    page += ["| " + " | ".join(line) + " |" for line in lines]
    if tables:
        page += ["", "## Published figures", "", "Shares in percent, other figures as printed.", "", tables]
    return "\n".join(page).rstrip() + "\n"


def _html_page(protocol: PublishedProtocol, report: dict[str, Any], tables: str) -> str:
    from html import escape

    from mmdit_lora.html import document

    style = (
        ".wide td:last-child,.wide th:last-child{text-align:left}.wide p{margin:14px 14px 4px;color:var(--soft);font-size:13px}"
        ".wide .own td{font-weight:600;color:var(--bar)}"
    )
    head, *lines = _own_table(protocol, report["scores"])
    own = "<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"
    own += "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    notes = "".join(f"<li>{escape(line)}</li>" for line in (*_facts(report), *report["deviations"]))
    body = f'<ul class="notes">{notes}</ul><h2>In percent</h2><div class="wide"><table>{own}</table></div>'
    if tables:
        body += (
            '<h2>Published figures</h2><p class="of">Shares in percent, other figures as printed.</p>'
            f'<div class="wide">{tables}</div>'
        )
    return document(body, kind="benchmark", title=protocol.title, style=style)
