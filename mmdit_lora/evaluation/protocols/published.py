"""Published figures beside one's own: `data/benchmarks/published.json`, and tables of them for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import items_of, need, number, text
from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.json_files import read_json
from mmdit_lora.resources import resource

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


def beside(protocol: str, own: Mapping[str, float], *, path: str | Path = PUBLISHED) -> list[Row]:
    """One's own row first, then the published ones in the file's order.

    Args:
        own: scores as `PublishedProtocol.score` gives them: shares in [0, 1]; they become percent.
    """
    return [Row(OWN, {key: 100 * value for key, value in own.items()}, "", OWN), *published(protocol, path)]


def tables(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The rows in one table a source, since what one source prints is comparable: (heading, head, rows of cells).

    One's own row stands first in each, with the metrics that the source has; what a row does not have is "-". A note that
    all rows of a source share stands in the heading, others in a column.
    """
    own = [row for row in rows if row.kind == OWN]
    sources: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.kind != OWN:
            sources.setdefault((row.source, row.kind), []).append(row)
    out = []
    for (source, kind), theirs in sources.items():
        names = list(dict.fromkeys(key for row in theirs for key in row.metrics))
        noted = len({row.note for row in theirs}) > 1
        heading = f"{source} ({kind})" + (f"; {theirs[0].note}" if theirs[0].note and not noted else "")
        cells = [
            [row.method, *(f"{row.metrics[name]:.2f}" if name in row.metrics else "-" for name in names)]
            + ([row.note] if noted else [])
            for row in own + theirs
        ]
        out.append((heading, ["method", *names, *(["note"] if noted else [])], cells))
    return out


def to_dicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON objects."""
    return [asdict(row) for row in rows]
