"""What an evaluation keeps on disk, so that one that was stopped continues: generated images, and detections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from mmdit_lora.data.images import load_image
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError, clip
from mmdit_lora.evaluation.detectors import Detection, Detector
from mmdit_lora.files import write_json
from mmdit_lora.json_files import read_cached, warn_damaged
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate
from mmdit_lora.visual import save_png

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PLAN, IMAGES, DETECTIONS = "evaluate.json", "images", "seen"
_DIGESTS = "digests.json"
_DETECTIONS = TypeAdapter(list[list[Detection]])


class ImageCache:
    """`folder/images/<condition>/00000.png`, and a file with everything that determines them.

    `folder/images/<condition>/digests.json` holds their digests: an image that was changed since is refused.

    Args:
        folder: of one evaluation. plan: what the images depend on, for JSON; the same to continue. name: of its file. what: made them.

    Raises:
        InputError: the folder holds images of another plan.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], *, name: str = PLAN, what: str = "evaluation") -> None:
        self.folder, self._plan, self._file = folder, json.loads(json.dumps(plan)), folder / name
        before = read_cached(self._file, dict)
        self._begun = before is not None
        for key in {} if before is None else before | self._plan:
            was, now = (before or {}).get(key), self._plan.get(key)
            if was != now:
                raise InputError(
                    f"holds images of another {what}: {key} was {_short(was)} and is {_short(now)}",
                    location=f"--out {folder}",
                    hint="give another folder, or remove this one",
                )

    def begin(self) -> None:
        """Write the plan. Before the first image, so that errors of the input are found before anything is written."""
        if not self._begun:
            # Without a readable plan it is unknown what the images here show: all are generated again.
            for digests in self.folder.glob(f"{IMAGES}/*/{_DIGESTS}"):
                digests.unlink()
            write_json(self._file, self._plan)
            self._begun = True

    def generate(
        self,
        condition: str,
        pipe: LayoutPipeline,
        layouts: Sequence[Layout],
        settings: SamplingConfig,
        *,
        seed: int,
        on_progress: Callable[[int], None],
    ) -> LazyImages:
        """As `pipelines.generate`, batch by batch; a batch whose images are all there is not generated again.

        The batches are those of the first call, since an image's last bits may depend on its batch.

        Raises:
            InputError: an image was changed.
        """
        self.begin()
        digests_file = self.folder / IMAGES / condition / _DIGESTS
        digests: dict[str, str] = read_cached(digests_file, dict) or {}
        paths = [digests_file.with_name(f"{index:05d}.png") for index in range(len(layouts))]
        for start in range(0, len(layouts), settings.batch_size):
            batch = slice(start, start + settings.batch_size)
            there = [path for path in paths[batch] if path.is_file() and path.name in digests]
            if changed := [path for path in there if _digest(path) != digests[path.name]]:
                what, hint = "is not the image that was generated", "remove it: it is generated again"
                raise InputError(what, location=str(changed[0]), hint=hint)
            if len(there) < len(paths[batch]):
                images = generate(pipe, layouts[batch], settings, seed=seed + start)
                for path, image in zip(paths[batch], images, strict=True):
                    save_png(image, path)
                digests |= {path.name: _digest(path) for path in paths[batch]}
                write_json(digests_file, digests)
            on_progress(len(paths[: batch.stop]))
        return image_files(paths)


class DetectionCache:
    """`folder/<key>.json`: the detections of a few images. The key is made of the detector's fingerprint, the pixels and the
    layouts, so nothing is ever stale."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def detect(
        self, detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]
    ) -> list[list[Detection]]:
        """As `Detector.detect`."""
        key = hashlib.sha256(detector.fingerprint().encode())
        for image, layout in zip(images, layouts, strict=True):
            key.update(repr((image.mode, image.size)).encode())
            key.update(image.tobytes())
            key.update(json.dumps(layout.to_dict(), ensure_ascii=False).encode())
        path = self.folder / f"{key.hexdigest()[:32]}.json"
        if (content := read_cached(path, list)) is not None:
            try:
                detections = _DETECTIONS.validate_python(content)
                if len(detections) == len(images):
                    return detections
                warn_damaged(path, f"it is of {len(detections)} images, not {len(images)}")
            except ValidationError as error:
                warn_damaged(path, error)
        detections = detector.detect(images, layouts)
        write_json(path, [[asdict(detection) for detection in found] for found in detections])
        return detections


class LazyImages(Sequence[Image.Image]):
    """Images that are decoded at every access: thousands of them are too many to hold."""

    def __init__(self, loaders: Sequence[Callable[[], Image.Image]]) -> None:
        self._loaders = list(loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [load() for load in self._loaders[index]]
        return self._loaders[index]()


def image_files(paths: Sequence[Path]) -> LazyImages:
    """Images in files."""
    return LazyImages([partial(load_image, path) for path in paths])


def images_of(folder: Path, records: Sequence[Record]) -> LazyImages:
    """Images that something else made of a data set's layouts: `<the record's file name, any suffix>`, or, if none is named
    so, `0000.png`, ... in the data set's order, as `sample` writes them.

    Raises:
        InputError: images are missing, or two have one name; with the first of them and how many more.
    """
    if not folder.is_dir():
        raise InputError("no such folder", location=f"--images {folder}", hint="give a folder of images")
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES:
            found.setdefault(path.stem, []).append(path)
    stems = [Path(record.name).stem for record in records]
    if not any(stem in found for stem in stems):
        stems = [f"{number:04d}" for number in range(len(records))]
    if wrong := [stem for stem in stems if len(found.get(stem, ())) != 1]:
        what = "two images" if wrong[0] in found else "no image"
        more = f", and {len(wrong) - 1} more are missing or doubled" if len(wrong) > 1 else ""
        raise InputError(
            f"holds {what} for {wrong[0]} ({records[stems.index(wrong[0])].location}){more}",
            location=f"--images {folder}",
            hint="name each image as the data set's image, or 0000.png, 0001.png, ... in its order",
        )
    return image_files([found[stem][0] for stem in stems])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _short(value: Any) -> str:
    return clip(json.dumps(value), 80)
