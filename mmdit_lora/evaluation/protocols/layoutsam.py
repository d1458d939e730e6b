"""LayoutSAM-Eval: is each thing in its box, and are its colour, texture and shape as described? Asked of a VLM.

Source: github.com/HuiZhang0812/CreatiLayout, 860d8bd, score_layoutsam_benchmark.py and dataset/layoutsam_benchmark.py
(paper: arXiv 2412.03859). Each box is cut out of the image and asked about; an attribute is asked about only where the
thing is there. The scores are sums over all boxes of all images, divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from mmdit_lora.data.formats.common import Context, need, text
from mmdit_lora.data.formats.layout_sets import layout_sam_eval_boxes
from mmdit_lora.data.formats.tables import rows, table_files
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.protocols.common import (
    Case,
    PublishedProtocol,
    Question,
    Seen,
    Thing,
    checked,
    layout_of,
    paired,
    raw_box,
    share,
    stated_size,
    yes,
)
from mmdit_lora.files import write_json, write_text

ATTRIBUTES = ("color", "texture", "shape")


class LayoutSamEval(PublishedProtocol):
    """`HuiZhang0812/LayoutSAM-eval`, 5,000 layouts; judged in the paper by MiniCPM-V-2.6."""

    name = "layoutsam-eval"
    title = "LayoutSAM-Eval"
    source = "github.com/HuiZhang0812/CreatiLayout 860d8bd, score_layoutsam_benchmark.py; arXiv 2412.03859"
    metrics = {  # noqa: RUF012
        "spatial": "share of boxes in which the judge sees the thing",
        "color": "share of boxes whose thing is there and has the described colour",
        "texture": "the same for the texture",
        "shape": "the same for the shape",
    }
    detector = "unused"
    judge = "needed"
    deviations = ("the paper's judge is MiniCPM-V-2.6 (seed 42); figures of another judge are not comparable with it",)

    def read(self, path: str | Path) -> list[Case]:
        """Rows of *.parquet (or .jsonl, .json): global_caption, bbox_list, region_captions, detail_region_captions, ..."""
        path = Path(path)
        table = rows(table_files(Context(path), ".parquet", ".jsonl", ".json"), without=("image",))
        return checked([_case(row, location, path) for location, row in table], path)

    def questions(self, case: Case, seen: Seen = Seen()) -> list[Question]:  # noqa: ARG002, B008
        """Four a box, about the box cut out; a "/" in a description is left away, as in the authors' code."""
        out = []
        for thing in case.things:
            name, detail = thing.phrase.replace("/", ""), thing.detail.replace("/", "")
            first = f"{thing.key}: spatial"
            strictly = 'Strictly answer with "Yes" or "No", without any irrelevant words.'
            out.append(Question(first, f'Is the subject "{name}" present in the image? {strictly}', thing.xyxy))
            for kind in ATTRIBUTES:
                asked = (
                    f'Is the subject in "{name}" in the image consistent with the {kind} described in the detailed '
                    f'description: "{detail}"? {strictly} If the {kind} is not mentioned in the detailed description, '
                    'the answer is "Yes".'
                )
                out.append(Question(f"{thing.key}: {kind}", asked, thing.xyxy, after=first))
        return out

    def score(self, cases: Sequence[Case], seen: Sequence[Seen]) -> dict[str, float]:
        """Sums over boxes, divided by the number of all boxes."""
        counts = [_counts(case, one) for case, one in paired(cases, seen)]
        boxes = sum(one["bbox_count"] for one in counts)
        return {key: share(sum(one[f"score_{key}"] for one in counts), boxes) for key in self.metrics}

    def write_results(self, cases: Sequence[Case], seen: Sequence[Seen], out: str | Path) -> list[Path]:
        """minicpm-vqa.json (counts by image) and minicpm-vqa-score.txt, as score_layoutsam_benchmark.py writes them."""
        counts = {PurePath(case.images[0]).name: _counts(case, one) for case, one in paired(cases, seen)}
        stats = {
            name: {k: v if k == "bbox_count" else float(v) for k, v in one.items()} for name, one in counts.items()
        }
        boxes = sum(one["bbox_count"] for one in counts.values())
        lines = [f"Total number of bbox: {boxes}"]
        for key in self.metrics:
            total = float(sum(one[f"score_{key}"] for one in counts.values()))
            lines.append(f"Total score of {key}: {total}; Average score of {key}: {round(share(total, boxes), 4)}")
        files = [Path(out) / "minicpm-vqa.json", Path(out) / "minicpm-vqa-score.txt"]
        write_json(files[0], stats)
        write_text(files[1], "\n".join(lines) + "\n")
        return files


def _counts(case: Case, seen: Seen) -> dict[str, int]:
    """How many boxes there are, and of how many the judge said yes; an attribute counts only where the thing is there."""
    there = [thing.key for thing in case.things if yes(seen, f"{thing.key}: spatial")]
    counts = {"bbox_count": len(case.things), "score_spatial": len(there)}
    return counts | {f"score_{kind}": sum(yes(seen, f"{key}: {kind}") for key in there) for kind in ATTRIBUTES}


def _case(row: Any, location: str, path: Path) -> Case:
    if isinstance(row, InputError):
        raise row
    size = stated_size(row, location)
    things = []
    for index, said in enumerate(layout_sam_eval_boxes(row, location)):
        # Three decimals, as the authors' BboxDataset rounds them before anything is painted or cut out.
        x0, y0, x1, y1 = (round(v, 3) for v in raw_box(said, path, "pixel", size))
        phrase, detail = said.phrase(False), said.phrase(True)
        things.append(Thing((x0, y0, x1, y1), phrase, phrase, detail, str(index)))
    name = text(need(row, "file_name", location), "file_name", location)
    caption = text(need(row, "global_caption", location), "global_caption", location)
    stem = PurePath(name).stem
    return Case(stem, layout_of(caption, things, location), size, tuple(things), (name,), (stem,), location)
