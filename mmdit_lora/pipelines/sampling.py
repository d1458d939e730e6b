"""Many layouts to many images: batches, a seed for each image, the settings in one value; and texts that are too long."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from mmdit_lora.config.sampling import SamplingConfig
from mmdit_lora.data.images import opaque
from mmdit_lora.errors import NonFiniteError
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines.base import LayoutPipeline

_CLIP_TOKENS = 77
_MOST_STATED = 100_000  # a tokenizer without a limit states a huge one
_THEIRS = ("was truncated because", "Token indices sequence length is longer")


def generate(
    pipe: LayoutPipeline,
    layouts: Sequence[Layout],
    settings: SamplingConfig,
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    same_noise: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One RGB image for each layout. Image number i starts from the noise of `seed + i`, whatever the batch.

        images = generate(pipe, layouts, SamplingConfig(steps=28, batch_size=4), seed=7)

    Args:
        sizes: (height, width) in pixels of each image; None = all as `settings` has it.
        same_noise: all images start from the noise of `seed`, to compare layouts.
        on_progress: called with the number of images done.

    Raises:
        InputError: the base cannot generate a size, or the window covers no step.
        NonFiniteError: images hold NaN or infinity; later batches are not generated.
    """
    of_size: dict[tuple[int, int] | None, list[int]] = {}
    for number, size in enumerate(sizes if sizes is not None else [settings.size] * len(layouts)):
        of_size.setdefault(size, []).append(number)
    for size in of_size:
        for side in size or ():
            pipe.check_side(side)
    images: dict[int, Image.Image] = {}
    for size, numbers in of_size.items():
        height, width = size or (None, None)
        for start in range(0, len(numbers), settings.batch_size):
            part = numbers[start : start + settings.batch_size]
            # On the CPU, so that the same seed is the same noise on every device.
            generators = [torch.Generator().manual_seed(seed + (0 if same_noise else number)) for number in part]
            try:
                output: Any = pipe(
                    [layouts[number] for number in part],
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    layout_scale=settings.layout_scale,
                    layout_window=settings.layout_window,
                    height=height,
                    width=width,
                    generator=generators,
                )
            except NonFiniteError as error:
                done = len(images) + len(part)
                bad = [part[number] for number in error.bad]
                raise error.change(bad=bad, count=done, left=len(layouts) - done) from None
            images.update(zip(part, map(opaque, output.images), strict=True))
            if on_progress is not None:
                on_progress(len(images))
    return [images[number] for number in range(len(layouts))]


def long_texts(pipe: LayoutPipeline, texts: Iterable[str], what: str) -> str | None:
    """One line that counts the texts of which a text encoder reads a part only; None where all are read whole.

    Args:
        what: they are, in the plural, e.g. "captions". Phrases are read by CLIP, or, as token embeddings, up to the
            base's `phrase_tokens`.
    """
    texts = list(texts)
    readers: dict[tuple[int, str], list[Any]] = {}
    for name, tokenizer in pipe.components.items():
        if not name.startswith("tokenizer") or tokenizer is None:
            continue
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        kind = str(getattr(getattr(encoder, "config", None), "model_type", "t5"))
        is_clip = kind.startswith("clip")
        limit = pipe.config.max_sequence_length
        if is_clip:
            limit = tokenizer.model_max_length if tokenizer.model_max_length < _MOST_STATED else _CLIP_TOKENS
        if what == "phrases":
            tokens = pipe.transformer.phrase_tokens
            if is_clip != (tokens is None):
                continue
            limit = tokens or limit
        reader = "CLIP" if is_clip else "T5" if kind == "t5" else "the text encoder"
        readers.setdefault((limit, reader), []).append(tokenizer)
    parts = []
    for (limit, reader), tokenizers in sorted(readers.items(), key=lambda item: item[0]):
        # A token is one byte at least: most texts need not be counted. Two tokens are start and end.
        near = [text for text in texts if len(text.encode()) + 2 > limit]
        count = sum(any(len(t(text, verbose=False).input_ids) > limit for t in tokenizers) for text in near)
        if count:
            parts.append(f"{count:,} of {len(texts):,} {what} are longer than the {limit} tokens that {reader} reads")
    return f"{'; '.join(parts)}: the rest is cut off there" if parts else None


@contextmanager
def quiet_texts(pipe: LayoutPipeline) -> Iterator[None]:
    """Without their warnings of texts that are cut off: one a text, and one of "indexing errors" that never come."""
    modules = {c.__module__ for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.")}
    loggers = [logging.getLogger(name) for name in (*modules, "transformers.tokenization_utils_base")]
    for logger in loggers:
        logger.addFilter(_counted_here)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_counted_here)


def _counted_here(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _THEIRS)
