"""Everything that a run would ask its encoders for, made in advance: `mmdit-lora data cache`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mmdit_lora.config.loading import Config
from mmdit_lora.data.cache import DiskCache
from mmdit_lora.errors import InputError
from mmdit_lora.training.encoding import Encoder, EncodingStore
from mmdit_lora.training.examples import Examples
from mmdit_lora.training.load_base import DTYPES, open_encoders
from mmdit_lora.training.setup import read_data, run_buckets

OnProgress = Callable[[str, int, int, dict[str, float]], None]  # phase, done, of how many, scalars


def fill_cache(config: Config, cache: DiskCache, *, tell: OnProgress | None = None) -> dict[str, Any]:
    """Make what is missing: images of both sides in all their variants, captions, the empty caption, phrases.

    Another process may fill the same folder: what it is making is left to it, and looked at once more at the end.

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
    store = EncodingStore(cache, pipe, config.base)
    encoder = Encoder(pipe, store)
    examples = Examples([*data.records, *data.held_out], encoder, config, buckets=buckets, slots=None)
    layouts = [record.layout for record in examples.records]
    captions = list(dict.fromkeys(["", *(layout.caption for layout in layouts)]))
    phrases = list(dict.fromkeys(box.phrase for layout in layouts for box in layout.boxes))
    if config.train.phrase_dropout:
        phrases.append("")
    views = [(index, variant) for index in range(len(layouts)) for variant in range(examples.variants or 0)]
    work: list[Callable[..., Any]] = [
        *(partial(store.prompt, text, partial(encoder.encode_caption, text)) for text in captions),
        *(partial(store.phrase, text, partial(encoder.encode_phrase, text)) for text in phrases),
        *(partial(examples.view, *view) for view in views),
    ]
    cache.sweep()
    left: list[Callable[..., Any]] = []
    for done, item in enumerate(work, start=1):
        if item(wait=False) is None:
            left.append(item)
        if tell is not None:
            tell("cache", done, len(work), {})
    for item in left:
        item()
    cache.sweep()
    return {
        "images": len(views),
        "captions": len(captions),
        "phrases": len(phrases),
        "uncached_images": 0 if views else len(layouts),
    }
