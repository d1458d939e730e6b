"""An evaluation for reading: `report.html`, one page without a network, and `report.md`, its tables."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from mmdit_lora.errors import clip
from mmdit_lora.evaluation.evaluate import ADAPTERS, SIDES, Evaluation
from mmdit_lora.evaluation.metrics import FIGURES
from mmdit_lora.layout import Layout
from mmdit_lora.visual.canvas import Rgb, one_line
from mmdit_lora.visual.draw import draw_boxes, phrase_colors
from mmdit_lora.visual.page import document, escape_markdown

SHOWN = 8  # best and worst images each
FIGURE_TEXT = FIGURES | {
    "ap": "COCO's average precision, a category a phrase, over IoU 0.50 to 0.95",
    "ap50": "the same at IoU 0.50",
    "ar_100": "COCO's average recall",
    "spread": "difference of images of one layout from different noise (root mean square, pixels in [0, 1])",
    "clip_score": "CLIP score of the image with its caption",
    "clip_box": "CLIP score of each box's crop with its phrase",
    "kid_clip": "kernel distance to the data set's own images, of CLIP's features; 0 = alike",
}
_CHIPS = 12  # phrases in the legend of an image
_OF_GROUPS = ("iou50", "miou")
_BY_PHRASE = "By phrase"
_ABOUT_GROUPS = "The share of boxes met at IoU 0.5 (iou50), and the mean IoU of boxes."
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
    "images": "images made by something else",
    "ground_truth": "the data's own images: the ceiling",
    "shuffled": "those, with layouts of others: the floor",
}


def conditions_of(report: Mapping[str, Any]) -> list[str]:
    """The sides that a report (or one of its groups) has, in order."""
    return [name for name in SIDES if name in report]


def figures_of(report: Mapping[str, Any]) -> list[str]:
    """The figures that any of its sides has, in order."""
    return [name for name in FIGURE_TEXT if any(name in report[side] for side in conditions_of(report))]


# -- markdown ------------------------------------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any], *, title: str) -> str:
    """`report.md`: every table, figures with their 95 % intervals."""
    facts = [escape_markdown(line) for line in _facts(report)]
    lines = [f"# {escape_markdown(title)}", "", *facts, "", *_table(report, with_intervals=True), ""]
    for name, figures in report["differences"].items():
        lines += [f"## {_words(name)}", "", "| | difference | 95 % interval |", "| --- | ---: | ---: |"]
        lines += [
            f"| {key} | {found['value']:+.3f} | {_interval(found['interval'], '+.3f')} |"
            for key, found in figures.items()
        ]
        lines.append("")
    for heading, groups in _groups(report):
        if heading == _BY_PHRASE:
            lines += [f"## {heading}", "", _phrases_shown(report), "", *_phrase_table(groups), ""]
            continue
        for group, sides in groups.items():
            lines += [f"## {heading}: {group} ({_size(sides)})", "", *_table(sides), ""]
    return "\n".join(lines)


def _facts(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{report['layouts']} layouts, seed {report['seed']}."]
    if (tested := report.get("detector")) is not None:
        found = tested["true"]
        lines.append(
            f"Detector {clip(tested['detector'])}, on the data set's own images: {tested['verdict']}; recall {found['recall']:.3f}, "
            f"precision {found['precision']:.3f}, mIoU of the boxes met {found['miou']:.3f}."
        )
    return lines


def _phrase_table(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    sides = conditions_of(next(iter(groups.values())))
    head = ["", "boxes", *(f"{_words(side)} {name}" for side in sides for name in _OF_GROUPS)]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for phrase, figures in groups.items():
        cells = [_cell(figures[side], name, with_intervals=False) for side in sides for name in _OF_GROUPS]
        lines.append("| " + " | ".join([escape_markdown(clip(phrase, 120)), str(figures["boxes"]), *cells]) + " |")
    return lines


def _table(report: Mapping[str, Any], *, with_intervals: bool = False) -> list[str]:
    names = figures_of(report)
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for side in conditions_of(report):
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


def _groups(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Heading, and its groups by name; a division that has all in one group repeats the whole and is left out."""
    headings = {
        "by_phrase": _BY_PHRASE,
        "by_boxes": "By boxes an image",
        "by_size": "By size of the box",
        "by_overlap": "By overlap of boxes",
    }
    for key, heading in headings.items():
        if len(report[key]) > 1:
            yield heading, report[key]


def _size(group: Mapping[str, Any]) -> str:
    count, what = (group["layouts"], "layout") if "layouts" in group else (group["boxes"], "box")
    return f"{count} {what if count == 1 else {'layout': 'layouts', 'box': 'boxes'}[what]}"


def _phrases_shown(report: Mapping[str, Any]) -> str:
    shown = len(report["by_phrase"])
    which = f"The {shown} most frequent of {report['phrases']} phrases" if shown < report["phrases"] else "All phrases"
    return f"{which}: boxes, the share of them met at IoU 0.5 (iou50), and their mean IoU."


def _words(name: str) -> str:
    return name.replace("_", " ")


# -- html ----------------------------------------------------------------------------------------------------------------


def page(evaluation: Evaluation, report: Mapping[str, Any], *, title: str) -> str:
    """`report.html`.

    Args:
        report: `evaluation.to_dict()`.
    """
    chief = next(name for name in ("adapter", "images", "base", "ground_truth") if name in evaluation.sides)
    notes = "".join(f"<li>{escape(line)}</li>" for line in _facts(report))
    parts = [
        _images(evaluation, chief),
        f'<h2>Fidelity</h2><ul class="notes">{notes}</ul>{_html_table(report)}'
        f"<div class='charts one'>{_plot(report)}</div>",
        _html_differences(report),
        _html_groups(report),
    ]
    found = report[chief]
    verdict = f"{_words(chief)}: mIoU {found['miou']:.3f} {_interval(found['intervals']['miou'], '.3f')}"
    if "adapter_minus_base" in report["differences"]:
        moved = report["differences"]["adapter_minus_base"]["miou"]
        verdict += f", {moved['value']:+.3f} {_interval(moved['interval'], '+.3f')} to the base"
    return document("".join(parts), kind="evaluation", title=title, verdict=verdict, style=_STYLE)


def _html_table(report: Mapping[str, Any]) -> str:
    """A row a figure, with what it is; a column a side."""
    sides = conditions_of(report)
    head = "".join(f"<th>{_dot(side)}{_words(side)}<small>{_SIDE_TEXT[side]}</small></th>" for side in sides)
    rows = ""
    for name in figures_of(report):
        cells = ""
        for side in sides:
            between = report[side].get("intervals", {}).get(name)
            shown = f"{report[side][name]:.3f}" if name in report[side] else ""
            cells += f"<td>{shown}{f'<small>{between[0]:.3f} – {between[1]:.3f}</small>' if between else ''}</td>"
        rows += f"<tr><td><b>{_words(name)}</b><small>{escape(FIGURE_TEXT[name])}</small></td>{cells}</tr>"
    return (
        f'<div class="wide figures-of"><table><thead><tr><th>figure</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="of">Small below a figure: its 95 % interval over images.</p>'
    )


def _dot(side: str) -> str:
    return f"<i style='background:{_COLORS[side]}'></i>"


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
    """A table a division: a row a group, two figures a side."""
    out = ""
    for heading, groups in _groups(report):
        sides = conditions_of(next(iter(groups.values())))
        head = "".join(f'<th colspan="{len(_OF_GROUPS)}">{_dot(side)}{_words(side)}</th>' for side in sides)
        names = "".join(f"<th>{_words(name)}</th>" for _ in sides for name in _OF_GROUPS)
        rows = ""
        for group, figures in groups.items():
            cells = "".join(
                f"<td>{_cell(figures[side], name, with_intervals=False)}</td>" for side in sides for name in _OF_GROUPS
            )
            rows += f"<tr><td>{escape(clip(group, 120))}<small>{_size(figures)}</small></td>{cells}</tr>"
        about = _phrases_shown(report) if heading == _BY_PHRASE else _ABOUT_GROUPS
        out += (
            f'<h2>{heading}</h2><p class="of">{about}</p><div class="wide"><table><thead><tr><th></th>{head}</tr>'
            f"<tr><th></th>{names}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return out


def _plot(report: Mapping[str, Any]) -> str:
    """Figures between 0 and 1 as dots with their intervals, a row a figure, a colour a side."""
    names = [name for name in _PLOTTED if any(name in report[side] for side in conditions_of(report))]
    sides = conditions_of(report)
    left, wide, row = 110, 420, 9 * len(sides) + 12
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
        f'<figure><figcaption>Figures with their 95 % intervals over images</figcaption><p class="key">{key}</p>'
        f'<svg viewBox="0 0 {left + wide + 20} {tall}" role="img">{"".join(parts)}</svg></figure>'
    )


def _images(evaluation: Evaluation, chief: str) -> str:
    """The images of highest and lowest mIoU, beside the base's and the data set's own."""
    ious = np.array(evaluation.sides[chief].image_ious)
    order = [int(n) for n in np.argsort(ious, kind="stable") if not np.isnan(ious[n])]
    beside = [name for name in ("base", chief, "ground_truth") if name in evaluation.sides]
    beside = list(dict.fromkeys(beside))
    colors = phrase_colors(evaluation.layouts)
    out = (
        f'<p class="of">Boxes are what the layout asks for, a phrase in one colour on the whole page. The number below a '
        f"image is the mean IoU of its boxes with what was found in it; sorted by {_words(chief)}.</p>"
    )
    for heading, rows in (("Best", order[::-1][:SHOWN]), ("Worst", order[:SHOWN])):
        cards = ""
        for row in rows:
            layout = evaluation.layouts[row]
            shown = "".join(
                f'<div><img src="{_data_url(evaluation.sides[name].images[row], layout, colors)}" '
                f'alt="{_words(name)} {row}"><small>{_words(name)} <b>{evaluation.sides[name].image_ious[row]:.3f}</b></small></div>'
                for name in beside
            )
            cards += (
                f'<figure><div class="trio">{shown}</div><figcaption>{_chips(layout, colors)}'
                f"<p><b>{row}</b> {escape(clip(layout.caption, 300))}</p></figcaption></figure>"
            )
        out += f'<h2>{heading} by mIoU: {_words(chief)}</h2><div class="cases">{cards}</div>'
    return out


def _chips(layout: Layout, colors: Mapping[str, Rgb]) -> str:
    """The legend of an image: each phrase with its colour, and how many boxes it has."""
    counts = Counter(one_line(box.phrase) for box in layout.boxes)
    chips = [
        f"<span><i style='background:rgb{colors[phrase]}'></i>{escape(clip(phrase, 80))}"
        f"{f' x{count}' if count > 1 else ''}</span>"
        for phrase, count in counts.most_common(_CHIPS)
    ]
    more = f"<span>and {len(counts) - _CHIPS} more</span>" if len(counts) > _CHIPS else ""
    return f'<p class="chips">{"".join(chips)}{more}</p>'


def _data_url(image: Image.Image, layout: Layout, colors: Mapping[str, Rgb]) -> str:
    drawn = draw_boxes(image, layout, scale_to=256, labels=False, colors=colors)
    drawn.thumbnail((256, 512))
    file = io.BytesIO()
    drawn.quantize(64).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


_STYLE = """
main{max-width:1240px}
.wide i,.key i,.chips i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:6px;flex:none}
.wide small{font-size:11px;font-weight:400}.wide th,.wide td{padding:4px 8px}
.wide td:first-child,.wide th:first-child{position:sticky;left:0;background:var(--card);white-space:normal;min-width:120px}
.wide td:first-child{overflow-wrap:anywhere}.wide th[colspan]{text-align:center}.wide tbody tr+tr td{border-top:1px solid var(--line)}
.figures-of th small{white-space:normal;min-width:76px;max-width:130px;margin-left:auto}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(560px,100%),1fr));gap:12px}.pairs>*{min-width:0}
.key{display:flex;flex-wrap:wrap;gap:16px;margin:0 0 8px;font-size:13px}
.charts.one svg{max-width:640px}svg .bar{stroke-width:2.5}svg .name{fill:var(--ink);font-size:12px}
.cases{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:14px}
.cases figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
.trio{display:grid;grid-template-columns:repeat(3,1fr);gap:8px;align-items:start}.trio img{width:100%;border-radius:6px;display:block}
.trio b{color:var(--ink)}.cases figcaption{font-size:13px;margin-top:8px;color:var(--soft);overflow-wrap:anywhere}.cases p{margin:6px 0 0}
.chips{display:flex;flex-wrap:wrap;gap:4px 14px;color:var(--ink)}.chips i{border-radius:2px;outline:1px solid #0006}
@media (max-width:600px){main{padding:20px 12px 60px}h1{font-size:22px}.pairs{gap:10px}.cases figure{padding:8px}
.trio{gap:5px}.trio small{font-size:11px;line-height:1.3}.wide small{white-space:normal;font-size:10px}.wide th,.wide td{padding:4px 5px}
svg text{font-size:16px}svg .name{font-size:18px}}
"""
