"""DenseLayout: the Layout Grounding Score (LGS) of layouts with fifteen boxes and more.

Source: github.com/FireRedTeam/InstanceAssemble, a572349, benchmark/score_LGS.py and benchmark/utils.py (paper: arXiv
2509.16691). A detector is asked for each box's category alone; the box's IoU is the best of what it finds, and counts only
from 0.5 on. Where it counts, the *found* box is cut out and a judge asked for colour, texture and shape: yes is worth
the IoU. All four scores are sums over all boxes, divided by their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdit_lora.data.formats.common import Context, key_of, need, text
from mmdit_lora.data.formats.layout_sets import dense_layout_boxes
from mmdit_lora.data.formats.tables import rows, table_files
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.protocols.common import (
    Case,
    PublishedProtocol,
    Question,
    Seen,
    Thing,
    best,
    checked,
    labelled,
    layout_of,
    paired,
    raw_box,
    share,
    stated_size,
    yes,
)
from mmdit_lora.evaluation.protocols.layoutsam import ATTRIBUTES
from mmdit_lora.files import write_json, write_text

MET = 0.5  # IoU from which on a box counts (--iou_thr of score_LGS.py)


class DenseLayout(PublishedProtocol):
    """`FireRedTeam/DenseLayout`, 5,000 layouts; the paper detects with Grounding DINO Swin-T and asks MiniCPM-V-2.6."""

    name = "denselayout"
    title = "DenseLayout (LGS)"
    source = "github.com/FireRedTeam/InstanceAssemble a572349, benchmark/score_LGS.py; arXiv 2509.16691"
    metrics = {  # noqa: RUF012
        "miou": f"mean over boxes of the IoU with the best detection of the category, 0 below {MET:g}",
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

    def read(self, path: str | Path) -> list[Case]:
        """Rows of *.parquet (or .jsonl, .json): id, prompt, width, height, annos [{bbox, category_name, caption}]."""
        path = Path(path)
        table = rows(table_files(Context(path), ".parquet", ".jsonl", ".json"), without=("image",))
        return checked([_case(row, location, path) for location, row in table], path)

    def questions(self, case: Case, seen: Seen = Seen()) -> list[Question]:  # noqa: B008
        """Three for each box that counts and has a description beyond its category; about the detection, cut out."""
        out = []
        for thing in case.things:
            value, found = best(thing, labelled(seen, thing.label))
            if value < MET or found is None or thing.label == thing.detail:
                continue
            for kind in ATTRIBUTES:
                asked = (
                    f'Is the subject in "{thing.label}" in the image consistent with the {kind} described in the detailed '
                    f'description: "{thing.detail}"? Strictly answer with "Yes" or "No". If the {kind} is not '
                    'mentioned, answer "Yes".'
                )
                out.append(Question(f"{thing.key}: {kind}", asked, found.xyxy))
        return out

    def score(self, cases: Sequence[Case], seen: Sequence[Seen]) -> dict[str, float]:
        """Sums over boxes, divided by the number of all boxes; without a judge the IoU alone."""
        sums = [_sums(case, one) for case, one in paired(cases, seen)]
        boxes = sum(int(one["box_count"]) for one in sums)
        judged = any(one.answers is not None for one in seen)
        keys = {"miou": "sum_iou"} | ({kind: f"sum_{kind}" for kind in ATTRIBUTES} if judged else {})
        return {key: share(sum(one[name] for one in sums), boxes) for key, name in keys.items()}

    def write_results(self, cases: Sequence[Case], seen: Sequence[Seen], out: str | Path) -> list[Path]:
        """lgs_score_detailed.json (sums by image) and lgs_score.txt, as score_LGS.py writes them."""
        sums = {f"{case.id}.jpg": _sums(case, one) for case, one in paired(cases, seen)}
        boxes = sum(int(one["box_count"]) for one in sums.values())
        lines = [f"dense instance score: {boxes} boxes"]
        for key in ("iou", *ATTRIBUTES):
            lines.append(f"\t - {key} score: {share(sum(one[f'sum_{key}'] for one in sums.values()), boxes)}")
        files = [Path(out) / "lgs_score_detailed.json", Path(out) / "lgs_score.txt"]
        write_json(files[0], sums)
        write_text(files[1], "\n".join(lines) + "\n")
        return files


def _sums(case: Case, seen: Seen) -> dict[str, float]:
    sums: dict[str, float] = {"box_count": len(case.things), "sum_iou": 0.0} | {f"sum_{k}": 0.0 for k in ATTRIBUTES}
    for thing in case.things:
        value, _ = best(thing, labelled(seen, thing.label))
        if value < MET:
            continue
        sums["sum_iou"] += value
        for kind in ATTRIBUTES:
            sums[f"sum_{kind}"] += value * yes(seen, f"{thing.key}: {kind}")
    return sums


def _case(row: Any, location: str, path: Path) -> Case:
    if isinstance(row, InputError):
        raise row
    size = stated_size(row, location)
    things = []
    for index, said in enumerate(dense_layout_boxes(row, location)):
        label = text(said.short, "category_name", said.location)
        detail = said.phrase(True)  # what InstanceAssemble paints: `caption`
        things.append(Thing(raw_box(said, path, "pixel", size), label, detail, detail, str(index)))
    id_ = str(key_of(row, "id", location))
    caption = text(need(row, "prompt", location), "prompt", location)
    return Case(id_, layout_of(caption, things, location), size, tuple(things), (f"{id_}.jpg",), (id_,), location)
