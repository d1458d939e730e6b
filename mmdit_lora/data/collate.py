"""Samples to batches: of a data set's samples, and of layouts as the model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout

if TYPE_CHECKING:
    from mmdit_lora.models.layout_stream import LayoutInputs


class View(NamedTuple):
    """How an image looks after the transform, where that is the same every time and its latents can be kept.

    Args:
        layout: after the transform. pixels: digest of the pixels. key: of the view in the cache on disk, where there is one.
    """

    layout: Layout
    pixels: str
    key: str | None


class Sample(NamedTuple):
    """One position of a data set; everything random in it is drawn.

    Args:
        position: of the run. record: its number in the data set.
        layout: as the model sees it, after crop, flip and augmentation. caption: empty where it is dropped.
        silent: of each box, whether its phrase is taken away. drops_layout: whether the layout is masked.
        key: what the adapter's dropout draws from.
        image: (3, height, width) uint8; None where its latents are known.
        variant: number of the view of the image; None where every view is a new one. view: where the image was looked at.
        t: () training time, 1 = noise. noise: (C, h, w), where the shape of the latents is known.
    """

    position: int
    record: int
    layout: Layout
    caption: str
    silent: tuple[bool, ...]
    drops_layout: bool
    key: int
    image: Tensor | None
    variant: int | None
    view: View | None
    t: Tensor
    noise: Tensor | None


class Samples(NamedTuple):
    """A batch: each field holds that of every `Sample`; `drops_layout`, `key`, `t` and `noise` are stacked."""

    position: Sequence[int]
    record: Sequence[int]
    layout: Sequence[Layout]
    caption: Sequence[str]
    silent: Sequence[Sequence[bool]]
    drops_layout: Tensor
    key: Tensor
    image: Sequence[Tensor | None]
    variant: Sequence[int | None]
    view: Sequence[View | None]
    t: Tensor
    noise: Tensor | None

    @property
    def pixels(self) -> Tensor:
        """(B, 3, height, width) float in [-1, 1], as a VAE takes it."""
        return to_pixels(torch.stack([image for image in self.image if image is not None]))

    @property
    def phrases(self) -> list[list[str]]:
        """Of each layout, the phrases of its boxes; empty where one is taken away."""
        return [
            ["" if silent else box.phrase for box, silent in zip(layout.boxes, flags, strict=True)]
            for layout, flags in zip(self.layout, self.silent, strict=True)
        ]


class LayoutCollator:
    """The `collate_fn` of a `DataLoader` over a `LayoutDataset`: `Sample`s to `Samples`."""

    def __call__(self, samples: Sequence[Sample]) -> Samples:
        if not samples:
            raise ValueError("no samples: a batch has at least one")
        columns = Samples(*zip(*samples, strict=True))  # type: ignore[arg-type]
        return columns._replace(
            drops_layout=torch.tensor(columns.drops_layout),
            key=torch.tensor(columns.key, dtype=torch.int32),
            t=torch.stack(list(columns.t)),
            noise=None if samples[0].noise is None else torch.stack(list(columns.noise)),  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Batch:
    """All that a training step reads; everything random in it is already drawn.

    Args:
        x0: (B, C, h, w) latents; noise: the same shape; t: (B,) in [0, 1], 1 = noise.
        texts: encoded captions by name, (B, ...) each: what `LayoutModelMixin.model_inputs` of the base takes.
        layout: B layouts; a dropped one is masked, never absent.
        keys: (B,) int32, what the adapter's dropout draws from for each sample; None where nothing drops.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    texts: dict[str, Tensor]
    layout: LayoutInputs
    keys: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """On `device`; from pinned memory without waiting."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(each) for name, each in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value.to(device)

        return Batch(**{name: moved(value) for name, value in vars(self).items() if value is not None})


def to_pixels(image: Tensor) -> Tensor:
    """uint8 to float in [-1, 1]."""
    return image.float() / 127.5 - 1


def collate_layouts(
    layouts: Sequence[Layout],
    phrase_embeds: Mapping[str, Tensor],
    *,
    phrase_dim: int,
    phrase_tokens: int | None = None,
    slots: int | None = None,
    phrases: Sequence[Sequence[str]] | None = None,
) -> LayoutInputs:
    """Layouts with different numbers of boxes as one padded, masked batch.

    Args:
        phrase_embeds: phrase -> (P,) pooled text embedding, or (K, P) token embeddings, for every phrase that occurs.
        phrase_dim: P, phrase_tokens: K or None; needed where no layout has a box.
        slots: N; None = as many as the fullest layout needs, at least one.
        phrases: of every box; None = its own.

    Raises:
        InputError: a layout has more boxes than there are slots.
    """
    from mmdit_lora.models.layout_stream import LayoutInputs  # diffusers, which a loader's worker does without

    counts = [len(layout.boxes) for layout in layouts]
    needed = max(counts, default=0)
    if slots is not None and needed > slots:
        raise InputError(f"a layout has {needed} boxes, this base takes {slots}", hint=f"keep at most {slots} boxes")
    slots = slots or max(needed, 1)
    if phrases is None:
        phrases = [[box.phrase for box in layout.boxes] for layout in layouts]
    mask = torch.arange(slots) < torch.tensor(counts).reshape(-1, 1)
    boxes = torch.zeros(len(layouts), slots, 4)
    embeds = torch.zeros(
        len(layouts), slots, *((phrase_dim,) if phrase_tokens is None else (phrase_tokens, phrase_dim))
    )
    if needed:
        boxes[mask] = torch.tensor([box.xyxy for layout in layouts for box in layout.boxes])
        embeds[mask] = torch.stack([phrase_embeds[phrase] for each in phrases for phrase in each]).to(embeds)
    return LayoutInputs(boxes, embeds, mask)
