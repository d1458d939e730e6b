"""`data synthesize`: images and boxes that a base and a detector make of captions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mmdit_lora.evaluation.synthesize as synthesize_module
from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.data.captions import Caption
from mmdit_lora.data.records import read_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.detectors import Detection, Detector, open_detector
from mmdit_lora.evaluation.detectors.base import agrees
from mmdit_lora.evaluation.synthesize import MISSING, NOTHING, UNNAMED, boxes_of, synthesize
from mmdit_lora.pipelines import SamplingConfig, generate, load_pipeline

PLACES = [(0.1 * n, 0.1, 0.1 * n + 0.08, 0.3) for n in range(9)]


class Learned:
    """Of a detector, what `boxes_of` asks; it finds what it knows and no attributes."""

    attributes = False
    agrees = staticmethod(agrees)


def found(*labels: str, scores: tuple[float, ...] = ()) -> list[Detection]:
    scored = zip(labels, scores or [1.0] * len(labels), strict=True)
    return [Detection(place, label, score) for place, (label, score) in zip(PLACES, scored, strict=False)]


@pytest.mark.parametrize(
    ("phrases", "labels", "scores", "exact", "reason", "taken"),
    [
        (
            ["a red circle", "a blue square"],
            ["blue square", "red circle"],
            (),
            True,
            None,
            ["a blue square", "a red circle"],
        ),
        (["a red circle", "a red circle"], ["red circle", "red circle"], (), True, None, ["a red circle"] * 2),
        (["a red circle", "a red circle"], ["red circle"], (), True, MISSING, None),
        (["a red circle"], ["red circle", "red circle"], (), True, UNNAMED, None),
        (["a red circle"], ["red circle", "blue thing"], (), True, UNNAMED, None),
        (["a red circle"], ["blue thing"], (), True, MISSING, None),
        (["a red circle"], [], (), True, NOTHING, None),
        # A learned detector may see more than the caption names, and more than one of each.
        (["a dog"], ["dog", "dog", "sofa"], (), False, None, ["a dog", "a dog", "sofa"]),
        (["a dog", "a cat"], ["dog"], (), False, MISSING, None),
        (["a dog", "a cat"], ["dog", "cat"], (0.9, 0.3), False, MISSING, None),
        (["a dog", "a cat"], ["cat", "dog", "cat"], (0.5, 0.9, 0.2), False, None, ["a cat", "a dog", "a cat"]),
    ],
)
def test_doubtful_images_are_told(
    phrases: list[str],
    labels: list[str],
    scores: tuple[float, ...],
    exact: bool,
    reason: str | None,
    taken: list[str] | None,
) -> None:
    detector = open_detector("shapes") if exact else Learned()
    boxes, why = boxes_of(Caption("", tuple(phrases)), found(*labels, scores=scores), detector, 0.4)  # type: ignore[arg-type]
    assert why == reason
    if taken is not None:
        assert [box.phrase for box in boxes] == taken
        assert [box.xyxy for box in boxes] == PLACES[: len(labels)]


def test_pieces_of_a_plain_caption_need_not_all_be_objects() -> None:
    caption = Caption("a dog on a sunny day", ("a dog", "a sunny day"), stated=False)
    boxes, why = boxes_of(caption, found("dog"), Learned(), 0.4)  # type: ignore[arg-type]
    assert why is None
    assert [box.phrase for box in boxes] == ["a dog"]


# -- the whole way: a small stock base paints noise, and a detector of these tests finds what it is told to


class Told(Detector):
    """Finds the first phrase of a caption in the left half of even images, and nothing in odd ones."""

    name, by_label, attributes = "told", True, False

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        self.seen = [*getattr(self, "seen", []), *images]
        return [
            [Detection((0.0, 0.0, 0.5, 1.0), layout.boxes[0].phrase, 0.9)] if index % 2 == 0 else []
            for index, layout in enumerate(layouts)
        ]

    def fingerprint(self) -> str:
        return "told"


CAPTIONS = [Caption(f"a dog number {number}", ("a dog",)) for number in range(6)]
SETTINGS = SamplingConfig(steps=2, batch_size=2, size=(32, 32))


def test_a_data_set_is_made_and_a_stopped_call_goes_on(
    flux2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize_module, "PART", 4)
    pipe = load_pipeline(str(flux2))
    whole = synthesize(pipe, CAPTIONS, Told(), tmp_path / "whole", SETTINGS, seed=3)
    assert (whole.kept, whole.boxes, whole.dropped) == (3, 3, {NOTHING: 3})
    records = read_dataset(tmp_path / "whole")
    assert [record.layout.caption for record in records] == [f"a dog number {n}" for n in (0, 2, 4)]
    assert records[0].layout.boxes == (Box((0.0, 0.0, 0.5, 1.0), "a dog"),)
    assert records[0].size() == (32, 32)
    # Each image is what the base paints of its caption from its own noise, without a layout.
    images = generate(pipe, [Layout(CAPTIONS[4].text)], SETTINGS, seed=3 + 4)
    difference = np.abs(np.asarray(images[0], dtype=int) - np.asarray(records[2].load(), dtype=int))
    assert difference.max() <= 1  # another batch

    class Stopped(Told):
        def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
            if len(getattr(self, "seen", [])) == 4:
                raise KeyboardInterrupt
            return super().detect(images, layouts)

    out = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        synthesize(pipe, CAPTIONS, Stopped(), out, SETTINGS, seed=3)
    assert not (out / "metadata.jsonl").exists()
    detector = Told()
    done: list[int] = []
    again = synthesize(pipe, CAPTIONS, detector, out, SETTINGS, seed=3, on_progress=done.append)
    assert len(detector.seen) == 2, "the first part is not done again"
    assert done[-1] == 6
    assert again == whole
    for name in ("metadata.jsonl", "report.json", "images/0000/00002.png", "images/0001/00000.png"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(InputError, match="holds images of another synthesis: seed was 3 and is 4"):
        synthesize(pipe, CAPTIONS, Told(), out, SETTINGS, seed=4)


def test_where_nothing_is_found_there_is_no_data_set(
    flux2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("a red circle\n")
    arguments = ["--base", str(flux2), "--detector", "shapes", "--steps", "2", "--size", "32"]
    command = [
        "data",
        "synthesize",
        *arguments,
        "--captions",
        str(tmp_path / "words.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    assert "all 1 images are doubtful" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_what_the_detector_cannot_look_for_is_refused_before_anything_is_painted(
    flux2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.jsonl").write_text(json.dumps({"caption": "a dog", "phrases": ["a dog"]}) + "\n")
    arguments = ["--base", str(flux2), "--captions", str(tmp_path / "words.jsonl"), "--detector", "shapes"]
    assert main(["data", "synthesize", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert "cannot look for 'a dog'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "images").exists()


@pytest.mark.slow
def test_two_processes_share_the_captions(flux2: Path, tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "import mmdit_lora.evaluation.synthesize as module\n"
        "from mmdit_lora.pipelines import load_pipeline\n"
        "from tests.test_synthesize import CAPTIONS, SETTINGS, Told\n"
        "module.PART = 2\n"
        f"module.synthesize(load_pipeline({str(flux2)!r}), CAPTIONS, Told(), Path(sys.argv[1]), SETTINGS, seed=3)\n"
    )
    root = Path(__file__).resolve().parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
    for count, name in ((1, "alone"), (2, "shared")):
        command = [*torchrun, str(count), str(script), str(tmp_path / name)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    for name in ("metadata.jsonl", "report.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
