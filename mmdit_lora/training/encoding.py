"""Images, captions and phrases to what the transformer takes, by the base's own VAE and text encoders; kept in a cache.

The last bits of an encoding depend on the shape of the batch that it is made in, and what is missing from a cache depends on
when the run was last started; a resumed run must see the bits of an undisturbed one. So every image is encoded alone, and
texts in batches of one size, filled up with copies: one kernel serves every call, and a row's bits depend neither on its
neighbours nor on how many were asked for (tests/test_text_batches.py).

| entry | key: SHA-256 over |
| --- | --- |
| latents | the pixels after the transform, the VAE's files, its dtype |
| prompts, phrases | the text, the text encoders' and tokenizers' files, their dtypes, `max_sequence_length` or phrase tokens, the batch size |
| views | the image's file, its layout, the transform and its code: which pixels come of it, without decoding it |
| weights | path, size, time and inode of a file of the base: its SHA-256, so that gigabytes are hashed once |

The device is not in the keys. Two devices differ in the last bits; what was cached on one is right on the other.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdit_lora.config.loading import Config
from mmdit_lora.data.buckets import Buckets, Size
from mmdit_lora.data.cache import LATENTS, PHRASES, PROMPTS, VIEWS, WEIGHTS, EncodingCache, Entry, content_key
from mmdit_lora.data.collate import Batch, LayoutCollator, Samples, View, collate_layouts, to_pixels
from mmdit_lora.data.dataset import LayoutDataset, Request, load, start_server, stored_view
from mmdit_lora.data.records import Record
from mmdit_lora.data.sampler import seeded
from mmdit_lora.errors import InputError
from mmdit_lora.flow import sample_timesteps, scheduler_shift
from mmdit_lora.hub import opened_folder
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.pipelines.sampling import quiet_texts

TEXT_BATCH = 16
_TEXT = ("text_encoder", "tokenizer")
_MOST_KNOWN = 100_000  # views whose place in the cache is remembered: about 1 kB each


class LayoutEncoder:
    """The frozen encoders of a base: `Samples` to the `Batch` that a training step reads. Each text is encoded once.

    Args:
        pipe: its VAE and text encoders are used where they are.
        cache: of what was encoded before; None = only what this object encoded is known.
        base: folder or hub id that `pipe` was loaded from: with a cache on disk, its files are hashed.
        slots: boxes that a layout is padded to; None = as many as the batch needs.
    """

    def __init__(
        self, pipe: LayoutPipeline, cache: EncodingCache | None = None, *, base: str = "", slots: int | None = None
    ) -> None:
        self.pipe, self.cache, self.base, self.slots = pipe, cache or EncodingCache(), base, slots

    def __call__(self, samples: Samples, latents: Tensor | None = None) -> Batch:
        """The batch, on the CPU.

        Args:
            latents: (B, C, h, w) of the images, where they are known.
        """
        if not isinstance(samples, Samples):
            raise TypeError(
                f"samples is a {type(samples).__name__}; give what LayoutCollator makes of a list of samples"
            )
        if latents is None:
            latents = self.latents(samples.pixels)
        noise = samples.noise
        if noise is None:
            keys = samples.key.tolist()
            noise = torch.stack([torch.randn(latents.shape[1:], generator=seeded("noise", key)) for key in keys])
        transformer, phrases = self.pipe.transformer, samples.phrases
        layout = collate_layouts(
            samples.layout,
            self.phrases([phrase for each in phrases for phrase in each]),
            phrase_dim=transformer.phrase_dim,
            phrase_tokens=transformer.phrase_tokens,
            slots=self.slots,
            phrases=phrases,
        )
        layout = type(layout)(layout.boxes, layout.phrase_embeds, layout.mask & ~samples.drops_layout[:, None].cpu())
        return Batch(latents, noise, samples.t, self.prompts(samples.caption), layout, samples.key)

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) fp32 on the CPU: the posterior's mode, scaled as the transformer takes it."""
        vae, transformer = self.pipe.vae, self.pipe.transformer
        each = [transformer.encode_latents(vae, x.to(vae.device, vae.dtype)).cpu() for x in pixels.split(1)]
        return torch.cat(each)

    def prompts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Encoded captions by name, (B, ...) each, on the CPU, as the pipeline makes them when it samples; see
        `LayoutPipeline.encode_caption`."""
        entries = [entry for entry in self.cached_prompts(captions) if entry is not None]
        return joined_texts([entry.tensors for entry in entries])

    def phrases(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """phrase -> embedding, pooled (P,) or of tokens (K, P), on the CPU."""
        each = list(dict.fromkeys(phrases))
        entries = zip(each, self.cached_phrases(each), strict=True)
        return {phrase: entry.tensors["embeds"][0] for phrase, entry in entries if entry is not None}

    def cached_prompts(self, captions: Sequence[str], *, wait: bool = True) -> list[Entry | None]:
        """The entry of each caption, made where it is missing; `wait` as of `EncodingCache.get_many`."""

        def make(missing: list[int]) -> list[Entry]:
            return [Entry(row) for row in self.encode_captions([captions[number] for number in missing])]

        length, batch = self.pipe.config.max_sequence_length, 1 if self.pipe.ragged_captions else TEXT_BATCH
        keys = [content_key("prompt", self._text_id, length, batch, caption) for caption in captions]
        return self.cache.get_many(PROMPTS, keys, make, batch=TEXT_BATCH, wait=wait)

    def cached_phrases(self, phrases: Sequence[str], *, wait: bool = True) -> list[Entry | None]:
        """As `cached_prompts`, of phrases."""

        def make(missing: list[int]) -> list[Entry]:
            embeds = self.encode_phrases([phrases[number] for number in missing])
            return [Entry({"embeds": row}) for row in embeds.split(1)]

        tokens, batch = self.pipe.transformer.phrase_tokens, 1 if self.pipe.ragged_captions else TEXT_BATCH
        keys = [content_key("phrase", self._text_id, tokens, batch, phrase) for phrase in phrases]
        return self.cache.get_many(PHRASES, keys, make, batch=TEXT_BATCH, wait=wait)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """At most `TEXT_BATCH` captions, (1, ...) each by name, encoded, never from the cache.

        None depends on the others: it would be another one after a break, or when some of them are in the cache.
        """
        with quiet_texts(self.pipe):
            texts = [self.pipe.encode_caption(group, self._text_device) for group in self._groups(captions)]
        rows = [
            {name: value[n : n + 1].cpu() for name, value in t.items()} for t in texts for n in range(len(t["embeds"]))
        ]
        return rows[: len(captions)]

    def _groups(self, texts: Sequence[str]) -> list[list[str]]:
        """What is encoded together."""
        return [[text] for text in texts] if self.pipe.ragged_captions else [_filled(texts)]

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """(n, P) or (n, K, P) of at most `TEXT_BATCH` phrases, never from the cache."""
        with quiet_texts(self.pipe):
            each = [self.pipe.encode_phrases(group, self._text_device).cpu() for group in self._groups(phrases)]
        return torch.cat(each)[: len(phrases)]

    def latents_key(self, pixels: str) -> str:
        """Key of the latents of an image with this digest of pixels."""
        return content_key("latents", self.vae_id, pixels)

    @cached_property
    def _text_device(self) -> torch.device:
        return self.pipe.encoding_device  # asked of the pipeline once: it walks over every module for it

    @cached_property
    def vae_id(self) -> str:
        return content_key("vae", str(self.pipe.vae.dtype), self._files(["vae"]))

    @cached_property
    def _text_id(self) -> str:
        parts = sorted(n for n, part in self.pipe.components.items() if n.startswith(_TEXT) and part is not None)
        dtypes = [str(getattr(self.pipe.components[name], "dtype", None)) for name in parts]
        # Where there is no third encoder, zeros of the transformer's width stand for it.
        width = self.pipe.transformer.config.get("joint_attention_dim")
        return content_key("text", type(self.pipe).__name__, dtypes, width, self._files(parts))

    def _files(self, parts: Sequence[str]) -> list[list[str]]:
        """[part/name, SHA-256] of every file of these parts of the base; nothing where no file outlives this process."""
        if self.cache.root is None:
            return []
        folder = opened_folder(self.base)
        files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
        return [
            [file.relative_to(folder).as_posix(), self._file_digest(file.resolve())]
            for file in files
            if not file.name.startswith(".") and file.suffix.lower() != ".md"
        ]

    def _file_digest(self, file: Path) -> str:
        def make() -> Entry:
            with file.open("rb") as opened:
                return Entry({}, {"sha256": hashlib.file_digest(opened, "sha256").hexdigest()})

        status = file.stat()
        key = content_key("file", str(file), status.st_size, status.st_mtime_ns, status.st_ino)
        return str(self.cache.get(WEIGHTS, key, make).note["sha256"])


def _scheduler_shift(scheduler: dict[str, Any], cell: int, size: Size) -> float:
    return scheduler_shift(scheduler, size[0] // cell * (size[1] // cell))


class EncodedDataset:
    """A data set with its encoders: batches of what the model takes.

    Args:
        records: of the data set. encoder: of the base.
        buckets: the sizes of the images.
        batch: samples of an optimizer step, over all processes: they are of one size.
        stream: see `LayoutDataset`.
        workers: processes that read, decode and resize ahead; 0 = this one does it when a batch is asked for.

    Raises:
        InputError: with more than one size, an image is none, or too small.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: LayoutEncoder,
        config: Config,
        *,
        buckets: Buckets,
        batch: int = 1,
        stream: str = "train",
        workers: int = 0,
    ) -> None:
        data, train, flow = config.data, config.train, config.flow
        self.records, self.encoder, self.workers, self.guidance = records, encoder, workers, flow.guidance
        times = partial(
            sample_timesteps,
            density=flow.timesteps,
            logit_mean=flow.logit_mean,
            logit_std=flow.logit_std,
            mode_scale=flow.mode_scale,
            shift=flow.shift,
        )
        pipe = encoder.pipe
        cell = pipe.vae_scale_factor * pipe.transformer.latent_multiple
        self.dataset = LayoutDataset(
            records,
            size=buckets,
            seed=train.seed,
            batch=batch,
            group_boxes=data.buckets.group_boxes,
            stream=stream,
            crop=data.crop,
            flip=data.flip,
            min_visible=data.min_visible,
            variants=data.cache_variants,
            caption_dropout=train.caption_dropout,
            layout_dropout=train.layout_dropout,
            box_jitter=data.box_jitter,
            box_dropout=train.box_dropout,
            phrase_dropout=train.phrase_dropout,
            times=times,
            shift=partial(_scheduler_shift, dict(pipe.scheduler.config), cell) if flow.scheduler_shift else None,
            latents=(pipe.transformer.latent_channels, pipe.vae_scale_factor),
        )
        self.variants, self.size_of = self.dataset.variants, self.dataset.size_of
        self.bucket_counts = self.dataset.bucket_counts
        if workers:
            start_server()
        self._collate = LayoutCollator()
        # Where the cache has the latents of a view, and its layout: so a run reads an image's file once.
        self._known: OrderedDict[tuple[int, int], tuple[str, Layout]] = OrderedDict()

    def batch(self, positions: Iterable[int]) -> Batch:
        """The batch at these positions, read by this process."""
        self._use_disk()
        return self._encode(self._collate([self.dataset[self._request(position)] for position in positions]))

    def batches(
        self, positions: Iterable[Sequence[int]], device: torch.device, *, workers: int | None = None
    ) -> Iterator[Batch]:
        """One batch after another, on `device`, read ahead by workers.

        Args:
            positions: of each batch.
            workers: None = as many as the data set was made with.
        """
        self._use_disk()
        requests = ([self._request(position) for position in each] for each in positions)
        workers = self.workers if workers is None else workers
        for samples in load(self.dataset, requests, self._collate, workers=workers, pin_memory=device.type == "cuda"):
            yield self._encode(samples).to(device)

    def knows(self, positions: Iterable[int]) -> bool:
        """Whether no image need be read for these positions."""
        return all(self._request(position).layout is not None for position in positions)

    def cached_view(self, index: int, variant: int, *, wait: bool = True) -> Entry | None:
        """The latents' entry of one view of a record's image, made where it is missing; `wait` as of `get_many`."""
        self._use_disk()
        image, _, view = self.dataset.view(index, variant)
        return self._latents(index, variant, image, view, wait=wait)

    def record_at(self, position: int) -> Record:
        """The record that comes at `position` of the run."""
        return self.records[self.dataset.request(position).record]

    def size_at(self, position: int) -> Size:
        """(height, width) in pixels that the image at `position` of the run is trained at."""
        return self.size_of(self.dataset.request(position).record)

    def bucket_warnings(self) -> list[str]:
        """One line where buckets hold fewer records than a batch: such a batch has records twice."""
        counts, batch = self.bucket_counts(), self.dataset.batch
        small = [name for name, count in counts.items() if count < batch]
        if not small or self.dataset.has_one_size:
            return []
        names = ", ".join(small[:4]) + (" ..." if len(small) > 4 else "")
        return [
            f"{len(small)} buckets hold fewer images than a batch of {batch} ({names}): their batches repeat "
            "images; fewer data.buckets.ratios, or a smaller batch, avoid it"
        ]

    @contextmanager
    def without_disk(self) -> Iterator[None]:
        """Within it, nothing is read from the cache on disk, or written there."""
        encoder = self.encoder
        self.encoder = LayoutEncoder(encoder.pipe, slots=encoder.slots)
        try:
            yield
        finally:
            self.encoder = encoder
            self._known.clear()

    def _use_disk(self) -> None:
        """Let the data set know which views need not be decoded; late, since the base's files are hashed for it."""
        cache = self.encoder.cache
        is_used = cache.root is not None and self.variants is not None
        self.dataset.stored = partial(stored_view, cache, self.encoder.vae_id) if is_used else None

    def _request(self, position: int) -> Request:
        """With the layout of the view, where its latents are at hand: then no image is read."""
        request = self.dataset.request(position)
        variant = self.dataset.variant(position, request.record)
        known = None if variant is None else self._known.get((request.record, variant))
        if known is None or (LATENTS, known[0]) not in self.encoder.cache:
            return request
        return request._replace(layout=known[1])

    def _encode(self, samples: Samples) -> Batch:
        rows = []
        for index, variant, image, view in zip(
            samples.record, samples.variant, samples.image, samples.view, strict=True
        ):
            if variant is None:
                assert image is not None
                rows.append(self.encoder.latents(to_pixels(image[None]))[0])
            else:
                entry = self._latents(index, variant, image, view)
                assert entry is not None
                rows.append(entry.tensors["latents"])
        return self.encoder(samples, torch.stack(rows))

    def _latents(
        self, index: int, variant: int, image: Tensor | None, view: View | None, *, wait: bool = True
    ) -> Entry | None:
        cache, place = self.encoder.cache, (index, variant)
        if view is None and place not in self._known:  # it was known when the sample was asked for
            image, _, view = self.dataset.view(index, variant)
        if view is not None:
            note = Entry({}, {"pixels": view.pixels, "layout": view.layout.to_dict()})
            if view.key is not None:
                (noted,) = cache.get_many(VIEWS, [view.key], lambda _: [note], wait=wait)
                if noted is None:
                    return None
                self._check_pixels(index, noted.note["pixels"], view.pixels)
            self._known[place] = self.encoder.latents_key(view.pixels), view.layout
            if len(self._known) > _MOST_KNOWN:
                self._known.popitem(last=False)
        key = self._known[place][0]

        def make(missing: list[int]) -> list[Entry]:  # noqa: ARG001
            pixels = image
            if pixels is None:  # the entry was there when the sample was asked for
                pixels, _, seen = self.dataset.view(index, variant, decode=True)
                assert pixels is not None
                assert seen is not None
                self._check_pixels(index, self.encoder.latents_key(seen.pixels), key)
            return [Entry({"latents": self.encoder.latents(to_pixels(pixels[None]))[0]})]

        return cache.get_many(LATENTS, [key], make, wait=wait)[0]

    def _check_pixels(self, index: int, one: str, other: str) -> None:
        if one != other:
            location = str(self.records[index].image)
            raise InputError("changed while it was read", location=location, hint="start again")


def joined_texts(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Encoded captions, (1, ...) each, as a batch; where lengths differ, shorter ones are filled up.

    With zeros, which are masked; or, where a base masks nothing (FLUX.3), with its last token: that is the state of all padding
    in the base's window, also in a longer one.
    """
    batch = {name: pad_sequence([row[name][0] for row in rows], batch_first=True) for name in rows[0]}
    if "mask" not in batch:
        for own, row in zip(batch["embeds"], rows, strict=True):
            length = row["embeds"].shape[1]
            own[length:] = own[length - 1].clone()
    return batch


def _filled(texts: Sequence[str]) -> list[str]:
    """`TEXT_BATCH` texts: these, and copies of the first."""
    if not 0 < len(texts) <= TEXT_BATCH:
        raise ValueError(f"{len(texts)} texts for a batch of {TEXT_BATCH}")
    return [*texts, *[texts[0]] * (TEXT_BATCH - len(texts))]
