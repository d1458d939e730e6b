"""An evaluation for reading: `report.html`, one page without a network, and `report.md`, its tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from mmdit_lora.errors import clip
from mmdit_lora.evaluation.evaluate import ADAPTERS, CONDITIONS, Evaluation
from mmdit_lora.evaluation.metrics import FIGURES
from mmdit_lora.visual import draw_boxes, phrase_colors
from mmdit_lora.visual.charts import figure, to_svg
from mmdit_lora.visual.compose import Rgb, one_line
from mmdit_lora.visual.pages import data_url, interval, number, render

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
_DIVISIONS = {
    "by_phrase": "By phrase",
    "by_boxes": "By boxes an image",
    "by_size": "By size of the box",
    "by_overlap": "By overlap of boxes",
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
    "text_only": "generated without boxes",
    "layout_only": "generated without a caption",
    "images": "images made by something else",
    "ground_truth": "the data's own images: the ceiling",
    "shuffled": "those, with layouts of others: the floor",
}


def markdown(report: Mapping[str, Any], *, title: str) -> str:
    """`report.md`: every table, figures with their 95 % intervals."""
    tables = [("", "", *_table(report, with_intervals=True))]
    for name, rows in _differences(report).items():
        tables.append((_words(name), "", ["", "difference", "95 % interval"], rows))
    for heading, about, groups in _divisions(report):
        if heading == _DIVISIONS["by_phrase"]:
            sides = _sides(next(iter(groups.values())))
            head = ["", "boxes", *(f"{_words(side)} {name}" for side in sides for name in _OF_GROUPS)]
            cells = [
                [
                    clip(phrase, 120),
                    group["boxes"],
                    *(_cell(group[side], name) for side in sides for name in _OF_GROUPS),
                ]
                for phrase, group in groups.items()
            ]
            tables.append((heading, about, head, cells))
        else:
            tables += [(f"{heading}: {name} ({_size(group)})", "", *_table(group)) for name, group in groups.items()]
    return render("report.md", title=title, facts=_facts(report), notes=(), tables=tables)


def page(evaluation: Evaluation, report: Mapping[str, Any], *, title: str) -> str:
    """`report.html`.

    Args:
        report: `evaluation.to_dict()`.
    """
    chief = next(name for name in ("adapter", "images", "base", "ground_truth") if name in evaluation.conditions)
    own, moved = report[chief], report["differences"].get("adapter_minus_base", {}).get("miou")
    verdict = f"{_words(chief)}: mIoU {own['miou']:.3f} {interval(own['intervals']['miou'])}"
    if moved is not None:
        verdict += f", {moved['value']:+.3f} {interval(moved['interval'], '+.3f')} to the base"
    divisions = [
        (heading, about, [(clip(name, 120), _size(group), group) for name, group in groups.items()],
         _sides(next(iter(groups.values()))))
        for heading, about, groups in _divisions(report)
    ]  # fmt: skip
    return render(
        "evaluation.html",
        title=title,
        verdict=verdict,
        chief=chief,
        galleries=_galleries(evaluation, chief),
        facts=_facts(report),
        report=report,
        sides=_sides(report),
        side_text=_SIDE_TEXT,
        figures=_figures(report),
        figure_text=FIGURE_TEXT,
        colors=_COLORS,
        plot=_plot(report),
        differences=_differences(report),
        divisions=divisions,
        of_groups=_OF_GROUPS,
    )


def _sides(report: Mapping[str, Any]) -> list[str]:
    """The sides that a report (or one of its groups) has, in order."""
    return [name for name in CONDITIONS if name in report]


def _figures(report: Mapping[str, Any]) -> list[str]:
    """The figures that any of its sides has, in order."""
    return [name for name in FIGURE_TEXT if any(name in report[side] for side in _sides(report))]


def _facts(report: Mapping[str, Any]) -> list[str]:
    lines = [f"{report['layouts']} layouts, seed {report['seed']}."]
    if (tested := report.get("detector")) is not None:
        true = tested["true"]
        lines.append(
            f"Detector {clip(tested['detector'])}, on the data set's own images: {tested['verdict']}; recall {true['recall']:.3f}, "
            f"precision {true['precision']:.3f}, mIoU of the boxes met {true['miou']:.3f}."
        )
    return lines


def _table(report: Mapping[str, Any], *, with_intervals: bool = False) -> tuple[list[str], list[list[str]]]:
    """Head and rows: a row a side, a column a figure."""
    names = _figures(report)
    rows = []
    for side in _sides(report):
        ends = report[side].get("intervals", {}) if with_intervals else {}
        cells = (Markup(f"{_cell(report[side], name)} {interval(ends.get(name))}".rstrip()) for name in names)
        rows.append([_words(side), *cells])
    return ["", *map(_words, names)], rows


def _cell(figures: Mapping[str, Any], name: str) -> str:
    return number(figures[name]) if name in figures else ""


def _differences(report: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """Rows of figure, difference and interval, by the two sides."""
    return {
        name: [[_words(key), number(f["value"], "+.3f"), interval(f["interval"], "+.3f")] for key, f in moved.items()]
        for name, moved in report["differences"].items()
    }


def _divisions(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Heading, what is in it, and groups by name; a division that has all in one group repeats the whole and is left out."""
    for key, heading in _DIVISIONS.items():
        groups, about = report[key], "The share of boxes met at IoU 0.5 (iou50), and the mean IoU of boxes."
        if key == "by_phrase":
            few, all_of = len(groups), report["phrases"]
            which = f"The {few} most frequent of {all_of} phrases" if few < all_of else "All phrases"
            about = f"{which}: boxes, the share of them met at IoU 0.5 (iou50), and their mean IoU."
        if len(groups) > 1:
            yield heading, about, groups


def _size(group: Mapping[str, Any]) -> str:
    count, one, many = (
        (group["layouts"], "layout", "layouts") if "layouts" in group else (group["boxes"], "box", "boxes")
    )
    return f"{count} {one if count == 1 else many}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _plot(report: Mapping[str, Any]) -> str:
    """Figures between 0 and 1 as dots with their intervals, a row a figure, a colour a side."""
    sides = _sides(report)
    names = [name for name in _PLOTTED if any(name in report[side] for side in sides)]
    step = 0.7 / len(sides)
    with figure(6.5, 0.6 + len(names) * (0.13 * len(sides) + 0.12)) as (drawn, axes):
        for place, side in enumerate(sides):
            for row, name in enumerate(names):
                if name not in report[side]:
                    continue
                value, y = report[side][name], row - 0.35 + step * (place + 0.5)
                ends = report[side]["intervals"].get(name) or (value, value)
                axes.plot(ends, [y, y], color=_COLORS[side], lw=1.8)
                axes.plot(value, y, "o", color=_COLORS[side], markersize=4.5)
            axes.plot([], [], "o", color=_COLORS[side], label=_words(side))
        axes.set_yticks(range(len(names)), [_words(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(sides), 6), columnspacing=1, handletextpad=0)
        return to_svg(drawn, "figures")


def _galleries(evaluation: Evaluation, chief: str) -> list[tuple[str, list[dict[str, Any]]]]:
    """The images of highest and lowest mIoU, beside the base's and the data set's own."""
    ious = np.array(evaluation.conditions[chief].image_ious)
    order = [int(n) for n in np.argsort(ious, kind="stable") if not np.isnan(ious[n])]
    colors = phrase_colors(evaluation.layouts)
    return [
        (heading, [_case(evaluation, row, chief, colors) for row in rows])
        for heading, rows in (("Best", order[::-1][:SHOWN]), ("Worst", order[:SHOWN]))
    ]


def _case(evaluation: Evaluation, row: int, chief: str, colors: Mapping[str, Rgb]) -> dict[str, Any]:
    layout, images = evaluation.layouts[row], []
    for side in dict.fromkeys(("base", chief, "ground_truth")):
        if side in evaluation.conditions:
            shown = evaluation.conditions[side]
            drawn = draw_boxes(shown.images[row], layout, scale_to=256, labels=False, colors=colors)
            drawn.thumbnail((256, 512))
            images.append((side, data_url(drawn.quantize(64), "PNG"), shown.image_ious[row]))
    counts = Counter(one_line(box.phrase) for box in layout.boxes)
    chips = [(clip(phrase, 80), colors[phrase], count) for phrase, count in counts.most_common(_CHIPS)]
    more = len(counts) - len(chips)
    return {"number": row, "caption": clip(layout.caption, 300), "images": images, "chips": chips, "more": more}
