"""Captions and phrases: too long for the text encoder, at odds with one another, unevenly spread."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmdit_lora.data.check.findings import Findings
from mmdit_lora.data.records import Record
from mmdit_lora.errors import InputError

CLIP_TOKENS = 77  # positions of CLIP's text encoder, with the start and the end token
# Above so many distinct phrases they are descriptions rather than classes, and a caption may word them in its own way.
FEW_PHRASES = 50
UNEVEN = 10  # times as many boxes as the rarest
_ENOUGH_BOXES = 20  # a phrase on average; with fewer, an uneven count may be chance
# As CLIP cuts a text before its byte pairs (openai/CLIP, simple_tokenizer.py): words, single digits, runs of marks.
_PIECES = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_")
_ARTICLE = re.compile(r"^(?:an?|the)\s+")


@dataclass(frozen=True)
class TokenCount:
    """How tokens are counted: `of` gives the tokens of a text with start and end; `limit` how many are read."""

    of: Callable[[str], int]
    limit: int
    estimated: bool


def clip_tokens(base: str | Path | None) -> TokenCount:
    """The tokenizer of a base's pipeline folder (its `tokenizer`); without a base, `estimate_tokens`.

    Raises:
        InputError: the folder has no tokenizer that loads.
    """
    if base is None:
        return TokenCount(estimate_tokens, CLIP_TOKENS, True)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(base), subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise InputError(
            f"has no tokenizer that loads ({str(error).splitlines()[0]})",
            location=str(base),
            hint="give a pipeline folder or hub id that holds `tokenizer`, or leave --base away",
        ) from None
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 100_000 else CLIP_TOKENS
    # The warning about a sequence beyond the limit would come for the very texts that are looked for.
    return TokenCount(lambda text: len(tokenizer(text, verbose=False).input_ids), limit, False)


def estimate_tokens(text: str) -> int:
    """CLIP's tokens of a text, estimated without its vocabulary: start and end; 1 a word, a digit or a run of marks.

    A word counts once for each 8 letters begun, a letter beyond ASCII as 2 tokens more. For English prose that is within
    some 10 %; rare words break into more pieces than this says.
    """
    pieces = _PIECES.findall(text)
    return 2 + sum(-(-len(piece) // 8) + 2 * sum(not c.isascii() for c in piece) for piece in pieces)


def text_findings(found: Findings, records: Sequence[Record], tokens: TokenCount) -> None:
    """Captions and phrases that are missing, too long, at odds, or unevenly spread."""
    how = "estimated from words: give --base for the tokenizer's own count" if tokens.estimated else "counted by CLIP"
    beyond = f"longer than the {tokens.limit} tokens that the CLIP encoder reads ({how}): the rest is cut off"
    length = cache(tokens.of)
    for record in records:
        caption = record.layout.caption
        if not caption.strip():
            found.add("empty-captions", record, "empty caption")
        if (n := length(caption)) > tokens.limit:
            found.add("long-captions", record, f"{n} tokens: {_short(caption)}", rank=-n, beyond=beyond)
        for index, box in enumerate(record.layout.boxes):
            if (n := length(box.phrase)) > tokens.limit:
                text = f"objects.phrase[{index}], {n} tokens: {_short(box.phrase)}"
                found.add("long-phrases", record, text, [index], rank=-n, beyond=beyond)
    if counts := few_phrases(records):
        _at_odds(found, records, counts)
        _uneven(found, records, counts)


def few_phrases(records: Sequence[Record]) -> Counter[str] | None:
    """Phrase without article and case -> boxes; None where the set has more than `FEW_PHRASES` of them."""
    counts = Counter(_plain(box.phrase) for record in records for box in record.layout.boxes)
    return counts if len(counts) <= FEW_PHRASES else None


def _at_odds(found: Findings, records: Sequence[Record], counts: Counter[str]) -> None:
    """Known phrases that a caption names and no box shows, and the reverse.

    A caption that names no phrase of its boxes at all is general ("a street in the rain"), not wrong.
    """
    # The longest first, so that "a red circle" is not also read as "circle".
    known = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, counts), key=len, reverse=True))})(?:e?s)?(?!\w)")
    for record in records:
        caption = " ".join(record.layout.caption.casefold().split())
        shown = {_plain(box.phrase) for box in record.layout.boxes}
        named = set()
        for match in known.findall(caption):
            named.add(
                next((m for m in (match, match.removesuffix("s"), match.removesuffix("es")) if m in counts), match)
            )
        if missing := sorted(named - shown):
            text = f"names {', '.join(map(repr, missing))}: {_short(record.layout.caption)}"
            found.add("caption-without-box", record, text)
        absent = {text for text in shown if not re.search(rf"(?<!\w){re.escape(text)}(?:e?s)?(?!\w)", caption)}
        if absent and absent != shown:
            boxes = [n for n, box in enumerate(record.layout.boxes) if _plain(box.phrase) in absent]
            text = f"leaves out {', '.join(map(repr, sorted(absent)))}: {_short(record.layout.caption)}"
            found.add("box-without-caption", record, text, boxes, count=len(boxes))


def _uneven(found: Findings, records: Sequence[Record], counts: Counter[str]) -> None:
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if len(counts) < 2 or counts.total() / len(counts) < _ENOUGH_BOXES or many < UNEVEN * few:
        return
    values: dict[str, Any] = {"most": most, "many": many, "least": least, "few": few, "times": many / few}
    for record in records:
        boxes = [n for n, box in enumerate(record.layout.boxes) if _plain(box.phrase) == least]
        if boxes:
            text = f"one of the {few} boxes of {least!r}"
            found.add("label-imbalance", record, text, boxes, count=len(boxes), **values)


def _plain(text: str) -> str:
    return _ARTICLE.sub("", " ".join(text.casefold().split()))


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
