"""`scripts/custom_training_loop.py`: a loop of a user's own, by public names, whose adapter the command line samples from."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

import mmdit_lora
from mmdit_lora.cli.main import main

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "custom_training_loop.py"


def test_the_script_trains_and_its_adapter_is_sampled_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = ROOT / "data" / "tiny_base", tmp_path / "adapter"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--base", str(base), "--steps", "3", "--out", str(out)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "step 3: loss" in capsys.readouterr().out
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"caption": "c", "boxes": [{"xyxy": [0.1, 0.1, 0.5, 0.6], "phrase": "a red circle"}]}))
    command = ["sample", "--base", str(base), "--adapter", str(out), "--layout", str(layout), "--steps", "2"]
    assert main([*command, "--out", str(tmp_path / "samples")]) == 0
    with Image.open(tmp_path / "samples" / "0000.png") as image:
        assert image.size == (64, 64)


def test_it_is_short_and_uses_public_names_only() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 45
    assert "mmdit_lora." not in text.partition('"""\n\n')[2]
    assert set(re.findall(r"\bml\.(\w+)", text)) <= set(mmdit_lora.__all__)
