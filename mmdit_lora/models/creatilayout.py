"""CreatiLayout's names for a layout stream, in and out (HuiZhang0812/CreatiLayout at 860d8bd; arXiv 2412.03859).

Its three published variants: "sd3" (580 tensors) and "flux" (1,146 tensors) hold a stream that is ours under other names.
"sd3-lora" (580 tensors) holds low-rank additions to the weights of the base's text and image streams; a stream of
full weights follows from them in closed form.

Only names and facts are taken over. Tensor shapes: (out, in), as in `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdit_lora.errors import InputError

SLOTS = 10  # of a layout, filled with null features
PHRASE_TOKENS = 30  # T5 tokens of a phrase, "flux" only: `max_boxes_token_length`

_PROCESSOR = {
    "layout_mlp.fc1": "linears.linear_1",
    "layout_mlp.fc2": "linears.linear_2",
    "phrase_mlp.fc1": "text_embedder.linear_1",
    "phrase_mlp.fc2": "text_embedder.linear_2",
    "null_phrase": "null_positive_feature",
    "null_box": "null_position_feature",
}
_DOUBLE = {
    "layout_mlp.fc1": "ff_bbox.net.0.proj",
    "layout_mlp.fc2": "ff_bbox.net.2",
    "norm1": "norm1_bbox",
    "out_proj": "bbox_forward",
}
# The fused projection `bbox_proj_out` (D, D + H) is two of ours: `attn.to_out.0` its first D columns, `layout_mlp.fc2` the rest.
_FUSED = "bbox_proj_out"
_SINGLE = {
    "layout_mlp.fc1": "bbox_proj_mlp",
    "layout_mlp.fc2": _FUSED,
    "attn.to_out.0": _FUSED,
    "attn": "bbox_attn",
    "norm1": "bbox_norm",
    "out_proj": "bbox_forward",
}


@dataclass(frozen=True)
class Variant:
    """One of the published forms of a stream.

    Args:
        family: of the base, a key of `FAMILIES`.
        mark: part of a name that only this variant's files have.
        attention: its name for the attention of a double-stream block.
        low_rank: it holds low-rank additions instead of a stream.
        config: what our transformer's config says to compute the same.
    """

    family: str
    mark: str
    attention: str
    low_rank: bool
    config: Mapping[str, Any]


_COMMON = {"mask_padding": False, "layout_slots": SLOTS, "layout_attention": "siamese"}
VARIANTS: dict[str, Variant] = {
    "sd3": Variant("sd3", ".bbox_fuser_block.", "bbox_fuser_block", False, _COMMON),
    "sd3-lora": Variant("sd3", ".img_q_lora.", "attn", True, _COMMON),
    "flux": Variant(
        "flux",
        ".bbox_attn.",
        "bbox_attn",
        False,
        {**_COMMON, "phrase_tokens": PHRASE_TOKENS, "layout_single_blocks": True},
    ),
}


def variant_of(names: Iterable[str]) -> str | None:
    """Which variant's file has these names; None for no CreatiLayout file."""
    names = list(names)
    return next((key for key, variant in VARIANTS.items() if any(variant.mark in name for name in names)), None)


def variant_of_model(model: Any) -> str:
    """The variant under whose names a model's stream can be written.

    Raises:
        InputError: its stream is of a form that CreatiLayout has not.
    """
    config = model.config
    key = next((k for k, v in VARIANTS.items() if v.family == model.family and not v.low_rank), None)
    if key is None:
        raise InputError(f"CreatiLayout has no stream for {model.family}")
    wanted = {k: v for k, v in VARIANTS[key].config.items() if k not in ("mask_padding", "layout_slots")}
    wrong = {k: config.get(k) for k, v in wanted.items() if config.get(k) != v}
    # Its classes know neither of these where ours has them by choice.
    wrong |= {k: config.get(k) for k in ("qk_norm", "dual_attention_layers") if config.get(k)}
    if config.layout_mlp_dim not in (None, 4 * model.inner_dim):
        wrong["layout_mlp_dim"] = config.layout_mlp_dim
    if wrong:
        raise InputError(f"CreatiLayout has no such stream: {', '.join(f'{k} {v}' for k, v in wrong.items())}")
    return key


def to_creatilayout(name: str, variant: str) -> str:
    """CreatiLayout's name of a module or tensor of our stream; two of ours share a fused projection's name.

    Raises:
        KeyError: it is no part of a layout stream.
    """
    if name.startswith("layout_processor."):
        return _renamed(name.removeprefix("layout_processor."), _PROCESSOR, "position_net.")
    block, found, rest = name.partition(".layout_stream.")
    if not found:
        raise KeyError(name)
    if block.startswith("single_"):
        return _renamed(rest, _SINGLE, f"{block}.")
    return _renamed(rest, {**_DOUBLE, "attn": VARIANTS[variant].attention}, f"{block}.")


def _renamed(rest: str, table: Mapping[str, str], head: str) -> str:
    for ours, theirs in table.items():
        if rest == ours or rest.startswith(f"{ours}."):
            return head + theirs + rest[len(ours) :]
    raise KeyError(rest)


@dataclass(frozen=True)
class Recipe:
    """How one of our tensors is made of theirs.

    Args:
        sources: names in their file, or, for a low-rank variant, of the base's tensors.
        make: from these tensors to ours; None = as it is.
    """

    sources: tuple[str, ...]
    make: Callable[..., Tensor] | None = None

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        sources = [tensors[name] for name in self.sources]
        return sources[0] if self.make is None else self.make(*sources)


def recipes(names: Iterable[str], variant: str) -> dict[str, Recipe]:
    """For every tensor of a stream of ours, `names`, how it is made."""
    return {name: _low_rank(name) if VARIANTS[variant].low_rank else _same(name, variant) for name in names}


def _same(name: str, variant: str) -> Recipe:
    theirs = to_creatilayout(name, variant)
    if f".{_FUSED}." not in theirs or name.endswith(".bias"):
        return Recipe((theirs,))
    if ".attn." in name:
        return Recipe((theirs,), lambda fused: fused[:, : fused.shape[0]].contiguous())
    return Recipe((theirs,), lambda fused: fused[:, fused.shape[0] :].contiguous())


def stream_to_creatilayout(stream: Mapping[str, Tensor], variant: str) -> dict[str, Tensor]:
    """A whole stream of ours under CreatiLayout's names; the inverse of `recipes` for variants of full weights."""
    out: dict[str, Tensor] = {}
    for name, value in stream.items():
        theirs = to_creatilayout(name, variant)
        if f".{_FUSED}.weight" not in theirs:
            out[theirs] = value
        elif ".attn." in name:
            mlp = stream[name.replace("attn.to_out.0", "layout_mlp.fc2")]
            out[theirs] = torch.cat([value, mlp], dim=1)
    return out


def lora_to_creatilayout(name: str, factors: Mapping[str, Tensor], variant: str) -> tuple[str, dict[str, Tensor]]:
    """A LoRA of one of our modules as that of their module: its name, and its factors under the same keys.

    A LoRA on the MLP's part of a fused projection is one on the whole of it that reads none of the attention's columns.

    Args:
        name: of our module; factors: `lora_A.weight` (r, in), `lora_B.weight` (out, r), and what else PEFT has.

    Raises:
        InputError: a LoRA that their fused projection cannot carry.
    """
    theirs = to_creatilayout(name, variant)
    if not theirs.endswith(_FUSED):
        return theirs, dict(factors)
    if not name.endswith("layout_mlp.fc2") or "lora_magnitude_vector" in factors:
        raise InputError(
            f"a LoRA on {name} (or a DoRA) cannot be one on CreatiLayout's fused {_FUSED}",
            hint="train LoRA on layout_mlp.fc1 and fc2 for this export",
        )
    down, out_features = factors["lora_A.weight"], factors["lora_B.weight"].shape[0]
    return theirs, {**factors, "lora_A.weight": torch.cat([down.new_zeros(len(down), out_features), down], dim=1)}


# -- the low-rank variant. With BA = up @ down (alpha = rank):

_ATTENTION_LORA = {
    "to_q": "img_q_lora",
    "to_k": "img_k_lora",
    "to_v": "img_v_lora",
    "to_out.0": "proj_lora_img",
    "add_q_proj": "bbox_q_lora",
    "add_k_proj": "bbox_k_lora",
    "add_v_proj": "bbox_v_lora",
    "to_add_out": "proj_lora_bbox",
}


def _low_rank(name: str) -> Recipe:
    """A tensor of the stream from the base's weights and the additions to them; sums in fp32, or fp64 where given."""
    block, found, rest = name.partition(".layout_stream.")
    if not found:
        return Recipe((to_creatilayout(name, "sd3-lora"),))

    def pair(module: str) -> tuple[str, str]:
        return f"{block}.{module}.up.weight", f"{block}.{module}.down.weight"

    module, _, leaf = rest.rpartition(".")
    if module.startswith("attn."):
        base = f"{block}.{rest}"
        if leaf == "bias":
            return Recipe((base,), torch.clone)  # one file cannot hold one tensor under two names
        return Recipe((base, *pair(f"attn.{_ATTENTION_LORA[module.removeprefix('attn.')]}")), _added)
    if module == "norm1.linear":
        base = f"{block}.norm1_context.linear.{leaf}"
        if leaf == "bias":
            return Recipe((base, f"{block}.bbox_forward.up.weight"), _one_more_scale)
        return Recipe((base, *pair("norm1_context_lora_bbox.1")), _added)
    if module == "out_proj":
        up, down = pair("bbox_forward")
        return Recipe((up, down), _product) if leaf == "weight" else Recipe((up,), lambda up: up.new_zeros(len(up)))
    # The text's MLP and a low-rank one side by side are one MLP, twice as wide.
    first, second = f"{block}.ff_context.net.0.proj.{leaf}", f"{block}.ff_context.net.2.{leaf}"
    if module == "layout_mlp.fc1":
        if leaf == "bias":
            up, _ = pair("ff_context_lora.0")
            return Recipe((first, up), lambda bias, up: torch.cat([bias, bias.new_zeros(len(up))]))
        return Recipe((first, *pair("ff_context_lora.0")), lambda w, up, down: torch.cat([w, _product(up, down)]))
    if leaf == "bias":
        return Recipe((second,), torch.clone)
    return Recipe((second, *pair("ff_context_lora.1")), lambda w, up, down: torch.cat([w, _product(up, down)], dim=1))


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _product(up: Tensor, down: Tensor) -> Tensor:
    return _exact(up) @ _exact(down)


def _added(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return _exact(weight) + _product(up, down)


def _one_more_scale(bias: Tensor, gate_up: Tensor) -> Tensor:
    """The reference adds a second LayerNorm(x) * (1 + s) + b, so the scale's rows gain 1.

    They are the second of six parts (shift, scale, gate, ...), or the first of two (scale, shift) in the last block.
    """
    dim = len(gate_up)
    start = 0 if len(bias) == 2 * dim else dim
    more = torch.zeros_like(_exact(bias))
    more[start : start + dim] = 1.0
    return _exact(bias) + more
