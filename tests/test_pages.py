"""Pages and Markdown: texts of others do nothing in them; an evaluation's page shows its images first."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.records import read_dataset
from mmdit_lora.evaluation.evaluate import evaluate
from mmdit_lora.evaluation.report import markdown, page
from mmdit_lora.pipelines import SamplingConfig
from mmdit_lora.training.model_card import adapter_card
from mmdit_lora.visual.pages import code_markdown, escape_markdown

HOSTILE = 'a<script>alert(1)|`b` *c* [d](e) & "f" \n# g'  # without "/": a card names a folder by its last part


def test_escaped_markdown_is_one_line_in_which_nothing_acts() -> None:
    assert escape_markdown("a <b>|`c`\n# *d_e* [f] ~g~ \\h & i") == (
        r"a &lt;b&gt;\|\`c\` # \*d\_e\* \[f\] \~g\~ \\h &amp; i"
    )
    assert code_markdown("a`b``c\nd") == "``` a`b``c d ```"
    assert code_markdown("<b>") == "`<b>`"


def test_the_card_of_an_adapter_keeps_the_base_s_name_a_text() -> None:
    report: dict[str, Any] = {
        "trainable_params": 1,
        "total_params": 2,
        "steps": 3,
        "images": 4,
        "adapter_step": 3,
        "held_out_loss": None,
        "samples_a_step": 1,
        "buckets": {},
        "seconds": 1.0,
        "start": None,
        "fingerprints": {"base": "b", "data": "d"},
    }
    config = Config.model_validate({"base": HOSTILE, "data": "d", "lora": {"targets": ["a`b"]}})
    text = adapter_card(config, report, "Pipeline")
    body = text.split("\n---\n", 1)[1]
    lines = [line for line in body.splitlines() if "<script>" in line]
    assert [line.split("<script>")[0] for line in lines] == [
        "# Layout LoRA for `` a",
        "    mmdit-lora sample --base 'a",
        '    pipe = Pipeline.from_pretrained("a',
    ]  # a code span and two indented blocks: none is HTML
    assert "# g" not in body.splitlines()
    assert "`` a`b ``" in body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve layouts of one box, and one of two: every division by size and overlap repeats the whole."""
    folder = tmp_path / "<script>x"
    folder.mkdir()
    lines = []
    for number, phrase in enumerate(["a red square"] * 12 + ["a blue square"]):
        image = Image.new("RGB", (64, 64), (128, 128, 128))
        image.paste((215, 25, 28) if "red" in phrase else (30, 70, 220), (16, 16, 48, 48))
        image.save(folder / f"{number}.png")
        objects = {"bbox": [[0.25, 0.25, 0.75, 0.75]], "phrase": [phrase]}
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": f"<script>{number}", "objects": objects}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


class _Order(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        del attrs
        self.tags.append(tag)


def test_the_page_of_an_evaluation(folder: Path) -> None:
    evaluation = evaluate(None, read_dataset(folder), SamplingConfig())
    report = evaluation.to_dict()
    assert report["phrases"] == 2
    assert list(report["by_phrase"]) == ["a red square", "a blue square"]
    assert report["by_phrase"]["a red square"]["boxes"] == 12
    truth = report["by_phrase"]["a red square"]["ground_truth"]
    assert truth["iou50"] == 1
    assert truth["miou"] > 0.9
    assert "shuffled" not in report["by_phrase"]["a red square"]
    text = page(evaluation, report, title="<script>x")
    order = _Order()
    order.feed(text)
    assert "script" not in order.tags
    assert order.tags.index("img") < order.tags.index("table")  # images first
    assert "By phrase" in text
    assert "All phrases: " in text
    for repeats in ("By boxes an image", "By size of the box", "By overlap of boxes"):
        assert repeats not in text
        assert repeats not in markdown(report, title="x")
    table = markdown(report, title="<script>x")
    assert "<script" not in table
    assert "| a red square | 12 | 1.000 |" in table


def test_a_folder_s_name_is_a_text_in_every_file_of_an_evaluation(folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(13):
        Image.open(folder / f"{number}.png").save(images / f"{number}.png")
    out = tmp_path / "out"
    assert main(["evaluate", "--data", str(folder), "--images", str(images), "--out", str(out)]) == 0
    for name in ("report.md", "report.html"):
        assert "<script" not in (out / name).read_text(encoding="utf-8")
    assert "&lt;script&gt;x" in (out / "report.md").read_text(encoding="utf-8")
