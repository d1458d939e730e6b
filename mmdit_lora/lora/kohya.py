"""LoRA files in the names of kohya-ss/sd-scripts, for MM-DiTs whose original code names its blocks `joint_blocks`.

sd-scripts names a module by its place in the original code, dots as underscores (`networks/lora_sd3.py` at 077f6a4:
prefixes `lora_unet`, `lora_te1`, `lora_te2`, `lora_te3`); diffusers, which converts such files for other families, has its
modules elsewhere, and q, k and v apart (diffusers 0.42.1, loaders/single_file_utils.py,
`convert_sd3_transformer_checkpoint_to_diffusers`, is the table for whole weights). Names and facts only are taken over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmdit_lora.errors import InputError, listed

PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_")

# Original place -> ours; several of ours: rows of one fused linear, in this order.
_IN_BLOCK: dict[str, tuple[str, ...]] = {
    "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block_attn_proj": ("attn.to_out.0",),
    "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block_attn2_proj": ("attn2.to_out.0",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "x_block_adaLN_modulation_1": ("norm1.linear",),
    "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block_attn_proj": ("attn.to_add_out",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
    "context_block_adaLN_modulation_1": ("norm1_context.linear",),
}
_OUTSIDE: dict[str, str] = {
    "x_embedder_proj": "pos_embed.proj",
    "context_embedder": "context_embedder",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}
_TEXT = re.compile(r"lora_te([12])_text_model_encoder_layers_(\d+)_(self_attn|mlp)_([qkv]_proj|out_proj|fc[12])")
_BLOCK = re.compile(r"lora_unet_joint_blocks_(\d+)_(.+)")


def is_kohya(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of sd-scripts."""
    return any(name.startswith(PREFIXES) for name in state)


def from_kohya(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same LoRA in diffusers' names, `transformer.<module>.lora_A.weight` and `text_encoder...`; the deltas are equal.

    A fused q/k/v becomes three LoRAs that share the first factor. Alpha goes into the second factor, in fp32.

    Args:
        state: `<name>.lora_down.weight` (r, in), `<name>.lora_up.weight` (out, r), `<name>.alpha` (none = r).

    Raises:
        InputError: names that have no place in these models, among them T5's, or factors that do not belong together.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, leaf = key.partition(".")
        parts.setdefault(name, {})[leaf] = value
    targets = {name: _targets(name) for name in parts}
    leaves = {"lora_down.weight", "lora_up.weight"}
    faults = [
        name
        for name, tensors in parts.items()
        if not targets[name] or not leaves <= tensors.keys() <= {*leaves, "alpha"}
    ]
    if faults:
        raise InputError(
            f"{len(faults)} of {len(parts)} modules are not plain LoRA on a part that can carry one here: "
            f"{listed(sorted(faults))}",
            cure="T5 (lora_te3), LoHa, LoKr and DoRA parts are not supported: leave them out of the file",
        )
    converted: dict[str, Tensor] = {}
    for name, tensors in parts.items():
        down, up = tensors["lora_down.weight"], tensors["lora_up.weight"].float()
        rank = down.shape[0]
        if up.shape[1] != rank or up.shape[0] % len(targets[name]):
            raise InputError(f"{name}: factors of {tuple(down.shape)} and {tuple(up.shape)} do not belong together")
        up = up * (tensors["alpha"].item() / rank if "alpha" in tensors else 1.0)
        if _shift_comes_first(name, down, up):
            up = torch.cat(up.chunk(2)[::-1])
        for target, rows in zip(targets[name], up.chunk(len(targets[name])), strict=True):
            converted[f"{target}.lora_A.weight"] = down.clone()
            converted[f"{target}.lora_B.weight"] = rows.contiguous()
    return converted


def _targets(name: str) -> list[str]:
    """Full module names; none for a name that has no place."""
    if match := _TEXT.fullmatch(name):
        number, layer, part, leaf = match.groups()
        encoder = "text_encoder" if number == "1" else "text_encoder_2"
        return [f"{encoder}.text_model.encoder.layers.{layer}.{part}.{leaf}"]
    if match := _BLOCK.fullmatch(name):
        index, place = match.groups()
        return [f"transformer.transformer_blocks.{index}.{target}" for target in _IN_BLOCK.get(place, ())]
    outside = _OUTSIDE.get(name.removeprefix("lora_unet_")) if name.startswith("lora_unet_") else None
    return [f"transformer.{outside}"] if outside else []


def _shift_comes_first(name: str, down: Tensor, up: Tensor) -> bool:
    """The original code orders a modulation of two as (shift, scale), diffusers' AdaLayerNormContinuous as (scale, shift).

    Those are the final one and the text's in the last block, which has two parts where the other blocks' has six.
    """
    if name.endswith("final_layer_adaLN_modulation_1"):
        return True
    return name.endswith("context_block_adaLN_modulation_1") and up.shape[0] == 2 * down.shape[1]
