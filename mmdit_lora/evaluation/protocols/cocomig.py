"""COCO-MIG: 800 layouts of two to six coloured things; is each where it should be, in its colour?

Source: github.com/LeyRio/MIG_Bench, 063ec45, eval_mig.py; the layouts are those of github.com/limuloo/MIGC, effd6cc,
bench_file (paper: arXiv 2402.05408). A detector looks for the noun of each phrase ("car" of "a red car"). Of a thing, v is
the best IoU of its detections (after non-maximum suppression at 0.8), and c whether at least a fifth of its pixels has the
colour:

    it is met          if v >= 0.5 and c
    it adds to mIoU    v if v < 0.5, v if v >= 0.5 and c, and 0 if v >= 0.5 and not c

I-SR is the share of things that are met, SR that of images whose things are all met, mIoU the mean over things: each over
all images and for images with two things (L2) to six (L6).

The authors take the pixels of a thing from a SAM mask made from the layout's box. Here they are all pixels of that box,
background included, so the colour test is a proxy of theirs. `Observation.measured` holds the share; whoever has masks puts
the share in the mask there, and the formulas are then the authors'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.ops import nms

from mmdit_lora.data.formats.common import need, read_text
from mmdit_lora.data.formats.layout_sets import coco_mig_boxes, coco_mig_prompts
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection
from mmdit_lora.evaluation.protocols.base import (
    MATCHED,
    Case,
    Observation,
    Pairs,
    PublishedProtocol,
    Region,
    best,
    raw_box,
    share,
)
from mmdit_lora.files import write_json

NMS = 0.8  # IoU above which two detections of a noun are one thing (NMS_THRESHOLD)
COLORED = 0.2  # share of a thing's pixels that must have its colour
SIDE = 512  # images are resized to this before their colours are read
# OpenCV's 8-bit HSV (H in half degrees, 0 to 180; S, V to 255), both ends included: `color_dict` of eval_mig.py.
HSV: dict[str, tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]] = {
    "red": (((0, 50, 70), (9, 255, 255)), ((159, 50, 70), (180, 255, 255))),
    "blue": (((90, 50, 70), (128, 255, 255)),),
    "yellow": (((25, 50, 70), (35, 255, 255)),),
    "green": (((36, 50, 70), (89, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 30)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}
LEVELS = (2, 3, 4, 5, 6)


class CocoMig(PublishedProtocol):
    """`mig_bench.txt` and `mig_bench_anno.yaml` of MIGC (the folder, or one of the two files), in the order of the first.

    The authors detect with Grounding DINO Swin-T.
    """

    name = "coco-mig"
    title = "COCO-MIG"
    source = "github.com/LeyRio/MIG_Bench 063ec45, eval_mig.py; arXiv 2402.05408"
    metrics = {  # noqa: RUF012
        "sr": "share of images of which every thing is met",
        "isr": f"share of things that are met: IoU >= {MATCHED:g} and the right colour",
        "miou": f"mean over things of the IoU, 0 where the place is right (IoU >= {MATCHED:g}) and the colour wrong",
    }
    parts = {f"L{level}": f"{{}}_L{level}" for level in LEVELS}  # noqa: RUF012
    several = True
    deviations = (
        "the colour is read in all of the asked box (HSV ranges and the fifth as published); the authors read it in a SAM "
        "mask made from that box",
        "the authors detect with Grounding DINO Swin-T (box and text threshold 0.25)",
    )

    def _cases(self, path: Path) -> Iterator[Case]:
        folder = path if path.is_dir() else path.parent
        listing = path if path.suffix == ".txt" else folder / "mig_bench.txt"
        yaml = path if path.suffix in (".yaml", ".yml") else folder / "mig_bench_anno.yaml"
        if not yaml.is_file():
            hint = "give the folder bench_file of github.com/limuloo/MIGC"
            raise InputError("no such file", location=str(yaml), hint=hint)
        entries = {prompt: (entry, location) for prompt, entry, location in coco_mig_prompts(yaml)}
        lines = list(entries) if not listing.is_file() else read_text(listing).split("\n")
        for number, line in enumerate(lines, start=1):
            if line in entries:
                yield _case(line, *entries[line], yaml)
            elif line.strip():
                raise InputError(f"{yaml.name} has no prompt {line!r}", location=f"{listing}:{number}")

    def key(self, image: PurePath) -> str:
        """The COCO id at the end of the name, after the last "_"; MIGC's drawn layouts (anno_*) are none of the images."""
        return "" if image.name.startswith("anno_") else image.stem.split("_")[-1]

    def measure(self, case: Case, image: Image.Image) -> dict[str, float]:
        """The share of the pixels of each box that has its colour."""
        hsv = opencv_hsv(np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)))
        return {region.key: _color_share(hsv, region) for region in case.regions}

    def _score(self, pairs: Pairs) -> dict[str, float]:
        images = [(len(case.regions), *_met_and_iou(case, seen)) for case, seen in pairs]
        out: dict[str, float] = {}
        for form, level in [("{}", None), *((f"{{}}_L{level}", level) for level in LEVELS)]:
            if of_level := [one for one in images if level in (None, one[0])]:
                things = sum(count for count, _, _ in of_level)
                out[form.format("sr")] = share(sum(met == count for count, met, _ in of_level), len(of_level))
                out[form.format("isr")] = share(sum(met for _, met, _ in of_level), things)
                out[form.format("miou")] = share(sum(total for _, _, total in of_level), things)
        return out

    def write_results(self, cases: Sequence[Case], observations: Sequence[Observation], out: str | Path) -> list[Path]:
        """metric_<name>.json with eval_mig.py's keys, its spelling included; null for a level without images."""
        scores = self.score(cases, observations)
        result: dict[str, object] = {}
        names = (("sr", "sucess_ratio", "success_level_ratio"), ("isr", "inst_sucess_ratio", "inst_level_sucess_ratio"))
        for key, total, levels in (*names, ("miou", "miou", "miou_level")):
            result |= {total: scores[key], levels: [scores.get(f"{key}_L{level}") for level in LEVELS]}
        file = Path(out) / "metric_mmdit_lora.json"
        write_json(file, result | {"metric_name": "mmdit_lora", "image_path": ""})
        return [file]


def opencv_hsv(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(H, W, 3) uint8 RGB to OpenCV's 8-bit HSV: H in half degrees [0, 180), S and V in [0, 255].

    Source: OpenCV's documentation of color conversions, "RGB <-> HSV", for 8-bit images.
    """
    r, g, b = (rgb[..., channel].astype(np.float32) for channel in range(3))
    value = np.maximum(np.maximum(r, g), b)
    spread = value - np.minimum(np.minimum(r, g), b)
    safe = np.where(spread == 0, 1, spread)
    degrees = np.where(
        value == r, 60 * (g - b) / safe, np.where(value == g, 120 + 60 * (b - r) / safe, 240 + 60 * (r - g) / safe)
    )
    hue = np.round(np.where(spread == 0, 0, degrees) % 360 / 2) % 180
    saturation = np.round(255 * spread / np.where(value == 0, 1, value))
    return np.stack([hue, saturation, value], axis=-1).astype(np.int64)


def _color_share(hsv: NDArray[np.int64], region: Region) -> float:
    """The share of the box's pixels in its colour's ranges; the box's sides are cut to whole pixels."""
    x0, y0, x1, y1 = (int(v * SIDE) for v in region.xyxy)
    pixels = hsv[max(y0, 0) : y1, max(x0, 0) : x1].reshape(-1, 3)
    if not len(pixels):
        return 0.0
    ranges = HSV[_color_and_noun(region.phrase)[0]]
    return float(np.any([np.all((pixels >= low) & (pixels <= high), axis=1) for low, high in ranges], axis=0).mean())


def _suppressed(detections: Sequence[Detection]) -> list[Detection]:
    """Non-maximum suppression: of detections that overlap by an IoU above `NMS`, the best."""
    boxes = torch.tensor([d.xyxy for d in detections], dtype=torch.float64).reshape(-1, 4)
    scores = torch.tensor([d.score for d in detections], dtype=torch.float64)
    return [detections[index] for index in nms(boxes, scores, NMS).tolist()]


def _met_and_iou(case: Case, seen: Observation) -> tuple[int, float]:
    """How many things are met, and what they add to mIoU."""
    met, total = 0, 0.0
    for region in case.regions:
        iou, _ = best(region.xyxy, _suppressed(seen.labelled(region.label)))
        colored = seen.measured.get(region.key, 0.0) >= COLORED
        met += iou >= MATCHED and colored
        total += iou if iou < MATCHED or colored else 0.0
    return met, total


def _color_and_noun(phrase: str) -> tuple[str, str]:
    """("red", "fire hydrant") of "a red fire hydrant": the second word, and what follows it."""
    words = phrase.split(" ")
    return words[1] if len(words) > 1 else "", " ".join(words[2:])


def _case(prompt: str, entry: object, location: str, path: Path) -> Case:
    id_ = str(need(entry, "coco_id", location))
    regions = []
    for index, said in enumerate(coco_mig_boxes(entry, location)):
        color, noun = _color_and_noun(said.short)
        if color not in HSV or not noun:
            what, hint = f"the phrase {said.short!r} is not 'a COLOUR THING'", f"colours: {', '.join(HSV)}"
            raise InputError(what, location=said.location, hint=hint)
        regions.append(Region(raw_box(said, path, "relative"), noun, said.short, key=str(index)))
    return Case(id_, prompt, (SIDE, SIDE), tuple(regions), (f"{prompt}_{id_}.png",), (id_,), location)
