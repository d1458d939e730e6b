"""DenseLayout: the Layout Grounding Score (LGS) of layouts with fifteen boxes and more.

Source: github.com/FireRedTeam/InstanceAssemble, a572349, benchmark/score_LGS.py and benchmark/utils.py (paper: arXiv
2509.16691). A detector looks for each box's category alone; the box's IoU is the best of its detections, and counts only
from 0.5. If it counts, the *detected* box is cropped and a judge asked for colour, texture and shape: yes is worth the IoU.
All four scores are sums over all boxes, divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mmdit_lora.data.formats.common import key_of, need_text, text
from mmdit_lora.data.formats.layout_sets import dense_layout_boxes
from mmdit_lora.evaluation.protocols.base import (
    MATCHED,
    Case,
    Observation,
    Pairs,
    PublishedProtocol,
    Question,
    Region,
    best,
    image_size,
    raw_box,
    share,
    table_rows,
)
from mmdit_lora.evaluation.protocols.layoutsam import ATTRIBUTES
from mmdit_lora.files import write_json, write_text


class DenseLayout(PublishedProtocol):
    """`FireRedTeam/DenseLayout`, 5,000 layouts; the paper detects with Grounding DINO Swin-T and asks MiniCPM-V-2.6.

    Its files are *.parquet (or .jsonl, .json): id, prompt, width, height, annos [{bbox, category_name, caption}].
    """

    name = "denselayout"
    title = "DenseLayout (LGS)"
    source = "github.com/FireRedTeam/InstanceAssemble a572349, benchmark/score_LGS.py; arXiv 2509.16691"
    metrics = {  # noqa: RUF012
        "miou": f"mean over boxes of the IoU with the best detection of the category, 0 below {MATCHED:g}",
        "color": "mean over boxes of that IoU where the judge finds the described colour, else 0",
        "texture": "the same for the texture",
        "shape": "the same for the shape",
    }
    judge = "optional"
    deviations = (
        "the paper detects with Grounding DINO Swin-T (box threshold 0.35, text threshold 0.25), one prompt a category, "
        "and asks MiniCPM-V-2.6 (seed 42)",
        "an image that is missing stops the scoring; the authors' script leaves it out of the mean",
    )

    def _cases(self, path: Path) -> Iterator[Case]:
        for location, row in table_rows(path, ".parquet", ".jsonl", ".json"):
            size, regions = image_size(row, location), []
            for index, said in enumerate(dense_layout_boxes(row, location)):
                label = text(said.short, "category_name", said.location)
                detail = said.phrase(True)  # what InstanceAssemble generates: `caption`
                regions.append(Region(raw_box(said, path, "pixel", size), label, detail, detail, str(index)))
            id_, caption = str(key_of(row, "id", location)), need_text(row, "prompt", location)
            yield Case(id_, caption, size, tuple(regions), (f"{id_}.jpg",), (id_,), location)

    def questions(self, case: Case, observation: Observation = Observation()) -> list[Question]:  # noqa: B008
        """Three for each box that counts and has a description beyond its category; about the crop of its detection."""
        out = []
        for region in case.regions:
            iou, found = best(region.xyxy, observation.labelled(region.label))
            if iou < MATCHED or found is None or region.label == region.detail:
                continue
            for kind in ATTRIBUTES:
                asked = (
                    f'Is the subject in "{region.label}" in the image consistent with the {kind} described in the detailed '
                    f'description: "{region.detail}"? Strictly answer with "Yes" or "No". If the {kind} is not '
                    'mentioned, answer "Yes".'
                )
                out.append(Question(f"{region.key}: {kind}", asked, found.xyxy))
        return out

    def _score(self, pairs: Pairs) -> dict[str, float]:
        scores = _mean([_sums(*pair) for pair in pairs])
        return scores if any(seen.answers is not None for _, seen in pairs) else {"miou": scores["miou"]}

    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """lgs_score_detailed.json (sums by image) and lgs_score.txt, as score_LGS.py writes them."""
        sums = {f"{c.id}.jpg": _sums(c, seen) for c, seen in zip(cases, observations, strict=True)}
        lines = [f"dense instance score: {sum(int(one['box_count']) for one in sums.values())} boxes"]
        lines += [f"\t - {key.removeprefix('m')} score: {value}" for key, value in _mean([*sums.values()]).items()]
        files = [Path(out) / "lgs_score_detailed.json", Path(out) / "lgs_score.txt"]
        write_json(files[0], sums)
        write_text(files[1], "\n".join(lines) + "\n")
        return files


def _sums(case: Case, seen: Observation) -> dict[str, float]:
    sums = {"box_count": len(case.regions)} | dict.fromkeys(["sum_iou", *(f"sum_{k}" for k in ATTRIBUTES)], 0.0)
    for region in case.regions:
        iou, _ = best(region.xyxy, seen.labelled(region.label))
        if iou >= MATCHED:
            sums["sum_iou"] += iou
            for kind in ATTRIBUTES:
                sums[f"sum_{kind}"] += iou * seen.yes(f"{region.key}: {kind}")
    return sums


def _mean(sums: Sequence[dict[str, float]]) -> dict[str, float]:
    boxes = int(sum(one["box_count"] for one in sums))
    names = {"miou": "sum_iou"} | {kind: f"sum_{kind}" for kind in ATTRIBUTES}
    return {key: share(sum(one[name] for one in sums), boxes) for key, name in names.items()}
