"""Published figures beside one's own: `data/benchmarks/published.json`, and tables of it for reports."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import items_of, need, number, text
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.json_files import read_json
from mmdit_lora.resources import resource
from mmdit_lora.visual.page import escape_markdown

PUBLISHED = resource("data/benchmarks/published.json") or Path("data/benchmarks/published.json")
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
        raise unknown_key(protocol, tables, location=str(path))
    rows = []
    for index, entry in enumerate(items_of(tables, protocol, str(path))):
        place = f"{path}: {protocol}[{index}]"
        kind = text(need(entry, "kind", place), "kind", place)
        if kind not in KINDS:
            raise InputError(f"kind is {shown(kind)}", location=place, hint=f"one of {', '.join(KINDS)}")
        metrics = need(entry, "metrics", place)
        if not isinstance(metrics, Mapping):
            raise InputError(f"metrics is {type(metrics).__name__}, not an object", location=place)
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


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[Row]]]:
    """The rows in one table a source, since what one source prints is comparable: (heading, metrics, rows).

    One's own row stands first in each, with the metrics that the source has.
    """
    own = [row for row in rows if row.kind == OWN]
    sources: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.kind != OWN:
            sources.setdefault((row.source, row.kind), []).append(row)
    out = []
    for (source, kind), found in sources.items():
        names = list(dict.fromkeys(key for row in found for key in row.metrics))
        notes = {row.note for row in found}
        heading = f"{source} ({kind})" + (f"; {found[0].note}" if len(notes) == 1 and found[0].note else "")
        if len(notes) == 1:
            found = [Row(row.method, row.metrics, row.source, row.kind) for row in found]
        out.append((heading, names, own + found))
    return out


def markdown(rows: Sequence[Row]) -> str:
    """Markdown tables, one a source; what a row does not have is "-"."""
    lines: list[str] = []
    for heading, names, of_source in tables(rows):
        noted = any(row.note for row in of_source)
        lines += [escape_markdown(heading), ""]
        lines += [_line(["method", *names, *(["note"] if noted else [])])]
        lines += ["| --- |" + " ---: |" * len(names) + (" --- |" if noted else "")]
        lines += [_line([row.method, *_figures(row, names), *([row.note] if noted else [])]) for row in of_source]
        lines += [""]
    return "\n".join(lines)


def as_html(rows: Sequence[Row]) -> str:
    """The same as HTML tables without styles; one's own rows have the class `own`."""
    parts = []
    for heading, names, of_source in tables(rows):
        noted = any(row.note for row in of_source)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ["method", *names, *(["note"] if noted else [])])
        body = []
        for row in of_source:
            cells = [row.method, *_figures(row, names), *([row.note] if noted else [])]
            mark = ' class="own"' if row.kind == OWN else ""
            body.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
        parts.append(
            f'<p>{html.escape(heading)}</p>\n<table class="published"><thead><tr>{head}</tr></thead><tbody>\n'
            + "\n".join(body)
            + "\n</tbody></table>\n"
        )
    return "".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escape_markdown(cell) for cell in cells) + " |"


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON objects."""
    return [
        {"method": r.method, "metrics": dict(r.metrics), "source": r.source, "kind": r.kind, "note": r.note}
        for r in rows
    ]


def _figures(row: Row, names: Sequence[str]) -> list[str]:
    return [f"{row.metrics[name]:.2f}" if name in row.metrics else "-" for name in names]
