"""Imported weights compute what CreatiLayout's own classes do: against golden values, and live where its checkout is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora import Box, Layout
from mmdit_lora.export_creatilayout import ADAPTER_FILE, write_creatilayout_adapter
from mmdit_lora.lora import add_layout_lora, lora_parameters
from mmdit_lora.models import FAMILIES
from mmdit_lora.models.creatilayout import VARIANTS
from mmdit_lora.models.creatilayout_import import import_creatilayout
from mmdit_lora.pipelines import LayoutStableDiffusion3Pipeline
from tests.creatilayout_files import inputs, layout, write_files
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


@needs_peer
@pytest.mark.parametrize("variant", DTYPES)
def test_outputs_are_the_peers(imported: dict[str, Any], variant: str) -> None:
    peer = peer_model(variant, DTYPES[variant])
    for boxes in BOXES:
        for scale in SCALES:
            theirs = peer_velocity(peer, variant, layout(variant, boxes, DTYPES[variant]), scale, DTYPES[variant])
            ours = velocity(imported[variant], variant, boxes, scale)
            assert (ours - theirs).abs().max().item() < TOLERANCES[variant]


def our_loop(transformer: Any, tokenizers: Path) -> Tensor:
    pipe = LayoutStableDiffusion3Pipeline(transformer=transformer, **loop_components(tokenizers))
    pipe.set_progress_bar_config(disable=True)
    boxes = [Box(xyxy, phrase) for xyxy, phrase in zip(CORNERS, PHRASES, strict=True)]
    return pipe(Layout("", boxes), layout_window=WINDOW, **loop_arguments()).images


def test_the_denoising_loop_is_the_golden_one(imported: dict[str, Any], tmp_path: Path) -> None:
    ours = our_loop(imported["sd3"], tmp_path)
    assert (ours - GOLDEN["loop"]).abs().max().item() < 1e-4
    pipe = LayoutStableDiffusion3Pipeline(transformer=imported["sd3"], **loop_components(tmp_path))
    pipe.set_progress_bar_config(disable=True)
    assert (
        pipe(**loop_arguments()).images - ours
    ).abs().max().item() > 1e-2  # without the layout it is another picture


@needs_peer
def test_the_denoising_loop_is_the_peers(imported: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = peer_loop(tmp_path / "theirs"), our_loop(imported["sd3"], tmp_path / "ours")
    assert (ours - theirs).abs().max().item() < 1e-4


@needs_peer
@pytest.mark.parametrize("variant", ["sd3", "flux"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_peer_loads_our_adapter(variant: str, rslora: bool, tmp_path: Path) -> None:
    """Imported, trained by us for a few steps, exported under its names, loaded by its class: the same outputs."""
    base, weights = write_files(variant, tmp_path)
    import_creatilayout(base, weights, tmp_path / "out")
    transformer: Any = FAMILIES[VARIANTS[variant].family].transformer
    model = transformer.from_pretrained(str(tmp_path / "out" / "transformer"))
    before = velocity(model, variant, 3, 1.0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layout_mlp.fc1", "layout_mlp.fc2"], use_rslora=rslora)
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
