"""Open-vocabulary detectors of transformers: Grounding DINO and OWLv2, which look for the layout's own phrases.

Both give, for every box that they propose, one score a phrase; a proposal stands for the phrase with the highest. That is
computed here and not by transformers' processors, as these mix up phrases: Grounding DINO's joins all tokens above a
threshold, from whichever phrases ("red circle square"), and OWLv2's lets the blanks that fill up a batch win.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import torch
import transformers
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors.common import (
    Detection,
    Detector,
    DetectorOptions,
    batches,
    clipped,
    default_device,
    digest,
    digest_of_files,
    folder_files,
    load_whole,
    model_folder,
    part_of,
    same_number,
)
from mmdit_lora.layout import Layout


class GroundingDinoOptions(DetectorOptions):
    threshold: float = Field(default=0.25, ge=0, lt=1, description="detections with a lower score are dropped")


class Owlv2Options(DetectorOptions):
    threshold: float = Field(default=0.1, ge=0, lt=1, description="detections with a lower score are dropped")


class ZeroShot(Detector):
    """What both have in common. Subclasses say how phrases are asked for."""

    by_label = True
    attributes = False
    model_types: tuple[str, ...] = ()
    example = ""

    def __init__(self, target: str | None, options: DetectorOptions, *, spec: str, device: str | None) -> None:
        self.name, self.options, self.device = spec.partition("?")[0], options, default_device(device)
        folder = model_folder(target, spec=spec, example=self.example)
        kind = part_of(transformers.AutoConfig.from_pretrained, folder, spec=spec).model_type
        if kind not in self.model_types:
            raise InputError(
                f"{folder} is a {kind}, not a {' or '.join(self.model_types)}",
                location=spec,
                hint=f"give for example {self.example}",
            )
        load = transformers.AutoModelForZeroShotObjectDetection.from_pretrained
        self.model = load_whole(load, folder, spec=spec, dtype=torch.float32).to(self.device)
        self.processor = part_of(transformers.AutoProcessor.from_pretrained, folder, spec=spec)
        self.tokenizer = self.processor.tokenizer
        self._folder = folder

    @cached_property
    def _weights(self) -> list[list[str]]:
        return digest_of_files(*folder_files(self._folder))  # reads them all: only where it is asked for

    def fingerprint(self) -> str:
        return digest(self.example, transformers.__version__, self._weights, self.options.model_dump())

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """As `Detector.detect`. One proposal stands for one phrase; a phrase asked for twice is looked for once."""
        same_number(images, layouts)
        phrases = [list(dict.fromkeys(box.phrase for box in layout.boxes)) for layout in layouts]
        queries = [(index, part) for index, asked in enumerate(phrases) for part in self._parts(asked)]
        found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in images]
        names: list[list[str]] = [[] for _ in images]
        for rows in batches([images[index].size for index, _ in queries], self.options.batch_size):
            batch = [images[queries[row][0]].convert("RGB") for row in rows]
            answers = self._scores(batch, [queries[row][1] for row in rows])
            for row, (scores, boxes) in zip(rows, answers, strict=True):
                index, asked = queries[row]
                best, label = scores.max(dim=1)
                found[index].append((torch.stack([best, (label + len(names[index])).to(best.dtype)]), boxes))
                names[index] += asked
        return [self._detections(parts, asked) for parts, asked in zip(found, names, strict=True)]

    def _detections(self, parts: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> list[Detection]:
        if not parts:
            return []
        scores, labels = torch.cat([part for part, _ in parts], dim=1).float().cpu()
        boxes = box_convert(torch.cat([boxes for _, boxes in parts]).float().cpu(), "cxcywh", "xyxy")
        sure = (scores > self.options.threshold) & boxes.isfinite().all(dim=1)
        scores, labels, boxes = scores[sure], labels[sure].long(), boxes[sure]
        kept = batched_nms(boxes, scores, labels, self.options.nms)  # comes in falling order of scores
        out = []
        for xyxy, label, score in zip(boxes[kept].tolist(), labels[kept].tolist(), scores[kept].tolist(), strict=True):
            whole = clipped(xyxy)
            if whole is not None:
                out.append(Detection(whole, names[label], score))
        return out

    def _parts(self, phrases: list[str]) -> list[list[str]]:
        """Phrases in the groups in which they are asked for."""
        raise NotImplementedError

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        """Of images of one size: (proposals, phrases) in [0, 1], and (proposals, 4) cxcywh relative to the image."""
        raise NotImplementedError

    def _pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor.image_processor(images=images, return_tensors="pt").to(self.device))


class GroundingDino(ZeroShot):
    """Grounding DINO (Liu et al., arXiv 2303.05499), and MM Grounding DINO.

    A phrase's score is that of its best token, as in the paper's own inference; the ends of the text and the stops between
    phrases name nothing and do not count. Phrases are asked for together,
    "a red circle. a blue square.", as many as its text length takes, then the rest. A phrase's own stops and question marks
    would part it and are blanks. A phrase that alone is too long is cut.
    """

    model_types = ("grounding-dino", "mm-grounding-dino")
    example = "IDEA-Research/grounding-dino-tiny"

    def _parts(self, phrases: list[str]) -> list[list[str]]:
        limit = self._limit
        parts: list[list[str]] = []
        room = 0
        for phrase in phrases:
            need = min(len(self._tokens(phrase)), limit) + 1
            if need == 1:
                continue  # nothing but marks: there is nothing to look for
            if not parts or need > room:
                parts.append([])
                room = limit + 1
            parts[-1].append(phrase)
            room -= need
        return parts

    @property
    def _limit(self) -> int:
        """Tokens for one phrase alone: beside it stand the first and the last token and its stop."""
        return int(self.model.config.max_text_len) - 3

    def _tokens(self, phrase: str) -> list[int]:
        text = re.sub(r"[.?]", " ", phrase.strip().lower())
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        stop = self.tokenizer.convert_tokens_to_ids(".")
        texts: list[list[int]] = []
        spans: list[list[tuple[int, int]]] = []
        for asked in phrases:
            text, places = [int(self.tokenizer.cls_token_id)], []
            for phrase in asked:
                tokens = self._tokens(phrase)[: self._limit]
                places.append((len(text), len(text) + len(tokens)))
                text += [*tokens, stop]
            texts.append([*text, int(self.tokenizer.sep_token_id)])
            spans.append(places)
        longest = max(map(len, texts))
        ids = torch.full((len(texts), longest), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        output = self.model(
            **self._pixels(images), input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)
        )
        probabilities = output.logits.sigmoid()
        return [
            (torch.stack([probabilities[row, :, a:b].amax(dim=1) for a, b in places], dim=1), output.pred_boxes[row])
            for row, places in enumerate(spans)
        ]


class Owlv2(ZeroShot):
    """OWLv2 (Minderer et al., arXiv 2306.09683), and OWL-ViT.

    Its text encoder reads 16 tokens; a longer phrase is cut there. OWLv2 pads an image to a square below and to the
    right, and its boxes are relative to that square.
    """

    model_types = ("owlv2", "owlvit")
    example = "google/owlv2-base-patch16-ensemble"

    def _parts(self, phrases: list[str]) -> list[list[str]]:
        return [phrases] if phrases else []

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        most = max(map(len, phrases))
        texts = [text for asked in phrases for text in [*asked, *[" "] * (most - len(asked))]]
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        output = self.model(
            **self._pixels(images), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        width, height = images[0].size
        square = max(width, height) if self.model.config.model_type == "owlv2" else 0
        scale = torch.tensor([square / width, square / height] * 2 if square else [1.0] * 4, device=self.device)
        scores = output.logits.sigmoid()
        return [(scores[row, :, : len(asked)], output.pred_boxes[row] * scale) for row, asked in enumerate(phrases)]


def open_grounding_dino(
    target: str | None, options: GroundingDinoOptions, *, spec: str, device: str | None
) -> GroundingDino:
    """A folder or hub id of `transformers`' Grounding DINO. Raises InputError where it is not to be had or does not fit."""
    return GroundingDino(target, options, spec=spec, device=device)


def open_owlv2(target: str | None, options: Owlv2Options, *, spec: str, device: str | None) -> Owlv2:
    """A folder or hub id of `transformers`' OWLv2 or OWL-ViT. Raises as `open_grounding_dino`."""
    return Owlv2(target, options, spec=spec, device=device)
