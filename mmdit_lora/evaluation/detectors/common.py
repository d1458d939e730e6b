"""What every detector and judge has in common: what they answer, how labels meet phrases, options, fingerprints, weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmdit_lora.errors import InputError, listed, shown, unknown_key
from mmdit_lora.layout import Layout


@dataclass(frozen=True)
class Detection:
    """One object seen in an image.

    Args:
        xyxy: (left, top, right, bottom), relative to the image.
        label: what it is taken for; matched with phrases.
        score: in [0, 1]; 1 from a detector that has no doubts.
        color, shape: None where the detector tells none, or where the object has none of those it knows.
    """

    xyxy: tuple[float, float, float, float]
    label: str
    score: float = 1.0
    color: str | None = None
    shape: str | None = None


class Detector(Protocol):
    """Finds objects in images. Classes may inherit the methods that have bodies here.

    Attributes:
        name: the spec that opens it, without options.
        by_label: whether its labels, beside places, say which detections may stand for a box. The exact reader's do
            not: it judges colour and shape of what stands in a box's place.
        attributes: whether it tells colours and shapes.
    """

    name: str
    by_label: bool
    attributes: bool

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """The objects of each image, the surest first.

        Args:
            layouts: one an image. Open-vocabulary detectors look for its phrases; others ignore it.

        Raises:
            ValueError: not as many images as layouts.
            InputError: a phrase that this detector cannot look for (see `knows`).
        """
        ...

    def fingerprint(self) -> str:
        """SHA-256 of all that decides its answers (weights, options, versions): the key of stored answers."""
        ...

    def knows(self, phrase: str) -> bool:  # noqa: ARG002
        """Whether it can look for this phrase at all."""
        return True

    def agrees(self, label: str, phrase: str) -> bool:
        """Whether a detection with this label may stand for a box with this phrase."""
        return agrees(label, phrase)


def known_layouts(detector: Detector, layouts: Sequence[Layout]) -> list[Layout]:
    """The layouts without the boxes whose phrases the detector cannot look for."""
    return [
        replace(layout, boxes=tuple(box for box in layout.boxes if detector.knows(box.phrase))) for layout in layouts
    ]


class Options(BaseModel):
    """Options of a plug-in, as `?key=value&key=value` behind its spec or as keyword arguments."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectorOptions(Options):
    """What every learned detector takes."""

    threshold: float = Field(default=0.5, ge=0, lt=1, description="detections with a lower score are dropped")
    nms: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="of detections with one label that overlap by more than this IoU, the surest",
    )
    batch_size: int = Field(default=8, ge=1, description="images at once")


T = TypeVar("T", bound=Options)


def parse_options(kind: type[T], values: Mapping[str, Any], *, location: str) -> T:
    """Options of `kind` from text or values.

    Raises:
        InputError: an unknown key, or a value that does not fit, with `where`.
    """
    for key in values:
        if key not in kind.model_fields:
            raise unknown_key(key, kind.model_fields, location=location)
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise InputError(
            f"{key} is {shown(values[key])}: {first['msg'].lower()}",
            location=location,
            hint=f"{key}: {kind.model_fields[key].description}",
        ) from None


_ARTICLES = {"a", "an", "the"}


def words(text: str) -> tuple[str, ...]:
    """The words of a label or phrase: lower case, without articles and punctuation, a plural's s cut off."""
    found = re.findall(r"[^\W_]+", text.casefold())
    kept = [word for word in found if word not in _ARTICLES] or found
    return tuple(
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in kept
    )


def agrees(label: str, phrase: str) -> bool:
    """Whether the label's words stand in the phrase, one after the other: "dog" and "hot dog" do in "two hot dogs"."""
    return place_of(words(label), words(phrase)) is not None


def place_of(part: tuple[str, ...], whole: tuple[str, ...]) -> int | None:
    """Where `part` first stands in `whole`; None: nowhere, or `part` is empty."""
    places = range(len(whole) - len(part) + 1) if part else range(0)
    return next((place for place in places if whole[place : place + len(part)] == part), None)


def same_number(images: Sequence[Any], layouts: Sequence[Any]) -> None:
    """Raises ValueError unless there are as many of both."""
    if len(images) != len(layouts):
        raise ValueError(f"{len(images)} images, but {len(layouts)} layouts")


def clipped(xyxy: Sequence[float]) -> tuple[float, float, float, float] | None:
    """A box cut to the image; None: nothing of it is left, or a number is not finite."""
    left, top, right, bottom = (min(max(float(value), 0.0), 1.0) for value in xyxy)
    return (left, top, right, bottom) if left < right and top < bottom else None


def batches(sizes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of images in batches of one size each: a padded image would be read otherwise than one alone."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def digest(*parts: Any) -> str:
    """SHA-256 over parts that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def digest_of_files(*files: Path) -> list[list[str]]:
    """[name, SHA-256 of the content] of each file."""
    out = []
    for file in files:
        with file.open("rb") as opened:
            out.append([file.name, hashlib.file_digest(opened, "sha256").hexdigest()])
    return out


def default_device(device: str | None) -> str:
    """`device`, or else the first GPU where there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


# What of a model's folder is fetched: weights as safetensors, and the small files that say how to use them. No pickle.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def model_folder(source: str | None, *, spec: str, example: str) -> Path:
    """The folder of a transformers model: itself, or that of a hub id (from the local cache, or fetched).

    Args:
        spec: what asks for it, for messages. example: a hub id that fits.

    Raises:
        InputError: no source, no such folder, not on the hub or not to be reached, or no safetensors in it.
    """
    kind = spec.partition(":")[0]

    def get(hub_id: str) -> str:
        local = f"models/{hub_id.rpartition('/')[2]}"
        return f"`hf download {hub_id} --local-dir {local}`, then {kind}:{local}"

    if not source:
        raise InputError("names no weights", location=spec, hint=f"get some: {get(example)}")
    folder = Path(source)
    if not folder.is_dir():
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
            raise InputError(f"no such folder {source!r}", location=spec, hint=f"get weights: {get(example)}")
        folder = _from_hub(source, spec=spec, hint=f"where there is a connection: {get(source)}")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json", location=spec, hint=f"give a model's folder: {get(example)}")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds no safetensors; pickles are not read, as they may run code",
            location=spec,
            hint=get(example),
        )
    return folder


def _from_hub(source: str, *, spec: str, hint: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(source, allow_patterns=list(_WANTED)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no folder {source!r}, and not had from the hub ({reason})", location=spec, hint=hint
        ) from None


def part_of(load: Callable[..., Any], folder: Path, *, spec: str, **options: Any) -> Any:
    """`load(folder)` of a part of a transformers model (config, processor, weights), from that folder alone.

    Code that a folder brings along is not run, and nobody is asked whether it may.

    Raises:
        InputError: it does not load.
    """
    from safetensors import SafetensorError

    try:
        return load(folder, local_files_only=True, trust_remote_code=False, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "get the model's folder anew"
        if "trust_remote_code" in str(error):
            hint = "a model with code of its own is not run here; a judge may be served and asked as openai:URL#MODEL"
        raise InputError(f"{folder} does not load: {reason}", location=spec, hint=hint) from None


def load_whole(load: Callable[..., Any], folder: Path, *, spec: str, **options: Any) -> Any:
    """`load(folder)` of a transformers model in eval mode, from safetensors only.

    Raises:
        InputError: it does not load, or weights are missing or of other shapes (transformers would draw them at random).
    """
    model, info = part_of(load, folder, spec=spec, use_safetensors=True, output_loading_info=True, **options)
    wrong = sorted(str(name) for name in {*info["missing_keys"], *info["mismatched_keys"]})
    if wrong:
        raise InputError(
            f"{folder} lacks weights of {type(model).__name__}, or has them in other shapes: {listed(wrong)}",
            location=spec,
            hint="get the model's folder anew",
        )
    return model.eval()


def folder_files(folder: Path) -> list[Path]:
    """The files of a model's folder that decide its answers, in order."""
    return sorted(file for pattern in _WANTED for file in folder.glob(pattern))
