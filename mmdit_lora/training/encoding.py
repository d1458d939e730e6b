"""Images, captions and phrases to what the transformer takes, by the base's own VAE and text encoders; kept on disk.

Each is encoded alone: the last bits of an encoding depend on what else is in the batch, and what is missing from a cache
depends on when the run was last started. A resumed run must see the bits of an undisturbed one.

| entry | key: SHA-256 over |
| --- | --- |
| latents | the pixels after the transform, the VAE's files, its dtype |
| prompts, phrases | the text, the text encoders' and tokenizers' files, their dtypes, `max_sequence_length` or phrase tokens |
| views | the image's file, its layout, the transform and its code: which pixels come of it, without decoding it |
| weights | path, size, time and inode of a file of the base: its SHA-256, so that gigabytes are hashed once |

The device is not in the keys. Two devices differ in the last bits; what was cached on one is right on the other.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cache as once
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from PIL import features
from torch import Tensor

from mmdit_lora.data import transforms
from mmdit_lora.data.cache import LATENTS, PHRASES, PROMPTS, VIEWS, WEIGHTS, DiskCache, Entry, content_key, pixel_digest
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.pipelines.sampling import quiet_texts

_TEXT = ("text_encoder", "tokenizer")


class EncodingStore:
    """Entries of one base's encoders in a cache.

    Args:
        base: folder or hub id that `pipe` was opened from: its files are what is hashed.

    Every `wait=False` gives None where another process is making the entry just now.
    """

    def __init__(self, cache: DiskCache, pipe: LayoutPipeline, base: str) -> None:
        self.cache, self.pipe, self.base = cache, pipe, base

    def image(
        self,
        source: Sequence[Any],
        prepared: Callable[[], tuple[Tensor, Layout]],
        encode: Callable[[Tensor], Tensor],
        *,
        location: str | None = None,
        wait: bool = True,
    ) -> tuple[Tensor, Layout, str] | None:
        """Latents (C, h, w) of an image, its layout after the transform, and the key that `latents` finds the first by.

        Args:
            source: JSON values that say all that `prepared` depends on.
            prepared: the pixels (3, H, W) in [-1, 1] and the layout; called only where one of the two entries is missing.
            encode: pixels to latents; called only where those are missing.
            location: the image's place, for messages.

        Raises:
            InputError: the image's file changed while it was read.
        """
        pixels: Tensor | None = None

        def look() -> Entry:
            nonlocal pixels
            pixels, layout = prepared()
            return Entry({}, {"pixels": pixel_digest(pixels), "layout": layout.to_dict()})

        view = self.cache.try_get(VIEWS, content_key("view", transform_id(), *source), look, wait=wait)
        if view is None:
            return None

        def make() -> Entry:
            seen = prepared()[0] if pixels is None else pixels
            if pixel_digest(seen) != view.note["pixels"]:
                raise InputError("changed while it was read", location=location, hint="start again")
            return Entry({"latents": encode(seen)})

        key = content_key("latents", self._vae_id, view.note["pixels"])
        entry = self.cache.try_get(LATENTS, key, make, wait=wait)
        return None if entry is None else (entry.tensors["latents"], Layout.from_dict(view.note["layout"]), key)

    def latents(self, key: str) -> Tensor | None:
        """Latents by the key that `image` gave; None where they are gone."""
        entry = self.cache.read(LATENTS, key)
        if entry is None:
            return None
        self.cache.stats.hits[LATENTS] += 1
        return entry.tensors["latents"]

    def prompt(
        self, caption: str, encode: Callable[[], tuple[Tensor, Tensor]], *, wait: bool = True
    ) -> tuple[Tensor, Tensor] | None:
        """Prompt embeddings (1, S, E) and pooled ones (1, P) of a caption."""

        def make() -> Entry:
            embeds, pooled = encode()
            return Entry({"embeds": embeds, "pooled": pooled})

        key = content_key("prompt", self._text_id, self.pipe.config.max_sequence_length, caption)
        entry = self.cache.try_get(PROMPTS, key, make, wait=wait)
        return None if entry is None else (entry.tensors["embeds"], entry.tensors["pooled"])

    def phrase(self, phrase: str, encode: Callable[[], Tensor], *, wait: bool = True) -> Tensor | None:
        """A phrase as the transformer takes it, (1, P) or (1, K, P)."""
        key = content_key("phrase", self._text_id, self.pipe.transformer.phrase_tokens, phrase)
        entry = self.cache.try_get(PHRASES, key, lambda: Entry({"embeds": encode()}), wait=wait)
        return None if entry is None else entry.tensors["embeds"]

    @cached_property
    def _vae_id(self) -> str:
        return content_key("vae", str(self.pipe.vae.dtype), self._files(["vae"]))

    @cached_property
    def _text_id(self) -> str:
        parts = sorted(n for n, part in self.pipe.components.items() if n.startswith(_TEXT) and part is not None)
        dtypes = [str(getattr(self.pipe.components[name], "dtype", None)) for name in parts]
        # Where there is no third encoder, zeros of the transformer's width stand for it.
        width = self.pipe.transformer.config.get("joint_attention_dim")
        return content_key("text", type(self.pipe).__name__, dtypes, width, self._files(parts))

    def _files(self, parts: Sequence[str]) -> list[list[str]]:
        """[part/name, SHA-256] of every file of these parts of the base."""
        folder = self._folder
        files = [file for part in parts for file in sorted((folder / part).rglob("*")) if file.is_file()]
        return [
            [file.relative_to(folder).as_posix(), self._file_digest(file)]
            for file in files
            if not file.name.startswith(".") and file.suffix.lower() != ".md"
        ]

    def _file_digest(self, file: Path) -> str:
        file = file.resolve()
        status = file.stat()
        key = content_key("file", str(file), status.st_size, status.st_mtime_ns, status.st_ino)
        return str(self.cache.get(WEIGHTS, key, lambda: Entry({}, {"sha256": _sha256(file)})).note["sha256"])

    @cached_property
    def _folder(self) -> Path:
        return Path(self.base) if Path(self.base).is_dir() else Path(DiffusionPipeline.download(self.base))


@once
def transform_id() -> str:
    """Of all that decides which pixels come of an image's file: our code of data, torchvision, Pillow and its codecs."""
    codecs = {name: features.version(name) for name in ("jpg", "libjpeg_turbo", "zlib", "webp", "jpg_2000", "avif")}
    code = [file.read_bytes() for file in sorted(Path(transforms.__file__).parent.glob("*.py"))]
    return content_key("transform", PIL.__version__, torchvision.__version__, codecs, *code)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


CACHE_BYTES = 4 * 2**30


class TensorCache:
    """Tensors kept in memory up to a number of bytes; those that were not used for longest go first."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[Hashable, tuple[Tensor, ...]] = OrderedDict()

    def get(self, keys: Sequence[Hashable], make: Callable[[list[int]], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Tensors of `keys`, stacked along a new first axis.

        Args:
            make: from the positions of the keys that are missing to their tensors, stacked; called at most once.
        """
        first: dict[Hashable, int] = {}
        for position, key in enumerate(keys):
            if key not in self._entries:
                first.setdefault(key, position)
        missing = list(first.values())
        fresh = make(missing) if missing else ()
        made = {
            keys[position]: tuple(stacked[row].clone() for stacked in fresh) for row, position in enumerate(missing)
        }
        out = []
        for key in keys:
            if key in made:
                out.append(made[key])
            else:
                self._entries.move_to_end(key)
                out.append(self._entries[key])
        for key, tensors in made.items():
            self._entries[key] = tensors
            self.bytes += _bytes(tensors)
        while self.bytes > self.max_bytes and self._entries:
            self.bytes -= _bytes(self._entries.popitem(last=False)[1])
        return tuple(torch.stack(parts) for parts in zip(*out, strict=True))


class Encoder:
    """The frozen encoders of a base, each text encoded once.

    Args:
        pipe: its VAE and text encoders are used where they lie.
        store: what was made before, on disk; None = only what this object made is known.
    """

    def __init__(self, pipe: LayoutPipeline, store: EncodingStore | None = None) -> None:
        self.pipe, self.store = pipe, store
        self._prompts = TensorCache()
        self._phrases = TensorCache()

    @cached_property
    def _text_device(self) -> torch.device:
        return self.pipe.encoding_device  # asked of the pipeline once: it walks over every module for it

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) fp32 on the CPU: the posterior's mode, scaled as the transformer takes it."""
        vae = self.pipe.vae
        each = [vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu() for x in pixels.split(1)]
        mode = torch.cat(each)
        return (mode - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    @torch.no_grad()
    def prompts(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompt embeddings (B, S, E) and pooled ones (B, P), on the CPU, as the pipeline makes them when it samples."""

        def make(missing: list[int]) -> tuple[Tensor, Tensor]:
            each = [self.prompt(captions[i]) for i in missing]
            return torch.cat([embeds for embeds, _ in each]), torch.cat([pooled for _, pooled in each])

        embeds, pooled = self._prompts.get(captions, make)
        return embeds, pooled

    @torch.no_grad()
    def phrases(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """phrase -> embedding, pooled (P,) or of tokens (K, P), on the CPU."""
        each = list(dict.fromkeys(phrases))
        if not each:
            return {}

        def make(missing: list[int]) -> tuple[Tensor]:
            return (torch.cat([self.phrase(each[i]) for i in missing]),)

        (embeds,) = self._phrases.get(each, make)
        return dict(zip(each, embeds, strict=True))

    def prompt(self, caption: str) -> tuple[Tensor, Tensor]:
        """One caption, from the store or made: (1, S, E) and (1, P)."""
        found = None if self.store is None else self.store.prompt(caption, lambda: self.encode_caption(caption))
        return self.encode_caption(caption) if found is None else found

    def phrase(self, phrase: str) -> Tensor:
        """One phrase, from the store or made: (1, P) or (1, K, P)."""
        found = None if self.store is None else self.store.phrase(phrase, lambda: self.encode_phrase(phrase))
        return self.encode_phrase(phrase) if found is None else found

    @torch.no_grad()
    def encode_caption(self, caption: str) -> tuple[Tensor, Tensor]:
        """As `prompt`, always made."""
        with quiet_texts(self.pipe):
            embeds, pooled = self.pipe.encode_caption(caption, self._text_device)
        return embeds.cpu(), pooled.cpu()

    @torch.no_grad()
    def encode_phrase(self, phrase: str) -> Tensor:
        """As `phrase`, always made."""
        with quiet_texts(self.pipe):
            return self.pipe.encode_phrases([phrase], self._text_device).cpu()


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
