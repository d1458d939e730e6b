"""`report.html` and `report.md` of a published benchmark: one's own figures, and the published ones beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdit_lora.errors import clip
from mmdit_lora.evaluation.protocols.base import PublishedProtocol
from mmdit_lora.evaluation.protocols.published import OWN, Row, tables
from mmdit_lora.visual.pages import render


def protocol_pages(protocol: PublishedProtocol, report: Mapping[str, Any], published: Sequence[Row]) -> dict[str, str]:
    """File name -> content.

    Args:
        report: what `report.json` holds. published: `published.beside`; none = no published figures are shown.
    """
    facts = [f"Layouts: {report['cases']}; boxes: {report['boxes']}; images: {report['images']}."]
    facts += [f"{kind.capitalize()}: {clip(report[kind])}." for kind in ("detector", "judge") if report[kind]]
    if report["questions"]:
        facts.append(f"Questions: {report['questions']}; without yes or no (counted as no): {report['unanswered']}.")
    facts.append(f"Computed as {report['source']}. What differs from what its authors run:")
    shown = [("In percent", "", *_own_table(protocol, report["scores"]))]
    if published:
        shown.append(("Published figures", "Shares in percent, other figures as printed.", [], []))
        shown += [("", *table) for table in tables(published)]
    values = {"title": protocol.title, "facts": facts, "notes": report["deviations"], "tables": shown, "own": OWN}
    return {f"report.{kind}": render(template, **values) for kind, template in _TEMPLATES.items()}


_TEMPLATES = {"md": "report.md", "html": "protocol.html"}


def _own_table(protocol: PublishedProtocol, scores: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a metric's figures over all images and over the parts that there are, and what it is."""
    parts = {
        part: form for part, form in protocol.parts.items() if any(form.format(m) in scores for m in protocol.metrics)
    }
    rows = []
    for metric, meaning in protocol.metrics.items():
        keys = [metric, *(form.format(metric) for form in parts.values())]
        if metric in scores:
            rows.append([metric, *(f"{100 * scores[key]:.2f}" if key in scores else "-" for key in keys), meaning])
    return ["", "all", *parts, "what it is"], rows
