"""`check.html`: what is in a data set, and the findings with their images."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image, ImageDraw

from mmdit_lora.boxes import Four
from mmdit_lora.data.check.findings import Example
from mmdit_lora.data.check.report import CheckReport
from mmdit_lora.data.images import load_image, opened
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box
from mmdit_lora.visual.charts import columns, heat, rows
from mmdit_lora.visual.pages import data_url, render

_THUMB = 320  # longer side of a thumbnail in pixels
_AT_FAULT, _OTHER, _BEYOND = (230, 30, 60), (40, 115, 245), (120, 126, 138)
_MAX_PIXELS = 60_000_000  # larger ones are not decoded a second time for a page


def page(report: CheckReport, *, title: str, boxes: Sequence[Box]) -> str:
    """The whole page as HTML.

    Args:
        title: the data set's name.
        boxes: all boxes of the set, for the histograms.
    """
    # Large images are warned of when they are opened, and have a finding of their own.
    with warnings.catch_warnings(action="ignore"), ThreadPoolExecutor() as pool:
        images = [pool.map(thumbnail, finding.examples) for finding in report.findings]
        findings = [(f, [*zip(f.examples, own, strict=True)]) for f, own in zip(report.findings, images, strict=True)]
    errors = sum(finding.severity == "error" for finding in report.findings)
    mild = len(report.findings) - errors
    kinds = [f"{n} kind{'s' if n > 1 else ''} of {what}" for n, what in ((errors, "error"), (mild, "warning")) if n]
    ending = "a run would stop." if errors else "a run can start; look at them first."
    figures = (
        (report.images, "images"),
        (report.records, "layouts"),
        (report.boxes, "boxes"),
        (report.boxes / max(report.records, 1), "boxes a layout"),
        (report.phrases, "distinct phrases"),
        (len(report.image_sizes), "image sizes"),
    )
    return render(
        "check.html",
        title=title,
        verdict=f"{' and '.join(kinds)}: {ending}" if kinds else "No findings.",
        state="bad" if errors else "mild" if mild else "good",
        figures=[(f"{value:,}" if isinstance(value, int) else f"{value:.1f}", name) for value, name in figures],
        remarks=[*report.notes, *(f"{count} {what} left out" for what, count in report.left_out.items())],
        findings=findings,
        drawn=_charts(report, boxes),
    )


def _charts(report: CheckReport, boxes: Sequence[Box]) -> list[tuple[str, str]]:
    sizes, trained = (
        {size.replace("x", " x "): count for size, count in counts.items()}
        for counts in (report.image_sizes, report.buckets)
    )
    areas, sides = by_powers([box.area for box in boxes]), by_powers([min(box.width, box.height) for box in boxes])
    centers = [((box.xyxy[0] + box.xyxy[2]) / 2, (box.xyxy[1] + box.xyxy[3]) / 2) for box in boxes]
    return [
        ("Phrases, by boxes", rows(report.phrase_counts, "phrases")),
        ("Image sizes", rows(sizes, "sizes")),
        ("Sizes in training, by images", rows(trained, "buckets")),
        ("Boxes a layout", columns(_filled(report.boxes_per_image), "boxes")),
        ("Area of boxes, up to this share of the image", columns(areas, "areas")),
        ("Shorter side of boxes, up to this share", columns(sides, "sides")),
        ("Centers of boxes in their images", heat(centers, "centers")),
    ]


def _filled(counts: dict[int, int]) -> dict[str, int]:
    """With the numbers between that no record has; in tens where there are more than 40."""
    if not counts:
        return {}
    step = 1 if max(counts) <= 40 else 10 ** (len(str(max(counts) // 4)) - 1)
    filled = {str(n) if step == 1 else f"{n}+": 0 for n in range(min(counts) // step * step, max(counts) + 1, step)}
    for n, count in counts.items():
        filled[str(n) if step == 1 else f"{n // step * step}+"] += count
    return filled


def by_powers(values: Sequence[float]) -> dict[str, int]:
    """Counts of values in (0, 1] by halves: from 1/1024 and less up to more than 1/2, as percentages."""
    edges = [2.0**-power for power in range(10, -1, -1)]
    names = [f"{edge:.0%}" if edge >= 0.01 else f"{edge:.1%}" for edge in edges]
    counts = dict.fromkeys(names, 0)
    for value in values:
        counts[next((name for edge, name in zip(edges, names, strict=True) if value <= edge), names[-1])] += 1
    return counts


def thumbnail(example: Example) -> str | None:
    """A data URL of the example's image with its boxes; None where it cannot be shown.

    Boxes beyond the image are drawn on a grey margin of up to half a side, and at its edge where they go further.
    """
    if example.image is None:
        return None
    try:
        source = example.image if example.record is None else example.record.source()
        with opened(source) as head:
            if head.width * head.height > _MAX_PIXELS:
                return None
        image = load_image(source)
    except InputError:
        return None
    width, height = (max(1, round(side * _THUMB / max(image.size))) for side in image.size)
    xs, ys = ([v for box in example.at_fault for v in box[axis::2]] for axis in (0, 1))
    left, right = (round(min(max(v, 0), 0.5) * width) for v in (-min(xs, default=0), max(xs, default=1) - 1))
    top, bottom = (round(min(max(v, 0), 0.5) * height) for v in (-min(ys, default=0), max(ys, default=1) - 1))
    canvas = Image.new("RGB", (left + width + right, top + height + bottom), _BEYOND)
    canvas.paste(image.resize((width, height)), (left, top))
    draw = ImageDraw.Draw(canvas)

    def corners(box: Four, grow: int) -> tuple[float, float, float, float]:
        """In pixels and in order, whichever order the box has them in."""
        x = sorted(left + min(max(v, -0.5), 1.5) * (width - 1) for v in box[0::2])
        y = sorted(top + min(max(v, -0.5), 1.5) * (height - 1) for v in box[1::2])
        return x[0] - grow, y[0] - grow, x[1] + grow, y[1] + grow

    for box in example.others:
        draw.rectangle(corners(box, 0), outline=_OTHER)
    for box in example.at_fault:
        draw.rectangle(corners(box, 1), outline=(255, 255, 255), width=5)  # to be seen on any ground
        draw.rectangle(corners(box, 0), outline=_AT_FAULT, width=3)
    return data_url(canvas, "JPEG", quality=80)
