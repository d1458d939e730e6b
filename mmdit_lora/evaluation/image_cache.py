"""Painted images kept in a folder, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, overload

from PIL import Image

from mmdit_lora.data.images import load_image
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError
from mmdit_lora.files import write_json
from mmdit_lora.json_files import read_cached
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate
from mmdit_lora.visual import save_png

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
PLAN, IMAGES = "evaluate.json", "images"
_DIGESTS = "digests.json"


class ImageCache:
    """`folder/images/<side>/00000.png`, and `folder/evaluate.json` with all that decides what they show.

    `folder/images/<side>/digests.json` holds their digests: an image that was changed since is not judged as a painted one.

    Args:
        folder: of one evaluation. plan: what the images depend on, for JSON; the same to go on.

    Raises:
        InputError: the folder holds images of another plan, or something else.
    """

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        self.folder = folder
        self._plan = json.loads(json.dumps(plan))
        self._begun = read_cached(folder / PLAN, dict)
        if self._begun is not None:
            _refuse_other(self._begun, self._plan, folder)

    def begin(self) -> None:
        """Write the plan. Before the first image; what is wrong is found before anything is written."""
        if self._begun is None:
            # Without a plan that can be read, nobody knows what the images here show: all are painted again.
            for digests in self.folder.glob(f"{IMAGES}/*/{_DIGESTS}"):
                digests.unlink()
            write_json(self.folder / PLAN, self._plan)
            self._begun = self._plan

    def generate(
        self,
        pipe: LayoutPipeline,
        layouts: Sequence[Layout],
        settings: SamplingConfig,
        *,
        side: str,
        seed: int,
        on_progress: Callable[[int], None],
    ) -> Lazy:
        """As `pipelines.paint`, batch by batch; a batch whose images are all there is not painted again.

        The batches are cut as they were, since an image's last bits may depend on what it is painted with.

        Raises:
            InputError: an image is not the one that was painted.
        """
        self.begin()
        digests_file = self.folder / IMAGES / side / _DIGESTS
        digests: dict[str, str] = read_cached(digests_file, dict) or {}
        out: list[Path] = []
        for start in range(0, len(layouts), settings.batch_size):
            part = layouts[start : start + settings.batch_size]
            paths = [self.path(side, start + number) for number in range(len(part))]
            there = [path for path in paths if path.is_file() and path.name in digests]
            changed = [path for path in there if _digest(path) != digests[path.name]]
            if changed:
                raise InputError(
                    "is not the image that was painted", location=str(changed[0]), hint="remove it: it is painted again"
                )
            if len(there) < len(paths):
                images = generate(pipe, part, settings, seed=seed + start)
                for path, image in zip(paths, images, strict=True):
                    save_png(image, path)
                digests |= {path.name: _digest(path) for path in paths}
                write_json(digests_file, digests)
            out += paths
            on_progress(len(out))
        return stored(out)

    def path(self, side: str, index: int) -> Path:
        """Of image `index` of a side."""
        return self.folder / IMAGES / side / f"{index:05d}.png"


class Lazy(Sequence[Image.Image]):
    """Images that are decoded whenever they are looked at: thousands of them are too many to hold."""

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


def stored(paths: Sequence[Path]) -> Lazy:
    """Images in files."""
    return Lazy([partial(load_image, path) for path in paths])


def images_of(folder: Path, records: Sequence[Record]) -> Lazy:
    """Images that something else made of a data set's layouts: `<the record's file name, any suffix>`, or, where none is
    named so, `0000.png`, ... in the data set's order, as `sample` writes them.

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
    wrong = [stem for stem in stems if len(found.get(stem, ())) != 1]
    if wrong:
        what = "two images" if wrong[0] in found else "no image"
        more = f", and {len(wrong) - 1} more are missing or doubled" if len(wrong) > 1 else ""
        raise InputError(
            f"holds {what} for {wrong[0]} ({records[stems.index(wrong[0])].location}){more}",
            location=f"--images {folder}",
            hint="name each image as the data set's image, or 0000.png, 0001.png, ... in its order",
        )
    return stored([found[stem][0] for stem in stems])


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refuse_other(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    different = [key for key in (*before, *(k for k in now if k not in before)) if before.get(key) != now.get(key)]
    if not different:
        return
    key = different[0]
    raise InputError(
        f"holds images of another evaluation: {key} was {_short(before.get(key))} and is {_short(now.get(key))}",
        location=f"--out {folder}",
        hint="give another folder, or remove this one",
    )


def _short(thing: Any) -> str:
    text = json.dumps(thing)
    return text if len(text) <= 80 else text[:77] + "..."
