"""Captions to generate images from, with the phrases of what each names: of a file, of a data set, or composed from words."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from mmdit_lora.config.loading import parse_yaml
from mmdit_lora.data.shapes import is_scenes, join_phrases
from mmdit_lora.data.shards import is_sharded
from mmdit_lora.data.sources import open_dataset
from mmdit_lora.errors import InputError, listed, shown
from mmdit_lora.files import exists, read_lines, read_text
from mmdit_lora.layout import read_json_records

_HINT = 'give a .txt (a caption a line), a .jsonl ({"caption": ..., "phrases": [...]}), a .yaml of words, or a data set'
_WORDS_HINT = (
    'e.g. caption: "a photo of {phrases}", phrase: "a {color} {animal}", color: [red, blue], animal: [cat, dog]'
)
# Between these a plain caption names its objects.
_BETWEEN = re.compile(r"[,;.]|\b(?:and|with|on|in|at|under|over|behind|beside|near|next to|in front of|of)\b", re.I)


class Caption(NamedTuple):
    """A text, and phrases of the objects that it names.

    Args:
        stated: the phrases were given; else they are pieces of the text, some of which may be no objects.
    """

    text: str
    phrases: tuple[str, ...]
    stated: bool = True


def open_captions(source: str, *, count: int | None = None, seed: int = 0) -> list[Caption]:
    """`count` captions; of a list that is shorter they come again, of a longer one the first ones.

    Args:
        source: path of a .txt, .jsonl or .yaml file, or a data set (folder, shards, `shapes://`), whose captions are taken.
        count: None = all that there are; needed for words.
        seed: of the words that are drawn.

    Raises:
        InputError: there is no such file, a line is no caption, or words do not fit their templates.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        if count is None:
            raise InputError("is missing", location="--count", hint="say how many captions to compose")
        return compose_captions(
            parse_yaml(read_text(path, what="file of words"), location=source)[0], count, seed, source
        )
    if path.suffix == ".txt" and not path.is_dir():
        lines = [text.strip() for _, text in read_lines(path, what="file of captions")]
        captions = [Caption(text, pieces(text), stated=False) for text in lines if text]
    elif path.suffix == ".jsonl" and not path.is_dir():
        captions = [_caption(value, location) for location, value in read_json_records(path, what="file of captions")]
    elif is_scenes(source) or is_sharded(source) or path.is_dir() or not exists(source):
        layouts = [record.layout for record in open_dataset(source)]
        captions = [Caption(layout.caption, tuple(box.phrase for box in layout.boxes)) for layout in layouts]
    else:
        raise InputError("is no file of captions", location=source, hint=_HINT)
    if not captions:
        raise InputError("holds no caption", location=source, hint=_HINT)
    return [captions[number % len(captions)] for number in range(len(captions) if count is None else count)]


def pieces(text: str) -> tuple[str, ...]:
    """What a plain caption may name: its parts between commas, prepositions and `and`."""
    return tuple(dict.fromkeys(piece for part in _BETWEEN.split(text) if (piece := part.strip())))


def compose_captions(words: Any, count: int, seed: int, location: str) -> list[Caption]:
    """Captions of words drawn at random; the same arguments give the same ones, and more of them begin with fewer.

    Args:
        words: "caption", a template with {phrases} and lists; "phrase", a template of one object; "objects", the fewest and
            most of them (default [1, 3]); and the lists that the templates name.

    Raises:
        InputError: a template or list is missing, or is none.
    """
    if not isinstance(words, dict):
        raise InputError("is no mapping", location=location, hint=_WORDS_HINT)
    lists = {key: value for key, value in words.items() if key not in ("caption", "phrase", "objects")}
    for key, value in lists.items():
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value):
            raise InputError(f"{key} is {shown(value)}", location=location, hint="give a list of words")
    fewest, most = _span(words.get("objects", [1, 3]), location)
    for name, known in (("phrase", lists), ("caption", {**lists, "phrases": 0})):
        template = words.get(name)
        if not isinstance(template, str):
            raise InputError(f"{name} is {shown(template)}", location=location, hint=_WORDS_HINT)
        try:
            fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        except ValueError as error:
            raise InputError(f"{name} is {template!r}: {error}", location=location, hint=_WORDS_HINT) from None
        if unknown := [field for field in fields if field not in known]:
            what = f"{name} names {listed(map(repr, unknown))}, of which there is no list"
            raise InputError(what, location=location, hint=_WORDS_HINT)
    out = []
    for number in range(count):
        random = Random(f"{seed} {number}")
        wanted, phrases = random.randint(fewest, most), dict[str, None]()
        for _ in range(20 * wanted):  # of few words there may be fewer phrases than are wanted
            if len(phrases) < wanted:
                phrases[_filled(words["phrase"], lists, random)] = None
        text = _filled(words["caption"], {**lists, "phrases": [join_phrases(list(phrases))]}, random)
        out.append(Caption(text, tuple(phrases)))
    return out


def _span(value: Any, location: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value):
        fewest, most = value
        if 1 <= fewest <= most <= 100:
            return fewest, most
    raise InputError(f"objects is {shown(value)}", location=location, hint="give the fewest and most, e.g. [1, 4]")


def _filled(template: str, lists: Mapping[str, Sequence[str]], random: Random) -> str:
    fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    text = template.format(**{field: random.choice(lists[field]) for field in fields})
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _caption(value: Any, location: str) -> Caption:
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict) or not isinstance(value.get("caption"), str) or not value["caption"].strip():
        raise InputError(
            "holds no caption", location=location, hint='e.g. {"caption": "a dog on a sofa", "phrases": ["a dog"]}'
        )
    phrases = value.get("phrases")
    if phrases is None:
        return Caption(value["caption"], pieces(value["caption"]), stated=False)
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise InputError(f"phrases is {shown(phrases)}", location=location, hint="give a list of texts")
    return Caption(value["caption"], tuple(phrases))
