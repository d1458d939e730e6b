"""An evaluation for reading: `report.html`, one page without a network, and `report.md`, its tables."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from mmdit_lora.evaluate.draw import draw_boxes
from mmdit_lora.evaluate.judged import FIGURES
from mmdit_lora.evaluate.sides import ADAPTERS, SIDES, Evaluation
from mmdit_lora.html import document

SHOWN = 8  # best and worst pictures each
FIGURE_TEXT = FIGURES | {
    "ap": "COCO's average precision, a category a phrase, over IoU 0.50 to 0.95",
    "ap50": "the same at IoU 0.50",
    "ar_100": "COCO's average recall",
    "spread": "difference of pictures of one layout from different noise (root mean square, pixels in [0, 1])",
    "clip_score": "CLIP score of the picture with its caption",
    "clip_box": "CLIP score of each box's crop with its phrase",
    "kid_clip": "kernel distance to the data set's own pictures, of CLIP's features; 0 = alike",
}
_PLOTTED = ("miou", "iou50", "color_acc", "shape_acc", "precision", "relations")
_COLORS = {
    "base": "#8c8c8c",
    **dict(zip(ADAPTERS, ("#0072b2", "#56b4e9", "#f0e442", "#7b4fb5", "#a6761d", *["#444444"] * 4), strict=True)),
    "text_only": "#d55e00",
    "layout_only": "#e69f00",
    "images": "#0072b2",
    "ground_truth": "#009e73",
    "shuffled": "#cc79a7",
}
_SIDE_TEXT = {
    "base": "the base, without an adapter",
    **dict.fromkeys(ADAPTERS, "the base with this adapter, same noise"),
    "text_only": "painted without boxes",
    "layout_only": "painted without a caption",
    "images": "pictures made by something else",
    "ground_truth": "the data's own pictures: the ceiling",
    "shuffled": "those, with layouts of others: the floor",
}


def sides_of(report: Mapping[str, Any]) -> list[str]:
    """The sides that a report (or one of its groups) has, in order."""
    return [name for name in SIDES if name in report]


def figures_of(report: Mapping[str, Any]) -> list[str]:
    """The figures that any of its sides has, in order."""
    return [name for name in FIGURE_TEXT if any(name in report[side] for side in sides_of(report))]


# -- markdown ------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], *, title: str) -> str:
    """`report.md`: every table, figures with their 95 % intervals."""
    lines = [f"# {title}", "", *_facts(report), "", *_table(report, with_intervals=True), ""]
    for name, figures in report["differences"].items():
        lines += [f"## {_words(name)}", "", "| | difference | 95 % interval |", "| --- | ---: | ---: |"]
        lines += [
            f"| {key} | {found['value']:+.3f} | {_interval(found['interval'], '+.3f')} |"
            for key, found in figures.items()
        ]
        lines.append("")
    for heading, group, sides in _groups(report):
        lines += [f"## {heading}: {group}", "", *_table(sides), ""]
    return "\n".join(lines)


def _facts(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{report['pictures']} layouts, seed {report['seed']}."]
    if (tested := report.get("detector")) is not None:
        found = tested["true"]
        lines.append(
            f"Detector {tested['detector']}, on the data set's own pictures: {tested['verdict']}; recall {found['recall']:.3f}, "
            f"precision {found['precision']:.3f}, mIoU of the boxes met {found['miou']:.3f}."
        )
    return lines


def _table(report: Mapping[str, Any], *, with_intervals: bool = False) -> list[str]:
    names = figures_of(report)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for side in sides_of(report):
        cells = [_cell(report[side], name, with_intervals=with_intervals) for name in names]
        lines.append(f"| {_words(side)} | " + " | ".join(cells) + " |")
    return lines


def _cell(figures: Mapping[str, Any], name: str, *, with_intervals: bool) -> str:
    if name not in figures:
        return ""
    between = figures.get("intervals", {}).get(name) if with_intervals else None
    return f"{figures[name]:.3f}" + (f" {_interval(between, '.3f')}" if between else "")


def _interval(between: Sequence[float] | None, form: str) -> str:
    return "" if between is None else f"[{between[0]:{form}}, {between[1]:{form}}]"


def _groups(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    headings = {"by_boxes": "By boxes a picture", "by_size": "By size of the box", "by_overlap": "By overlap of boxes"}
    for key, heading in headings.items():
        for group, sides in report[key].items():
            count = f"{sides['pictures']} pictures" if "pictures" in sides else f"{sides['boxes']} boxes"
            yield heading, f"{group} ({count})", sides


def _words(name: str) -> str:
    return name.replace("_", " ")


# -- html ----------------------------------------------------------------------------------------------------------------


def page(evaluation: Evaluation, report: Mapping[str, Any], *, title: str) -> str:
    """`report.html`.

    Args:
        report: `evaluation.to_dict()`.
    """
    chief = next(name for name in ("adapter", "images", "base", "ground_truth") if name in evaluation.sides)
    parts = [
        f"<h2>Fidelity</h2>{_html_table(report)}<div class='charts one'>{_plot(report)}</div>{_legend(report)}",
        _html_differences(report),
        _html_groups(report),
        f"<h2>The best and the worst of {_words(chief)}</h2>{_pictures(evaluation, chief)}",
    ]
    found = report[chief]
    verdict = f"{_words(chief)}: mIoU {found['miou']:.3f} {_interval(found['intervals']['miou'], '.3f')}"
    if "adapter_minus_base" in report["differences"]:
        moved = report["differences"]["adapter_minus_base"]["miou"]
        verdict += f", {moved['value']:+.3f} {_interval(moved['interval'], '+.3f')} to the base"
    notes = "".join(f"<li>{escape(line)}</li>" for line in _facts(report))
    body = f'<ul class="notes">{notes}</ul>' + "".join(parts)
    return document(body, kind="evaluation", title=title, verdict=verdict, style=_STYLE)


def _html_table(report: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    names = [name for name in figures_of(report) if names is None or name in names]
    head = "".join(f'<th title="{escape(FIGURE_TEXT[name], quote=True)}">{_words(name)}</th>' for name in names)
    rows = ""
    for side in sides_of(report):
        cells = ""
        for name in names:
            between = report[side].get("intervals", {}).get(name)
            shown = f"{report[side][name]:.3f}" if name in report[side] else ""
            cells += f"<td>{shown}{f'<small>{between[0]:.3f} – {between[1]:.3f}</small>' if between else ''}</td>"
        text = _SIDE_TEXT[side] if "intervals" in report[side] else ""
        rows += (
            f"<tr><td><i style='background:{_COLORS[side]}'></i>{_words(side)}<small>{text}</small></td>{cells}</tr>"
        )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _html_differences(report: Mapping[str, Any]) -> str:
    if not report["differences"]:
        return ""
    parts = []
    for name, figures in report["differences"].items():
        rows = "".join(
            f"<tr><td>{_words(key)}</td><td>{f['value']:+.3f}</td><td>{_interval(f['interval'], '+.3f')}</td></tr>"
            for key, f in figures.items()
        )
        parts.append(
            f'<figure class="wide"><table><tr><th>{_words(name)}</th><th>difference</th><th>95 % interval, paired</th></tr>'
            f"{rows}</table></figure>"
        )
    return f'<h2>Differences</h2><div class="pairs">{"".join(parts)}</div>'


def _html_groups(report: Mapping[str, Any]) -> str:
    out, last = "", ""
    for heading, group, sides in _groups(report):
        if heading != last:
            out += f'{"</div>" if last else ""}<h2>{heading}</h2><div class="pairs">'
        out += f"<div><h3>{escape(group)}</h3>{_html_table(sides, _PLOTTED)}</div>"
        last = heading
    return out + ("</div>" if last else "")


def _legend(report: Mapping[str, Any]) -> str:
    lines = "".join(f"<li><b>{_words(name)}</b> {escape(FIGURE_TEXT[name])}</li>" for name in figures_of(report))
    return f'<details><summary>What the figures are</summary><ul class="notes">{lines}</ul></details>'


def _plot(report: Mapping[str, Any]) -> str:
    """Figures between 0 and 1 as dots with their intervals, a row a figure, a colour a side."""
    names = [name for name in _PLOTTED if any(name in report[side] for side in sides_of(report))]
    sides = sides_of(report)
    left, wide, row = 90, 640, 9 * len(sides) + 12
    tall = row * len(names) + 22
    parts = []
    for tick in range(0, 11, 2):
        x = left + wide * tick / 10
        parts.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{tall - 18}"/>')
        parts.append(f'<text x="{x}" y="{tall - 4}" text-anchor="middle">{tick / 10:g}</text>')
    for n, name in enumerate(names):
        middle = n * row + row / 2
        parts.append(f'<text class="name" x="{left - 12}" y="{middle + 4}" text-anchor="end">{_words(name)}</text>')
        for k, side in enumerate(sides):
            if name not in report[side]:
                continue
            y, x = n * row + 10 + 9 * k, left + wide * report[side][name]
            between = report[side]["intervals"].get(name)
            color = _COLORS[side]
            if between:
                ends = [left + wide * value for value in between]
                parts.append(
                    f'<line class="bar" style="stroke:{color}" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>'
                )
            label = f"{_words(side)}: {report[side][name]:.3f} {_interval(between, '.3f')}"
            parts.append(f'<circle style="fill:{color}" cx="{x:.1f}" cy="{y}" r="3.4"><title>{label}</title></circle>')
    key = "".join(f"<span><i style='background:{_COLORS[side]}'></i>{_words(side)}</span>" for side in sides)
    return (
        f'<figure><figcaption>Figures with their 95 % intervals over pictures</figcaption><p class="key">{key}</p>'
        f'<svg viewBox="0 0 {left + wide + 20} {tall}" role="img">{"".join(parts)}</svg></figure>'
    )


def _pictures(evaluation: Evaluation, chief: str) -> str:
    """The pictures of lowest and highest mIoU, beside the base's and the data set's own."""
    ious = np.array(evaluation.sides[chief].picture_ious)
    order = [int(n) for n in np.argsort(ious, kind="stable") if not np.isnan(ious[n])]
    beside = [name for name in ("base", chief, "ground_truth") if name in evaluation.sides]
    beside = list(dict.fromkeys(beside))
    out = ""
    for heading, rows in (("Worst", order[:SHOWN]), ("Best", order[::-1][:SHOWN])):
        cards = ""
        for row in rows:
            shown = "".join(
                f'<div><img src="{_data_url(evaluation.sides[name].pictures[row], evaluation, row)}" '
                f'alt="{_words(name)} {row}"><small>{_words(name)} {evaluation.sides[name].picture_ious[row]:.3f}</small></div>'
                for name in beside
            )
            caption = escape(evaluation.layouts[row].caption)
            cards += f'<figure><div class="trio">{shown}</div><figcaption><b>{row}</b> {caption}</figcaption></figure>'
        out += f'<h3>{heading} by mIoU</h3><div class="cases">{cards}</div>'
    return out


def _data_url(picture: Image.Image, evaluation: Evaluation, row: int) -> str:
    drawn = draw_boxes(picture, evaluation.layouts[row], scale_to=256)
    drawn.thumbnail((256, 512))
    file = io.BytesIO()
    drawn.quantize(64).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


_STYLE = """
main{max-width:1240px}
.wide i,.key i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}.wide small{font-size:11px}
.wide th,.wide td{padding:4px 8px}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(560px,100%),1fr));gap:12px}.pairs>*{min-width:0}
.key{display:flex;flex-wrap:wrap;gap:16px;margin:0 0 8px;font-size:13px}
svg .bar{stroke-width:2.5}svg .name{fill:var(--ink);font-size:12px}details{margin-top:12px}summary{cursor:pointer}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:14px}
.cases figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;align-items:start}.trio img{width:100%;border-radius:6px;display:block}
.cases figcaption{font-size:13px;margin-top:8px;color:var(--soft)}
"""
