"""Texts beyond what a base's encoders read: counted here, once, in place of a warning of diffusers and transformers for each."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from mmdit_lora.pipelines.base import LayoutPipeline

_CLIP_TOKENS = 77
_MOST_STATED = 100_000  # a tokenizer without a limit states a huge one
_THEIRS = ("was truncated because", "Token indices sequence length is longer")


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
        encoder = pipe.components.get(name.replace("tokenizer", "text_encoder"))
        is_clip = hasattr(getattr(encoder, "config", None), "max_position_embeddings")
        limit = pipe.config.max_sequence_length
        if is_clip:
            limit = tokenizer.model_max_length if tokenizer.model_max_length < _MOST_STATED else _CLIP_TOKENS
        if what == "phrases":
            tokens = pipe.transformer.phrase_tokens
            if is_clip != (tokens is None):
                continue
            limit = tokens or limit
        readers.setdefault((limit, "CLIP" if is_clip else "T5"), []).append(tokenizer)
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
        logger.addFilter(_is_ours_to_tell)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_ours_to_tell)


def _is_ours_to_tell(record: logging.LogRecord) -> bool:
    return not any(text in record.getMessage() for text in _THEIRS)
