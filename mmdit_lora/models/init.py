"""What a fresh layout stream starts from: random weights, or copies of the base's own text or image stream."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mmdit_lora.models.layout_stream import LayoutStream, SingleLayoutStream

StreamInit = Literal["copy_text", "copy_image", "random"]
STREAM_INITS: tuple[StreamInit, ...] = get_args(StreamInit)

# The layout side of an attention, and the image side's names for the same.
_SIDES = {
    "add_q_proj": "to_q",
    "add_k_proj": "to_k",
    "add_v_proj": "to_v",
    "to_add_out": "to_out.0",
    "norm_added_q": "norm_q",
    "norm_added_k": "norm_k",
}


@torch.no_grad()
def copy_from_block(stream: nn.Module, block: nn.Module, init: StreamInit) -> None:
    """Fill a block's layout stream from the block's own streams; the gate stays zero.

    The image side of a siamese attention is a copy of the block's image side in both cases. A block with one set of weights
    for all tokens has only that to copy.

    Args:
        stream: `LayoutStream` or `SingleLayoutStream`, changed in place.
        block: diffusers' MM-DiT block: `norm1`, `norm1_context`, `attn`, `ff`, `ff_context`; or single-stream block: `norm`,
            `attn`, `proj_mlp`, `proj_out`.

    Raises:
        ValueError: `layout_mlp` has another width than the MLP that it would be a copy of.
    """
    if init == "random":
        return
    if isinstance(stream, SingleLayoutStream):
        _copy_single(stream, block)
    else:
        assert isinstance(stream, LayoutStream)
        _copy_double(stream, block, side="text" if init == "copy_text" else "image")


def _copy_double(stream: LayoutStream, block: nn.Module, *, side: str) -> None:
    norm = block.get_submodule("norm1_context" if side == "text" else "norm1")
    _copy_modulation(stream, norm.get_submodule("linear"))
    for name, image_name in _SIDES.items():
        # A text stream that ends in this block has no output of its own; the layout stream ends there too.
        _copy(stream.attn, name, block.get_submodule("attn"), name if side == "text" else image_name)
        _copy(stream.attn, image_name, block.get_submodule("attn"), image_name)
    if not stream.last:
        feed_forward = block.get_submodule("ff_context" if side == "text" else "ff")
        _fill(stream.layout_mlp.fc1, *_weights(feed_forward.get_submodule("net.0.proj")))
        _fill(stream.layout_mlp.fc2, *_weights(feed_forward.get_submodule("net.2")))


def _copy_modulation(stream: LayoutStream, source: nn.Module) -> None:
    """The rows of shift, scale and gate that the stream has; a last one has (scale, shift) only, in this order."""
    target = stream.norm1.get_submodule("linear")
    wanted, dim = target.get_parameter("weight").shape
    weight, bias = source.get_parameter("weight").data, source.get_parameter("bias").data
    if wanted == 2 * dim and len(weight) > wanted:
        weight, bias = (torch.cat([x[dim : 2 * dim], x[:dim]]) for x in (weight, bias))
    _fill(target, weight[:wanted], bias[:wanted])


def _copy_single(stream: SingleLayoutStream, block: nn.Module) -> None:
    _fill(stream.norm1.linear, *_weights(block.get_submodule("norm.linear")))
    dim = stream.out_proj.in_features
    # The fused output projection reads the attention's output first, then the MLP's; it has one bias, kept by fc2.
    weight, bias = _weights(block.get_submodule("proj_out"))
    for name, image_name in _SIDES.items():
        if image_name != "to_out.0":
            _copy(stream.attn, name, block.get_submodule("attn"), image_name)
            _copy(stream.attn, image_name, block.get_submodule("attn"), image_name)
    for name in ("to_out.0", "to_add_out"):
        if (out := _submodule(stream.attn, name)) is not None:
            _fill(out, weight[:, :dim], torch.zeros(dim))
    if not stream.last:
        _fill(stream.layout_mlp.fc1, *_weights(block.get_submodule("proj_mlp")))
        _fill(stream.layout_mlp.fc2, weight[:, dim:], bias)


def _copy(target: nn.Module, name: str, source: nn.Module, source_name: str) -> None:
    """Copy a linear or norm where both sides have it: a cross attention has no image side, a last block no output."""
    to, of = _submodule(target, name), _submodule(source, source_name)
    if to is not None and of is not None:
        _fill(to, *_weights(of))


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module.get_parameter("weight"), getattr(module, "bias", None)


def _fill(target: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    parameter = target.get_parameter("weight")
    if parameter.shape != weight.shape:
        raise ValueError(
            f"cannot copy a weight of {tuple(weight.shape)} into one of {tuple(parameter.shape)}; with a layout_mlp_dim of "
            "its own, start the stream with init random"
        )
    parameter.copy_(weight)
    if getattr(target, "bias", None) is not None:
        target.get_parameter("bias").copy_(torch.zeros(len(parameter)) if bias is None else bias)
