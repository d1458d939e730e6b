"""Every described family the whole way: a folder that its stock pipeline saved, a stream trained on it, an adapter, images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora import Box, Layout
from mmdit_lora.hub import index_file
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.pipelines import SamplingConfig, generate, load_pipeline
from mmdit_lora.training.trainer import train
from tests.streams import MAKERS
from tests.streams.common import seeded
from tests.test_trainer import adapter_of, make_config

LAYOUT = Layout("two things", [Box((0.1, 0.1, 0.5, 0.5), "red circle"), Box((0.5, 0.4, 0.9, 0.9), "blue square")])


@pytest.mark.slow
@pytest.mark.parametrize("family", STREAM_FAMILIES)
def test_a_stream_and_an_adapter_are_trained_and_sampled(family: str, data: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    with seeded(0):
        stock = MAKERS[family].pipeline(MAKERS[family].transformer())
    getattr(stock, "modular", stock).save_pretrained(str(base))
    index = index_file(base)
    assert index is not None
    tokens = MAKERS[family].SAMPLING.get("max_sequence_length", 48)  # Ideogram 4 would read 2,048 of each caption
    index.write_text(json.dumps(json.loads(index.read_text()) | {"max_sequence_length": tokens}))
    kind = {"kind": "generic"} if family in ("sd3", "flux") else {}
    side = 4 * load_pipeline(str(base), generic=True).transformer.latent_multiple * stock.vae_scale_factor
    common: dict[str, Any] = {
        "data": {"path": str(data), "validation_share": 0.25, "resolution": side},
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "sample_every": 0},
    }
    stream = train(
        make_config(base, data, tmp_path / "stream", method="layout_stream", stream={"width": 16, **kind}, **common)
    )
    assert stream.report["family"] == family
    folder = tmp_path / "stream" / "stream"
    train(make_config(base, data, tmp_path / "run", stream_weights=str(folder), **common))
    adapter = adapter_of(tmp_path / "run")
    assert all("layout_mlp" in name for name in adapter)
    assert any(value.any() for name, value in adapter.items() if "lora_B" in name)

    pipe = load_pipeline(str(base), stream=folder)
    with seeded(1), torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith("layout_stream.out_proj.weight"):
                parameter.normal_(std=0.3)
    options = {"steps": 2, "size": (side, side), "guidance_scale": 3.0}
    changes: list[dict[str, Any]] = [{}, {"layout_scale": 0.0}, {"layout_window": (0.0, 0.5)}]
    images = [generate(pipe, [LAYOUT], SamplingConfig(**options, **each), seed=0)[0] for each in changes]
    assert [(image.mode, image.size) for image in images] == [("RGB", (side, side))] * 3
    assert len({image.tobytes() for image in images}) == 3
