"""Pictures, captions and phrases to what the transformer takes, by the base's own VAE and text encoders.

Each is encoded alone: the last bits of an encoding depend on what else is in the batch, and what is missing from a cache
depends on when the run was last started. A resumed run must see the bits of an undisturbed one. So what is stored on disk
(`encode_store`) is what would be made again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.pipelines.texts import quiet_texts
from mmdit_lora.training.encode_store import EncodingStore

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
