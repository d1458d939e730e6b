"""What detectors and judges share: detections, how labels agree with phrases, options, fingerprints and loading of weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torchvision.ops import batched_nms

from mmdit_lora.errors import InputError, clip, listed
from mmdit_lora.hub import local_copy
from mmdit_lora.layout import Layout


@dataclass(frozen=True)
class Detection:
    """One object detected in an image.

    Args:
        xyxy: (left, top, right, bottom), relative to the image.
        label: the class or phrase that it was detected as.
        score: confidence in [0, 1]; 1 from a detector without confidences.
        color, shape: None where the detector reports none, or the object has none of those it knows.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    score: float = 1.0
    color: str | None = None
    shape: str | None = None


class Detector(Protocol):
    """Detects objects in images. Classes may inherit the methods that have bodies here.

    Attributes:
        name: the spec that opens it, without options.
        by_label: whether only a detection whose label agrees with a box's phrase may match it. False for the exact
            detector of shapes, which reports colour and shape of whatever is in the box.
        attributes: whether it reports colours and shapes.
    """

    name: str
    by_label: bool
    attributes: bool

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """The objects of each image, by falling score.

        Args:
            layouts: one per image. Open-vocabulary detectors look for its phrases; others ignore it.

        Raises:
            ValueError: the numbers of images and layouts differ.
            InputError: the detector cannot look for a phrase (see `knows`).
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of everything that determines the detections (weights, options, versions): the key of caches."""
        ...

    def knows(self, phrase: str) -> bool:  # noqa: ARG002
        """Whether it can look for this phrase."""
        return True

    def agrees(self, label: str, phrase: str) -> bool:
        """Whether a detection with this label may match a box with this phrase."""
        return agrees(label, phrase)


def known_layouts(detector: Detector, layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts without the boxes whose phrases the detector cannot look for."""
    return [replace(layout, boxes=tuple(b for b in layout.boxes if detector.knows(b.phrase))) for layout in layouts]


def unknown_phrases(detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[str]:
    """The phrases that the detector cannot look for. Raises ValueError if the numbers of images and layouts differ."""
    require_same_number(images, layouts)
    return sorted({box.phrase for layout in layouts for box in layout.boxes if not detector.knows(box.phrase)})


class Options(BaseModel):
    """Options of a plug-in: `?key=value&key=value` after its spec, or keyword arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectorOptions(Options):
    """Options of every learned detector."""

    threshold: float = Field(default=0.5, ge=0, lt=1, description="detections with a lower score are dropped")
    nms: float = Field(
        default=0.5, gt=0, le=1, description="of detections with one label and an IoU above this, the best one is kept"
    )
    batch_size: int = Field(default=8, ge=1, description="images at once")

    def select(
        self, boxes: Tensor, labels: Tensor, scores: Tensor, names: Sequence[str], size: tuple[int, int] = (1, 1)
    ) -> list[Detection]:
        """Threshold and non-maximum suppression.

        Args:
            boxes: (n, 4) xyxy in units of which the image has `size` (width, height). labels: (n,) indices of `names`.
            scores: (n,).
        """
        sure = (scores > self.threshold) & boxes.isfinite().all(dim=1)
        boxes, labels, scores = boxes[sure], labels[sure], scores[sure]
        kept = batched_nms(boxes, scores, labels, self.nms)  # by falling score
        relative = (boxes[kept] / boxes.new_tensor([*size, *size])).clamp(0, 1).tolist()
        return [
            Detection((left, top, right, bottom), names[label], score)
            for (left, top, right, bottom), label, score in zip(
                relative, labels[kept].tolist(), scores[kept].tolist(), strict=True
            )
            if left < right and top < bottom
        ]


_ARTICLES = {"a", "an", "the"}


def words(text: str) -> tuple[str, ...]:
    """The words of a label or phrase: lower case, without articles, punctuation and the s of plurals."""
    found = re.findall(r"[^\W_]+", text.casefold())
    kept = [word for word in found if word not in _ARTICLES] or found
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept
    )


def agrees(label: str, phrase: str) -> bool:
    """Whether the phrase contains the label's words in a row: "dog" and "hot dog" agree with "two hot dogs"."""
    return index_of(words(label), words(phrase)) is not None


def index_of(part: tuple[str, ...], text: tuple[str, ...]) -> int | None:
    """The first index of `part` in `text`; None if `text` does not contain it, or `part` is empty."""
    starts = range(len(text) - len(part) + 1) if part else range(0)
    return next((start for start in starts if text[start : start + len(part)] == part), None)


def require_same_number(images: Sized, layouts: Sized) -> None:
    """Raises ValueError if the lengths differ."""
    if len(images) != len(layouts):
        raise ValueError(f"{len(images)} images, but {len(layouts)} layouts")


def batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of images in batches of one size each: padding an image would change its detections."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def digest(*parts: Any) -> str:
    """SHA-256 of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def file_digests(*files: Path) -> list[list[str]]:
    """[name, SHA-256 of the content] of each file."""
    out = []
    for file in files:
        with file.open("rb") as opened:
            out.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return out


def default_device(device: str | None) -> str:
    """`device`, or else the first GPU if there is one."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


class TransformersModel:
    """A model of transformers with its processor, from a folder or hub id.

    Only safetensors are read, and a folder's own code is never run.

    Args:
        auto_class: e.g. `transformers.AutoModel`. source: folder or hub id. spec: the option that names it, for messages.
        example: a hub id that fits, for messages. model_types: of the config; empty = any.
        options: for `from_pretrained`.

    Raises:
        InputError: no source, no such folder, the hub cannot be reached, no safetensors; the model does not load, or lacks
            weights (which transformers would initialise at random).
    """

    def __init__(
        self,
        auto_class: Any,
        source: str | None,
        *,
        spec: str,
        example: str,
        device: str | None,
        model_types: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self.device = default_device(device)
        self._folder, self._spec = _model_folder(source, spec, example), spec
        kind = self._load(transformers.AutoConfig.from_pretrained).model_type if model_types else None
        if model_types and kind not in model_types:
            what = f"{self._folder} is a {kind}, not a {' or '.join(model_types)}"
            raise InputError(what, location=spec, hint=f"give for example {example}")
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, info = self._load(auto_class.from_pretrained, **options)
        if wrong := sorted(str(name) for name in {*info["missing_keys"], *info["mismatched_keys"]}):
            raise InputError(
                f"{self._folder} lacks weights of {type(model).__name__}, or has them in other shapes: {listed(wrong)}",
                location=spec,
                hint="download the model's folder again",
            )
        self.model: Any = model.eval().to(self.device)
        self.processor: Any = self._load(transformers.AutoProcessor.from_pretrained)

    @cached_property
    def file_digests(self) -> list[list[str]]:
        """Of the files that determine the model's answers. Reads them all."""
        return file_digests(*sorted(file for pattern in _NEEDED for file in self._folder.glob(pattern)))

    def _load(self, load: Callable[..., Any], **options: Any) -> Any:
        try:
            return load(self._folder, local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:  # what a damaged file makes transformers raise is of many types
            hint = "download the model's folder again"
            if "trust_remote_code" in str(error):
                hint = "code in a model's folder is not run; such a judge may be served and asked as openai:URL#MODEL"
            reason = clip((str(error).strip() or type(error).__name__).splitlines()[0])
            raise InputError(f"{self._folder} does not load: {reason}", location=self._spec, hint=hint) from None


# The files of a model's folder that are downloaded: weights as safetensors, and the small files that they need. No pickle.
_NEEDED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def _model_folder(source: str | None, spec: str, example: str) -> Path:
    hub_id = source if source and re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) else example
    local = f"models/{hub_id.rpartition('/')[2]}"
    hint = f"download weights: `hf download {hub_id} --local-dir {local}`, then {spec.partition(':')[0]}:{local}"
    if not source:
        raise InputError("names no weights", location=spec, hint=hint)
    try:
        folder = local_copy(source, location=spec, allow=_NEEDED)
    except InputError as error:
        raise InputError(f"{error.what}: {source!r}", location=spec, hint=hint) from None
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json", location=spec, hint=hint)
    if not any(folder.glob("*.safetensors")):
        what = f"{folder} holds no safetensors; pickles are not read, as they may run code"
        raise InputError(what, location=spec, hint=hint)
    return folder
