"""SIGKILL in every verb that writes, at steps of its work on the disk; then the same call gives the undisturbed result.

The processes are forked from one that has imported everything; each is killed at an exact change of the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import mmdit_lora.analysis.attribute
import mmdit_lora.analysis.inspect_page
import mmdit_lora.analysis.resize
import mmdit_lora.cli.quickstart
import mmdit_lora.models.import_creatilayout
from mmdit_lora import Layout, files
from mmdit_lora.cli.main import main
from mmdit_lora.evaluation.detectors.base import Detection
from mmdit_lora.evaluation.detectors.shapes import ShapesDetector
from mmdit_lora.files import RESERVED
from tests.creatilayout_files import write_files
from tests.test_outputs import VERBS, Inputs, call, copy, out_name

ROOT = Path(__file__).resolve().parent.parent
KILLS = 10
FEWER = {"export": 4, "study": 3, "quickstart": 4}  # each of their starts takes several seconds
# Files with times in them: that they are there is all that is compared.
TIMED = (
    ".index.safetensors",  # the time of its shard
    "report.json",
    "report.html",
    "figures.json",
    "study.json",
    "study.md",
    "study.png",
    "README.md",
    "state.json",
    ".mmdit_lora.json",
)
_CHANGES = ("mkdir", "open", "rename", "replace", "fsync", "rmdir", "unlink", "ftruncate")


def what_is_named(_: Any, images: Any, layouts: Sequence[Layout]) -> list[list[Detection]]:
    del images
    return [[Detection((0.0, 0.0, 1.0, 1.0), box.phrase) for box in layout.boxes] for layout in layouts]


def one_life(argv: list[str], count_file: str, step: int | None, quick: str) -> None:
    """A call, killed at its `step`-th change of the disk; how many there were goes into `count_file` where it ends by itself."""
    import torch

    torch.set_num_threads(1)
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), 9)

    def ticking(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tick()
            return original(*args, **kwargs)

        return wrapper

    os.chdir(ROOT)
    quickstart: Any = mmdit_lora.cli.quickstart
    quickstart.TRAIN_IMAGES, quickstart.HELD_OUT_IMAGES, quickstart.SHOWN = 8, 6, 4
    quickstart.EXPORTS = ("peft",)
    quickstart.CONFIG = quick
    # The base of these tests paints noise, in which the exact reader finds objects by chance alone.
    ShapesDetector.detect = what_is_named  # type: ignore[method-assign]
    for name in _CHANGES:
        setattr(os, name, ticking(getattr(os, name)))
    files._exchange = ticking(files._exchange)
    code = main(argv)
    Path(count_file).write_text(f"{count} {code}")
    os._exit(0)


@pytest.fixture(scope="module")
def inputs(base: Path, data: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    found = Inputs(folder)
    for source, target in ((base, found.base), (data, found.data), (adapter, found.adapter)):
        copy(source, target)
    train = {"max_steps": 2, "batch_size": 2, "checkpoint_every": 1, "sample_every": 0, "validate_every": 0}
    config = {"base": str(found.base), "data": {"path": str(found.data)}, "train": train}
    found.config.write_text(json.dumps(config))
    quick = ROOT / "data" / "tiny_base"
    steps = train | {"preflight": False}
    (folder / "quick.yaml").write_text(json.dumps({"base": str(quick), "data": {"path": "x"}, "train": steps}))
    return found


def argv_of(verb: str, inputs: Inputs, out: Path, theirs: tuple[Path, Path]) -> list[str]:
    if verb == "import creatilayout":
        return [*verb.split(), "--base", str(theirs[0]), "--weights", str(theirs[1]), "--out", str(out)]
    return [*call(verb, inputs, out), *(["--resume", "latest"] if verb == "train" else [])]


def contents(out: Path) -> dict[str, bytes | None]:
    """Relative names, and bytes where they hold no times."""
    found = [out] if out.is_file() else sorted(path for path in out.rglob("*") if path.parent.name != "locks")
    return {
        str(path.relative_to(out)): None if path.is_dir() or path.name.endswith(TIMED) else path.read_bytes()
        for path in found
    }


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_any_moment_and_called_again(verb: str, forks: Any, inputs: Inputs, tmp_path: Path) -> None:
    theirs = write_files("sd3", tmp_path / "theirs") if verb == "import creatilayout" else (tmp_path, tmp_path)
    counted, quick = tmp_path / "count", str(inputs.config.parent / "quick.yaml")

    def live(out: Path, step: int | None) -> Any:
        counted.unlink(missing_ok=True)
        process = forks.Process(target=one_life, args=(argv_of(verb, inputs, out, theirs), str(counted), step, quick))
        process.start()
        process.join(300)
        return process.exitcode

    whole, out = tmp_path / "whole" / out_name(verb), tmp_path / "killed" / out_name(verb)
    for folder in (whole, out):
        folder.parent.mkdir()
    assert live(whole, None) == 0
    count, code = map(int, counted.read_text().split())
    assert code == 0
    kills = FEWER.get(verb, KILLS)
    killed = 0
    for number in range(kills):
        # The later ones come after what the earlier starts did.
        killed += live(out, max(1, count * (number + 1) // (kills + 1))) == -9
        if verb == "init":
            out.unlink(missing_ok=True)  # it replaces no file
    assert killed >= kills // 3  # what goes on has less to do each time
    assert live(out, None) == 0
    assert counted.read_text().split()[1] == "0"
    expected = {
        name: text and text.replace(str(whole).encode(), str(out).encode()) for name, text in contents(whole).items()
    }
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    assert not list(tmp_path.rglob(f"{RESERVED}*"))
    assert [path.name for path in out.parent.iterdir()] == [out.name]
