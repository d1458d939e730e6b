"""Which picture comes when, and everything that is drawn for it: functions of (seed, position) and of nothing else.

Positions are counted through the whole run, over all processes and accumulated batches. So a resumed run draws what an
undisturbed one would have drawn, and two processes draw together what one would have drawn alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mmdit_lora.config import Config
from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.data.order import epoch_order, seeded
from mmdit_lora.data.records import Record
from mmdit_lora.data.transforms import augment_boxes, prepare
from mmdit_lora.flow import sample_timesteps
from mmdit_lora.layout import Layout
from mmdit_lora.training.encode import Encoder, TensorCache
from mmdit_lora.training.step import Batch


class Examples:
    """Records as batches of what the model takes.

    Args:
        records: of the data set.
        encoder: of the base.
        size: (height, width) of the training pictures in pixels.
        slots: boxes a layout is padded to; None = as many as the batch needs.
    """

    def __init__(
        self, records: Sequence[Record], encoder: Encoder, config: Config, *, size: tuple[int, int], slots: int | None
    ) -> None:
        self.records, self.encoder, self.config = records, encoder, config
        self.size, self.slots = size, slots
        # Where nothing is drawn for the picture, its latents are the same each time; where it has a number of variants,
        # each of them is.
        self._is_drawn = config.data.crop != "center" or config.data.flip
        self.variants = config.data.cache_variants if self._is_drawn else 1
        self._latents = TensorCache()
        self._layouts: dict[tuple[int, int], Layout] = {}
        self._stored: dict[tuple[int, int], str] = {}  # keys of latents: a run looks at a picture's file once

    def training_batch(self, positions: Sequence[int]) -> Batch:
        """The samples at `positions` of the run, with their augmentation, dropout, time and noise."""
        config = self.config
        indices = [self._index_at(position) for position in positions]
        generators = [seeded("train", config.train.seed, position) for position in positions]
        latents, layouts = self._encode(indices, generators)
        drop = torch.stack([torch.rand(2, generator=generator) for generator in generators])
        no_caption = (drop[:, 0] < config.train.caption_dropout).tolist()
        no_layout = drop[:, 1] < config.train.layout_dropout
        captions = ["" if dropped else layout.caption for dropped, layout in zip(no_caption, layouts, strict=True)]
        return self._batch(latents, layouts, captions, no_layout, generators, augment=True)

    def held_out_batch(self, indices: Sequence[int], draw: int) -> Batch:
        """Records as they are, with time and noise that depend on the record and `draw` alone."""
        generators = [seeded("held out", index, draw) for index in indices]
        latents, layouts = self._encode(indices, generators)
        captions = [layout.caption for layout in layouts]
        return self._batch(latents, layouts, captions, torch.zeros(len(layouts), dtype=torch.bool), generators)

    def record_at(self, position: int) -> Record:
        """The record that comes at `position` of the run."""
        return self.records[self._index_at(position)]

    def _index_at(self, position: int) -> int:
        epoch, place = divmod(position, len(self.records))
        blocks = getattr(self.records, "blocks", None)  # of sharded records that are cheaper to read together
        return int(epoch_order(self.config.train.seed, epoch, len(self.records), blocks)[place])

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
            pairs = [self._prepare(index, generator) for index, generator in zip(indices, generators, strict=True)]
            return self.encoder.latents(torch.stack([pixels for pixels, _ in pairs])), [layout for _, layout in pairs]
        views = [(index, self._draw_variant(generator)) for index, generator in zip(indices, generators, strict=True)]

        def make(missing: list[int]) -> tuple[Tensor]:
            made = []
            for position in missing:
                found = self.view(*views[position])
                assert found is not None
                made.append(found[0])
            return (torch.stack(made),)

        (latents,) = self._latents.get(views, make)
        return latents, [self._layouts[view] for view in views]

    def view(self, index: int, variant: int, *, wait: bool = True) -> tuple[Tensor, Layout] | None:
        """Latents (C, h, w) of one variant of a record's picture, and its layout: from the store, or made.

        The variant depends on the seed, its number and the picture's bytes. Without `wait`, None where another process
        is making it.
        """
        record, data, seed = self.records[index], self.config.data, self.config.train.seed
        store, place = self.encoder.store, (index, variant)
        if store is not None and place in self._stored:
            latents = store.latents(self._stored[place])
            if latents is not None:
                return latents, self._layouts[place]
        digest = hashlib.sha256(record.read_bytes()).hexdigest()
        draw = ("variant", seed, variant) if self._is_drawn else None

        def prepared() -> tuple[Tensor, Layout]:
            return self._prepare(index, None if draw is None else seeded(*draw, digest))

        def encode(pixels: Tensor) -> Tensor:
            return self.encoder.latents(pixels[None])[0]

        if store is None:
            pixels, self._layouts[place] = prepared()
            return encode(pixels), self._layouts[place]
        source = (digest, record.layout.to_dict(), self.size, data.crop, data.flip, data.min_visible, draw)
        found = store.picture(source, prepared, encode, where=str(record.image), wait=wait)
        if found is None:
            return None
        latents, self._layouts[place], self._stored[place] = found
        return latents, self._layouts[place]

    def _draw_variant(self, generator: torch.Generator) -> int:
        return int(torch.randint(self.variants or 1, (1,), generator=generator)) if self._is_drawn else 0

    def _prepare(self, index: int, generator: torch.Generator | None) -> tuple[Tensor, Layout]:
        record, data = self.records[index], self.config.data
        return prepare(
            record.load(),
            record.layout,
            self.size,
            crop=data.crop,
            flip=data.flip,
            min_visible=data.min_visible,
            generator=generator,
        )
