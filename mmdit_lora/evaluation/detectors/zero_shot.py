"""Open-vocabulary detectors of transformers: Grounding DINO and OWLv2, which look for the layout's own phrases.

Both give, for every proposed box, one score per phrase; a proposal is labelled with the best phrase. That is computed here
and not by transformers' processors, as these mix up phrases: Grounding DINO's joins all tokens above a threshold, from
whichever phrases ("red circle square"), and OWLv2's lets the blanks that pad a batch win.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import transformers
from PIL import Image
from pydantic import Field
from torch import Tensor
from torchvision.ops import box_convert

from mmdit_lora.evaluation.detectors.base import (
    Detection,
    Detector,
    DetectorOptions,
    TransformersModel,
    batches,
    digest,
    require_same_number,
)
from mmdit_lora.layout import Layout


class GroundingDinoOptions(DetectorOptions):
    threshold: float = Field(default=0.25, ge=0, lt=1, description="detections with a lower score are dropped")


class Owlv2Options(DetectorOptions):
    threshold: float = Field(default=0.1, ge=0, lt=1, description="detections with a lower score are dropped")


class ZeroShotDetector(Detector, TransformersModel):
    """What both have in common. Subclasses group the phrases and compute their scores.

    Raises:
        InputError: as `TransformersModel`.
    """

    by_label = True
    attributes = False
    model_types: tuple[str, ...] = ()
    example = ""

    def __init__(self, target: str | None, options: DetectorOptions, *, spec: str, device: str | None) -> None:
        self.name, self.options = spec.partition("?")[0], options
        kind, names = transformers.AutoModelForZeroShotObjectDetection, {"spec": spec, "example": self.example}
        TransformersModel.__init__(
            self, kind, target, **names, device=device, model_types=self.model_types, dtype=torch.float32
        )
        self.tokenizer = self.processor.tokenizer

    def fingerprint(self) -> str:
        return digest(self.example, transformers.__version__, self.file_digests, self.options.model_dump())

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """As `Detector.detect`. A proposal gets one phrase; a phrase given twice is looked for once."""
        require_same_number(images, layouts)
        phrases = [list(dict.fromkeys(box.phrase for box in layout.boxes)) for layout in layouts]
        queries = [(index, group) for index, own in enumerate(phrases) for group in self._groups(own)]
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in images]  # boxes, labels, scores
        names: list[list[str]] = [[] for _ in images]
        for rows in batches([images[index].size for index, _ in queries], self.options.batch_size):
            batch = [images[queries[row][0]].convert("RGB") for row in rows]
            answers = self._scores(batch, [queries[row][1] for row in rows])
            for row, (scores, boxes) in zip(rows, answers, strict=True):
                index, group = queries[row]
                best, label = scores.max(dim=1)
                found[index].append((boxes.float().cpu(), label.cpu() + len(names[index]), best.float().cpu()))
                names[index] += group
        out: list[list[Detection]] = []
        for parts, own in zip(found, names, strict=True):
            if not parts:
                out.append([])
                continue
            boxes, labels, scores = (torch.cat(part) for part in zip(*parts, strict=True))
            out.append(self.options.select(box_convert(boxes, "cxcywh", "xyxy"), labels, scores, own))
        return out

    def _groups(self, phrases: list[str]) -> list[list[str]]:
        """Phrases in the groups that the model reads together."""
        raise NotImplementedError

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        """Of images of one size: (proposals, phrases) in [0, 1], and (proposals, 4) cxcywh relative to the image."""
        raise NotImplementedError

    def _pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor.image_processor(images=images, return_tensors="pt").to(self.device))


class GroundingDino(ZeroShotDetector):
    """Grounding DINO (Liu et al., arXiv 2303.05499), and MM Grounding DINO.

    A phrase's score is that of its best token, as in the paper's own inference; the special tokens and the stops between
    phrases do not count. Phrases are read together, "a red circle. a blue square.", as many as its text length takes, then
    the rest. A phrase's own stops and question marks would split it and become blanks. A phrase that alone is too long is
    cut.
    """

    model_types = ("grounding-dino", "mm-grounding-dino")
    example = "IDEA-Research/grounding-dino-tiny"
    options_type = GroundingDinoOptions

    def _groups(self, phrases: list[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        room = 0
        for phrase in phrases:
            need = min(len(self._tokens(phrase)), self._limit) + 1
            if need == 1:
                continue  # nothing but marks
            if not groups or need > room:
                groups.append([])
                room = self._limit + 1
            groups[-1].append(phrase)
            room -= need
        return groups

    @property
    def _limit(self) -> int:
        """Tokens of one phrase alone: beside it stand the first and the last token and its stop."""
        return int(self.model.config.max_text_len) - 3

    def _tokens(self, phrase: str) -> list[int]:
        text = re.sub(r"[.?]", " ", phrase.strip().lower())
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        stop = self.tokenizer.convert_tokens_to_ids(".")
        texts: list[Tensor] = []
        spans: list[list[tuple[int, int]]] = []  # of each phrase's tokens in its text
        for group in phrases:
            text, own = [int(self.tokenizer.cls_token_id)], []
            for phrase in group:
                tokens = self._tokens(phrase)[: self._limit]
                own.append((len(text), len(text) + len(tokens)))
                text += [*tokens, stop]
            texts.append(torch.tensor([*text, int(self.tokenizer.sep_token_id)]))
            spans.append(own)
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(texts, batch_first=True, padding_value=self.tokenizer.pad_token_id).to(self.device)
        mask = pad([torch.ones_like(text) for text in texts], batch_first=True).to(self.device)
        output = self.model(
            **self._pixels(images), input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)
        )
        scores = output.logits.sigmoid()
        return [
            (torch.stack([scores[row, :, start:end].amax(dim=1) for start, end in own], dim=1), output.pred_boxes[row])
            for row, own in enumerate(spans)
        ]


class Owlv2(ZeroShotDetector):
    """OWLv2 (Minderer et al., arXiv 2306.09683), and OWL-ViT.

    Its text encoder reads 16 tokens; a longer phrase is cut there. OWLv2 pads an image to a square below and to the
    right, and its boxes are relative to that square.
    """

    model_types = ("owlv2", "owlvit")
    example = "google/owlv2-base-patch16-ensemble"
    options_type = Owlv2Options

    def _groups(self, phrases: list[str]) -> list[list[str]]:
        return [phrases] if phrases else []

    def _scores(self, images: list[Image.Image], phrases: list[list[str]]) -> list[tuple[Tensor, Tensor]]:
        most = max(map(len, phrases))
        texts = [text for group in phrases for text in [*group, *[" "] * (most - len(group))]]
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        tokens = tokens.to(self.device)
        output = self.model(
            **self._pixels(images), input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        width, height = images[0].size
        square = max(width, height) if self.model.config.model_type == "owlv2" else 0
        scale = torch.tensor([square / width, square / height] * 2 if square else [1.0] * 4, device=self.device)
        scores = output.logits.sigmoid()
        return [(scores[row, :, : len(group)], output.pred_boxes[row] * scale) for row, group in enumerate(phrases)]
