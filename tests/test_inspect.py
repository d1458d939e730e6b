"""`inspect`: planted updates are recovered, by every kind of LoRA; the page; what is refused."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from markupsafe import escape
from torch import Tensor

from mmdit_lora.analysis.inspect_page import advice, page
from mmdit_lora.analysis.inspection import Inspection, block_of, inspect_adapter, suggest
from mmdit_lora.analysis.resize import resize_adapter
from mmdit_lora.analysis.updates import open_adapter
from mmdit_lora.cli.main import main
from mmdit_lora.lora import add_layout_lora, merge_adapter, save_adapter
from mmdit_lora.outputs import MARKER
from tests.adapter_makers import make_adapter, rank_four
from tests.tiny import tiny_transformer, trained_adapter
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

FC1 = "transformer_blocks.1.layout_stream.layout_mlp.fc1"
FIRST, COUNT = 5, 4  # the planted update lies in W's singular directions number 5 to 8
STRENGTH = (3.0, 2.0, 2.0, 1.0)


def along_own_directions(name: str, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """sum_i c_i u_i v_i^T over W's own directions i: U^T W V is then diag(sigma_i), and the amplification ||c|| / ||sigma||."""
    del name
    left, _, right = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = torch.zeros(weight.shape[0], r), torch.zeros(r, weight.shape[1])
    up[:, :COUNT] = (left[:, FIRST : FIRST + COUNT] * torch.tensor(STRENGTH)).float()
    down[:COUNT] = right[FIRST : FIRST + COUNT].float()
    return up, down


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {"r": 8, "rank_pattern": {"fc2": 5}, "alpha_pattern": {"layout_processor.layout_mlp.fc1": 3}},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_amplification_of_a_planted_update_is_recovered(base: Path, tmp_path: Path, kind: str) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, along_own_directions, **KINDS[kind])
    modules = {module.name: module for module in inspect_adapter(adapter).modules}
    weights = dict(tiny_transformer().named_parameters())
    assert len(modules) == 6  # two blocks with an MLP (the last one has none), and the processor
    for name, found in modules.items():
        sigma = torch.linalg.svdvals(weights[f"{name}.weight"].double())
        norm = math.sqrt(sum(c * c for c in STRENGTH))
        beneath = sigma[FIRST : FIRST + COUNT].square().sum().sqrt().item()
        assert found.norm == pytest.approx(norm, rel=1e-3)
        assert found.spectral_norm == pytest.approx(STRENGTH[0], rel=1e-3)
        assert found.singular_values[:COUNT] == pytest.approx(STRENGTH, rel=1e-3)
        assert found.relative_norm == pytest.approx(norm / sigma.square().sum().sqrt().item(), rel=1e-3)
        assert found.directions == COUNT
        assert found.projected == pytest.approx(beneath, rel=1e-2)
        assert found.amplification == pytest.approx(norm / beneath, rel=1e-2)
        own = sigma[:COUNT].square().sum().sqrt().item()
        assert found.amplification_own == pytest.approx(norm / own, rel=1e-2)
        assert found.projected_random < found.projected < found.projected_own
        assert found.weight_spectral_norm == pytest.approx(sigma[0].item(), rel=1e-5)
    assert sum(module.energy_share for module in modules.values()) == pytest.approx(1)


def test_the_change_of_dora_is_what_peft_merges(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four, magnitude=1.3, use_dora=True)
    opened = open_adapter(adapter)
    changes = {update.name: update.change() for update in opened.updates()}
    merged = dict(merge_adapter(opened.pipe.transformer).named_parameters())
    plain = dict(tiny_transformer().named_parameters())
    for name, change in changes.items():
        assert change is not None
        expected = (merged[f"{name}.weight"] - plain[f"{name}.weight"]).double()
        assert torch.allclose(change, expected, atol=1e-5)
        assert expected.abs().max() > 1e-2
    found = inspect_adapter(adapter)
    assert any("DoRA" in note for note in found.notes)
    module = next(m for m in found.modules if m.name == FC1)
    assert module.norm == pytest.approx(torch.linalg.matrix_norm(changes[FC1]).item())  # type: ignore[arg-type]
    assert module.suggested_rank == 4  # of the part that has a rank: 29 of 30 in three


def test_ranks_blocks_and_the_suggestion(base: Path, tmp_path: Path) -> None:
    def one_is_strong(name: str, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
        up, down = rank_four(name, weight, r)
        return (up * 3 if name == FC1 else up * 0 if name.startswith("layout_processor") else up), down

    found = inspect_adapter(make_adapter(tmp_path / "adapter", base, one_is_strong))
    module = next(m for m in found.modules if m.name == FC1)
    assert (module.ranks, module.suggested_rank) == ({"90%": 3, "95%": 3, "99%": 4}, 4)
    assert module.effective_rank == pytest.approx(
        math.exp(sum(-p * math.log(p) for p in (0.4, 0.3, 0.2, 0.1))), rel=1e-4
    )
    assert module.stable_rank == pytest.approx(30 / 16, rel=1e-4)
    assert {b.name: (b.modules, round(b.share, 4)) for b in found.blocks} == {
        "transformer_blocks.0": (2, round(2 / 12, 4)),  # of 1 + 1 + 9 + 1 parts
        "transformer_blocks.1": (2, round(10 / 12, 4)),
        "layout_processor": (2, 0.0),
    }
    still = next(m for m in found.modules if m.name == "layout_processor.layout_mlp.fc1")
    assert (still.norm, still.amplification, still.effective_rank, still.suggested_rank) == (0, None, 0, 1)
    assert "2 of 6 linears are not changed" in found.notes[0]
    assert found.suggested_rank == 4


def test_one_rank_for_all_is_counted_over_all() -> None:
    assert suggest([[10.0, 0.1], [1.2, 1.2]]) == 2  # 1.45 of 102.89 are more than a hundredth
    assert suggest([[10.0, 0.1], [0.5, 0.5]]) == 1
    assert suggest([[0.0, 0.0]]) == 1
    assert block_of("single_transformer_blocks.12.layout_stream.attn.to_q") == "single_transformer_blocks.12"
    assert block_of("layout_processor.phrase_mlp.fc1") == "layout_processor"


def test_similarity_of_two_adapters(base: Path, tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one", base, rank_four)
    apart = make_adapter(tmp_path / "two", base, lambda name, w, r: rank_four(name + "x", w, r))
    same = inspect_adapter(one, against=one).similarity
    other = inspect_adapter(one, against=apart).similarity
    assert same is not None
    assert other is not None
    assert all(each.full == pytest.approx(1) and len(each.phi) == 4 for each in same)
    assert all(each.full < 0.6 for each in other)
    assert [each.chance for each in other if each.name == FC1] == [4 / 32]


def test_a_base_of_single_blocks_is_inspected_and_resized(tmp_path: Path) -> None:
    pipe = tiny_flux_pipeline(tmp_path / "vocabulary", tiny_flux_transformer(layout_single_blocks=True))
    pipe.save_pretrained(tmp_path / "base")
    add_layout_lora(
        pipe.transformer, peft.LoraConfig(r=6, lora_alpha=3, target_modules=["layout_mlp.fc1", "layout_mlp.fc2"])
    )
    trained_adapter(pipe.transformer)
    save_adapter(pipe.transformer, tmp_path / "adapter", metadata={"base": str(tmp_path / "base")})
    found = inspect_adapter(tmp_path / "adapter")
    blocks = [block.name for block in found.blocks]
    assert any(name.startswith("single_transformer_blocks.") for name in blocks)
    assert any(name.startswith("transformer_blocks.") for name in blocks)
    module = found.modules[0]
    weights = dict(pipe.transformer.named_parameters())
    product = weights[f"{module.name}.lora_B.default.weight"] @ weights[f"{module.name}.lora_A.default.weight"]
    assert module.norm == pytest.approx(0.5 * torch.linalg.matrix_norm(product).item(), rel=1e-5)
    report = resize_adapter(tmp_path / "adapter", tmp_path / "small", rank=3)
    for module, resized in zip(found.modules, report.modules, strict=True):
        squares = [value**2 for value in module.singular_values]
        assert resized.error == pytest.approx(math.sqrt(sum(squares[3:]) / sum(squares)), rel=1e-4)


class _Reader(HTMLParser):
    """Whether every element is closed, and what points outside."""

    void = frozenset(("meta", "img", "br", "link", "input", "hr"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.seen: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.handle_startendtag(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "action") and not str(value).startswith(("data:", "#")):
                self.faults.append(f"<{tag} {name}={value}>")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


def read_page(text: str) -> _Reader:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader


def test_the_page_is_whole_and_asks_nothing_of_the_network(base: Path, tmp_path: Path) -> None:
    hostile = "a<script>b&\"c'"
    adapter = make_adapter(tmp_path / hostile, base, rank_four)
    found = inspect_adapter(adapter, against=adapter)
    text = page(found)
    reader = read_page(text)
    assert (reader.faults, reader.open) == ([], [])
    assert {"svg", "table", "style"} <= reader.seen
    assert "script" not in reader.seen
    assert len(reader.ids) == len(set(reader.ids))
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    referred = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text))
    assert {first or second for first, second in referred} <= set(reader.ids)
    assert "block 1 layout_mlp fc1" in text
    verdict = text.split('<p class="verdict ">')[1].split("</p>")[0]
    assert verdict == escape(advice(found))
    assert verdict.startswith("Make it smaller with `mmdit-lora resize ")
    assert f"--rank {found.suggested_rank} --out OUT --data DATA`: rank {found.suggested_rank} of " in verdict
    assert text == page(found)
    assert read_page(text.replace("</table>", "", 1)).faults  # a page that is not whole is seen
    assert read_page('<img src="https://x">').faults


def test_an_adapter_that_changes_nothing_has_a_page_too(base: Path, tmp_path: Path) -> None:
    def nothing(name: str, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
        up, down = rank_four(name, weight, r)
        return 0 * up, 0 * down

    adapter = make_adapter(tmp_path / "adapter", base, nothing)
    found = inspect_adapter(adapter, against=adapter)
    text = page(found)
    assert read_page(text).faults == []
    assert "Nothing is changed" in text
    assert "Train this adapter for longer" in text
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_verb_writes_both_files(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four)
    assert main(["inspect", str(adapter), "--out", str(tmp_path / "out"), "--json"]) == 0
    output = capsys.readouterr()
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"inspect.html", "inspect.json", MARKER}
    written = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert written == json.loads(output.out)
    assert written["header"]["base"] == base.name
    assert "block 1 layout_mlp fc1" in output.err
    assert set(Inspection.__dataclass_fields__) == written.keys()


def test_what_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, rank_four)
    nameless = make_adapter(tmp_path / "nameless", "", rank_four)
    apart = make_adapter(tmp_path / "apart", base, rank_four, target_modules=["layout_stream.out_proj"])
    foreign = make_adapter(tmp_path / "foreign", base, rank_four)
    _set_fingerprint(foreign, "0" * 64)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    wrong = {
        "no adapter_config.json": [str(tmp_path / "empty")],
        "does not say which base": [str(nameless)],
        "was trained on another base": [str(foreign)],
        "adapts none of the linears": [str(adapter), "--against", str(apart)],
        "(it holds thesis.txt)": [str(adapter), "--out", str(tmp_path / "full")],
        "is not a base": [str(adapter), "--base", str(adapter)],
    }
    for message, argv in wrong.items():
        out = [] if "--out" in argv else ["--out", str(tmp_path / "out")]
        assert main(["inspect", *argv, *out]) == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert isinstance(
        peft.PeftConfig.from_pretrained(str(adapter)), peft.LoraConfig
    )  # none of that touched the adapter


def _set_fingerprint(folder: Path, value: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    metadata["mmdit_lora"] = json.dumps(json.loads(metadata["mmdit_lora"]) | {"fingerprint": value})
    save_file(load_file(file), file, metadata=metadata)
