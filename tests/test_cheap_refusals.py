"""What needs no model to be refused is refused before torch is imported: one process in which that import fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Arguments, and what the message names. FILE is a file, FULL a folder with something in it, OUT is free, LAYOUT a layout.
SAMPLE = ["sample", "--base", "data/tiny_base", "--out", "OUT"]
CASES: dict[str, tuple[list[str], str]] = {
    "adapter": ([*SAMPLE, "--layout", "LAYOUT", "--adapter", "nowhere"], "--adapter nowhere"),
    "adapter's weight": ([*SAMPLE, "--layout", "LAYOUT", "--adapter", "FULL=nan"], "FULL=nan"),
    "size": ([*SAMPLE, "--layout", "LAYOUT", "--size", "0"], "--size"),
    "layout": ([*SAMPLE, "--layout", "nowhere.json"], "nowhere.json"),
    "no layout": (SAMPLE, "nothing to sample"),
    "box": ([*SAMPLE, "--prompt", "x", "--box", "1,1,0,0=x"], "--box"),
    "base": (["sample", "--base", "data/tiny_bse", "--out", "OUT", "--prompt", "x"], "did you mean data/tiny_base"),
    "a base that is none": (["sample", "--base", "FULL", "--out", "OUT", "--prompt", "x"], "model_index.json"),
    "sample onto a file": (["sample", "--base", "data/tiny_base", "--prompt", "x", "--out", "FILE"], "FILE"),
    "sample onto a folder": (["sample", "--base", "data/tiny_base", "--prompt", "x", "--out", "FULL"], "FULL"),
    "evaluate: data": (["evaluate", "--base", "data/tiny_base", "--data", "nowhere", "--out", "OUT"], "nowhere"),
    "evaluate: base": (["evaluate", "--base", "./nowhere", "--data", "FULL", "--out", "OUT"], "nowhere"),
    "evaluate: nothing": (["evaluate", "--out", "OUT"], "--data"),
    "attribute: layout": (
        ["attribute", "--base", "data/tiny_base", "--layout", "nowhere.json", "--out", "OUT"],
        "nowhere.json",
    ),
    "inspect": (["inspect", "nowhere"], "nowhere"),
    "inspect onto a file": (["inspect", "FULL", "--out", "FILE"], "FILE"),
    "resize": (["resize", "nowhere", "--rank", "2", "--out", "OUT"], "nowhere"),
    "resize: no rank": (["resize", "FULL", "--out", "OUT"], "--rank or --energy"),
    "export": (["export", "nowhere", "--to", "peft", "--out", "OUT"], "nowhere"),
    "export: base": (["export", "FULL", "--to", "peft", "--out", "OUT", "--base", "./nowhere"], "./nowhere"),
    "export: merge": (["export", "FULL", "--to", "peft", "--merge", "--out", "OUT"], "--merge"),
    "export onto a folder": (["export", "FULL", "--to", "peft", "--out", "FULL"], "FULL"),
    "export onto a file": (["export", "FULL", "--to", "merged", "--out", "FILE"], "FILE"),
    "export: kohya's name": (["export", "FULL", "--to", "kohya", "--out", "OUT"], ".safetensors"),
    "import onto a folder": (
        ["import", "creatilayout", "--base", "data/tiny_base", "--weights", "FILE", "--out", "FULL"],
        "FULL",
    ),
    "study onto a folder": (["study", "rank", "configs/study.yaml", "--out", "FULL"], "FULL"),
    "attribute onto a file": (
        ["attribute", "--base", "data/tiny_base", "--layout", "LAYOUT", "--out", "FILE"],
        "FILE",
    ),
    "resize onto a folder": (["resize", "FULL", "--rank", "2", "--out", "FULL"], "FULL"),
    "evaluate onto a folder": (
        ["evaluate", "--base", "data/tiny_base", "--data", "nowhere", "--out", "FULL"],
        "FULL",
    ),
    "train onto a file": (["train", "configs/quickstart.yaml", "output_dir=FILE"], "FILE"),
    "verify": (["verify", "nowhere"], "nowhere"),
    "import: base": (["import", "creatilayout", "--base", "./nowhere", "--weights", "FULL", "--out", "OUT"], "--base"),
    "import: weights": (
        ["import", "creatilayout", "--base", "data/tiny_base", "--weights", "./nowhere", "--out", "OUT"],
        "--weights",
    ),
    "plan: nothing": (["plan"], "--family"),
    "plan: base": (["plan", "./nowhere"], "nowhere"),
    "study: config": (["study", "rank", "nowhere.yaml", "--out", "OUT"], "nowhere.yaml"),
    "study: seeds": (["study", "rank", "configs/study.yaml", "--out", "OUT", "--seeds", "-1"], "--seeds"),
    "train: config": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "train: key": (["train", "configs/quickstart.yaml", "train.max_step=3"], "max_steps"),
    "train: number": (["train", "configs/quickstart.yaml", "train.max_steps=0"], "max_steps"),
    "quickstart onto a file": (["quickstart", "--out", "FILE"], "FILE"),
    "quickstart onto a folder": (["quickstart", "--out", "FULL"], "FULL"),
}
SCRIPT = """
import contextlib, io, json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "peft"):
            raise ImportError(f"{name} is imported")
sys.meta_path.insert(0, Blocker())
from mmdit_lora.cli.main import main
answers = []
for argv in json.loads(sys.stdin.read()):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    answers.append([code, said.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    folder = tmp_path_factory.mktemp("cheap")
    (folder / "FULL").mkdir()
    (folder / "FULL" / "notes.txt").write_text("mine")
    (folder / "FILE").write_text("mine")
    (folder / "LAYOUT").write_text('{"caption": "x", "boxes": []}')
    here = {name: str(folder / name) for name in ("FULL", "FILE", "OUT", "LAYOUT")}

    def placed(text: str) -> str:
        head, equals, tail = text.partition("=")
        return here.get(head, head) + equals + here.get(tail, tail)

    given = [[placed(text) for text in argv] for argv, _ in CASES.values()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(given), capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "OUT").exists()
    assert (folder / "FILE").read_text() == (folder / "FULL" / "notes.txt").read_text() == "mine"
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_without_torch(answers: dict[str, tuple[int, str]], name: str) -> None:
    code, message = answers[name]
    assert "is imported" not in message
    assert code == 2, message
    assert CASES[name][1].replace("FULL", "").replace("FILE", "") in message
    assert len(message) < 2000
