"""Published figures beside one's own: `data/benchmarks/published.json`, and tables of it for reports."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import items_of, need, number, read_json, text
from mmdit_lora.errors import InputError, unknown_key

PUBLISHED = Path(__file__).resolve().parents[3] / "data" / "benchmarks" / "published.json"
KINDS = {
    "primary": "the authors' own paper or repository",
    "secondary": "notes about the paper, not the paper itself",
    "user-reproduction": "a user's run of the published weights",
}
OWN = "this run"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Args:
        metrics: key of a metric -> figure; shares in percent, others (FID, CLIP score, ...) in their own unit.
        kind: of `KINDS`, or `OWN`.
    """

    method: str
    metrics: Mapping[str, float]
    source: str
    kind: str
    note: str = ""


def published(protocol: str, path: str | Path = PUBLISHED) -> list[Row]:
    """The published rows of a protocol; none where none could be verified.

    Raises:
        InputError: the file is missing or malformed, or the protocol is not in it.
    """
    data = read_json(Path(path))
    tables = need(data, "protocols", str(path))
    if protocol not in tables:
        raise unknown_key(protocol, tables, where=str(path))
    rows = []
    for index, entry in enumerate(items_of(tables, protocol, str(path))):
        place = f"{path}: {protocol}[{index}]"
        kind = text(need(entry, "kind", place), "kind", place)
        if kind not in KINDS:
            raise InputError(f"kind is {kind!r}", where=place, cure=f"one of {', '.join(KINDS)}")
        metrics = need(entry, "metrics", place)
        if not isinstance(metrics, Mapping):
            raise InputError(f"metrics is {type(metrics).__name__}, not an object", where=place)
        figures = {str(key): number(value, f"{place}: {key}") for key, value in metrics.items()}
        method, source = (text(need(entry, key, place), key, place) for key in ("method", "source"))
        rows.append(Row(method, figures, source, kind, str(entry.get("note") or "")))
    return rows


def beside(protocol: str, own: Mapping[str, float], *, method: str = OWN, path: str | Path = PUBLISHED) -> list[Row]:
    """One's own row first, then the published ones in the file's order.

    Args:
        own: scores as `PublishedProtocol.score` gives them: shares in [0, 1]; they become percent.
    """
    return [Row(method, {key: 100 * value for key, value in own.items()}, "", OWN), *published(protocol, path)]


def columns(rows: Sequence[Row]) -> list[str]:
    """The metrics that a table of these rows has: those of the published rows in their order, else all of one's own."""
    names = dict.fromkeys(key for row in rows if row.kind != OWN for key in row.metrics)
    own = [key for row in rows if row.kind == OWN for key in row.metrics]
    return [key for key in own if key in names] + [key for key in names if key not in own] if names else own


def markdown(rows: Sequence[Row]) -> str:
    """A Markdown table; what a row does not have is "-"."""
    names = columns(rows)
    lines = [
        "| method | " + " | ".join(names) + " | kind | source | note |",
        "| --- |" + " ---: |" * len(names) + " --- |" * 3,
    ]
    for row in rows:
        cells = [row.method, *_figures(row, names), row.kind, row.source, row.note]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def as_html(rows: Sequence[Row]) -> str:
    """The same as an HTML table of its own, without styles; one's own row has the class `own`."""
    names = columns(rows)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["method", *names, "kind", "source", "note"])
    body = []
    for row in rows:
        cells = [row.method, *_figures(row, names), row.kind, row.source, row.note]
        mark = ' class="own"' if row.kind == OWN else ""
        body.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return (
        f'<table class="published"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(body) + "\n</tbody></table>\n"
    )


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON objects."""
    return [
        {"method": r.method, "metrics": dict(r.metrics), "source": r.source, "kind": r.kind, "note": r.note}
        for r in rows
    ]


def _figures(row: Row, names: Sequence[str]) -> list[str]:
    return [f"{row.metrics[name]:.2f}" if name in row.metrics else "-" for name in names]
