"""`export`: every format of every family gives the outputs of base + adapter, read by the tool that the format is for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit_lora.analysis.resize import resize_adapter
from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.export import Target
from mmdit_lora.export.export import export_adapter
from mmdit_lora.export.read_back import outputs, probe, read
from mmdit_lora.lora import KEY_PREFIX, add_layout_lora, base_fingerprint, load_adapter, read_adapter, save_adapter
from mmdit_lora.lora.known_bases import base_of
from mmdit_lora.pipelines import load_pipeline
from tests.time_limit import at_most
from tests.tiny import tiny_pipeline, tiny_transformer, trained_adapter
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer

FORMATS: tuple[Target, ...] = ("peft", "diffusers", "kohya", "merged")
LORA: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["layout_mlp.fc1", "layout_mlp.fc2", "layout_stream.out_proj"],
    "rank_pattern": {"fc2": 2},
    "use_rslora": True,
}
BASES: dict[str, Callable[[Path], Any]] = {
    "two streams": lambda folder: tiny_pipeline(folder, tiny_transformer(qk_norm="rms_norm", layout_attention="cross")),
    "single blocks": lambda folder: tiny_flux_pipeline(
        folder, tiny_flux_transformer(layout_single_blocks=True, phrase_tokens=4)
    ),
}


@pytest.fixture(scope="module", params=BASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base folder, and an adapter for it whose linears differ in rank and strength."""
    folder = tmp_path_factory.mktemp("export")
    pipe = BASES[request.param](folder / "vocabulary")
    pipe.save_pretrained(folder / "base")
    model = pipe.transformer
    fingerprint = base_fingerprint(model)
    add_layout_lora(model, peft.LoraConfig(**LORA, alpha_pattern={"out_proj": 1}))
    trained_adapter(model)
    metadata = {"base": str(folder / "base"), "fingerprint": fingerprint}
    save_adapter(model, folder / "adapter", metadata=metadata, card="# A card\n")
    return str(folder / "base"), folder / "adapter"


@pytest.fixture(scope="module")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """As `pair`, of one family."""
    folder = tmp_path_factory.mktemp("export")
    pipe = tiny_pipeline(folder / "vocabulary")
    pipe.save_pretrained(folder / "base")
    metadata = {"base": str(folder / "base"), "fingerprint": base_fingerprint(pipe.transformer)}
    add_layout_lora(pipe.transformer, peft.LoraConfig(r=4, target_modules=["layout_mlp.fc1"]))
    trained_adapter(pipe.transformer)
    save_adapter(pipe.transformer, folder / "adapter", metadata=metadata)
    return str(folder / "base"), folder / "adapter"


CREATILAYOUT_BASES: dict[str, Callable[[Path], Any]] = {
    "two streams": lambda folder: tiny_pipeline(folder, tiny_transformer(mask_padding=False, layout_slots=10)),
    "single blocks": lambda folder: tiny_flux_pipeline(
        folder, tiny_flux_transformer(layout_single_blocks=True, phrase_tokens=30)
    ),
}


@pytest.fixture(scope="module", params=CREATILAYOUT_BASES)
def creatilayout_pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base whose stream is of a form that CreatiLayout has, and an adapter."""
    folder = tmp_path_factory.mktemp("creatilayout")
    pipe = CREATILAYOUT_BASES[request.param](folder / "vocabulary")
    pipe.save_pretrained(folder / "base")
    fingerprint = base_fingerprint(pipe.transformer)
    add_layout_lora(pipe.transformer, peft.LoraConfig(**{**LORA, "target_modules": LORA["target_modules"][:2]}))
    trained_adapter(pipe.transformer)
    save_adapter(
        pipe.transformer, folder / "adapter", metadata={"base": str(folder / "base"), "fingerprint": fingerprint}
    )
    return str(folder / "base"), folder / "adapter"


def expected(base: str, adapter: Path) -> torch.Tensor:
    model = load_pipeline(base).transformer
    load_adapter(model, adapter)
    return outputs(model.eval())


def out_of(to: str, folder: Path) -> Path:
    return folder / (f"{to}.safetensors" if to == "kohya" else to)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "to"), [*(("two streams", to) for to in FORMATS), ("single blocks", "merged")], indirect=["pair"]
)
def test_a_fresh_process_reads_each_format(pair: tuple[str, Path], tmp_path: Path, to: Target) -> None:
    assert export_adapter(pair[1], to=to, out=out_of(to, tmp_path)).max_abs_diff <= 1e-5


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("to", FORMATS)
def test_each_format_gives_the_outputs_of_base_and_adapter(pair: tuple[str, Path], tmp_path: Path, to: Target) -> None:
    base, adapter = pair
    out = out_of(to, tmp_path)
    report = export_adapter(adapter, to=to, out=out)
    assert report.max_abs_diff <= 1e-5 < 1e-3 < report.effect
    assert report.bytes == sum(f.stat().st_size for f in ([out] if out.is_file() else out.rglob("*")) if f.is_file())
    # Once more here, and not by the same code where the format is somebody else's.
    want = expected(base, adapter)
    if to == "diffusers":
        model: Any = load_pipeline(base).transformer
        model.load_lora_adapter(str(out), weight_name="pytorch_lora_weights.safetensors")
    else:
        model = read(to, str(out), base).transformer
    torch.testing.assert_close(outputs(model), want, atol=1e-5, rtol=0)
    assert report.max_image_diff is not None
    assert report.max_image_diff <= (1e-4 if to == "merged" else 0)
    # A second time over its own result is fine.
    assert export_adapter(adapter, to=to, out=out).max_abs_diff == report.max_abs_diff


@pytest.mark.usefixtures("in_this_process")
def test_names_and_metadata_of_kohya(pair: tuple[str, Path], tmp_path: Path) -> None:
    base, adapter = pair
    file = tmp_path / "lora.safetensors"
    export_adapter(adapter, to="kohya", out=file)
    state = load_file(file)
    first = "lora_unet_transformer_blocks_0_layout_stream_layout_mlp_fc1"
    assert {f"{first}.lora_down.weight", f"{first}.lora_up.weight", f"{first}.alpha"} <= state.keys()
    # Their scaling is alpha / rank; rslora's was 6 / sqrt(4) here.
    assert state[f"{first}.alpha"].item() == pytest.approx(6 / 4**0.5 * 4)
    with safe_open(file, framework="pt") as tensors:
        metadata = tensors.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert json.loads(metadata["mmdit_lora"])["base"] == Path(base).name
    model = load_pipeline(base).transformer
    # Files of before had no `unet_`.
    save_file({key.replace("lora_unet_", "lora_"): value for key, value in state.items()}, tmp_path / "old.safetensors")
    old, new = read_adapter(tmp_path / "old.safetensors", model), read_adapter(file, model)
    assert old.config == new.config
    assert old.tensors.keys() == new.tensors.keys() == load_file(adapter / "adapter_model.safetensors").keys()
    assert all(name.startswith(KEY_PREFIX) for name in new.tensors)
    state["lora_unet_nothing.alpha"] = torch.tensor(1.0)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match="lora_unet_nothing"):
        read_adapter(tmp_path / "bad.safetensors", model)


@pytest.mark.usefixtures("in_this_process")
def test_a_kohya_file_that_was_changed_is_not_replaced(tiny_pair: tuple[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    export_adapter(tiny_pair[1], to="kohya", out=file)
    export_adapter(tiny_pair[1], to="kohya", out=file)
    whole = load_file(file)
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    name = sorted(whole)[1]
    for state, stated in (
        (whole | {name: whole[name] + 1}, metadata),
        (whole, metadata | {"ss_training_comment": "mine"}),
        (whole | {"mine": torch.zeros(2, dtype=torch.bfloat16)}, metadata),
        (whole, {key: value for key, value in metadata.items() if key != "mmdit_lora_sha256"}),
    ):
        save_file(state, file, stated)
        before = file.read_bytes()
        with pytest.raises(InputError, match="was changed since"):
            export_adapter(tiny_pair[1], to="kohya", out=file)
        assert file.read_bytes() == before


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_a_card_in_any_encoding_stops_no_export(
    encoding: str, tiny_pair: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_pair[1], adapter)
    (adapter / "README.md").write_text("# Größe\n", encoding=encoding)
    export_adapter(adapter, to="peft", out=tmp_path / "peft")
    resize_adapter(adapter, tmp_path / "small", rank=2)
    for out in ("peft", "small"):
        card = (tmp_path / out / "README.md").read_text(encoding="utf-8")
        assert card.startswith("# Layout LoRA" if encoding == "cp1252" else "# Größe\n")
    assert caplog.text.count("card is not taken along") == (2 if encoding == "cp1252" else 0)
    assert encoding != "cp1252" or "save it as UTF-8" in caplog.text


@pytest.mark.parametrize("kind", ["FIFO", "nested", "folder", "latin"])
def test_the_config_beside_an_adapter_is_only_a_hint(kind: str, tiny_pair: tuple[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    if kind == "FIFO":
        os.mkfifo(config)
    elif kind == "folder":
        config.mkdir()
    else:
        config.write_bytes(b"base: " + b"[" * 5000 + b"]" * 5000 if kind == "nested" else b"base: \xe4")
    shutil.copytree(tiny_pair[1], tmp_path / "adapter")
    with at_most(20):
        assert base_of(tmp_path / "adapter") == tiny_pair[0]


@pytest.mark.usefixtures("in_this_process")
def test_dora_has_no_place_in_the_names_of_kohya(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path / "vocabulary")
    pipe.save_pretrained(tmp_path / "base")
    add_layout_lora(pipe.transformer, peft.LoraConfig(target_modules=["layout_mlp.fc1"], use_dora=True))
    trained_adapter(pipe.transformer)
    save_adapter(pipe.transformer, tmp_path / "adapter", metadata={"base": str(tmp_path / "base")})
    with pytest.raises(InputError, match="DoRA"):
        export_adapter(tmp_path / "adapter", to="kohya", out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    report = export_adapter(tmp_path / "adapter", to="diffusers", out=tmp_path / "out")
    assert report.max_abs_diff <= 1e-5


# -- CreatiLayout's names ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_under_creatilayouts_names_reads_back(creatilayout_pair: tuple[str, Path], tmp_path: Path) -> None:
    base, adapter = creatilayout_pair
    report = export_adapter(adapter, to="creatilayout", out=tmp_path / "out")
    assert report.max_abs_diff <= 1e-5 < 1e-3 < report.effect
    names = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert "transformer.transformer_blocks.0.ff_bbox.net.0.proj.lora_A.weight" in names
    assert not any("layout" in name for name in names)
    model = load_pipeline(base).transformer
    assert (report.note is not None) == model.config.mask_padding  # theirs attends to the filling
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as opened:
        header = opened.metadata()
    for value in (7, ["^a"], "r", {"no such module": 2}):
        config = json.dumps(json.loads(header["lora_adapter_metadata"]) | {"transformer.rank_pattern": value})
        save_file(names, tmp_path / "changed.safetensors", header | {"lora_adapter_metadata": config})
        with pytest.raises(InputError, match=r"rank_pattern is no object|stands for no module"):
            read_adapter(tmp_path / "changed.safetensors", model)


@pytest.mark.usefixtures("in_this_process")
def test_the_whole_stream_with_or_without_the_adapter_reads_back(
    creatilayout_pair: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = creatilayout_pair
    merged = export_adapter(adapter, to="creatilayout", out=tmp_path / "merged", merge=True)
    assert merged.max_abs_diff <= 1e-5 < 1e-3 < merged.effect
    assert main(["export", base, "--to", "creatilayout", "--out", str(tmp_path / "own"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_diff"] == 0.0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "own"))
    assert one.keys() == two.keys()
    changed = {name for name in one if not torch.equal(one[name], two[name])}
    assert changed
    adapted = ("ff_bbox", "bbox_proj_mlp", "bbox_proj_out", "position_net.linears")
    assert all(name.endswith(".weight") and any(part in name for part in adapted) for name in changed)


@pytest.mark.usefixtures("in_this_process")
def test_a_stream_that_creatilayout_has_not_is_refused(pair: tuple[str, Path], tmp_path: Path) -> None:
    for merge in (False, True):
        with pytest.raises(InputError, match="CreatiLayout has no such stream"):
            export_adapter(pair[1], to="creatilayout", out=tmp_path / "out", merge=merge)
    with pytest.raises(InputError, match="CreatiLayout has no such stream"):
        export_adapter(pair[0], to="creatilayout", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
def test_a_fresh_process_reads_creatilayouts_names(
    creatilayout_pair: tuple[str, Path], tmp_path: Path, merge: bool
) -> None:
    report = export_adapter(creatilayout_pair[1], to="creatilayout", out=tmp_path / "out", merge=merge)
    assert report.max_abs_diff <= 1e-5


# -- the rest ------------------------------------------------------------------------------------------------------------


def test_the_probe_reaches_every_layer_that_carries_lora(pair: tuple[str, Path]) -> None:
    base, adapter = pair
    model = load_pipeline(base).transformer
    load_adapter(model, adapter, trainable=True)
    model(**probe(model)).sample.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.any() for p in trained.values())


@pytest.mark.parametrize(
    ("to", "out", "says"),
    [
        ("kohya", "folder", "ends in .safetensors"),
        ("kohya", "taken.safetensors", "is not what `export` wrote"),
        ("diffusers", "taken", "(it holds mine.txt)"),
        ("peft", "taken.safetensors", "is a file, not a folder"),
    ],
)
def test_a_place_that_is_taken_or_of_the_wrong_kind_is_refused(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str, out: str, says: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "taken.safetensors").write_text("mine")
    assert main(["export", str(adapter), "--to", to, "--out", str(tmp_path / out)]) == 2
    assert says in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine.txt", "taken", "taken.safetensors"]


def test_merge_is_for_creatilayout_only(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(adapter), "--to", "peft", "--merge", "--out", str(tmp_path / "out")]) == 2
    assert "--merge" in capsys.readouterr().err
