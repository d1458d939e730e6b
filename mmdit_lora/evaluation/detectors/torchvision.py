"""torchvision's detectors: a closed list of classes, COCO's or those of one's own file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torchvision.transforms.functional import pil_to_tensor

from mmdit_lora.errors import InputError, listed, unknown_key
from mmdit_lora.evaluation.detectors.base import (
    Detection,
    Detector,
    DetectorOptions,
    batches,
    default_device,
    digest,
    file_digests,
    index_of,
    unknown_phrases,
    words,
)
from mmdit_lora.json_files import parse_json
from mmdit_lora.layout import Layout

EXAMPLE = "fasterrcnn_resnet50_fpn_v2"
_NO_OBJECT = ("__background__", "N/A")

Weights = tuple[dict[str, torch.Tensor], list[str] | None, Any]  # state dict, classes, what identifies it


class TorchvisionOptions(DetectorOptions):
    """A phrase that names none of the classes is refused unless `ignore_unknown`; its box then counts as missed by `match`,
    so leave such boxes out before (`known_layouts`)."""

    ignore_unknown: bool = Field(default=False, description="do not refuse phrases that name none of the classes")


class TorchvisionDetector(Detector):
    """A model of `torchvision.models.detection`.

    A phrase means the class that it names first, of several at that place the longest: "a hot dog on a plate" a hot dog, "a
    man riding a horse" a horse, as "man" is no class of COCO's. So the class "dog" never matches a hot dog.

    The target is `MODEL=FILE.safetensors` or `MODEL=COCO_V1`. A file may give its classes in the header's key `classes` (a
    JSON list, the background first); without it they are those of torchvision's own weights, which are published as
    pickles: these are loaded by its own `get_state_dict` with `weights_only=True` and the hash checked, and only if such a
    name is given.

    Raises:
        InputError: no such model, no weights, or weights that do not fit.
    """

    by_label = True
    attributes = False
    options_type = TorchvisionOptions

    def __init__(self, target: str | None, options: TorchvisionOptions, *, spec: str, device: str | None) -> None:
        name, _, weights = (target or "").partition("=")
        known = torchvision.models.list_models(module=torchvision.models.detection)
        if not name:
            raise InputError("names no model", location=spec, hint=f"write for example torchvision:{EXAMPLE}=COCO_V1")
        if name not in known:
            raise unknown_key(name, known, location=spec)
        published: Any = torchvision.models.get_model_weights(name)
        hint = _how_to_get(name, published)
        if not weights:
            raise InputError("names no weights", location=spec, hint=hint)
        names = [entry.name for entry in published]
        try:
            state, classes, identity = _published(published[weights]) if weights in names else _read_file(Path(weights))
        except InputError as error:
            raise InputError(error.what, location=spec, hint=error.hint or hint) from None
        self.classes = tuple(classes or published.DEFAULT.meta["categories"])
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=len(self.classes))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            first = next((line.strip() for line in str(error).splitlines()[1:]), str(error))
            raise InputError(
                f"{weights} does not fit a {name} of {len(self.classes)} classes: {first[:200]}",
                location=spec,
                hint="give the file of that model; for other classes than COCO's, its header has `classes`, a JSON list "
                "with the background first",
            ) from None
        self.name, self.options, self.device = f"torchvision:{name}={weights}", options, default_device(device)
        self.model = model.eval().to(self.device)
        self._classes_by_words = {words(label): label for label in self.classes if label not in _NO_OBJECT}
        self._identity = [name, identity]

    def class_of(self, phrase: str) -> str | None:
        """The class that a phrase names; None: none."""
        asked = words(phrase)
        found = [
            (start, -len(part), label)
            for part, label in self._classes_by_words.items()
            if (start := index_of(part, asked)) is not None
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
        """As `Detector.detect`."""
        unknown = unknown_phrases(self, images, layouts)
        if unknown and not self.options.ignore_unknown:
            labels = list(self._classes_by_words.values())
            raise InputError(
                f"none of its {len(labels)} classes is named by {listed(map(repr, unknown))}",
                location=self.name,
                hint=f"its classes are {listed(labels)}; take an open-vocabulary detector (grounding-dino, owlv2), or "
                "leave such boxes out with ?ignore_unknown=true",
            )
        out: list[list[Detection]] = [[] for _ in images]
        for indices in batches([image.size for image in images], self.options.batch_size):
            inputs = [pil_to_tensor(images[index].convert("RGB")).to(self.device) / 255 for index in indices]
            for index, found in zip(indices, self.model(inputs), strict=True):
                boxes, labels, scores = (found[key] for key in ("boxes", "labels", "scores"))
                detections = self.options.select(boxes, labels, scores, self.classes, images[index].size)
                out[index] = [d for d in detections if d.label not in _NO_OBJECT]
        return out


def _published(entry: Any) -> Weights:
    try:
        state = entry.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError) as error:  # no connection, or another file than the hash in its name says
        raise InputError(f"{entry} could not be had ({error})") from None
    return state, list(entry.meta["categories"]), entry.url.rpartition("/")[2]


def _read_file(file: Path) -> Weights:
    if not file.is_file():
        raise InputError(f"no such file {str(file)!r}")
    if file.suffix != ".safetensors":
        raise InputError(f"{file} is no .safetensors file; pickles may run code")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        classes = parse_json(header.get("classes", "[]"), location=str(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from None
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not all(isinstance(label, str) for label in classes):
        raise InputError(
            f"the header of {file} has `classes` that are no JSON list of names",
            hint='write them as ["__background__", "dog", "cat"]',
        )
    return state, classes, file_digests(file)[0][1]


def _how_to_get(name: str, published: Any) -> str:
    """A weights name, and the command that makes a safetensors file of it."""
    first = next(iter(published)).name
    command = (
        "import json, torchvision; from safetensors.torch import save_file; "
        f"w = torchvision.models.get_weight('{published.__name__}.{first}'); save_file(w.get_state_dict(weights_only=True), "
        f"'{name}.safetensors', {{'classes': json.dumps(w.meta['categories'])}})"
    )
    return (
        f"torchvision:{name}={first} fetches torchvision's own (a pickle, read as bare tensors); or make a file where "
        f'there is a connection, python -c "{command}", then torchvision:{name}={name}.safetensors'
    )
