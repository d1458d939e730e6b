"""What the program keeps for itself and reads back, damaged: made anew with a word, or refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from mmdit_lora import Layout
from mmdit_lora.errors import InputError, shown
from mmdit_lora.evaluation.cache import PLAN, DetectionCache, ImageCache
from mmdit_lora.evaluation.detectors import Detection
from mmdit_lora.files import json_text, printable, write_json, write_text
from mmdit_lora.json_files import read_cached, read_object
from mmdit_lora.outputs import MARKER, Marker
from mmdit_lora.training.checkpoint import STATE, WEIGHTS, Checkpoint, State, checkpoints, save_checkpoint
from mmdit_lora.training.resumable_tracker import JOURNAL, resumable

DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "half": lambda content: content[: len(content) // 2],
    "noise": lambda _: b"\xff\x00junk",
    "another value": lambda _: b"3",
    "UTF-16": lambda content: content.decode().encode("utf-16-le"),
    "deep": lambda _: b"[" * 100_000,
    "deep for us alone": lambda _: b'{"a":' * 500 + b"{}" + b"}" * 500,
    "a key twice": lambda content: b'{"a": 1, "a": 2}',  # noqa: ARG005
}


def damage(path: Path, kind: str) -> None:
    path.write_bytes(DAMAGED[kind](path.read_bytes()))


@pytest.mark.parametrize("kind", DAMAGED)
def test_one_reader_of_objects(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, {"b": "ü"}]})
    assert read_object(path) == read_cached(path, dict) == {"a": [1, {"b": "ü"}]}
    damage(path, kind)
    with pytest.raises(InputError) as refusal:
        read_object(path, hint="mend it")
    assert str(path) in (refusal.value.location or "")
    assert len(str(refusal.value)) < 400
    assert read_cached(path, dict) is None
    assert f"{path} is damaged and made anew" in caplog.text
    assert read_cached(tmp_path / "none.json", dict) is None


# -- checkpoints


def make_checkpoints(folder: Path, *steps: int) -> list[Checkpoint]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {
        "config": {"base": "b"},
        "fingerprints": {"base": "f"},
        "start": None,
        "batches": {"train.batch_size": 2},
        "schedule_step": 1,
        "scaler": None,
        "run": asdict(State()),
    }
    return [save_checkpoint(folder, step, model, optimizer, state, extra={}, keep=9) for step in steps]


STATES: dict[str, dict[str, Any]] = {
    "no config": {"config": None},
    "no digests": {"sha256": None},
    "no fingerprints": {"fingerprints": None},
    "a text for a number": {"schedule_step": "3"},
    "a digest of another kind": {"sha256": {WEIGHTS: 3}},
    "batches of texts": {"batches": {"train.batch_size": "2"}},
    "a run with another key": {"run": {"step": 1, "other": 2}},
    "a run of texts": {"run": {"step": "1"}},
}


@pytest.mark.parametrize("kind", [*DAMAGED, *STATES])
def test_a_damaged_state_names_the_checkpoint_before(kind: str, tmp_path: Path) -> None:
    first, second, third = make_checkpoints(tmp_path, 1, 2, 3)
    assert third.state()["config"] == {"base": "b"}
    for checkpoint in (second, third):
        file = checkpoint.folder / STATE
        if kind in STATES:
            write_json(file, json.loads(file.read_text()) | STATES[kind])
        else:
            damage(file, kind)
    hint = "remove this checkpoint; `--resume latest` then takes the one before, step_0000001"
    with pytest.raises(InputError, match=STATE) as refusal:
        second.state()
    assert refusal.value.hint == hint
    with pytest.raises(InputError) as refusal:
        third.state()
    assert refusal.value.hint == f"remove this checkpoint and step_0000002, which is damaged too; {hint}"
    shutil.rmtree(second.folder)
    shutil.rmtree(third.folder)
    assert checkpoints(tmp_path) == [first]
    (first.folder / WEIGHTS).write_bytes(b"x")
    with pytest.raises(InputError, match=WEIGHTS) as refusal:
        first.state()
    assert refusal.value.hint == "it is the oldest one: start the run anew in another output_dir"


def test_a_checkpoint_whose_state_cannot_be_read_is_not_pruned(tmp_path: Path) -> None:
    first, second = make_checkpoints(tmp_path, 1, 2)
    (first.folder / STATE).write_text("{")
    assert first.others() == {path.name for path in first.folder.iterdir()}
    assert second.others() == set()


# -- journal


@pytest.mark.parametrize(
    "line", ["junk", "[]", "{}", '{"step": "x", "scalars": {}}', '{"step": 3, "scalars": 4}', "[" * 9999]
)
def test_a_damaged_journal_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    rows = ['{"tracker": "tensorboard", "run_id": null}', '{"step": 1, "scalars": {"loss": NaN}}', line]
    (tmp_path / JOURNAL).write_text("".join(row + "\n" for row in rows))

    def make(_: str | None) -> Any:
        raise AssertionError("the tracker is not made")

    with pytest.raises(InputError, match=rf"{JOURNAL}:3: ") as refusal:
        resumable(tmp_path, "tensorboard", make, run_id=None, step=0, resume=True)
    assert "move it away" in (refusal.value.hint or "")


# -- evaluate


class Counting:
    """A detector that counts the images that it looks at."""

    name = "counting"
    seen = 0

    def fingerprint(self) -> str:
        return "counting"

    def detect(self, images: Any, layouts: Any) -> list[list[Detection]]:  # noqa: ARG002
        self.seen += len(images)
        return [[Detection((0.1, 0.2, 0.5, 0.6), "a cat", 0.5)] for _ in images]


@pytest.mark.parametrize("content", [*DAMAGED, '[[{"xyxy": 3}]]', "[[]]", '[[{"xyxy": [0, 0, 1, 1], "other": 3}], []]'])
def test_damaged_detections_are_looked_at_again(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, detector = DetectionCache(tmp_path), Counting()
    given: Any = [Image.new("RGB", (4, 4))] * 2, [Layout("x", ())] * 2
    want = store.detect(detector, *given)  # type: ignore[arg-type]
    assert store.detect(detector, *given) == want  # type: ignore[arg-type]
    assert detector.seen == 2
    (file,) = tmp_path.iterdir()
    if content in DAMAGED:
        damage(file, content)
    else:
        file.write_text(content)
    assert store.detect(detector, *given) == want  # type: ignore[arg-type]
    assert detector.seen == 4
    assert f"{file} is damaged and made anew" in caplog.text
    assert store.detect(detector, *given) == want  # type: ignore[arg-type]
    assert detector.seen == 4


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_plan_has_all_images_painted_again(kind: str, tmp_path: Path) -> None:
    ImageCache(tmp_path, {"seed": 1}).begin()
    digests = tmp_path / "images" / "base" / "digests.json"
    write_json(digests, {"00000.png": "x"})
    with pytest.raises(InputError, match="seed was 1 and is 2"):
        ImageCache(tmp_path, {"seed": 2})
    ImageCache(tmp_path, {"seed": 1}).begin()
    assert digests.exists()
    damage(tmp_path / PLAN, kind)
    store = ImageCache(tmp_path, {"seed": 2})
    assert digests.exists(), "what is wrong is found before anything is written"
    store.begin()
    assert not digests.exists()
    assert json.loads((tmp_path / PLAN).read_text()) == {"seed": 2}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_digests_have_their_images_painted_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    painted: list[int] = []

    def generate(_: Any, part: Any, settings: Any, *, seed: int) -> list[Image.Image]:  # noqa: ARG001
        painted.append(len(part))
        return [Image.new("RGB", (4, 4), (seed, 0, 0)) for _ in part]

    monkeypatch.setattr("mmdit_lora.evaluation.cache.generate", generate)
    settings: Any = type("Settings", (), {"batch_size": 2})
    digests = tmp_path / "images" / "base" / "digests.json"
    for want in ([2, 1], [2, 1], [2, 1, 2, 1]):
        if len(want) == 4:
            damage(digests, kind)
        store = ImageCache(tmp_path, {"seed": 1})
        images = store.generate(
            "base",
            None,  # type: ignore[arg-type]
            [Layout("x", ())] * 3,
            settings,
            seed=7,
            on_progress=lambda _: None,
        )
        assert [image.getpixel((0, 0)) for image in images] == [(7, 0, 0), (7, 0, 0), (9, 0, 0)]
        assert painted == want
    assert f"{digests} is damaged and made anew" in caplog.text
    assert set(json.loads(digests.read_text())) == {"00000.png", "00001.png", "00002.png"}


# -- paths that are no text


def test_paths_that_are_no_text_are_written(tmp_path: Path) -> None:
    name = b"set\xff\xc3\xbc".decode("utf-8", "surrogateescape")
    spelt = b"\xc3\xbc".decode("ascii", "surrogateescape")  # ü as Python has it in a C locale
    assert printable(f"a {name} {spelt} ü \ud800") == "a set\\xffü ü ü \\ud800"
    assert json.loads(json_text({"x": name})) == {"x": name}
    write_text(tmp_path / "a.html", name)
    assert (tmp_path / "a.html").read_text() == "set\\xffü"
    write_json(tmp_path / "a.json", {"x": name})
    assert read_object(tmp_path / "a.json") == {"x": name}
    folder = tmp_path / name
    folder.mkdir()
    Marker("v", {name: None}).write(folder)
    assert Marker.read(folder) == Marker("v", {name: None})
    (folder / MARKER).write_text("[" * 100_000)
    assert Marker.read(folder) is None


# -- messages


def test_shown_looks_at_a_few_parts_alone() -> None:
    bomb: Any = "x"
    for _ in range(60):  # 9 ** 60 of them
        bomb = [bomb] * 9
    for value in (bomb, {"a": bomb}, "x" * 10**7, 10**100_000, [10**100_000], [[]] * 10**6):
        assert len(shown(value)) <= 200
    assert shown([1, "a", None]) == "[1, 'a', None]"
