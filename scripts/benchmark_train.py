"""What a training step costs, and what a run spends beside it: `scripts/benchmark.py train`.

Two things are measured. **The loop**: `train` itself on the embedded base with cached data; which share of its time is neither
forward, backward nor optimizer. **The step**: forward and backward of a layout transformer with the default LoRA, random
weights, and, with `--peer`, those of CreatiLayout's own class with LoRA on the same linears, in turns.
"""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 7
# Of CreatiLayout's SD3 class; `sample_size` is the side of the latents.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 3, "heads": 4, "sample_size": 32, "batch": 4},
    "small": {"layers": 6, "heads": 8, "sample_size": 32, "batch": 4},
    "sd3-medium": {"layers": 24, "heads": 24, "sample_size": 128, "batch": 4},
}
BOXES, TEXT = 10, 77


def train_benchmark(size: str, peer: Path | None) -> dict[str, Any]:
    """Both parts as one JSON object."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    command = f"uv run python scripts/benchmark.py train --size {size}"
    report: dict[str, Any] = {
        "command": command + (" --peer PATH" if peer else ""),
        "machine": {"cores": os.cpu_count(), "arch": platform.machine(), "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "loop": loop(),
        "step": step(size, peer),
    }
    for name in ("speedup_vs_creatilayout", "memory_vs_creatilayout"):
        if name in report["step"]:
            report[name] = report["step"].pop(name)
    return report


def loop(steps: int = 60) -> dict[str, Any]:
    """The quickstart's own training, cut short, on images and texts that are cached."""
    from mmdit_lora.config.loading import load_config
    from mmdit_lora.data.cache import EncodingCache
    from mmdit_lora.data.shapes import DOMAINS, write_dataset
    from mmdit_lora.training.callbacks import Callback
    from mmdit_lora.training.fill_cache import fill_cache
    from mmdit_lora.training.step import StepRecord
    from mmdit_lora.training.trainer import train

    seen: list[dict[str, float]] = []

    class Speeds(Callback):
        def on_step(self, record: StepRecord) -> None:
            if record.logged:
                seen.append({name.removeprefix("speed/"): value for name, value in record.logged.items()})

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_dataset(work / "data", DOMAINS["page"], count=500, seed=11)
        changes = [
            f"data.path={work / 'data'}",
            "data.validation=null",
            f"data.cache={work / 'cache'}",
            f"output_dir={work / 'run'}",
            f"train.max_steps={steps}",
            "train.log_every=10",
            "train.checkpoint_every=20",
            "train.validate_every=0",
            "train.sample_every=0",
        ]
        config = load_config("configs/quickstart.yaml", changes)
        fill_cache(config, EncodingCache(work / "cache"))
        train(config, callbacks=[Speeds()])
    late = seen[1:]  # the first holds what is done once
    mean = {key: statistics.mean(row[key] for row in late) for key in ("share_data", "share_other", "samples_per_s")}
    return {
        "base": "data/tiny_base",
        "batch_size": config.train.batch_size,
        "steps": steps,
        **{key: round(value, 4) for key, value in mean.items()},
        "share_outside_forward_backward_optimizer": round(mean["share_data"] + mean["share_other"], 4),
        "tflops": round(statistics.mean(row["tflops"] for row in late), 4),
    }


def step(size: str, peer: Path | None) -> dict[str, Any]:
    """Seconds of forward and backward, samples a second, and bytes of a step; in turns with the peer's."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases: dict[str, Callable[[], None]] = {"ours": _ours(size, device, dtype)}
    if peer is not None:
        cases["creatilayout"] = _peers(size, peer, device, dtype)
    for run in cases.values():
        run()  # warm
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, run in cases.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    memory = {name: _peak(run, device) for name, run in cases.items()}
    batch = SIZES[size]["batch"]
    found: dict[str, Any] = {
        "size": size,
        **{key: SIZES[size][key] for key in ("layers", "heads", "sample_size", "batch")},
        "boxes": BOXES,
        "text_tokens": TEXT,
        "dtype": str(dtype).removeprefix("torch."),
        "lora": "r=16 on layout_mlp.fc1, layout_mlp.fc2",
    }
    for name in cases:
        median = statistics.median(seconds[name])
        found[name] = {
            "step_s": round(median, 4),
            "all_rounds": [round(value, 4) for value in seconds[name]],
            "samples_per_s": round(batch / median, 2),
            "step_bytes": memory[name],
        }
    if peer is not None:
        ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["creatilayout"], strict=True)]
        found["speedup_vs_creatilayout"] = round(statistics.median(ratios), 3)
        found["memory_vs_creatilayout"] = round(memory["ours"] / memory["creatilayout"], 3)
    return found


def _config(size: str) -> dict[str, Any]:
    chosen = SIZES[size]
    return {
        "sample_size": chosen["sample_size"],
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": chosen["layers"],
        "num_attention_heads": chosen["heads"],
        "attention_head_dim": 64,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * chosen["heads"],
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": chosen["sample_size"] // 2,
    }


def _inputs(size: str, device: Any, dtype: Any) -> dict[str, Any]:
    import torch

    chosen, generator = SIZES[size], torch.Generator().manual_seed(0)
    batch, side = chosen["batch"], chosen["sample_size"]

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": normal(batch, 16, side, side),
        "encoder_hidden_states": normal(batch, TEXT, 4096),
        "pooled_projections": normal(batch, 2048),
        "timestep": (1000 * torch.rand(batch, generator=generator)).to(device, dtype),
    }


def _ours(size: str, device: Any, dtype: Any) -> Callable[[], None]:
    import torch

    from mmdit_lora.lora import add_layout_lora
    from mmdit_lora.models import LayoutInputs, LayoutSD3Transformer2DModel

    torch.manual_seed(0)
    with torch.device(device):
        # As CreatiLayout: ten slots, padding attended to. (Ours masks it by default, which costs a mask in attention.)
        model = LayoutSD3Transformer2DModel(**_config(size), mask_padding=False, layout_slots=BOXES)
    model.to(dtype)
    _open_gates(model, "out_proj")
    add_layout_lora(model)
    model.train()
    inputs = _inputs(size, device, dtype)
    boxes, phrases, mask = _layout(size, device)
    layout = LayoutInputs(boxes, phrases, mask.bool())

    def run() -> None:
        model(**inputs, layout=layout).sample.float().square().mean().backward()
        model.zero_grad()

    return run


def _peers(size: str, peer: Path, device: Any, dtype: Any) -> Callable[[], None]:
    import importlib

    import peft
    import torch
    from diffusers.training_utils import cast_training_params

    sys.path.insert(0, str(peer))
    module = importlib.import_module("src.models.transformer_sd3_SiamLayout")
    sys.path.remove(str(peer))
    torch.manual_seed(0)
    with torch.device(device):
        model = module.SiamLayoutSD3Transformer2DModel(**_config(size))
    model.to(dtype)
    _open_gates(model, "bbox_forward")
    model.requires_grad_(False)
    # Of its layout processor, the text's MLP and the box's: the two that ours has as layout_mlp are called linears here.
    targets = ["ff_bbox.net.0.proj", "ff_bbox.net.2", "position_net.linears.linear_1", "position_net.linears.linear_2"]
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.1, bias="none", target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    cast_training_params(model, torch.float32)
    model.train()
    inputs = _inputs(size, device, dtype)
    boxes, phrases, mask = _layout(size, device)
    layout = {"boxes": boxes.to(dtype), "positive_embeddings": phrases.to(dtype), "masks": mask.to(dtype)}

    def run() -> None:
        sample = model(**inputs, layout_kwargs={"layout": layout}, bbox_scale=1.0).sample
        sample.float().square().mean().backward()
        model.zero_grad()

    return run


def _layout(size: str, device: Any) -> tuple[Any, Any, Any]:
    import torch

    batch, generator = SIZES[size]["batch"], torch.Generator().manual_seed(1)
    corners = torch.rand(batch, BOXES, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    phrases = torch.randn(batch, BOXES, 2048, generator=generator)
    return corners.to(device), phrases.to(device), torch.ones(batch, BOXES, device=device)


def _open_gates(model: Any, name: str) -> None:
    """As after pretraining: a zero gate would leave nothing to be computed backwards."""
    import torch

    for key, parameter in model.named_parameters():
        if f".{name}." in key and key.endswith("weight"):
            torch.nn.init.normal_(parameter, std=0.02)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak(run: Callable[[], None], device: Any) -> int:
    """The most bytes that a step holds at once beside the weights."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run()
    live = peak = 0
    for event in records.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
