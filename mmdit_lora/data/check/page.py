"""`check.html`: what is in a data set, and what was found in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape

from mmdit_lora.data.check.charts import by_powers, columns, heat, rows, thumbnail
from mmdit_lora.data.check.findings import Example, Finding
from mmdit_lora.data.check.report import CheckReport
from mmdit_lora.layout import Box
from mmdit_lora.visual.page import document


def page(report: CheckReport, *, title: str, boxes: Sequence[Box]) -> str:
    """The whole page as HTML.

    Args:
        title: the data set's name.
        boxes: all boxes of the set, for the histograms.
    """
    examples = [example for found in report.findings for example in found.examples]
    # Large images are warned of when they are opened, and have a finding of their own.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        images = dict(zip(map(id, examples), pool.map(thumbnail, examples), strict=True))
    errors = [found for found in report.findings if found.severity == "error"]
    mild = [found for found in report.findings if found.severity != "error"]
    state = "bad" if errors else "mild" if mild else "good"
    verdict = _verdict(len(errors), len(mild))
    sections = "".join(_section(n, found, images) for n, found in enumerate(report.findings))
    notes = "".join(
        f"<li>{escape(note)}</li>"
        for note in (*report.notes, *(f"{n} {w} left out" for w, n in report.left_out.items()))
    )
    body = (
        f'<div class="figures">{_figures(report)}</div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + _contents(report.findings)
        + f"<h2>What is in it</h2>{_charts(report, boxes)}"
        + (f"<h2>What was found</h2>{sections}" if sections else "")
    )
    return document(body, kind="data check", title=title, verdict=verdict, state=state)


def _verdict(errors: int, warnings: int) -> str:
    if not errors and not warnings:
        return "Nothing was found."
    kinds = [
        f"{n} kind{'s' if n != 1 else ''} of {what}" for n, what in ((errors, "error"), (warnings, "warning")) if n
    ]
    return " and ".join(kinds) + (": a run would stop." if errors else ": a run can start; look at them first.")


def _figures(report: CheckReport) -> str:
    per = report.boxes / report.records if report.records else 0
    shown = (
        (f"{report.images:,}", "images"),
        (f"{report.records:,}", "layouts"),
        (f"{report.boxes:,}", "boxes"),
        (f"{per:.1f}", "boxes a layout"),
        (f"{report.phrases:,}", "distinct phrases"),
        (f"{len(report.image_sizes):,}", "image sizes"),
    )
    return "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in shown)


def _contents(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    lines = "".join(
        f'<tr><td><span class="badge {f.severity}">{f.severity}</span></td><td><a href="#{f.name}-{n}">{f.name}</a></td>'
        f'<td class="number">{f.count:,}</td><td class="of">of {f.total:,} {f.unit}</td></tr>'
        for n, f in enumerate(findings)
    )
    return f"<table>{lines}</table>"


def _charts(report: CheckReport, boxes: Sequence[Box]) -> str:
    shown = (
        ("Phrases, by boxes", rows(report.phrase_counts)),
        ("ImageFacts sizes", rows({size.replace("x", " x "): n for size, n in report.image_sizes.items()})),
        ("Sizes in training, by images", rows({size.replace("x", " x "): n for size, n in report.buckets.items()})),
        ("Boxes a layout", columns(_filled(report.boxes_per_image))),
        ("Area of boxes, up to this share of the image", columns(by_powers([box.area for box in boxes]))),
        ("Shorter side of boxes, up to this share", columns(by_powers([min(box.width, box.height) for box in boxes]))),
        ("Centers of boxes in their images", heat([_center(box) for box in boxes])),
    )
    cards = "".join(f"<figure><figcaption>{name}</figcaption>{chart}</figure>" for name, chart in shown if chart)
    return f'<div class="charts">{cards}</div>'


def _center(box: Box) -> tuple[float, float]:
    return ((box.xyxy[0] + box.xyxy[2]) / 2, (box.xyxy[1] + box.xyxy[3]) / 2)


def _filled(counts: dict[int, int]) -> dict[str, int]:
    """With the numbers between that no record has; in tens where there are more than 40."""
    if not counts:
        return {}
    step = 1 if max(counts) <= 40 else 10 ** (len(str(max(counts) // 4)) - 1)
    filled = {str(n) if step == 1 else f"{n}+": 0 for n in range(min(counts) // step * step, max(counts) + 1, step)}
    for n, count in counts.items():
        filled[str(n) if step == 1 else f"{n // step * step}+"] += count
    return filled


def _section(place: int, found: Finding, images: dict[int, str | None]) -> str:
    number = 0 if not found.total else min(found.count / found.total, 1)
    shown = "".join(_example(example, images[id(example)]) for example in found.examples)
    more = found.count - len(found.examples)
    rest = (
        f'<p class="of">The first {len(found.examples)} are shown; check.json lists every place.</p>'
        if more > 0 < len(found.examples)
        else ""
    )
    return (
        f'<section id="{found.name}-{place}"><h3><span class="badge {found.severity}">{found.severity}</span> {found.name}'
        f'<span class="of">{found.count:,} of {found.total:,} {found.unit}</span></h3>'
        f'<div class="share"><i style="width:{max(number * 100, 0.5):.1f}%"></i></div>'
        f"<p>{escape(found.message)}</p><p><b>To mend it:</b> {escape(found.hint)}</p>"
        f'<div class="gallery">{shown}</div>{rest}</section>'
    )


def _example(example: Example, source: str | None) -> str:
    location = escape("/".join(example.location.rsplit("/", 2)[-2:]))
    image = (
        f'<img src="{source}" alt="{escape(example.text, quote=True)}">'
        if source
        else '<div class="none">no source to show</div>'
    )
    name = f"<b>{escape(example.image.name)}</b> " if example.image else ""
    return f"<figure>{image}<figcaption>{name}{escape(example.text)}<small>{location}</small></figcaption></figure>"
