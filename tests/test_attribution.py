"""`attribute`: attention is what the model computes, scores are what they say, and the embedded base obeys its boxes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.analysis.attribute import (
    attribute,
    coverage,
    difference,
    heat,
    image_attention,
    inside,
    probabilities,
    sheet,
)
from mmdit_lora.cli.main import main
from mmdit_lora.models.attention import JointAttnProcessor
from mmdit_lora.pipelines import SamplingConfig, generate, load_pipeline
from tests.pipeline_makers import FAMILIES, TWO, open_pipeline
from tests.tiny import tiny_inputs, tiny_layout, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

ROOT = Path(__file__).resolve().parent.parent
FAST = SamplingConfig(steps=2, size=(32, 32))


def test_the_probabilities_are_those_of_the_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, size, 2, 8, generator=generator) for size in (5, 7, 7))
    mask = torch.tensor([True] * 5 + [False, True])[None, None, None, :]
    single = [probabilities(query[0, :, [h]], key[0, :, [h]], mask[0]) for h in range(2)]
    out = torch.stack([p @ value[0, :, h] for h, p in enumerate(single)], dim=1).flatten(1)
    assert torch.allclose(out, JointAttnProcessor().attend(query, key, value, mask)[0], atol=1e-6)
    both = probabilities(query[0], key[0], mask[0])
    assert torch.allclose(both, (single[0] + single[1]) / 2)
    assert both[:, 5].tolist() == [0.0] * 5
    assert torch.allclose(both.sum(1), torch.ones(5))


@pytest.mark.parametrize("attention", ["siamese", "cross"])
def test_attention_is_read_and_nothing_is_changed(attention: str) -> None:
    model = tiny_transformer(layout_attention=attention)
    inputs, layout = tiny_inputs(), tiny_layout((3, 2))
    with torch.no_grad():
        before = model(**inputs, layout=layout).sample
        with image_attention(model) as seen:
            during = model(**inputs, layout=layout).sample
            model(**inputs, layout=layout)
        after = model(**inputs, layout=layout).sample
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert list(seen) == [f"transformer_blocks.{n}" for n in range(3)]
    for total, calls in seen.values():
        assert (calls, tuple(total.shape)) == (2, (64, 3))
        assert total[:, 2].abs().max() == 0  # the last sample has two boxes; its third slot is padding
        mass = total.sum(1) / calls
        if attention == "cross":  # the image reads nothing but the layout there
            assert torch.allclose(mass, torch.ones(64), atol=1e-5)
        else:
            assert 0 < mass.min() <= mass.max() < 1
    assert not any("attend" in vars(m.processor) for m in model.modules() if hasattr(m, "processor"))
    with torch.no_grad(), image_attention(model) as unseen:
        model(**inputs, layout=None)
    assert unseen == {}


def test_coverage_and_shares_by_hand() -> None:
    box = Box((0.25, 0.5, 0.625, 1.0), "x")  # columns 1 and half of 2 of four, the lower of two rows
    assert coverage(box, (2, 4)).tolist() == [[0, 0, 0, 0], [0, 1, 0.5, 0]]
    assert coverage(box, (7, 5)).mean() == pytest.approx(box.area)
    assert inside(box, np.ones((2, 4))) == pytest.approx(box.area)
    assert inside(box, np.array([[0.0, 0, 0, 2], [0, 3, 2, 0]])) == pytest.approx((3 + 1) / 7)
    assert inside(box, np.zeros((2, 4))) is None
    black, red = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2), (255, 0, 0))
    assert difference(black, red).tolist() == [[1 / 3] * 4] * 2
    assert difference(red, red).max() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_one_box_at_a_time_is_left_out(family: str, tmp_path: Path) -> None:
    pipe = open_pipeline(family, tmp_path)
    done: list[int] = []
    found = attribute(pipe, TWO, FAST, seed=5, on_progress=done.append)
    assert done == [1, 3]
    (whole,) = generate(pipe, [TWO], FAST, seed=5)
    assert difference(found.image, whole).max() == 0
    for index in range(2):
        (other,) = generate(pipe, [Layout(TWO.caption, [TWO.boxes[1 - index]])], FAST, seed=5)
        assert difference(found.without[index], other).max() <= 1 / 255  # a batch rounds otherwise
        assert found.changes[index].shape == (32, 32)
        assert found.changes[index].max() > 2 / 255
    blocks = {name for box in found.boxes for name in box.attention_lift_by_block}
    assert len(blocks) == len([n for n, _ in pipe.transformer.named_modules() if n.endswith(".layout_stream")])
    assert sum(box.attention for box in found.boxes) < 1
    assert [box.area for box in found.boxes] == [box.area for box in TWO.boxes]
    assert sheet(found).width > 4 * 256


def test_phrases_of_several_tokens_are_one_box_each(tmp_path: Path) -> None:
    model = tiny_flux_transformer(layout_single_blocks=True, phrase_tokens=4, layout_attention="cross")
    pipe = tiny_flux_pipeline(tmp_path, model)
    pipe.set_progress_bar_config(disable=True)
    found = attribute(pipe, TWO, FAST)
    # The image reads nothing but layout tokens there: what one box does not get, the other gets.
    assert found.attentions[0] + found.attentions[1] == pytest.approx(1.0, abs=1e-5)
    assert 0 < found.attentions[0].min() < found.attentions[0].max() < 1


def test_a_layout_without_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no boxes"):
        attribute(open_pipeline("sd3", tmp_path), Layout("nothing", []), FAST)


def test_heat_is_lightest_where_most_is() -> None:
    amounts = np.array([[0.0, 1.0], [0.5, 0.0]])
    pixels = np.asarray(heat(Image.new("RGB", (64, 64), (128, 128, 128)), amounts).convert("L")).astype(int)
    quarter = pixels.shape[0] // 4
    least, most, middle = pixels[quarter, quarter], pixels[quarter, 3 * quarter], pixels[3 * quarter, quarter]
    assert least < middle < most
    assert len(np.unique(heat(Image.new("RGB", (64, 64)), 0 * amounts))) <= 3  # nothing anywhere: one colour


def test_each_box_of_the_embedded_base_moves_its_own_place(tmp_path: Path, capsys: Any) -> None:
    layout = {
        "caption": "a red square and a blue circle on a white background",
        "boxes": [
            {"xyxy": [0.05, 0.1, 0.45, 0.5], "phrase": "a red square"},
            {"xyxy": [0.55, 0.5, 0.95, 0.9], "phrase": "a blue circle"},
        ],
    }
    (tmp_path / "layout.json").write_text(json.dumps(layout))
    base = str(ROOT / "data" / "tiny_base")
    argv = ["attribute", "--base", base, "--layout", str(tmp_path / "layout.json"), "--steps", "8"]
    assert main([*argv, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    boxes = report["layouts"][0]["boxes"]
    assert [box["phrase"] for box in boxes] == ["a red square", "a blue circle"]
    for box in boxes:
        assert box["change_lift"] > 2
        assert box["attention_lift"] > 2
    written = json.loads((tmp_path / "out" / "attribution.json").read_text())
    assert written["layouts"] == report["layouts"]
    with Image.open(tmp_path / "out" / "0000.png") as drawn:
        assert drawn.width > 1000

    # The complement: a box's change and attention are not in the other's place.
    found = attribute(load_pipeline(base), Layout.from_dict(layout), SamplingConfig(steps=8))
    for index, other in enumerate(reversed(found.layout.boxes)):
        for amounts in (found.changes[index], found.attentions[index]):
            share = inside(other, amounts)
            assert share is not None
            assert share < other.area

    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps({"caption": "x", "boxes": []}))
    assert main(["attribute", "--base", base, "--layout", str(bare), "--out", str(tmp_path / "none")]) == 2
    assert "layout 1 has no boxes" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
