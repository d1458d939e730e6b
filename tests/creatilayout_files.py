"""CreatiLayout's three kinds of weight files at tiny size: names and shapes of its modules, filled with seeded numbers.

`scripts/golden.py` loads these very files into CreatiLayout's own classes (HuiZhang0812/CreatiLayout at 860d8bd), strictly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmdit_lora.models import LayoutInputs
from tests.tiny import SD3_CONFIG

# The peer's pipelines write the widths of phrases out: 2048 of pooled CLIP (SD3), 4096 of T5 (FLUX).
SD3: dict[str, Any] = {**SD3_CONFIG, "pooled_projection_dim": 2048}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
RANK = 4  # the published files have 256
CONFIGS = {"sd3": SD3, "sd3-lora": SD3, "flux": FLUX}


def stream_shapes(variant: str, config: dict[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that `variant` adds to its base; `config`: of another base than the tiny one."""
    config = config or CONFIGS[variant]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def low_rank(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.down.weight"], shapes[f"{name}.up.weight"] = (RANK, columns), (rows, RANK)

    linear("position_net.linears.linear_1", width // 2, width + 64)
    linear("position_net.linears.linear_2", width, width // 2)
    shapes["position_net.null_positive_feature"], shapes["position_net.null_position_feature"] = (width,), (64,)
    if variant != "flux":
        linear("position_net.text_embedder.linear_1", width, config["pooled_projection_dim"])
        linear("position_net.text_embedder.linear_2", width, width)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}."
        last = variant != "flux" and index == config["num_layers"] - 1
        modulation = 2 if last else 6
        if variant == "sd3-lora":
            names = ["img_q_lora", "img_k_lora", "img_v_lora", "bbox_q_lora", "bbox_k_lora", "bbox_v_lora"]
            for name in [*names, "proj_lora_img", *([] if last else ["proj_lora_bbox"])]:
                low_rank(f"{block}attn.{name}", width, width)
            low_rank(f"{block}norm1_context_lora_bbox.1", modulation * width, width)
            if not last:
                low_rank(f"{block}ff_context_lora.0", 4 * width, width)
                low_rank(f"{block}ff_context_lora.1", width, 4 * width)
            low_rank(f"{block}bbox_forward", width, width)
            continue
        attention = block + ("bbox_attn." if variant == "flux" else "bbox_fuser_block.")
        for name in ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]:
            linear(attention + name, width, width)
        if not last:
            linear(f"{attention}to_add_out", width, width)
            linear(f"{block}ff_bbox.net.0.proj", 4 * width, width)
            linear(f"{block}ff_bbox.net.2", width, 4 * width)
        if variant == "flux":
            for name in ["norm_q", "norm_k", "norm_added_q", "norm_added_k"]:
                shapes[f"{attention}{name}.weight"] = (config["attention_head_dim"],)
        linear(f"{block}norm1_bbox.linear", modulation * width, width)
        linear(f"{block}bbox_forward", width, width)
    for index in range(config.get("num_single_layers", 0)):
        block = f"single_transformer_blocks.{index}."
        linear(f"{block}bbox_norm.linear", 3 * width, width)
        linear(f"{block}bbox_proj_mlp", 4 * width, width)
        linear(f"{block}bbox_proj_out", width, 5 * width)
        for name in ["to_q", "to_k", "to_v"]:
            linear(f"{block}bbox_attn.{name}", width, width)
        for name in ["norm_q", "norm_k"]:
            shapes[f"{block}bbox_attn.{name}.weight"] = (config["attention_head_dim"],)
        linear(f"{block}bbox_forward", width, width)
    return shapes


def filled(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Numbers for these names: each depends on its name alone, the same on every machine; no gate is zero.

    They are so large that phrases, boxes and null slots each change the outputs by far more than the tests tolerate, and so
    small that fp32 still shows less than that.
    """
    tensors = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norm = name.endswith(".weight") and len(shape) == 1
        scale = 0.2 if len(shape) == 1 else 0.8 * shape[-1] ** -0.5
        tensors[name] = (scale * draw + norm).to(dtype)
    return tensors


def plain_base(variant: str) -> Any:
    """The stock class of the variant's base, filled the same way."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

    model: Any = (FluxTransformer2DModel if variant == "flux" else SD3Transformer2DModel)(**CONFIGS[variant])
    numbers = filled({name: tuple(p.shape) for name, p in model.named_parameters()})
    model.load_state_dict(numbers, strict=False)
    return model.eval()


def write_files(variant: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    """A base folder with `transformer/` only, and the variant's weight file."""
    plain_base(variant).to(dtype).save_pretrained(folder / "base" / "transformer")
    file = folder / "weights.safetensors"
    save_file(filled(stream_shapes(variant), dtype), file, metadata={"format": "pt"})
    return folder / "base", file


def inputs(variant: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Everything that both classes' forward takes but the layout, two samples."""
    config = CONFIGS[variant]
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    text = normal(2, 7, config["joint_attention_dim"]), normal(2, config["pooled_projection_dim"])
    if variant != "flux":
        return {
            "hidden_states": normal(2, config["in_channels"], 16, 16),
            "encoder_hidden_states": text[0],
            "pooled_projections": text[1],
            "timestep": torch.tensor([900.0, 300.0]),
        }
    rows, columns = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    return {
        "hidden_states": normal(2, 24, config["in_channels"]),
        "encoder_hidden_states": text[0],
        "pooled_projections": text[1],
        "timestep": torch.tensor([0.9, 0.3]),
        "img_ids": torch.stack([torch.zeros(6, 4), rows, columns], dim=-1).flatten(0, 1),
        "txt_ids": torch.zeros(7, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }


def layout(variant: str, boxes: int, dtype: torch.dtype = torch.float32) -> LayoutInputs:
    """Two layouts of `boxes` boxes in ten slots."""
    config = CONFIGS[variant]
    phrase = (30, config["joint_attention_dim"]) if variant == "flux" else (config["pooled_projection_dim"],)
    generator = torch.Generator().manual_seed(8)
    corners = torch.zeros(2, 10, 4)
    embeds = torch.zeros(2, 10, *phrase, dtype=dtype)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    corners[:, :boxes] = torch.rand(2, boxes, 2, 2, generator=generator).sort(dim=2).values.flatten(2)
    embeds[:, :boxes] = torch.randn(2, boxes, *phrase, generator=generator, dtype=torch.float64).to(dtype)
    mask[:, :boxes] = True
    return LayoutInputs(corners, embeds, mask)
