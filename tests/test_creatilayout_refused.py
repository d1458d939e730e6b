"""`import creatilayout` of wrong files: exit 2, the reason, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.models.import_creatilayout import import_creatilayout
from tests.creatilayout_files import CONFIGS, filled, plain_base, stream_shapes, write_files

Damage = Callable[
    [Path, Path], Any
]  # the base's folder and the weight file, changed in place; may answer another --weights


def truncated(_: Path, weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-100])


def truncated_base(base: Path, _: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(_: Path, weights: Path) -> Path:
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    return weights.with_suffix(".bin")


def only_pickles(_: Path, weights: Path) -> Path:
    folder = weights.parent / "pickles"
    folder.mkdir()
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    return folder


def missing_shard(_: Path, weights: Path) -> Path:
    folder = weights.parent / "shards"
    folder.mkdir()
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file(load_file(weights), folder / "one.safetensors")
    return folder


def broken_index(_: Path, weights: Path) -> Path:
    folder = weights.parent / "shards"
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text("[]")
    return folder


def without(name: str) -> Damage:
    def damage(_: Path, weights: Path) -> None:
        state = load_file(weights)
        del state[name]
        save_file(state, weights)

    return damage


def unexpected(_: Path, weights: Path) -> None:
    save_file({**load_file(weights), "foo.weight": torch.ones(1)}, weights)


def misshapen(_: Path, weights: Path) -> None:
    state = load_file(weights)
    save_file({**state, "position_net.linears.linear_2.weight": torch.ones(3, 3)}, weights)


def integers(_: Path, weights: Path) -> None:
    save_file({name: value.to(torch.int8) for name, value in load_file(weights).items()}, weights)


def another_family(_: Path, weights: Path) -> None:
    save_file(filled(stream_shapes("flux")), weights)


def another_width(base: Path, _: Path) -> None:
    config = CONFIGS["sd3"] | {"num_attention_heads": 4, "caption_projection_dim": 64}
    SD3Transformer2DModel(**config).save_pretrained(base / "transformer")


def fewer_blocks(base: Path, _: Path) -> None:
    SD3Transformer2DModel(**CONFIGS["sd3"] | {"num_layers": 2}).save_pretrained(base / "transformer")


def no_creatilayout(_: Path, weights: Path) -> None:
    save_file({"layout_processor.null_box": torch.ones(64)}, weights)


def another_generation(base: Path, _: Path) -> None:
    SD3Transformer2DModel(**CONFIGS["sd3"] | {"qk_norm": "rms_norm"}).save_pretrained(base / "transformer")


def another_base(base: Path, _: Path) -> None:
    plain_base("flux").save_pretrained(base / "transformer")


def empty(_: Path, weights: Path) -> None:
    weights.write_bytes(b"")


def two_sets(_: Path, weights: Path) -> Path:
    folder = weights.parent / "both"
    folder.mkdir()
    for name in ("one", "two"):
        save_file(load_file(weights), folder / f"{name}.safetensors")
    return folder


def not_finite(_: Path, weights: Path) -> None:
    state = load_file(weights)
    state["position_net.null_position_feature"][3] = float("nan")
    save_file(state, weights)


def nonsense_config(base: Path, _: Path) -> None:
    file = base / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_layers": "three"}))


def broken_pipeline(base: Path, _: Path) -> None:
    (base / "model_index.json").write_text("[]")


def no_config(base: Path, _: Path) -> None:
    (base / "transformer" / "config.json").unlink()


def no_json(base: Path, _: Path) -> None:
    (base / "transformer" / "config.json").write_text("{")


def incomplete_base(base: Path, _: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out.weight"]
    save_file(state, file)


def in_the_way(_: Path, weights: Path) -> None:
    (weights.parent / "out").mkdir()
    (weights.parent / "out" / "mine.txt").write_text("mine")


WRONG: dict[str, tuple[Damage, str]] = {
    "truncated": (truncated, "is not a whole safetensors file"),
    "truncated base": (truncated_base, "is not a whole safetensors file"),
    "a pickle": (pickled, "is a pickle"),
    "only pickles": (only_pickles, "holds pickles only"),
    "a shard is missing": (missing_shard, "1 of 2 shards are missing: two.safetensors"),
    "an index that is none": (broken_index, "holds list, not a JSON object"),
    "no such file": (lambda _, weights: weights.parent / "nowhere.safetensors", "no such file"),
    "a folder without weights": (lambda base, _: base, "no safetensors file"),
    "a tensor is missing": (
        without("position_net.null_position_feature"),
        "1 missing: position_net.null_position_feature",
    ),
    "one too many": (unexpected, "1 unexpected: foo.weight"),
    "of another shape": (misshapen, "position_net.linears.linear_2.weight (3, 3) for (32, 16)"),
    "integers": (integers, "is int8"),
    "another family": (another_family, "hold a stream for FluxTransformer2DModel"),
    "another family's base": (another_base, "hold a stream for SD3Transformer2DModel, and the base is a Flux"),
    "a base with more norms": (
        another_generation,
        "12 missing: transformer_blocks.0.bbox_fuser_block.norm_added_k.weight",
    ),
    "empty": (empty, "is not a whole safetensors file"),
    "two files, no index": (two_sets, "holds 2 safetensors files and no index"),
    "not finite": (not_finite, "layout_processor.null_box would hold numbers that are not finite"),
    "a config of nonsense": (nonsense_config, "describes no transformer"),
    "a pipeline that is none": (broken_pipeline, "holds list, not a JSON object"),
    "another width": (another_width, "misshapen: "),
    "fewer blocks": (fewer_blocks, "unexpected: transformer_blocks.1."),
    "ours, not theirs": (no_creatilayout, "holds no layout stream of CreatiLayout"),
    "a base without config": (no_config, "has no transformer/config.json"),
    "a config that is none": (no_json, "is not JSON"),
    "a base with a hole": (incomplete_base, "1 missing: proj_out.weight"),
    "out is taken": (in_the_way, "(it holds mine.txt)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = WRONG[case]
    base, weights = write_files("sd3", tmp_path)
    weights = damage(base, weights) or weights
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    code = main(["import", "creatilayout", "--base", str(base), "--weights", str(weights), "--out", str(out)])
    printed = capsys.readouterr().err
    assert (code, message in printed) == (2, True), printed
    assert "Traceback" not in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_fp16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    base, weights = write_files("sd3", tmp_path)
    state = load_file(weights)
    state["transformer_blocks.0.bbox_forward.weight"][0, 0] = 1e5
    save_file(state, weights)
    with pytest.raises(InputError, match=r"blocks\.0\.layout_stream\.out_proj\.weight would hold .* in float16"):
        import_creatilayout(base, weights, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    import_creatilayout(base, weights, tmp_path / "out", dtype=torch.bfloat16)


def test_out_below_a_file_is_refused(tmp_path: Path) -> None:
    base, weights = write_files("sd3", tmp_path)
    with pytest.raises(InputError, match="is a file, not a folder"):
        import_creatilayout(base, weights, weights / "out")


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0.ff_context_lora.0.up.weight", "transformer_blocks.1.attn.img_q_lora.up.weight"]
)
def test_a_low_rank_file_with_a_hole_is_refused(name: str, tmp_path: Path) -> None:
    base, weights = write_files("sd3-lora", tmp_path)
    without(name)(base, weights)
    with pytest.raises(InputError, match=name):
        import_creatilayout(base, weights, tmp_path / "out")
