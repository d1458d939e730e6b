"""Captions and phrases: too long for the text encoder, at odds with one another, unevenly spread."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmdit_lora.data.check.findings import Finding, example, finding
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


def text_findings(records: Sequence[Record], tokens: TokenCount) -> list[Finding]:
    """Warnings of captions and phrases."""
    boxes = sum(len(record.layout.boxes) for record in records)
    return [
        *finding(
            "empty-captions",
            "{n} records have an empty caption",
            "write one: the text stream has nothing to go by",
            [example(record, "empty caption") for record in records if not record.layout.caption.strip()],
            total=len(records),
            unit="records",
        ),
        *_too_long(records, tokens, boxes),
        *_at_odds(records, boxes),
        *_uneven(records, boxes),
    ]


def _too_long(records: Sequence[Record], tokens: TokenCount, boxes: int) -> list[Finding]:
    how = "estimated from words: give --base for the tokenizer's own count" if tokens.estimated else "counted by CLIP"
    count: dict[str, int] = {}

    def length(text: str) -> int:
        if text not in count:
            count[text] = tokens.of(text)
        return count[text]

    captions, phrases = [], []
    for record in records:
        if (n := length(record.layout.caption)) > tokens.limit:
            captions.append((n, example(record, f"{n} tokens: {_short(record.layout.caption)}")))
        for index, box in enumerate(record.layout.boxes):
            if (n := length(box.phrase)) > tokens.limit:
                text = f"objects.phrase[{index}], {n} tokens: {_short(box.phrase)}"
                phrases.append((n, example(record, text, [index])))
    captions.sort(key=lambda pair: -pair[0])
    phrases.sort(key=lambda pair: -pair[0])
    beyond = f"longer than the {tokens.limit} tokens that the CLIP encoder reads ({how}): the rest is cut off"
    return [
        *finding(
            "long-captions",
            f"{{n}} captions are {beyond}",
            "shorten them, or put what matters first (a base with T5 still reads the rest there)",
            [shown for _, shown in captions],
            total=len(records),
            unit="records",
        ),
        *finding(
            "long-phrases",
            f"{{n}} phrases are {beyond}",
            "shorten them: a phrase is what one box shows",
            [shown for _, shown in phrases],
            total=boxes,
            unit="boxes",
        ),
    ]


def few_phrases(records: Sequence[Record]) -> Counter[str] | None:
    """Phrase without article and case -> boxes; None where the set has more than `FEW_PHRASES` of them."""
    counts = Counter(_plain(box.phrase) for record in records for box in record.layout.boxes)
    return counts if len(counts) <= FEW_PHRASES else None


def _at_odds(records: Sequence[Record], boxes: int) -> list[Finding]:
    """Known phrases that a caption names and no box shows, and the reverse.

    A caption that names no phrase of its boxes at all is general ("a street in the rain"), not wrong.
    """
    counts = few_phrases(records)
    if not counts:
        return []
    # The longest first, so that "a red circle" is not also read as "circle".
    known = re.compile(rf"(?<!\w)(?:{'|'.join(sorted(map(re.escape, counts), key=len, reverse=True))})(?:e?s)?(?!\w)")
    unshown, unnamed, unnamed_count = [], [], 0
    for record in records:
        caption = " ".join(record.layout.caption.casefold().split())
        shown = {_plain(box.phrase) for box in record.layout.boxes}
        named = {_known(match, counts) for match in known.findall(caption)}
        if missing := sorted(named - shown):
            unshown.append(example(record, f"names {', '.join(map(repr, missing))}: {_short(record.layout.caption)}"))
        absent = {text for text in shown if not re.search(rf"(?<!\w){re.escape(text)}(?:e?s)?(?!\w)", caption)}
        if absent and absent != shown:
            indices = [n for n, box in enumerate(record.layout.boxes) if _plain(box.phrase) in absent]
            unnamed_count += len(indices)
            text = f"leaves out {', '.join(map(repr, sorted(absent)))}: {_short(record.layout.caption)}"
            unnamed.append(example(record, text, indices))
    return [
        *finding(
            "caption-without-box",
            "{n} captions name what no box shows",
            "box it, or take it out of the caption",
            unshown,
            total=len(records),
            unit="records",
        ),
        *finding(
            "box-without-caption",
            f"{{n}} boxes, in {len(unnamed)} records, show what the caption leaves out, though it names others",
            "name all of them, or none",
            unnamed,
            total=boxes,
            unit="boxes",
            count=unnamed_count,
        ),
    ]


def _known(match: str, counts: Counter[str]) -> str:
    return next((m for m in (match, match.removesuffix("s"), match.removesuffix("es")) if m in counts), match)


def _uneven(records: Sequence[Record], boxes: int) -> list[Finding]:
    counts = few_phrases(records)
    if not counts or len(counts) < 2 or boxes / len(counts) < _ENOUGH_BOXES:
        return []
    (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
    if many < UNEVEN * few:
        return []
    rare = [
        example(record, f"one of the {few} boxes of {least!r}", hit)
        for record in records
        if (hit := [n for n, box in enumerate(record.layout.boxes) if _plain(box.phrase) == least])
    ]
    return finding(
        "label-imbalance",
        f"{many} boxes say {most!r}, {few} say {least!r}: {many / few:.1f} times as many",
        "add images of the rare ones, or repeat their lines",
        rare,
        total=boxes,
        unit="boxes",
        count=few,
    )


def _plain(text: str) -> str:
    return _ARTICLE.sub("", " ".join(text.casefold().split()))


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."
