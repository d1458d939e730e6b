"""What a training step really allocates, by the CPU allocator's own records, beside what `plan` forecasts.

python -m tests.plan_measured memory > data/benchmarks/plan_memory.json     # all set-ups below; half a minute
python -m tests.plan_measured presets > data/benchmarks/plan_presets.json   # the published checkpoints, built-in streams
python -m tests.plan_measured bases > data/benchmarks/plan_bases.json       # all of them, a generic stream of width 1024
"""

from __future__ import annotations

import gc
import json
import platform
import sys
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mmdit_lora.analysis.plan.bases import PlannedBase, preset_base
from mmdit_lora.analysis.plan.forecast import DTYPES, Method, Setup, forecast, set_for
from mmdit_lora.models import FAMILIES, LayoutInputs
from mmdit_lora.models.stream_families import STREAM_FAMILIES
from mmdit_lora.training.loss import Batch, flow_matching_loss

# 10 M parameters and more: a step holds 100 to 500 MB.
_SD3: dict[str, Any] = {
    "sample_size": 32,
    "num_layers": 3,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "joint_attention_dim": 256,
    "caption_projection_dim": 384,
    "pooled_projection_dim": 128,
    "pos_embed_max_size": 32,
}
_FLUX: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 24, 24),
}
_FLUX2: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "joint_attention_dim": 256,
    "axes_dims_rope": (16, 16, 16, 16),
    "guidance_embeds": False,
}
# It reads masks and position ids to find its image tokens.
_LUMINA2: dict[str, Any] = {
    "hidden_size": 384,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "cap_feat_dim": 256,
    "axes_dim_rope": (16, 24, 24),
    "axes_lens": (300, 64, 64),
}
# name -> family, arguments of the transformer, method, changes to the setup
SETUPS: dict[str, tuple[str, dict[str, Any], Method, dict[str, Any]]] = {
    "siamese, lora": ("sd3", _SD3, "lora", {}),
    "siamese, lora, bf16": ("sd3", _SD3, "lora", {"dtype": "bf16"}),
    "cross, layout_stream": ("sd3", _SD3 | {"layout_attention": "cross"}, "layout_stream", {}),
    "full, checkpointing": ("sd3", _SD3 | {"qk_norm": "rms_norm"}, "full", {"checkpoint_every": 1, "batch": 6}),
    "dual attention, full, every second block checkpointed": (
        "sd3",
        _SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        "full",
        {"checkpoint_every": 2, "optimizer": "sgd-momentum"},
    ),
    "single-stream blocks, lora": ("flux", _FLUX, "lora", {}),
    "single-stream blocks with a stream, phrase tokens, layout_stream, bf16": (
        "flux",
        _FLUX | {"layout_single_blocks": True, "phrase_tokens": 5},
        "layout_stream",
        {"dtype": "bf16"},
    ),
    "generic stream, flux2, lora": ("generic flux2", _FLUX2, "lora", {}),
    "generic stream, lumina2, layout_stream": ("generic lumina2", _LUMINA2, "layout_stream", {}),
}


def planned(name: str) -> tuple[PlannedBase, Setup, Method]:
    """One of `SETUPS`, as `forecast` takes it."""
    family, arguments, method, changes = SETUPS[name]
    defaults: dict[str, Any] = {
        "resolution": 256,
        "boxes": 6,
        "batch": 4,
        "dtype": "fp32",
        "text_tokens": 77,
        "device": "cpu",
    }
    setup = Setup(**defaults | changes)
    if family.startswith("generic "):
        return PlannedBase(name, STREAM_FAMILIES[family.removeprefix("generic ")], arguments, 8, {}), setup, method
    return PlannedBase(name, FAMILIES[family], arguments, 8), setup, method


def measured_peak(base: PlannedBase, setup: Setup, method: Method) -> int:
    """The most bytes that the second step of a real run holds: weights, optimizer state, and all that is allocated in it."""
    torch.manual_seed(0)
    model = nn.Module.to(base.make(), dtype=DTYPES[setup.dtype])
    for block in model.layout_blocks():
        nn.init.normal_(block.layout_stream.out_proj.weight, std=0.02)  # zero gates would be refused
    set_for(model, method, setup.rank)
    model.train()
    if setup.checkpoint_every:
        model.enable_gradient_checkpointing(every=setup.checkpoint_every)
    weights = _bytes([*model.parameters(), *model.buffers()])
    AcceleratorState._reset_state()
    precision = "no" if setup.dtype == "fp32" else setup.dtype
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(trained)
    if setup.optimizer == "sgd-momentum":
        optimizer = torch.optim.SGD(trained, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step() -> None:
        batch = random_batch(model, setup)
        with accelerator.autocast():
            loss = flow_matching_loss(model, batch).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    gc.collect()
    state = _bytes(x for entry in optimizer.state.values() for x in entry.values() if isinstance(x, Tensor))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        step()
    live = peak = 0
    for event in records.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    AcceleratorState._reset_state()
    return weights + state + peak


def random_batch(model: Any, setup: Setup) -> Batch:
    """A batch of noise, of the shapes that the setup says."""
    size, side, slots = setup.batch, setup.resolution // 8, setup.boxes
    image = (size, model.latent_channels, side, side)
    phrase = (model.phrase_dim,) if model.phrase_tokens is None else (model.phrase_tokens, model.phrase_dim)
    return Batch(
        x0=torch.randn(image),
        noise=torch.randn(image),
        t=torch.rand(size),
        texts={name: torch.randn(size, *shape) for name, shape in model.text_shapes(setup.text_tokens).items()},
        layout=LayoutInputs(
            torch.rand(size, slots, 4), torch.randn(size, slots, *phrase), torch.ones(size, slots, dtype=torch.bool)
        ),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def compare_memory() -> dict[str, Any]:
    rows = {}
    for name in SETUPS:
        base, setup, method = planned(name)
        foreseen, measured = forecast(base, setup, method).trace, measured_peak(base, setup, method)
        rows[name] = {
            "forecast_bytes": foreseen.peak,
            "measured_bytes": measured,
            "forecast_over_measured": foreseen.peak / measured,
            "peak_in": foreseen.peak_in,
        }
    return {
        "what": "peak memory of a training step on a CPU: forecast of `plan`, and the allocator's own records",
        "command": "python -m tests.plan_measured memory",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "setups": rows,
    }


# name -> preset, options of the stream
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{preset}, {attention}": (preset, {"layout_attention": attention})
    for attention in ("siamese", "cross")
    for family in FAMILIES.values()
    for preset in family.presets
}
PRESETS["flux-dev, siamese in all blocks, 30 phrase tokens"] = (
    "flux-dev",
    {"layout_attention": "siamese", "layout_single_blocks": True, "phrase_tokens": 30},
)
METHODS: tuple[Method, ...] = ("lora", "layout_stream", "full")


def preset_setup(base: PlannedBase) -> Setup:
    """1024 px, 10 boxes, batch 1, bf16, on a GPU."""
    return Setup(resolution=1024, text_tokens=base.family.max_length)


def foresee_presets() -> dict[str, Any]:
    rows = {}
    for name, (preset, options) in PRESETS.items():
        base = preset_base(preset, options)
        rows[name] = {method: forecast(base, preset_setup(base), method).to_dict() for method in METHODS}
    return {
        "what": "`plan` for the published checkpoints: 1024 px, 10 boxes, batch 1, bf16, r 16, AdamW, on a GPU; memory in bytes",
        "command": "python -m tests.plan_measured presets",
        "torch": torch.__version__,
        "presets": rows,
    }


def foresee_bases() -> dict[str, Any]:
    rows = {}
    for preset in (preset for family in STREAM_FAMILIES.values() for preset in family.presets):
        base = preset_base(preset, {"layout_width": 1024})
        rows[preset] = forecast(base, preset_setup(base), "lora").to_dict() | {"family": base.family.name}
    return {
        "what": "LoRA on a generic layout stream of width 1024: 1024 px, 10 boxes, batch 1, bf16, r 16, AdamW, on a GPU; bytes",
        "command": "python -m tests.plan_measured bases",
        "torch": torch.__version__,
        "bases": rows,
    }


def main() -> None:
    json.dump(
        {"memory": compare_memory, "presets": foresee_presets, "bases": foresee_bases}[sys.argv[1]](),
        sys.stdout,
        indent=1,
    )
    print()


if __name__ == "__main__":
    main()
