"""Captions to generate from: files of three kinds, data sets, and words that are composed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora.data.captions import Caption, compose_captions, open_captions, pieces
from mmdit_lora.data.shapes import join_phrases, open_scenes
from mmdit_lora.errors import InputError

WORDS: dict[str, Any] = {
    "caption": "{phrases} on a {tone} background",
    "phrase": "a {color} {shape}",
    "objects": [1, 3],
    "color": ["red", "orange"],
    "shape": ["circle", "square"],
    "tone": ["light"],
}


def test_lines_of_text_are_captions_and_their_pieces_phrases(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a dog on a sofa, and two cats\n\n  a red car  \n", encoding="utf-8")
    assert open_captions(str(file)) == [
        Caption("a dog on a sofa, and two cats", ("a dog", "a sofa", "two cats"), stated=False),
        Caption("a red car", ("a red car",), stated=False),
    ]
    assert [c.text for c in open_captions(str(file), count=3)][2] == "a dog on a sofa, and two cats"
    assert len(open_captions(str(file), count=1)) == 1


def test_json_lines_may_state_their_phrases(tmp_path: Path) -> None:
    file = tmp_path / "captions.jsonl"
    lines = [{"caption": "a dog on a sofa", "phrases": ["a dog"]}, {"caption": "a cat and a cow"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert open_captions(str(file)) == [
        Caption("a dog on a sofa", ("a dog",)),
        Caption("a cat and a cow", ("a cat", "a cow"), stated=False),
    ]


def test_a_data_set_gives_its_captions_and_phrases(data: Path) -> None:
    scenes = "shapes://basic?count=3&seed=5"
    expected = [(r.layout.caption, tuple(b.phrase for b in r.layout.boxes), True) for r in open_scenes(scenes)]
    assert [tuple(caption) for caption in open_captions(scenes)] == expected
    assert open_captions(str(data), count=2)[0].stated


def test_words_are_composed_the_same_way_each_time(tmp_path: Path) -> None:
    captions = compose_captions(WORDS, 50, 0, "words.yaml")
    assert captions[:10] == compose_captions(WORDS, 10, 0, "words.yaml")
    assert captions != compose_captions(WORDS, 50, 1, "words.yaml")
    for caption in captions:
        assert 1 <= len(caption.phrases) <= 3
        assert len(set(caption.phrases)) == len(caption.phrases)
        assert caption.text == f"{join_phrases(caption.phrases)} on a light background"
    every = {phrase for caption in captions for phrase in caption.phrases}
    assert every == {"a red circle", "a red square", "an orange circle", "an orange square"}
    file = tmp_path / "words.yaml"
    file.write_text(json.dumps(WORDS))
    assert open_captions(str(file), count=50) == captions


def test_fewer_phrases_than_are_wanted() -> None:
    few = WORDS | {"color": ["red"], "shape": ["circle"], "objects": [3, 3]}
    assert compose_captions(few, 2, 0, "words")[0].phrases == ("a red circle",)


def test_pieces_and_lists() -> None:
    assert pieces("A dog; a cat next to a bowl of milk.") == ("A dog", "a cat", "a bowl", "milk")
    assert [join_phrases(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phrase": None}, "phrase is"),
        ({"phrase": "a {colour}"}, "'colour', of which there is no list"),
        ({"caption": "{phrases} {"}, "caption is"),
        ({"color": "red"}, "color is 'red'"),
        ({"color": []}, "color is"),
        ({"objects": [3, 1]}, "objects is"),
        ({"objects": 2}, "objects is 2"),
    ],
)
def test_wrong_words_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        compose_captions(
            {key: value for key, value in (WORDS | changes).items() if value is not None}, 1, 0, "words.yaml"
        )
    assert caught.value.location == "words.yaml"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "none.txt"),
        ("empty.txt", "\n", "holds no caption"),
        ("captions.jsonl", '{"caption": 3}\n', "captions.jsonl:1"),
        ("captions.jsonl", '{"caption": "a", "phrases": "a"}\n', "phrases is"),
        ("captions.jsonl", '{"caption": "a"}\n{\n', "captions.jsonl:2"),
        ("words.yaml", "[]", "--count"),
        ("captions.csv", "a", "is no file of captions"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        open_captions(str(tmp_path / name))
    assert said in f"{caught.value.location}: {caught.value.what}"
