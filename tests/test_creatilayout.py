"""CreatiLayout's weights in and out: files, names, refusals. What they compute is in `test_creatilayout_parity`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.export.creatilayout import (
    ADAPTER_FILE,
    STREAM_FILE,
    write_creatilayout_adapter,
    write_creatilayout_stream,
)
from mmdit_lora.lora import add_layout_lora, merge_adapter
from mmdit_lora.models import FAMILIES
from mmdit_lora.models.creatilayout import VARIANTS, recipes, to_creatilayout, variant_of
from mmdit_lora.models.import_creatilayout import import_creatilayout
from mmdit_lora.pipelines import load_pipeline
from tests.creatilayout_files import CONFIGS, filled, plain_base, stream_shapes, write_files
from tests.tiny import tiny_transformer, trained_adapter
from tests.tiny_flux import tiny_flux_transformer

FULL = ("sd3", "flux")  # variants of full weights; the low-rank one is not written back


def opened(variant: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    transformer: Any = FAMILIES[VARIANTS[variant].family].transformer
    return transformer.from_pretrained(str(folder / "transformer"), torch_dtype=dtype)


# -- full size, on the meta device


@pytest.mark.parametrize(
    ("preset", "variant", "tensors"),
    [("sd3-medium", "sd3", 580), ("sd3-medium", "sd3-lora", 580), ("flux-dev", "flux", 1146)],
)
def test_all_names_of_the_published_files(preset: str, variant: str, tensors: int) -> None:
    family = FAMILIES[VARIANTS[variant].family]
    with torch.device("meta"):
        model = family.transformer(**family.presets[preset], **VARIANTS[variant].config)
    stream = [name for name in model.state_dict() if "layout" in name]
    base = {name for name in model.state_dict() if "layout" not in name}
    sources = [source for recipe in recipes(stream, variant).values() for source in recipe.sources]
    assert len(set(sources) - base) == tensors
    assert variant_of(sources) == variant
    if variant == "sd3":  # one to one
        assert len(sources) == len(set(sources)) == len(stream)
        assert len(base) == 683


def test_names() -> None:
    assert to_creatilayout("transformer_blocks.7.layout_stream.attn.to_out.0.bias", "sd3") == (
        "transformer_blocks.7.bbox_fuser_block.to_out.0.bias"
    )
    assert to_creatilayout("transformer_blocks.7.layout_stream.attn.norm_q.weight", "flux") == (
        "transformer_blocks.7.bbox_attn.norm_q.weight"
    )
    assert to_creatilayout("single_transformer_blocks.3.layout_stream.layout_mlp.fc2.bias", "flux") == (
        "single_transformer_blocks.3.bbox_proj_out.bias"
    )
    assert to_creatilayout("layout_processor.null_box", "sd3") == "position_net.null_position_feature"
    with pytest.raises(KeyError):
        to_creatilayout("transformer_blocks.7.attn.to_q", "sd3")


# -- in


@pytest.mark.parametrize("variant", CONFIGS)
def test_an_import_says_what_it_did_and_its_config_computes_the_same(variant: str, tmp_path: Path) -> None:
    base, weights = write_files(variant, tmp_path)
    report = import_creatilayout(base, weights, tmp_path / "out")
    model = opened(variant, tmp_path / "out")
    stream = {n: v for n, v in model.state_dict().items() if "layout" in n}
    assert (report.variant, report.stream_tensors, report.base_tensors_from) == (variant, len(stream), "base")
    assert report.stream_params == sum(v.numel() for v in stream.values())
    assert (model.config.mask_padding, model.config.layout_slots) == (False, 10)
    assert model.config.layout_mlp_dim == (8 * 32 if variant == "sd3-lora" else None)
    assert getattr(model.config, "phrase_tokens", None) == (30 if variant == "flux" else None)
    own = plain_base(variant).state_dict()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert all(
        torch.equal(v, load_file(weights)[to_creatilayout(n, variant)]) for n, v in stream.items() if variant == "sd3"
    )


@pytest.mark.parametrize("variant", CONFIGS)
def test_the_whole_transformer_in_shards_is_the_same_as_the_stream_alone(variant: str, tmp_path: Path) -> None:
    base, weights = write_files(variant, tmp_path)
    import_creatilayout(base, weights, tmp_path / "alone")
    # As diffusers saves a large transformer: shards and an index. The base's own files are others, and must not count.
    state = {**load_file(weights), **plain_base(variant).state_dict()}
    names = sorted(state)
    folder = tmp_path / "sharded"
    folder.mkdir()
    files = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    other = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file(
        {name: value + 1 for name, value in other.items()},
        base / "transformer" / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    report = import_creatilayout(base, folder, tmp_path / "whole", max_shard_bytes=100_000)
    assert report.base_tensors_from == "weights"
    assert report.shards == len(list((tmp_path / "whole" / "transformer").glob("*.safetensors"))) > 1
    one, other = (opened(variant, tmp_path / name).state_dict() for name in ("alone", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variant", CONFIGS)
def test_any_dtype(variant: str, stored: torch.dtype, tmp_path: Path) -> None:
    base, weights = write_files(variant, tmp_path, stored)
    assert import_creatilayout(base, weights, tmp_path / "kept").dtype == str(stored).removeprefix("torch.")
    assert import_creatilayout(base, weights, tmp_path / "wide", dtype=torch.float32).dtype == "float32"
    kept, wide = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors") for name in ("kept", "wide")
    )
    assert {value.dtype for name, value in kept.items() if "layout" in name} == {stored}
    assert {value.dtype for value in wide.values()} == {torch.float32}
    # Rounded once, at the end: what was summed in fp32 and kept is what is stored.
    assert all(torch.equal(value.to(stored), kept[name]) for name, value in wide.items())
    if variant == "sd3-lora":
        name = "transformer_blocks.0.layout_stream.attn.to_q.weight"
        assert not torch.equal(wide[name].to(stored).float(), wide[name])


MEASURED = """
import sys, threading, time
from pathlib import Path
from mmdit_lora.models.import_creatilayout import import_creatilayout
def anonymous():
    return 1024 * int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")).split()[1])
peak, done, before = [0], [False], anonymous()
def watch():
    while not done[0]:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
import_creatilayout(*sys.argv[1:4], max_shard_bytes=10**7)
done[0] = True
thread.join()
print(peak[0] - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_near_one_shard(tmp_path: Path) -> None:
    """The variant whose tensors are computed, not copied: 120 MB written in shards of 10 MB, in a process of its own.

    What is counted is the process's own memory, not the pages of the files that it reads, which the system may drop.
    """
    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "caption_projection_dim": 512, "num_layers": 2}
    config = CONFIGS["sd3-lora"] | sizes
    with torch.device("meta"):
        model: Any = SD3Transformer2DModel(**config)
    model.save_config(tmp_path / "base" / "transformer")
    for file, shapes in (
        ("base/transformer/diffusion_pytorch_model.safetensors", {n: v.shape for n, v in model.state_dict().items()}),
        ("weights.safetensors", stream_shapes("sd3-lora", config)),
    ):
        save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / file)
    arguments = [str(tmp_path / name) for name in ("base", "weights.safetensors", "out")]
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=True)
    peak = int(done.stdout)
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "transformer").glob("*.safetensors"))

    assert 10**7 / 2 < peak < 4 * 10**7 < size / 3


def test_a_second_set_in_fp16_is_left_aside(tmp_path: Path) -> None:
    base, weights = write_files("sd3", tmp_path)
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    halves = {name: value.half() + 1 for name, value in load_file(file).items()}
    save_file(halves, base / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    import_creatilayout(base, weights, tmp_path / "out")
    state = opened("sd3", tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], value) for name, value in load_file(file).items())


def test_a_pipeline_folder_comes_along_and_opens(base: Path, tmp_path: Path) -> None:
    """`base` is a whole pipeline of ours; its transformer has a stream already, which the imported one replaces."""
    config = json.loads((base / "transformer" / "config.json").read_text())
    transformer: Any = FAMILIES["sd3"].transformer
    with torch.device("meta"):
        model = transformer.from_config({**config, **VARIANTS["sd3"].config})
    shapes = {to_creatilayout(n, "sd3"): tuple(v.shape) for n, v in model.state_dict().items() if "layout" in n}
    save_file(filled(shapes), tmp_path / "weights.safetensors", metadata={"format": "pt"})
    import_creatilayout(base, tmp_path / "weights.safetensors", tmp_path / "out")
    pipe = load_pipeline(str(tmp_path / "out"))
    assert pipe.transformer.config.layout_slots == 10
    assert {p.name for p in base.iterdir()} < {p.name for p in (tmp_path / "out").iterdir()}
    import_creatilayout(base, tmp_path / "weights.safetensors", tmp_path / "out")  # over an earlier import: allowed


# -- out


@pytest.mark.parametrize("variant", FULL)
def test_in_out_in_is_bit_equal(variant: str, tmp_path: Path) -> None:
    base, weights = write_files(variant, tmp_path)
    import_creatilayout(base, weights, tmp_path / "one")
    write_creatilayout_stream(opened(variant, tmp_path / "one"), tmp_path)
    there, back = load_file(weights), load_file(tmp_path / STREAM_FILE)
    assert there.keys() == back.keys()
    assert all(torch.equal(value, back[name]) for name, value in there.items())
    import_creatilayout(base, tmp_path / STREAM_FILE, tmp_path / "two")
    one, two = (opened(variant, tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("variant", FULL)
def test_an_adapter_under_their_names_is_the_merged_stream(variant: str, tmp_path: Path) -> None:
    """Their weight + alpha / r * B A, by hand, is the stream that we write with the adapter merged in."""
    base, weights = write_files(variant, tmp_path)
    import_creatilayout(base, weights, tmp_path / "out")
    model = opened(variant, tmp_path / "out")
    add_layout_lora(model)
    trained_adapter(model)
    write_creatilayout_adapter(model, tmp_path / "adapter")
    write_creatilayout_stream(merge_adapter(model), tmp_path)
    lora, merged, plain = (load_file(p) for p in (tmp_path / "adapter" / ADAPTER_FILE, tmp_path / STREAM_FILE, weights))
    modules = {name.rpartition(".lora_")[0] for name in lora}
    assert all(name.startswith("transformer.") for name in modules)
    for name in modules:
        theirs = name.removeprefix("transformer.") + ".weight"
        update = 2.0 * lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        torch.testing.assert_close(plain.pop(theirs) + update, merged.pop(theirs), atol=1e-6, rtol=0)
    assert all(torch.equal(value, merged[name]) for name, value in plain.items())  # and nothing else differs
    with safe_open(tmp_path / "adapter" / ADAPTER_FILE, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (16, 32)


def test_what_a_fused_projection_cannot_carry_is_not_written(tmp_path: Path) -> None:
    """DoRA scales whole columns of a weight, and theirs is two of ours."""
    base, weights = write_files("flux", tmp_path)
    import_creatilayout(base, weights, tmp_path / "out")
    model = opened("flux", tmp_path / "out")
    add_layout_lora(model, peft.LoraConfig(r=2, target_modules=["layout_mlp.fc2"], use_dora=True))
    with pytest.raises(InputError, match="cannot be one on CreatiLayout's fused bbox_proj_out"):
        write_creatilayout_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_streams_that_it_has_not_are_not_written(tmp_path: Path) -> None:
    for model in (
        tiny_transformer(layout_attention="cross"),
        tiny_transformer(layout_mlp_dim=24),
        tiny_transformer(qk_norm="rms_norm"),
        tiny_flux_transformer(),
    ):
        with pytest.raises(InputError, match="CreatiLayout has no such stream"):
            write_creatilayout_stream(model, tmp_path)
    assert not any(tmp_path.iterdir())


# -- the command


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, weights = write_files("sd3", tmp_path)
    arguments = ["--base", str(base), "--weights", str(weights), "--out", str(tmp_path / "out"), "--json"]
    assert main(["import", "creatilayout", *arguments, "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["variant"], report["dtype"]) == ("sd3", "bfloat16")
    assert "the sd3 stream, 76 tensors" in printed.err
