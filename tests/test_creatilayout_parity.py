"""Imported weights compute what CreatiLayout's own classes do: against golden values, and live where its checkout is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.export.creatilayout import ADAPTER_FILE, write_creatilayout_adapter
from mmdit_lora.lora import add_layout_lora, load_adapter, lora_parameters
from mmdit_lora.models import FAMILIES, LayoutInputs
from mmdit_lora.models.creatilayout import VARIANTS
from mmdit_lora.models.import_creatilayout import import_creatilayout
from mmdit_lora.pipelines import LayoutFluxPipeline, LayoutStableDiffusion3Pipeline, load_pipeline
from tests.creatilayout_files import inputs, layout, plain_base, write_files
from tests.creatilayout_peer import (
    BOXES,
    CORNERS,
    PHRASES,
    SCALES,
    WINDOW,
    checkout,
    loop_arguments,
    loop_components,
    peer_loop,
    peer_model,
    peer_velocity,
)

DTYPES = {"sd3": torch.float32, "sd3-lora": torch.float64, "flux": torch.float32}
TOLERANCES = {"sd3": 1e-5, "sd3-lora": 1e-10, "flux": 1e-5}
# Golden values are of another machine, whose kernels round otherwise; in fp64 that is far below the tolerance.
GOLDEN: dict[str, Tensor] = load_file(Path(__file__).parent / "golden" / "creatilayout.safetensors")

needs_peer = pytest.mark.skipif(checkout() is None, reason="no checkout under $MMDIT_LORA_PEERS/CreatiLayout")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Our model of each variant, through the importer and a folder."""
    models = {}
    for variant, dtype in DTYPES.items():
        folder = tmp_path_factory.mktemp(variant)
        base, weights = write_files(variant, folder, dtype)
        assert import_creatilayout(base, weights, folder / "out").variant == variant
        transformer: Any = FAMILIES[VARIANTS[variant].family].transformer
        models[variant] = transformer.from_pretrained(str(folder / "out" / "transformer"), torch_dtype=dtype)
    return models


@torch.no_grad()
def velocity(model: Any, variant: str, boxes: int, scale: float) -> Tensor:
    dtype = DTYPES[variant]
    return model(**inputs(variant, dtype), layout=layout(variant, boxes, dtype), layout_scale=scale).sample


@torch.no_grad()
def effect(model: Any, variant: str, boxes: int) -> float:
    """How much the layout does: a parity of models that ignore it would show nothing."""
    base = model(**inputs(variant, DTYPES[variant])).sample
    return (velocity(model, variant, boxes, 1.0) - base).abs().max().item()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("variant", DTYPES)
def test_outputs_are_the_golden_ones(imported: dict[str, Any], variant: str, boxes: int, scale: float) -> None:
    model = imported[variant]
    golden = GOLDEN[f"{variant}/{boxes}/{scale}"]
    assert (velocity(model, variant, boxes, scale) - golden).abs().max().item() < TOLERANCES[variant]
    assert effect(model, variant, boxes) > 0.1


@pytest.mark.parametrize("variant", DTYPES)
def test_the_golden_values_would_show_a_fault_in_any_part(imported: dict[str, Any], variant: str) -> None:
    given = layout(variant, 3, DTYPES[variant])
    order = [1, 2, 0, *range(3, 10)]
    wrong = {
        "sides swapped": replace(given, boxes=given.boxes.roll(1, dims=2)),
        "phrases permuted": replace(given, phrase_embeds=given.phrase_embeds[:, order]),
        "a null slot less": LayoutInputs(given.boxes[:, :9], given.phrase_embeds[:, :9], given.mask[:, :9]),
        "no null slots": LayoutInputs(given.boxes, given.phrase_embeds, torch.ones_like(given.mask)),
    }
    for what, inputs_ in wrong.items():
        with torch.no_grad():
            sample = imported[variant](**inputs(variant, DTYPES[variant]), layout=inputs_).sample
        assert (sample - GOLDEN[f"{variant}/3/1.0"]).abs().max().item() > 100 * 1e-5, what


@needs_peer
@pytest.mark.parametrize("variant", DTYPES)
def test_outputs_are_the_peers(imported: dict[str, Any], variant: str) -> None:
    peer = peer_model(variant, DTYPES[variant])
    for boxes in BOXES:
        for scale in SCALES:
            theirs = peer_velocity(peer, variant, layout(variant, boxes, DTYPES[variant]), scale, DTYPES[variant])
            ours = velocity(imported[variant], variant, boxes, scale)
            assert (ours - theirs).abs().max().item() < TOLERANCES[variant]


def our_pipeline(variant: str, transformer: Any, tokenizers: Path) -> Any:
    pipeline: Any = LayoutFluxPipeline if variant == "flux" else LayoutStableDiffusion3Pipeline
    return pipeline(transformer=transformer, **loop_components(variant, tokenizers))


def our_loop(variant: str, pipe: Any, phrases: list[str] | None = PHRASES) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    if phrases is None:
        return pipe(**loop_arguments(variant)).images
    boxes = [Box(xyxy, phrase) for xyxy, phrase in zip(CORNERS, phrases, strict=True)]
    return pipe(Layout("", boxes), layout_window=WINDOW, **loop_arguments(variant)).images


@pytest.mark.parametrize("variant", ["sd3", "flux"])
def test_the_denoising_loop_is_the_golden_one(imported: dict[str, Any], variant: str, tmp_path: Path) -> None:
    pipe = our_pipeline(variant, imported[variant], tmp_path)
    ours = our_loop(variant, pipe)
    assert (ours - GOLDEN[f"loop/{variant}"]).abs().max().item() < 1e-4
    for other in (None, PHRASES[::-1]):  # without a layout, and with the phrases swapped, it is another image
        assert (our_loop(variant, pipe, other) - ours).abs().max().item() > 1e-3


@pytest.mark.parametrize("variant", ["sd3", "flux"])
def test_an_import_on_a_stock_pipeline_folder_paints_the_same(variant: str, tmp_path: Path) -> None:
    """From the folders that users have to latents: everything is read from files."""
    stock: Any = FluxPipeline if variant == "flux" else StableDiffusion3Pipeline
    parts = loop_components(variant, tmp_path / "tokenizers")
    stock(transformer=plain_base(variant), **parts).save_pretrained(tmp_path / "pipeline")
    _, weights = write_files(variant, tmp_path)
    import_creatilayout(tmp_path / "pipeline", weights, tmp_path / "out")
    ours = our_loop(variant, load_pipeline(str(tmp_path / "out")))
    assert (ours - GOLDEN[f"loop/{variant}"]).abs().max().item() < 1e-4


@needs_peer
@pytest.mark.parametrize("variant", ["sd3", "flux"])
def test_the_denoising_loop_is_the_peers(imported: dict[str, Any], variant: str, tmp_path: Path) -> None:
    theirs = peer_loop(variant, tmp_path / "theirs")
    ours = our_loop(variant, our_pipeline(variant, imported[variant], tmp_path / "ours"))
    assert (ours - theirs).abs().max().item() < 1e-4


@needs_peer
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("sd3", {}),
        ("sd3", {"use_rslora": True}),
        ("sd3", {"use_dora": True}),
        ("flux", {}),
        ("flux", {"use_rslora": True}),
    ],
)
def test_the_peer_loads_our_adapter(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Imported, trained by us for a few steps, exported under its names, loaded by its class: the same outputs."""
    base, weights = write_files(variant, tmp_path)
    import_creatilayout(base, weights, tmp_path / "out")
    transformer: Any = FAMILIES[VARIANTS[variant].family].transformer
    model = transformer.from_pretrained(str(tmp_path / "out" / "transformer"))
    before = velocity(model, variant, 3, 1.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layout_mlp.fc1", "layout_mlp.fc2"], **options)
    config.rank_pattern = {"layout_processor.layout_mlp.fc1": 2}
    add_layout_lora(model, config)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=3e-2)
    for _ in range(3):
        model(**inputs(variant), layout=layout(variant, 3)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    ours = velocity(model, variant, 3, 1.0)
    assert (ours - before).abs().max().item() > 1e-2
    write_creatilayout_adapter(model, tmp_path / "adapter")
    peer = peer_model(variant)
    peer.load_lora_adapter(str(tmp_path / "adapter"), weight_name=ADAPTER_FILE)
    theirs = peer_velocity(peer.eval(), variant, layout(variant, 3), 1.0, torch.float32)
    assert (ours - theirs).abs().max().item() < 1e-5


@needs_peer
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sd3", "flux"])
def test_the_whole_way_on_the_command_line(variant: str, tmp_path: Path) -> None:
    """import, train, export: what the peer's class then computes is what ours does with the adapter."""
    stock: Any = FluxPipeline if variant == "flux" else StableDiffusion3Pipeline
    parts = loop_components(variant, tmp_path / "tokenizers")
    pipeline, out, data = (str(tmp_path / name) for name in ("pipeline", "out", "data"))
    stock(transformer=plain_base(variant), **parts).save_pretrained(pipeline)
    _, weights = write_files(variant, tmp_path)
    assert main(["import", "creatilayout", "--base", pipeline, "--weights", str(weights), "--out", out]) == 0
    assert main(["data", "make", "shapes", "--out", data, "--count", "4", "--seed", "1"]) == 0
    config = tmp_path / "config.yaml"
    config.write_text(
        f"base: {out}\noutput_dir: {tmp_path / 'run'}\ndata: {{path: {data}}}\n"
        "train: {max_steps: 3, batch_size: 2, learning_rate: 3.0e-2}\n"
    )
    assert main(["train", str(config)]) == 0
    adapter = str(tmp_path / "run" / "adapter")
    assert main(["export", adapter, "--to", "creatilayout", "--out", str(tmp_path / "exported")]) == 0
    peer = peer_model(variant)
    before = peer_velocity(peer, variant, layout(variant, 3), 1.0, torch.float32)
    peer.load_lora_adapter(str(tmp_path / "exported"), weight_name=ADAPTER_FILE)
    theirs = peer_velocity(peer.eval(), variant, layout(variant, 3), 1.0, torch.float32)
    pipe = load_pipeline(out)
    load_adapter(pipe.transformer, adapter)
    ours = velocity(pipe.transformer, variant, 3, 1.0)
    assert (ours - theirs).abs().max().item() < 1e-5
    assert (ours - before).abs().max().item() > 1e-3
