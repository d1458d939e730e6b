"""A data set with layouts for PyTorch's `DataLoader`: what it gives at a position depends on (seed, position) alone.

    dataset = LayoutDataset("data/mine", size=512, seed=0)
    loader = DataLoader(dataset, batch_size=8, collate_fn=LayoutCollator(), num_workers=4)

So a run resumes at a number, workers and processes share the work in any way, and results do not depend on how many they
are. Records, boxes and images are read, cut, mirrored and augmented here, in the worker that asks.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
import torchvision
from PIL import features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmdit_lora.data.buckets import MIN_VISIBLE, Buckets, Size, one_size, record_bucket, size_counts
from mmdit_lora.data.cache import LATENTS, VIEWS, EncodingCache, content_key, pixel_digest
from mmdit_lora.data.collate import LayoutCollator, Sample, Samples, View
from mmdit_lora.data.records import Record
from mmdit_lora.data.sampler import BatchPlan, box_count_group, epoch_order, seeded
from mmdit_lora.data.shards import ShardedRecords, ShardRecord, Subset
from mmdit_lora.data.sources import open_dataset
from mmdit_lora.data.transforms import augment_boxes, transform
from mmdit_lora.errors import InputError
from mmdit_lora.flow import sample_timesteps, shift_timesteps
from mmdit_lora.layout import Layout


class Request(NamedTuple):
    """A position whose record is known; with the layout of a view whose latents are, which needs no image."""

    position: int
    record: int
    layout: Layout | None = None


class LayoutDataset(Dataset[Sample]):
    """Images and layouts in a shuffled order, one epoch after another.

    Args:
        source: a data set folder, shards or scenes (see `open_dataset`), or records.
        size: of the images in pixels, 8 or more: a side, (height, width), or buckets.
        seed: of the order and of all draws.
        samples: how many positions `len` and iteration count; None = one epoch. Positions beyond are there all the same: they
            are later epochs.
        batch: samples of an optimizer step over all processes: with buckets, they are of one size.
        group_boxes: they have about as many boxes, too.
        stream: names the draws, so that two sets of a run draw different things. "held out": every record as it is, in its
            order, without augmentation; position `n * records + i` is draw number n of record i.
        crop, flip, min_visible: see `transform`.
        variants: a random crop or flip is one of so many views an image; None = a new one each time.
        caption_dropout, layout_dropout: shares of samples without caption, and without layout.
        box_jitter, box_dropout, phrase_dropout: see `augment_boxes`.
        times: draws training times, see `sample_timesteps`. shift: at a size, see `shift_timesteps`; None = 1.
        latents: (channels, pixels a cell) of the VAE: with it, noise is drawn too.
        stored: given the key of a view, its digest of pixels and its layout where its latents are in a cache on disk:
            such an image is not decoded.

    Raises:
        InputError: `source` is no data set; with more than one size, an image is none, or too small.
    """

    def __init__(
        self,
        source: str | Path | Sequence[Record],
        *,
        size: int | Size | Buckets,
        seed: int = 0,
        samples: int | None = None,
        batch: int = 1,
        group_boxes: bool = False,
        stream: str = "train",
        crop: str = "center",
        flip: bool = False,
        min_visible: float = MIN_VISIBLE,
        variants: int | None = None,
        caption_dropout: float = 0.0,
        layout_dropout: float = 0.0,
        box_jitter: float = 0.0,
        box_dropout: float = 0.0,
        phrase_dropout: float = 0.0,
        times: Callable[..., Tensor] = sample_timesteps,
        shift: Callable[[Size], float] | None = None,
        latents: tuple[int, int] | None = None,
        stored: Callable[[str], tuple[str, Layout] | None] | None = None,
    ) -> None:
        if isinstance(source, str | Path):
            source = open_dataset(source)
        self.records, self.seed, self.batch, self.stream = source, seed, batch, stream
        self.samples, self.group_boxes, self.is_held_out = samples, group_boxes, stream == "held out"
        self.crop, self.flip, self.min_visible = crop, flip, min_visible
        # Where nothing is drawn for the image, it looks the same each time; where it has a number of variants, each does.
        self._is_drawn = crop != "center" or flip
        self.variants = variants if self._is_drawn else 1
        self.caption_dropout, self.layout_dropout = caption_dropout, layout_dropout
        self._augment = partial(augment_boxes, jitter=box_jitter, dropout=box_dropout, phrase_dropout=phrase_dropout)
        self._times, self._shift, self._latents, self.stored = times, shift, latents, stored
        if isinstance(size, int):
            size = (size, size)
        sides = size if isinstance(size, tuple) else ()
        for name, value, least in (
            *(("size", side, 8) for side in sides),
            ("samples", samples, 0),
            ("batch", batch, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"is {value}", location=name, hint=f"give {least} or more")
        buckets = size if isinstance(size, Buckets) else one_size(size)
        self._size = buckets.sizes[0][0] if buckets.is_single else None
        self._sizes = [] if self._size else sizes_of(source, buckets)

    def __len__(self) -> int:
        return len(self.records) if self.samples is None else self.samples

    def __iter__(self) -> Iterator[Sample]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int | Request) -> Sample:
        """The sample at a position of the run, 0 or more.

        Raises:
            IndexError: `position` is no whole number of 0 or more. InputError: the record or its image cannot be read.
        """
        if not isinstance(position, Request) and (not isinstance(position, int) or position < 0):
            raise IndexError(f"position is {position!r}; positions are whole numbers from 0 on")
        request = position if isinstance(position, Request) else self.request(position)
        position, index, layout = request
        generator = self._generator(position, index)
        variant = self._draw_variant(generator)
        image = view = None
        if layout is None:
            image, layout, view = self.view(index, variant, generator)
        dropped = [1.0, 1.0] if self.is_held_out else torch.rand(2, generator=generator).tolist()
        caption = "" if dropped[0] < self.caption_dropout else layout.caption
        t = self._times(1, generator=generator)[0]
        if self._shift is not None:
            t = shift_timesteps(t, self._shift(self.size_of(index)))
        noise = None
        if self._latents is not None:
            channels, cell = self._latents
            height, width = self.size_of(index)
            noise = torch.randn(channels, height // cell, width // cell, generator=generator)
        silent = (False,) * len(layout.boxes)
        if not self.is_held_out:  # drawn last: with these switches on, everything above is what it is without them
            layout, silent = self._augment(layout, generator=generator)
        key = seeded("dropout", self.stream, self.seed, position).initial_seed() % 2**31
        drops_layout = dropped[1] < self.layout_dropout
        return Sample(position, index, layout, caption, silent, drops_layout, key, image, variant, view, t, noise)

    def request(self, position: int) -> Request:
        """Which record comes at `position`."""
        return Request(position, position % len(self.records) if self.is_held_out else self._plan.record(position))

    def variant(self, position: int, index: int) -> int | None:
        """Which view of the record `index` is taken at `position`."""
        return self._draw_variant(self._generator(position, index)) if self._is_drawn else 0

    def view(
        self, index: int, variant: int | None, generator: torch.Generator | None = None, *, decode: bool = False
    ) -> tuple[Tensor | None, Layout, View | None]:
        """(image, layout, view) of a record after crop and flip.

        Args:
            variant: depends on the seed, its number and the image's bytes; None = drawn by `generator`.
            decode: also where `stored` knows the view.
        """
        record = self.records[index]
        if variant is None:
            return *self._transform(record, index, generator), None
        content = record.read_bytes()
        if isinstance(record, ShardRecord):
            record = replace(record, read=lambda: content)  # read once
        digest = hashlib.sha256(content).hexdigest()
        draw = ("variant", self.seed, variant) if self._is_drawn else None
        key = None
        if self.stored is not None:
            settings = (self.size_of(index), self.crop, self.flip, self.min_visible, draw)
            key = content_key("view", transform_id(), digest, record.layout.to_dict(), *settings)
            if not decode and (known := self.stored(key)) is not None:
                pixels, layout = known
                return None, layout, View(layout, pixels, key)
        image, layout = self._transform(record, index, None if draw is None else seeded(*draw, digest))
        return image, layout, View(layout, pixel_digest(image), key)

    def size_of(self, index: int) -> Size:
        """(height, width) in pixels that a record's image is trained at."""
        return self._size or self._sizes[index]

    def bucket_counts(self) -> dict[str, int]:
        """ "WIDTHxHEIGHT" -> records, the fullest bucket first."""
        if self._size is not None:
            return {f"{self._size[1]}x{self._size[0]}": len(self.records)}
        return size_counts(self._sizes)

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which is asked by `Request`: without the order of the epochs."""
        return {name: value for name, value in vars(self).items() if name != "_plan"}

    def _generator(self, position: int, index: int) -> torch.Generator:
        if self.is_held_out:
            return seeded(self.stream, index, position // len(self.records))
        return seeded(self.stream, self.seed, position)

    def _draw_variant(self, generator: torch.Generator) -> int | None:
        if self.variants is None:
            return None
        return int(torch.randint(self.variants, (1,), generator=generator)) if self._is_drawn else 0

    def _transform(self, record: Record, index: int, generator: torch.Generator | None) -> tuple[Tensor, Layout]:
        return transform(
            record.load(),
            record.layout,
            self.size_of(index),
            crop=self.crop,
            flip=self.flip,
            min_visible=self.min_visible,
            generator=generator,
        )

    @property
    def has_one_size(self) -> bool:
        """Whether every image is trained at the same size."""
        return self._size is not None

    @cached_property
    def _plan(self) -> BatchPlan:
        count, seed = len(self.records), self.seed
        blocks = getattr(self.records, "blocks", None)  # of shards that are cheaper to read part by part
        groups: list[Hashable] | None = None
        if self._size is None or self.group_boxes:
            groups = [
                (self.size_of(index), box_count_group(len(record.layout.boxes)) if self.group_boxes else None)
                for index, record in enumerate(self.records)
            ]
        return BatchPlan(
            count,
            self.batch,
            order=lambda epoch: epoch_order(seed, epoch, count, blocks),
            shuffle=lambda epoch, batches: torch.randperm(batches, generator=seeded("batches", seed, epoch)),
            groups=groups,
        )


def sizes_of(records: Sequence[Record], buckets: Buckets) -> list[Size]:
    """The size that each record's image is trained at; of shards from their index, where that knows the images' own."""
    if isinstance(records, ShardedRecords | Subset) and (pixels := records.pixels()).all():
        _, first, place = np.unique(pixels, axis=0, return_index=True, return_inverse=True)
        sizes = [record_bucket(records[int(index)], buckets) for index in first]
        return [sizes[index] for index in place.ravel()]
    return [record_bucket(record, buckets) for record in records]


@cache
def transform_id() -> str:
    """Of all that decides which pixels come of an image's file: our code of data, torchvision, Pillow and its codecs."""
    codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "jpg_2000", "avif")}
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return content_key("transform", PIL.__version__, torchvision.__version__, codecs, *code)


def stored_view(cache: EncodingCache, vae_id: str, key: str) -> tuple[str, Layout] | None:
    """What is noted of a view whose latents are on disk too, for `LayoutDataset.stored`."""
    entry = cache.read(VIEWS, key, warn=False)
    if entry is None or (LATENTS, content_key("latents", vae_id, entry.note["pixels"])) not in cache:
        return None
    return entry.note["pixels"], Layout.from_dict(entry.note["layout"])


def loader_workers(setting: int | None, device: torch.device, processes: int) -> int:
    """`data.workers`, or what suits the machine where that is null.

    With a GPU, up to 4 a process, so that decoding hides behind its steps. On a CPU none: a step computes on every core,
    workers would take theirs, and after the first epoch latents come from memory.
    """
    if setting is not None:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if device.type == "cpu" else max(0, min(4, cores // processes - 1))


def start_server() -> Any:
    """Let the process that workers are forked from begin its imports, beside what this one does. Returns its context."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ensure_running()
    return context


def load(
    dataset: LayoutDataset,
    requests: Iterable[Sequence[Request]],
    collate: LayoutCollator,
    *,
    workers: int,
    pin_memory: bool = False,
) -> Iterator[Samples]:
    """Batches by a `DataLoader`, a few ahead of what was taken. Raises `InputError` as the data set raised it.

    Workers are started by Python's fork server, a process that has imported this module and nothing else. A fork of this one
    would start faster, and is not safe: it has the threads of CUDA, W&B and NCCL (PyTorch's notes on DDP: NCCL is "not fork
    safe ... change the multiprocessing start method to forkserver"), and a child would hold the GPU's memory when this process
    is killed. The server costs one import of torch a run, a worker then some milliseconds.
    """
    options: dict[str, Any] = {}
    if workers:
        context = start_server()
        options = {"prefetch_factor": 2, "multiprocessing_context": context, "worker_init_fn": _start_worker}
    loader = DataLoader(
        _Guarded(dataset, collate),
        batch_sampler=requests,  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one, the loader draws from PyTorch's global one
        **options,
    )
    # A worker would run the caller's script again, which one without `if __name__ == "__main__"` does not survive.
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        iterator = iter(loader)
    finally:
        sys.modules["__main__"] = main
    try:
        for samples in iterator:
            if isinstance(samples, InputError):
                raise samples
            yield samples
    finally:
        del iterator  # ends its workers; an error's traceback would hold it


class _Guarded(Dataset[Any]):
    """Whole batches; an `InputError` is a value, so that it arrives as it was raised."""

    def __init__(self, dataset: LayoutDataset, collate: LayoutCollator) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitems__(self, requests: Sequence[Request]) -> Samples | InputError:
        try:
            return self.collate([self.dataset[request] for request in requests])
        except InputError as error:
            return error


def _as_it_is(samples: Samples | InputError) -> Samples | InputError:
    return samples


def _start_worker(_: int) -> None:
    """A signal for the whole group (Ctrl-C, SIGTERM of a batch system) is for the main process, which still wants its
    batches; when that has ended, in whatever way, so does its worker."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
