"""LayoutSAM-Eval: is each object in its box, and are its colour, texture and shape as described? Asked of a VLM.

Source: github.com/HuiZhang0812/CreatiLayout, 860d8bd, score_layoutsam_benchmark.py and dataset/layoutsam_benchmark.py
(paper: arXiv 2412.03859). Each box is cropped and asked about; an attribute is asked about only if the object is there. The
scores are sums over all boxes of all images, divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from mmdit_lora.data.formats.common import need_text
from mmdit_lora.data.formats.layout_sets import layout_sam_eval_boxes
from mmdit_lora.evaluation.protocols.base import (
    Case,
    Observation,
    Pairs,
    PublishedProtocol,
    Question,
    Region,
    image_size,
    raw_box,
    share,
    table_rows,
)
from mmdit_lora.files import write_json, write_text

ATTRIBUTES = ("color", "texture", "shape")
_STRICTLY = 'Strictly answer with "Yes" or "No", without any irrelevant words.'


class LayoutSamEval(PublishedProtocol):
    """`HuiZhang0812/LayoutSAM-eval`, 5,000 layouts; judged in the paper by MiniCPM-V-2.6.

    Its files are *.parquet (or .jsonl, .json): global_caption, bbox_list, region_captions, detail_region_captions, ...
    """

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

    def _cases(self, path: Path) -> Iterator[Case]:
        for location, row in table_rows(path, ".parquet", ".jsonl", ".json"):
            size, regions = image_size(row, location), []
            for index, said in enumerate(layout_sam_eval_boxes(row, location)):
                # Three decimals, as the authors' BboxDataset rounds them before anything is generated or cropped.
                x0, y0, x1, y1 = (round(v, 3) for v in raw_box(said, path, "pixel", size))
                phrase, detail = said.phrase(False), said.phrase(True)
                regions.append(Region((x0, y0, x1, y1), phrase, phrase, detail, str(index)))
            name, caption = (need_text(row, key, location) for key in ("file_name", "global_caption"))
            stem = PurePath(name).stem
            yield Case(stem, caption, size, tuple(regions), (name,), (stem,), location)

    def questions(self, case: Case, observation: Observation = Observation()) -> list[Question]:  # noqa: ARG002, B008
        """Four per box, about its crop; "/" is removed from descriptions, as in the authors' code."""
        out = []
        for region in case.regions:
            name, detail, first = (
                region.phrase.replace("/", ""),
                region.detail.replace("/", ""),
                f"{region.key}: spatial",
            )
            out.append(Question(first, f'Is the subject "{name}" present in the image? {_STRICTLY}', region.xyxy))
            for kind in ATTRIBUTES:
                asked = (
                    f'Is the subject in "{name}" in the image consistent with the {kind} described in the detailed '
                    f'description: "{detail}"? {_STRICTLY} If the {kind} is not mentioned in the detailed description, '
                    'the answer is "Yes".'
                )
                out.append(Question(f"{region.key}: {kind}", asked, region.xyxy, after=first))
        return out

    def _score(self, pairs: Pairs) -> dict[str, float]:
        counts = [_counts(*pair) for pair in pairs]
        boxes = int(sum(one["bbox_count"] for one in counts))
        return {key: share(sum(one[f"score_{key}"] for one in counts), boxes) for key in self.metrics}

    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """minicpm-vqa.json (counts by image) and minicpm-vqa-score.txt, as score_layoutsam_benchmark.py writes them."""
        counts = {PurePath(c.images[0]).name: _counts(c, seen) for c, seen in zip(cases, observations, strict=True)}
        boxes = int(sum(one["bbox_count"] for one in counts.values()))
        lines = [f"Total number of bbox: {boxes}"]
        for key in self.metrics:
            total = sum(one[f"score_{key}"] for one in counts.values())
            lines.append(f"Total score of {key}: {total}; Average score of {key}: {round(share(total, boxes), 4)}")
        files = [Path(out) / "minicpm-vqa.json", Path(out) / "minicpm-vqa-score.txt"]
        write_json(files[0], counts)
        write_text(files[1], "\n".join(lines) + "\n")
        return files


def _counts(case: Case, seen: Observation) -> dict[str, float]:
    """The number of boxes, and of those that the judge said yes to; an attribute counts only if the object is there."""
    there = [region.key for region in case.regions if seen.yes(f"{region.key}: spatial")]
    counts = {"bbox_count": len(case.regions), "score_spatial": float(len(there))}
    return counts | {f"score_{kind}": float(sum(seen.yes(f"{key}: {kind}") for key in there)) for kind in ATTRIBUTES}
