"""Which image comes when, and everything that is drawn for it: functions of (seed, position) and of nothing else.

Positions are counted through the whole run, over all processes and accumulated batches. So a resumed run draws what an
undisturbed one would have drawn, and two processes draw together what one would have drawn alone.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.data.buckets import Buckets, Size, record_bucket, size_counts
from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.data.records import Record
from mmdit_lora.data.sampler import BatchPlan, box_count_group, epoch_order, seeded
from mmdit_lora.data.shards import ShardedRecords, Subset
from mmdit_lora.data.shards.ahead import Prefetcher
from mmdit_lora.data.transforms import augment_boxes, prepare
from mmdit_lora.flow import sample_timesteps
from mmdit_lora.layout import Layout
from mmdit_lora.training.encoding import CACHE_BYTES, Encoder
from mmdit_lora.training.loss import Batch

_MOST_KNOWN = 100_000  # views whose place in the store is remembered: about 1 kB each


class Examples:
    """Records as batches of what the model takes.

    Args:
        records: of the data set.
        encoder: of the base.
        buckets: the sizes of the training images.
        slots: boxes a layout is padded to; None = as many as the batch needs.
        batch: samples of an optimizer step, over all processes: they are of one size.
        draws: names what is drawn for training batches, so that two sets of a run draw different things.

    Raises:
        InputError: with more than one size, an image is none, or too small.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: Encoder,
        config: Config,
        *,
        buckets: Buckets,
        slots: int | None,
        batch: int = 1,
        draws: str = "train",
    ) -> None:
        self.records, self.encoder, self.config = records, encoder, config
        self.slots, self.batch, self.draws = slots, batch, draws
        self._one_size = buckets.sizes[0][0] if buckets.is_single else None
        self._sizes = [] if buckets.is_single else sizes_of(records, buckets)
        # Where nothing is drawn for the image, its latents are the same each time; where it has a number of variants,
        # each of them is.
        self._is_drawn = config.data.crop != "center" or config.data.flip
        self.variants = config.data.cache_variants if self._is_drawn else 1
        self.max_bytes = CACHE_BYTES  # of latents kept in memory
        self._views: OrderedDict[tuple[int, int], tuple[Tensor, Layout]] = OrderedDict()
        self._views_bytes = 0
        # Where the store has a view's latents, and its layout: so a run looks at an image's file once.
        self._stored: OrderedDict[tuple[int, int], tuple[str, Layout]] = OrderedDict()
        self._reader = Prefetcher(records, threads=config.data.workers)

    def read_ahead(self, positions: Sequence[int]) -> None:
        """Begin to read the images at these positions of the run, where they are not at hand (`data.workers`)."""
        if self.config.data.workers:
            self._reader.announce(index for p in positions if not self._is_at_hand(index := self._index_at(p)))

    def _is_at_hand(self, index: int) -> bool:
        views = [(index, variant) for variant in range(self.variants or 0)]
        return any(view in self._views or view in self._stored for view in views)

    def training_batch(self, positions: Sequence[int]) -> Batch:
        """The samples at `positions` of the run, with their augmentation, dropout, time and noise."""
        config = self.config
        indices = [self._index_at(position) for position in positions]
        generators = [seeded(self.draws, config.train.seed, position) for position in positions]
        latents, layouts = self._encode(indices, generators)
        drop = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        no_caption = (drop[:, 0] < config.train.caption_dropout).tolist()
        no_layout = drop[:, 1] < config.train.layout_dropout
        captions = ["" if dropped else layout.caption for dropped, layout in zip(no_caption, layouts, strict=True)]
        batch = self._batch(latents, layouts, captions, no_layout, generators, augment=True)
        keys = [
            seeded("dropout", self.draws, config.train.seed, position).initial_seed() % 2**31 for position in positions
        ]
        return replace(batch, keys=torch.tensor(keys, dtype=torch.int32))

    def held_out_batch(self, indices: Sequence[int], draw: int) -> Batch:
        """Records as they are, with time and noise that depend on the record and `draw` alone."""
        generators = [seeded("held out", index, draw) for index in indices]
        latents, layouts = self._encode(indices, generators)
        captions = [layout.caption for layout in layouts]
        return self._batch(latents, layouts, captions, torch.zeros(len(layouts), dtype=torch.bool), generators)

    def record_at(self, position: int) -> Record:
        """The record that comes at `position` of the run."""
        return self.records[self._index_at(position)]

    def size_of(self, index: int) -> Size:
        """(height, width) in pixels that a record's image is trained at."""
        return self._one_size or self._sizes[index]

    def size_at(self, position: int) -> Size:
        """As `size_of`, of the record that comes at `position` of the run."""
        return self.size_of(self._index_at(position))

    def bucket_counts(self) -> dict[str, int]:
        """ "WIDTHxHEIGHT" -> records, the fullest bucket first."""
        if self._one_size is not None:
            height, width = self._one_size
            return {f"{width}x{height}": len(self.records)}
        return size_counts([self.size_of(index) for index in range(len(self.records))])

    def bucket_warnings(self) -> list[str]:
        """One line where buckets hold fewer records than a batch: such a batch has records twice."""
        small = [name for name, count in self.bucket_counts().items() if count < self.batch]
        if not small or self._one_size is not None:
            return []
        names = ", ".join(small[:4]) + (" ..." if len(small) > 4 else "")
        return [
            f"{len(small)} buckets hold fewer images than a batch of {self.batch} ({names}): their batches repeat "
            "images; fewer data.buckets.ratios, or a smaller batch, avoid it"
        ]

    def _index_at(self, position: int) -> int:
        return self._plan.record(position)

    @cached_property
    def _plan(self) -> BatchPlan:
        count, seed = len(self.records), self.config.train.seed
        blocks = getattr(self.records, "blocks", None)  # of shards that are cheaper to read part by part
        groups: list[Hashable] | None = None
        if self._one_size is None or self.config.data.buckets.group_boxes:
            by_boxes = self.config.data.buckets.group_boxes
            groups = [
                (self.size_of(index), box_count_group(len(record.layout.boxes)) if by_boxes else None)
                for index, record in enumerate(self.records)
            ]
        return BatchPlan(
            count,
            self.batch,
            order=lambda epoch: epoch_order(seed, epoch, count, blocks),
            shuffle=lambda epoch, batches: torch.randperm(batches, generator=seeded("batches", seed, epoch)),
            groups=groups,
        )

    def _batch(
        self,
        latents: Tensor,
        layouts: list[Layout],
        captions: list[str],
        no_layout: Tensor,
        generators: Sequence[torch.Generator],
        *,
        augment: bool = False,
    ) -> Batch:
        flow = self.config.flow
        times = [
            sample_timesteps(
                1,
                density=flow.timesteps,
                logit_mean=flow.logit_mean,
                logit_std=flow.logit_std,
                mode_scale=flow.mode_scale,
                shift=flow.shift,
                generator=generator,
            )
            for generator in generators
        ]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        silent: list[tuple[bool, ...]] = [()] * len(layouts)
        if augment:  # drawn last: with these switches on, everything above is what it is without them
            pairs = [self._augmented(*pair) for pair in zip(layouts, generators, strict=True)]
            layouts, silent = [layout for layout, _ in pairs], [flags for _, flags in pairs]
        embeds, pooled = self.encoder.prompts(captions)
        phrases = self.encoder.phrases([box.phrase for layout in layouts for box in layout.boxes])
        transformer = self.encoder.pipe.transformer
        inputs = collate_layouts(
            layouts,
            phrases,
            phrase_dim=transformer.phrase_dim,
            phrase_tokens=transformer.phrase_tokens,
            slots=self.slots,
        )
        silent_places = [(row, column) for row, flags in enumerate(silent) for column, flag in enumerate(flags) if flag]
        if silent_places:
            rows, columns = torch.tensor(silent_places).unbind(1)
            inputs.phrase_embeds[rows, columns] = self.encoder.phrases([""])[""].to(inputs.phrase_embeds)
        inputs = type(inputs)(inputs.boxes, inputs.phrase_embeds, inputs.mask & ~no_layout[:, None])
        return Batch(latents, noise, torch.cat(times), embeds, pooled, inputs)

    def _augmented(self, layout: Layout, generator: torch.Generator) -> tuple[Layout, tuple[bool, ...]]:
        data, train = self.config.data, self.config.train
        return augment_boxes(
            layout,
            jitter=data.box_jitter,
            dropout=train.box_dropout,
            phrase_dropout=train.phrase_dropout,
            generator=generator,
        )

    def _encode(self, indices: Sequence[int], generators: Sequence[torch.Generator]) -> tuple[Tensor, list[Layout]]:
        if self.variants is None:
            drawn = zip(indices, generators, strict=True)
            pairs = [self._prepare(self._reader.take(index), index, generator) for index, generator in drawn]
            return self.encoder.latents(torch.stack([pixels for pixels, _ in pairs])), [layout for _, layout in pairs]
        views = [(index, self._draw_variant(generator)) for index, generator in zip(indices, generators, strict=True)]
        pairs = [self._recent(view) for view in views]
        return torch.stack([latents for latents, _ in pairs]), [layout for _, layout in pairs]

    def _recent(self, view: tuple[int, int]) -> tuple[Tensor, Layout]:
        """As `view`, from memory where it was used lately."""
        found = self._views.get(view)
        if found is not None:
            self._views.move_to_end(view)
            return found
        made = self.view(*view)
        assert made is not None
        # Its own memory, not a piece of the file that the store has mapped, nor of a batch.
        self._views[view] = made[0].clone(), made[1]
        self._views_bytes += made[0].nbytes
        while self._views_bytes > self.max_bytes:
            self._views_bytes -= self._views.popitem(last=False)[1][0].nbytes
        return made

    def view(self, index: int, variant: int, *, wait: bool = True) -> tuple[Tensor, Layout] | None:
        """Latents (C, h, w) of one variant of a record's image, and its layout: from the store, or made.

        The variant depends on the seed, its number and the image's bytes. Without `wait`, None where another process
        is making it.
        """
        data, seed = self.config.data, self.config.train.seed
        store, place = self.encoder.store, (index, variant)
        if store is not None and (known := self._stored.get(place)) is not None:
            latents = store.latents(known[0])
            if latents is not None:
                return latents, known[1]
        record = self._reader.take(index)
        digest = hashlib.sha256(record.read_bytes()).hexdigest()
        draw = ("variant", seed, variant) if self._is_drawn else None

        def prepared() -> tuple[Tensor, Layout]:
            return self._prepare(record, index, None if draw is None else seeded(*draw, digest))

        def encode(pixels: Tensor) -> Tensor:
            return self.encoder.latents(pixels[None])[0]

        if store is None:
            pixels, layout = prepared()
            return encode(pixels), layout
        source = (digest, record.layout.to_dict(), self.size_of(index), data.crop, data.flip, data.min_visible, draw)
        found = store.image(source, prepared, encode, location=str(record.image), wait=wait)
        if found is None:
            return None
        latents, layout, key = found
        self._stored[place] = key, layout
        if len(self._stored) > _MOST_KNOWN:
            self._stored.popitem(last=False)
        return latents, layout

    def _draw_variant(self, generator: torch.Generator) -> int:
        return int(torch.randint(self.variants or 1, (1,), generator=generator)) if self._is_drawn else 0

    def _prepare(self, record: Record, index: int, generator: torch.Generator | None) -> tuple[Tensor, Layout]:
        data = self.config.data
        return prepare(
            record.load(),
            record.layout,
            self.size_of(index),
            crop=data.crop,
            flip=data.flip,
            min_visible=data.min_visible,
            generator=generator,
        )


def sizes_of(records: Sequence[Record], buckets: Buckets) -> list[Size]:
    """The size that each record's image is trained at; of shards from their index, where that knows the images' own."""
    if isinstance(records, ShardedRecords | Subset) and (pixels := records.pixels()).all():
        _, first, place = np.unique(pixels, axis=0, return_index=True, return_inverse=True)
        sizes = [record_bucket(records[int(index)], buckets) for index in first]
        return [sizes[index] for index in place.ravel()]
    return [record_bucket(record, buckets) for record in records]
