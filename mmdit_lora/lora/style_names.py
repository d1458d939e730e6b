"""The key names of style LoRA files: which part of a name is the tensor, which the module, and which module of ours that is.

A key is `<prefix><module><leaf>`. Tools differ in all three, and agree in little: modules have the names of the original code
(fused q, k and v) or of diffusers (apart), with dots or underscores. So a module is looked up with all its dots turned into
underscores, under whichever prefix, and one table serves every tool.

Names and facts only are taken over, from
- ComfyUI: comfy/lora.py (prefixes, `diff`, `diff_b`, `set_weight`), comfy/weight_adapter/ at 0323d87, 17adbb5, 179c2d3 (leaves);
- kohya-ss/sd-scripts 48d368f: networks/lora_sd3.py, networks/lora_flux.py (`lora_unet`, `lora_te1` to `lora_te3`);
- diffusers 0.42.1: loaders/single_file_utils.py (which of its modules an original one is), loaders/lora_conversion_utils.py
  (the names of XLabs);
- OneTrainer: modules/util/convert/lora (`lora_transformer`, `lora_te2` for T5 beside one CLIP, `clip_l`, `t5`, `qkv.0`);
- LyCORIS and SimpleTuner: `lycoris_`, `hada_*`, `lokr_*`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmdit_lora.models.adapter_layers import own_modules

# Endings of keys, and what the tensor is. The longest that fits decides.
LEAVES = {
    **{
        f"{ending}": leaf
        for leaf, names in {
            "down": ("lora_down", "lora_A", "lora_A.default", "lora.down", "lora_linear_layer.down", "down"),
            "up": ("lora_up", "lora_B", "lora_B.default", "lora.up", "lora_linear_layer.up", "up"),
            "mid": ("lora_mid",),
        }.items()
        for ending in (f".{name}.weight" for name in names)
    },
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".alpha": "alpha",
    ".lora_B.bias": "up_bias",
    ".lora_up.bias": "up_bias",
    ".diff": "diff",
    ".diff_b": "bias",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    **{f".hada_{name}": f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{name}": f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")},
}
# Endings of what is read by no LoRA layer exactly, and how it is called.
REFUSED = {
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight"), "GLoRA"),
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".oft_R", ".oft_R.weight", ".rescale"), "OFT or BOFT"),
    **dict.fromkeys((".boft_R", ".boft_s", ".boft_blocks"), "BOFT"),
    **dict.fromkeys((".ia3_l", ".ia3_l.weight", ".on_input"), "IA3"),
    **dict.fromkeys((".vera_lambda_b", ".vera_lambda_d"), "VeRA"),
    **dict.fromkeys((".w_norm", ".b_norm"), "a change of a normalisation (w_norm)"),
    **dict.fromkeys((".set_weight", "_norm.scale"), "a replaced weight (set_weight)"),
    ".reshape_weight": "a widened layer (reshape_weight)",
    ".scalar": "a LyCORIS scalar",
    **dict.fromkeys((".scale_weight", ".weight_scale", ".scale_input"), "scaled fp8 storage"),
}
_ENDINGS = sorted((*LEAVES, *REFUSED), key=len, reverse=True)

# Of the transformer; the longest that fits decides, and a bare module name is one too.
_PREFIXES = (
    "base_model.model.diffusion_model.",
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
    "",
)
# Beside LoRA: textual inversion that OneTrainer bundles.
EMBEDDINGS = "bundle_emb."

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_TIME_AND_TEXT = "time_text_embed"


def _in_blocks(theirs: str, ours: str, table: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"{theirs}_{{}}_{name}": tuple(f"{ours}.{{}}.{module}" for module in to) for name, to in table.items()}


# Original module, dots as underscores -> ours; several of ours are the rows of one fused linear, in this order.
JOINT_BLOCKS: dict[str, tuple[str, ...]] = {
    **_in_blocks(
        "joint_blocks",
        "transformer_blocks",
        {
            "x_block_attn_qkv": _QKV,
            "x_block_attn_proj": ("attn.to_out.0",),
            "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
            "x_block_attn2_proj": ("attn2.to_out.0",),
            "x_block_mlp_fc1": ("ff.net.0.proj",),
            "x_block_mlp_fc2": ("ff.net.2",),
            "x_block_adaLN_modulation_1": ("norm1.linear",),
            "context_block_attn_qkv": _ADDED_QKV,
            "context_block_attn_proj": ("attn.to_add_out",),
            "context_block_mlp_fc1": ("ff_context.net.0.proj",),
            "context_block_mlp_fc2": ("ff_context.net.2",),
            "context_block_adaLN_modulation_1": ("norm1_context.linear",),
        },
    ),
    "x_embedder_proj": ("pos_embed.proj",),
    "t_embedder_mlp_0": (f"{_TIME_AND_TEXT}.timestep_embedder.linear_1",),
    "t_embedder_mlp_2": (f"{_TIME_AND_TEXT}.timestep_embedder.linear_2",),
    "y_embedder_mlp_0": (f"{_TIME_AND_TEXT}.text_embedder.linear_1",),
    "y_embedder_mlp_2": (f"{_TIME_AND_TEXT}.text_embedder.linear_2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}
DOUBLE_AND_SINGLE_BLOCKS: dict[str, tuple[str, ...]] = {
    **_in_blocks(
        "double_blocks",
        "transformer_blocks",
        {
            "img_attn_qkv": _QKV,
            "img_attn_proj": ("attn.to_out.0",),
            "img_mlp_0": ("ff.net.0.proj",),
            "img_mlp_2": ("ff.net.2",),
            "img_mod_lin": ("norm1.linear",),
            "txt_attn_qkv": _ADDED_QKV,
            "txt_attn_proj": ("attn.to_add_out",),
            "txt_mlp_0": ("ff_context.net.0.proj",),
            "txt_mlp_2": ("ff_context.net.2",),
            "txt_mod_lin": ("norm1_context.linear",),
            # XLabs
            "processor_qkv_lora1": _QKV,
            "processor_proj_lora1": ("attn.to_out.0",),
            "processor_qkv_lora2": _ADDED_QKV,
            "processor_proj_lora2": ("attn.to_add_out",),
        },
    ),
    **_in_blocks(
        "single_blocks",
        "single_transformer_blocks",
        {
            "linear1": (*_QKV, "proj_mlp"),
            "linear1_qkv": _QKV,
            "linear2": ("proj_out",),
            "modulation_lin": ("norm.linear",),
            # XLabs; `_lora` is part of the ending
            "processor_qkv": _QKV,
            "processor_proj": ("proj_out",),
        },
    ),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in_in_layer": (f"{_TIME_AND_TEXT}.timestep_embedder.linear_1",),
    "time_in_out_layer": (f"{_TIME_AND_TEXT}.timestep_embedder.linear_2",),
    "vector_in_in_layer": (f"{_TIME_AND_TEXT}.text_embedder.linear_1",),
    "vector_in_out_layer": (f"{_TIME_AND_TEXT}.text_embedder.linear_2",),
    "guidance_in_in_layer": (f"{_TIME_AND_TEXT}.guidance_embedder.linear_1",),
    "guidance_in_out_layer": (f"{_TIME_AND_TEXT}.guidance_embedder.linear_2",),
    "final_layer_linear": ("proj_out",),
    "final_layer_adaLN_modulation_1": ("norm_out.linear",),
}


@dataclass(frozen=True)
class FamilyNames:
    """How a family's parts are called in style LoRA files.

    Args:
        modules: original module of the transformer -> ours, `JOINT_BLOCKS` or `DOUBLE_AND_SINGLE_BLOCKS`.
        encoders: prefix -> component of the pipeline, see `encoder_prefixes`.
    """

    modules: Mapping[str, tuple[str, ...]]
    encoders: Mapping[str, str]


def encoder_prefixes(*, clip_l: str, t5: str, clip_g: str | None = None) -> dict[str, str]:
    """Prefixes of the text encoders' modules, and the components of the pipeline that they stand for.

    sd-scripts counts T5 as the third whether or not there is a second CLIP; OneTrainer counts those that there are.
    """
    roles = {"clip_l": clip_l, "t5xxl": t5} | ({"clip_g": clip_g} if clip_g else {})
    return {
        **{f"{component}.": component for component in roles.values()},
        **{f"text_encoders.{role}.transformer.": component for role, component in roles.items()},
        **{f"{role.removesuffix('xxl')}.": component for role, component in roles.items()},
        "lora_te_": clip_l,
        "lora_te1_": clip_l,
        "lora_te2_": clip_g or t5,
        "lora_te3_": t5,
    }


@dataclass(frozen=True)
class Place:
    """Where a module of a file belongs.

    Args:
        component: of the pipeline, e.g. "transformer".
        modules: one of ours, or several that are the rows of one fused linear, in the file's order.
        halves_swapped: the file orders a modulation of two as (shift, scale), diffusers as (scale, shift).
    """

    component: str
    modules: tuple[str, ...]
    halves_swapped: bool = False


def split_key(key: str) -> tuple[str, str]:
    """Module name with its prefix, and the ending, which is "" for an unknown one."""
    ending = next((ending for ending in _ENDINGS if key.endswith(ending)), "")
    return key[: len(key) - len(ending)], ending


class Places:
    """Finds modules of ours for the names of a file.

    Args:
        components: of the pipeline, by name; None for one that this base has not.
        names: of this family.
    """

    def __init__(self, components: Mapping[str, nn.Module | None], names: FamilyNames) -> None:
        self.names = names
        self.modules: dict[str, dict[str, Any]] = {}  # by component, then by name
        self._flat: dict[str, dict[str, str]] = {}
        self._no_carriers: dict[str, dict[str, str]] = {}  # their kinds
        for component, model in components.items():
            own = {} if model is None else dict(own_modules(model))
            own = {name: m for name, m in own.items() if next(m.parameters(recurse=False), None) is not None}
            self.modules[component] = {name: m for name, m in own.items() if isinstance(m, nn.Linear | nn.Conv2d)}
            self._flat[component] = {_flat(name): name for name in self.modules[component]}
            self._no_carriers[component] = {
                _flat(name): type(m).__name__ for name, m in own.items() if name not in self.modules[component]
            }

    def component(self, name: str) -> tuple[str, str]:
        """Component and the name without prefix."""
        for prefix, component in self.names.encoders.items():
            if name.startswith(prefix):
                return component, name.removeprefix(prefix)
        prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        return "transformer", name.removeprefix(prefix)

    def find(self, name: str) -> Place | None:
        """The place of a module; None if this base has none for it."""
        component, bare = self.component(name)
        flat = _flat(bare)
        found = self._lookup(component, flat)
        part = re.fullmatch(r"(.+)_(\d)", flat)
        if found is None and part:  # OneTrainer's parts of a fused linear: `qkv.0`
            whole = self._lookup(component, part[1])
            if whole is not None and 1 < len(whole) > int(part[2]):
                found = (whole[int(part[2])],)
        if found is None:
            return None
        return Place(component, found, self._halves_swapped(component, flat, found))

    def explain_missing(self, name: str) -> str:
        """The module's name, and what is known about why this base has no place for it."""
        component, bare = self.component(name)
        flat = _flat(bare)
        if flat in self._no_carriers[component]:
            return f"{name} (is a {self._no_carriers[component][flat]}, which can carry no LoRA)"
        number = re.search(r"(?<=blocks_)\d+|(?<=block_)\d+|(?<=layers_)\d+", flat)
        if number and self._lookup(component, flat[: number.start()] + "0" + flat[number.end() :]) is not None:
            return f"{name} (this base has no block {number[0]})"
        return name

    def _lookup(self, component: str, flat: str) -> tuple[str, ...] | None:
        known = self._flat[component]
        if flat in known:
            return (known[flat],)
        if component != "transformer":
            return None
        number = re.search(r"(?<=blocks_)\d+", flat)
        template = f"{flat[: number.start()]}{{}}{flat[number.end() :]}" if number else flat
        modules = tuple(module.format(number and number[0]) for module in self.names.modules.get(template, ()))
        return modules if modules and all(_flat(module) in known for module in modules) else None

    def _halves_swapped(self, component: str, flat: str, found: tuple[str, ...]) -> bool:
        """Those are the final modulation and the text's in the last joint block, of two parts where others have six."""
        if flat.endswith("final_layer_adaLN_modulation_1"):
            return True
        module = self.modules[component][found[0]]
        return flat.endswith("context_block_adaLN_modulation_1") and module.out_features == 2 * module.in_features


def _flat(name: str) -> str:
    # CLIP's text model has this part in its name, or not, by class and version of transformers.
    return name.replace(".", "_").removeprefix("text_model_")
