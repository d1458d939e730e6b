"""torchvision's detectors: a closed list of classes, COCO's or those of a file of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torchvision.ops import batched_nms
from torchvision.transforms.functional import pil_to_tensor

from mmdit_lora.errors import InputError, listed, unknown_key
from mmdit_lora.evaluation.detectors.common import (
    Detection,
    Detector,
    DetectorOptions,
    batches,
    clipped,
    default_device,
    digest,
    digest_of_files,
    place_of,
    same_number,
    words,
)
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Layout

EXAMPLE = "fasterrcnn_resnet50_fpn_v2"
_NO_OBJECT = ("__background__", "N/A")


class TorchvisionOptions(DetectorOptions):
    """A phrase that names none of the classes is refused unless `ignore_unknown`; its box then counts as missed by
    `match`, so leave such boxes out before (`known_layouts`)."""

    ignore_unknown: bool = Field(default=False, description="do not refuse phrases that name none of the classes")


class Torchvision(Detector):
    """A model of `torchvision.models.detection`.

    A phrase means the class that it names first, of several that begin there the longest: "a hot dog on a plate" a hot
    dog, "a man riding a horse" a horse, as "man" is no class of COCO's. So the class "dog" never stands for a hot dog.

    Args:
        classes: one a label of the model, the background first.
        identity: what its weights are, for the fingerprint.
    """

    by_label = True
    attributes = False

    def __init__(
        self, model: Any, classes: Sequence[str], options: TorchvisionOptions, *, name: str, identity: Any, device: str
    ) -> None:
        self.name, self.options, self.device = name, options, device
        self.model = model.eval().to(device)
        self.classes = tuple(classes)
        self._named = {words(label): label for label in self.classes if label not in _NO_OBJECT}
        self._identity = identity

    def class_of(self, phrase: str) -> str | None:
        """The class that a phrase names; None: none."""
        whole = words(phrase)
        found = [
            (place, -len(part), label)
            for part, label in self._named.items()
            if (place := place_of(part, whole)) is not None
        ]
        return min(found)[2] if found else None

    def knows(self, phrase: str) -> bool:
        return self.class_of(phrase) is not None

    def agrees(self, label: str, phrase: str) -> bool:
        return self.class_of(phrase) == label

    def fingerprint(self) -> str:
        return digest("torchvision", torchvision.__version__, self._identity, self.classes, self.options.model_dump())

    @torch.inference_mode()
    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        same_number(images, layouts)
        strange = sorted({box.phrase for layout in layouts for box in layout.boxes if not self.knows(box.phrase)})
        if strange and not self.options.ignore_unknown:
            labels = [label for label in self.classes if label not in _NO_OBJECT]
            raise InputError(
                f"none of its {len(labels)} classes is named by {listed(map(repr, strange))}",
                location=self.name,
                hint=f"its classes are {listed(labels)}; take an open-vocabulary detector (grounding-dino, owlv2), or "
                "leave such boxes out with ?ignore_unknown=true",
            )
        out: list[list[Detection]] = [[] for _ in images]
        for indices in batches([image.size for image in images], self.options.batch_size):
            inputs = [pil_to_tensor(images[index].convert("RGB")).to(self.device) / 255 for index in indices]
            for index, found in zip(indices, self.model(inputs), strict=True):
                out[index] = self._detections(found, images[index].size)
        return out

    def _detections(self, found: dict[str, torch.Tensor], size: tuple[int, int]) -> list[Detection]:
        sure = found["scores"] > self.options.threshold
        boxes, labels, scores = (found[key][sure] for key in ("boxes", "labels", "scores"))
        kept = batched_nms(boxes, scores, labels, self.options.nms)  # comes in falling order of scores
        relative = (boxes[kept] / boxes.new_tensor([*size, *size])).tolist()
        out = []
        for xyxy, label, score in zip(relative, labels[kept].tolist(), scores[kept].tolist(), strict=True):
            whole = clipped(xyxy)
            if whole is not None and self.classes[label] not in _NO_OBJECT:
                out.append(Detection(whole, self.classes[label], score))
        return out


def open_torchvision(target: str | None, options: TorchvisionOptions, *, spec: str, device: str | None) -> Torchvision:
    """`MODEL=FILE.safetensors` or `MODEL=COCO_V1`.

    A file may say its classes in the header's key `classes` (a JSON list, the background first); without it they are
    those of torchvision's own weights. torchvision publishes its weights as pickles: they are loaded by its own
    `get_state_dict` with `weights_only=True` and the hash checked, and only where such a name is given. A file must be
    safetensors.

    Raises:
        InputError: no such model, no weights, or weights that do not fit.
    """
    name, _, weights = (target or "").partition("=")
    known = torchvision.models.list_models(module=torchvision.models.detection)
    if name not in known:
        raise (
            unknown_key(name, known, location=spec)
            if name
            else InputError("names no model", location=spec, hint=f"write for example torchvision:{EXAMPLE}=COCO_V1")
        )
    published = torchvision.models.get_model_weights(name)
    names = [entry.name for entry in published]
    if not weights:
        raise InputError("names no weights", location=spec, hint=_how_to_get(name, names))
    if weights in names:
        state, classes, identity = _published(published[weights], spec=spec, hint=_how_to_get(name, names))
    else:
        state, classes, identity = _from_file(Path(weights), spec=spec, hint=_how_to_get(name, names))
        classes = classes or list(published.DEFAULT.meta["categories"])
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(classes))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
        raise InputError(
            f"{weights} does not fit a {name} of {len(classes)} classes: {first[:200]}",
            location=spec,
            hint="give the file of that model; of other classes than COCO's, its header says `classes`, a JSON list with "
            "the background first",
        ) from None
    opened = f"torchvision:{name}={weights}"
    return Torchvision(model, classes, options, name=opened, identity=[name, identity], device=default_device(device))


def _published(entry: Any, *, spec: str, hint: str) -> tuple[dict[str, torch.Tensor], list[str], Any]:
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:  # no connection, or not the file whose hash its name holds
        raise InputError(f"{entry} could not be had ({error})", location=spec, hint=hint) from None
    return state, list(entry.meta["categories"]), entry.url.rpartition("/")[2]


def _from_file(file: Path, *, spec: str, hint: str) -> tuple[dict[str, torch.Tensor], list[str], Any]:
    if not file.is_file():
        raise InputError(f"no such file {str(file)!r}", location=spec, hint=hint)
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; pickles may run code", location=spec, hint=hint)
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        classes = parse_json(header.get("classes", "[]"), location=str(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}", location=spec, hint=hint) from None
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(label, str) for label in classes):
        raise InputError(
            f"the header of {file} has `classes` that are no JSON list of names",
            location=spec,
            hint='write them as ["__background__", "dog", "cat"]',
        )
    return state, classes, digest_of_files(file)[0][1]


def _how_to_get(name: str, names: Sequence[str]) -> str:
    """A weights name, and the command that makes a safetensors file of it."""
    entry = f"{torchvision.models.get_model_weights(name).__name__}.{names[0]}"
    command = (
        f"import json, torchvision; from safetensors.torch import save_file; w = torchvision.models.get_weight('{entry}'); "
        "save_file(w.get_state_dict(weights_only=True), "
        f"'{name}.safetensors', {{'classes': json.dumps(w.meta['categories'])}})"
    )
    return (
        f"torchvision:{name}={names[0]} fetches torchvision's own (a pickle, read as bare tensors); or make a file where "
        f'there is a connection, python -c "{command}", then torchvision:{name}={name}.safetensors'
    )
