"""Layouts to the model's batch type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.models.layout_stream import LayoutInputs


def collate_layouts(
    layouts: Sequence[Layout],
    phrase_embeds: Mapping[str, Tensor],
    *,
    phrase_dim: int,
    phrase_tokens: int | None = None,
    slots: int | None = None,
) -> LayoutInputs:
    """Layouts with different numbers of boxes as one padded, masked batch.

    Args:
        phrase_embeds: phrase -> (P,) pooled text embedding, or (K, P) token embeddings, for every phrase that occurs.
        phrase_dim: P, phrase_tokens: K or None; needed where no layout has a box.
        slots: N; None = as many as the fullest layout needs, at least one.

    Raises:
        InputError: a layout has more boxes than there are slots.
    """
    needed = max((len(layout.boxes) for layout in layouts), default=0)
    if slots is not None and needed > slots:
        raise InputError(f"a layout has {needed} boxes, this base takes {slots}", hint=f"keep at most {slots} boxes")
    slots = slots or max(needed, 1)
    boxes = torch.zeros(len(layouts), slots, 4)
    phrase_shape = (phrase_dim,) if phrase_tokens is None else (phrase_tokens, phrase_dim)
    embeds = torch.zeros(len(layouts), slots, *phrase_shape)
    mask = torch.zeros(len(layouts), slots, dtype=torch.bool)
    for row, layout in enumerate(layouts):
        for column, box in enumerate(layout.boxes):
            boxes[row, column] = torch.tensor(box.xyxy)
            embeds[row, column] = phrase_embeds[box.phrase].to(embeds)
            mask[row, column] = True
    return LayoutInputs(boxes, embeds, mask)
