"""Everything that a run would ask its encoders for, made in advance: `mmdit-lora data cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mmdit_lora.config.loading import Config
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.errors import InputError
from mmdit_lora.training.callbacks import OnProgress
from mmdit_lora.training.encoding import TEXT_BATCH, EncodedDataset, LayoutEncoder
from mmdit_lora.training.load_base import DTYPES, open_encoders
from mmdit_lora.training.setup import read_data, run_buckets


def fill_cache(config: Config, cache: EncodingCache, *, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Make what is missing: images of both sides in all their variants, captions, the empty caption, phrases.

    Another process may fill the same folder: what it is making is left to it, and read once more at the end.

    Returns:
        {"images", "captions", "phrases", "uncached_images"}: how many the config asks for.

    Raises:
        InputError: the data, the base or the size are wrong, or an image cannot be read.
    """
    data = read_data(config)
    if not data.records:
        raise InputError("holds no record", location=config.data.path)
    pipe = open_encoders(config, DTYPES[config.train.mixed_precision])
    buckets = run_buckets(config, pipe)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and name != "transformer":
            part.to(device)
    encoder = LayoutEncoder(pipe, cache, base=config.base)
    records = [*data.records, *data.held_out]
    dataset = EncodedDataset(records, encoder, config, buckets=buckets)
    captions = list(dict.fromkeys(["", *(record.layout.caption for record in records)]))
    phrases = list(dict.fromkeys(box.phrase for record in records for box in record.layout.boxes))
    if config.train.phrase_dropout:
        phrases.append("")
    views = [(index, variant) for index in range(len(records)) for variant in range(dataset.variants or 0)]

    def batches(texts: Sequence[str]) -> list[Sequence[str]]:
        return [texts[start : start + TEXT_BATCH] for start in range(0, len(texts), TEXT_BATCH)]

    work: list[Callable[..., list[Any]]] = [
        *(partial(encoder.cached_prompts, texts) for texts in batches(captions)),
        *(partial(encoder.cached_phrases, texts) for texts in batches(phrases)),
        *(lambda *, wait, view=view: [dataset.cached_view(*view, wait=wait)] for view in views),
    ]
    cache.sweep()
    left, done, total = [], 0, len(captions) + len(phrases) + len(views)
    for item in work:
        entries = item(wait=False)
        done += len(entries)
        if None in entries:
            left.append(item)
        if on_progress is not None:
            on_progress("cache", done, total, {})
    for item in left:
        item(wait=True)
    cache.sweep()
    return {
        "images": len(views),
        "captions": len(captions),
        "phrases": len(phrases),
        "uncached_images": 0 if views else len(records),
    }
