"""Style LoRA files by hand, from the tools' own naming, and the change of every weight that they stand for, in fp64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.pipeline_makers import open_pipeline
from tests.tiny_flux import tiny_t5_encoder, tiny_t5_tokenizer

RANK, ALPHA = 3, 2.0

# Family -> our modules and the original code's name; one linear, one fused, one whose halves are swapped, an outer one.
PLACES: dict[str, dict[str, tuple[tuple[str, ...], str]]] = {
    "sd3": {
        "linear": (("transformer_blocks.0.attn.to_out.0",), "joint_blocks.0.x_block.attn.proj"),
        "wide": (("transformer_blocks.1.ff.net.0.proj",), "joint_blocks.1.x_block.mlp.fc1"),
        "fused": (
            tuple(f"transformer_blocks.1.attn.to_{kind}" for kind in "qkv"),
            "joint_blocks.1.x_block.attn.qkv",
        ),
        "swapped": (("norm_out.linear",), "final_layer.adaLN_modulation.1"),
        "outer": (("context_embedder",), "context_embedder"),
    },
    "flux": {
        "linear": (("transformer_blocks.0.attn.to_out.0",), "double_blocks.0.img_attn.proj"),
        "wide": (("transformer_blocks.1.ff_context.net.0.proj",), "double_blocks.1.txt_mlp.0"),
        "fused": (
            (
                *(f"single_transformer_blocks.1.attn.to_{kind}" for kind in "qkv"),
                "single_transformer_blocks.1.proj_mlp",
            ),
            "single_blocks.1.linear1",
        ),
        "swapped": (("norm_out.linear",), "final_layer.adaLN_modulation.1"),
        "outer": (("proj_out",), "final_layer.linear"),
    },
}
OURS_ALONE = {"linear", "wide", "outer"}  # one of ours each, so that diffusers' names do too


def make_pipe(family: str, folder: Any) -> Any:
    """A small pipeline with every text encoder, T5 too."""
    pipe = open_pipeline(family, folder)
    if family == "sd3":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            pipe.register_modules(text_encoder_3=tiny_t5_encoder(width=32), tokenizer_3=tiny_t5_tokenizer())
    return pipe


def base_layer(module: Any) -> Any:
    return getattr(module, "base_layer", module)


@dataclass
class StyleFile:
    """A file's tensors, and what they change.

    Args:
        tensors: by the file's keys.
        weights: (component, our module) -> change of its weight, fp64, (out, in).
        biases: the same of its bias, (out,).
        metadata: of diffusers, for the file's header.
        config: adapter_config.json beside the file.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    biases: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    metadata: dict[str, Any] | None = None
    config: dict[str, Any] | None = None


class Maker:
    """Random tensors of the right shapes on `pipe`'s modules."""

    def __init__(self, pipe: Any, seed: int = 0) -> None:
        self.pipe = pipe
        self.family = "sd3" if hasattr(pipe, "text_encoder_3") else "flux"
        self.generator = torch.Generator().manual_seed(seed)
        self.file = StyleFile()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator) / 4

    def module(self, name: str, component: str = "transformer") -> Any:
        return base_layer(getattr(self.pipe, component).get_submodule(name))

    def weight(self, ours: tuple[str, ...], component: str = "transformer", *, swapped: bool = False) -> Tensor:
        """The fused weight in the file's order of rows, fp64."""
        whole = torch.cat([self.module(name, component).weight.detach().flatten(1).double() for name in ours])
        return torch.cat(whole.chunk(2)[::-1]) if swapped else whole

    def expect(
        self,
        ours: tuple[str, ...],
        change: Tensor,
        *,
        component: str = "transformer",
        swapped: bool = False,
        bias: bool = False,
    ) -> None:
        """`change` is in the file's order of rows."""
        whole = torch.cat(change.chunk(2)[::-1]) if swapped else change
        rows = [self.module(name, component).weight.shape[0] for name in ours]
        location = self.file.biases if bias else self.file.weights
        location.update(zip(((component, name) for name in ours), whole.split(rows), strict=True))

    def lora(
        self,
        name: str,
        ours: tuple[str, ...],
        *,
        leaves: tuple[str, str] = (".lora_down.weight", ".lora_up.weight"),
        alpha: bool = True,
        component: str = "transformer",
        swapped: bool = False,
        dtype: torch.dtype = torch.float32,
        ones: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """A plain LoRA under `name`."""
        width_out, width_in = self.weight(ours, component).shape
        down, up = (self.randn(RANK, width_in).to(dtype), self.randn(width_out, RANK).to(dtype))
        written = (down[:, :, None, None], up[:, :, None, None]) if ones else (down, up)
        self.file.tensors |= {name + leaf: value for leaf, value in zip(leaves, written, strict=True)}
        if alpha:
            self.file.tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=dtype)
        scale = ALPHA / RANK if alpha else 1.0
        self.expect(ours, scale * up.double() @ down.double(), component=component, swapped=swapped)
        return down, up


# -- dialects: names

Make = Callable[[Maker], None]
AB = (".lora_A.weight", ".lora_B.weight")
UP = (".lora_down.weight", ".lora_up.weight")


def under(
    prefix: str,
    *,
    original: bool = False,
    flat: bool = False,
    leaves: tuple[str, str] = AB,
    alpha: bool = False,
    dtype: torch.dtype = torch.float32,
    ones: bool = False,
) -> Make:
    """A few modules under one tool's prefix."""

    def make(maker: Maker) -> None:
        for kind, (ours, theirs) in PLACES[maker.family].items():
            if not original and kind not in OURS_ALONE:
                continue
            name = theirs if original else ours[0]
            name = prefix + (name.replace(".", "_") if flat else name)
            swapped = original and kind == "swapped"
            maker.lora(name, ours, leaves=leaves, alpha=alpha, swapped=swapped, dtype=dtype, ones=ones)

    return make


def xlabs(maker: Maker) -> None:
    qkv = tuple(f"transformer_blocks.0.attn.to_{kind}" for kind in "qkv")
    added = tuple(f"transformer_blocks.1.attn.add_{kind}_proj" for kind in "qkv")
    single = tuple(f"single_transformer_blocks.0.attn.to_{kind}" for kind in "qkv")
    for name, ours in (
        ("double_blocks.0.processor.qkv_lora1", qkv),
        ("double_blocks.0.processor.proj_lora1", ("transformer_blocks.0.attn.to_out.0",)),
        ("double_blocks.1.processor.qkv_lora2", added),
        ("double_blocks.1.processor.proj_lora2", ("transformer_blocks.1.attn.to_add_out",)),
        ("single_blocks.0.processor.qkv_lora", single),
        ("single_blocks.0.processor.proj_lora", ("single_transformer_blocks.0.proj_out",)),
    ):
        maker.lora(name, ours, leaves=(".down.weight", ".up.weight"), alpha=False)


def parts_of_fused(maker: Maker) -> None:
    """OneTrainer's: `qkv.0`, `linear1.3`."""
    ours, theirs = PLACES[maker.family]["fused"]
    for number, module in enumerate(ours):
        maker.lora(f"transformer.{theirs}.{number}", (module,))


def text_encoders(prefixes: Mapping[str, str], *, flat: bool, leaves: tuple[str, str] = UP, alpha: bool = True) -> Make:
    """Prefix -> component; two modules each."""

    def make(maker: Maker) -> None:
        for prefix, component in prefixes.items():
            encoder = getattr(maker.pipe, component)
            names = [
                n for n, m in encoder.named_modules() if isinstance(base_layer(m), nn.Linear) and "base_layer" not in n
            ]
            chosen = [n for n in names if n.endswith((".self_attn.v_proj", ".SelfAttention.v", ".fc1", ".wi_0"))]
            assert len(chosen) > 1
            for ours in chosen:
                theirs = ours if ours.startswith(("encoder.block", "text_model.")) else f"text_model.{ours}"
                name = prefix + (theirs.replace(".", "_") if flat else theirs)
                maker.lora(name, (ours,), component=component, leaves=leaves, alpha=alpha)

    return make


NAMES: dict[str, dict[str, Make]] = {
    family: {
        "diffusers": under("transformer."),
        "diffusers, alpha": under("transformer.", alpha=True),
        "diffusers, down and up": under("transformer.", leaves=UP, alpha=True),
        "diffusers, lora.down": under("transformer.", leaves=(".lora.down.weight", ".lora.up.weight")),
        "diffusers, linear layers": under(
            "transformer.", leaves=(".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        ),
        "PEFT": under("base_model.model."),
        "PEFT, named adapter": under("base_model.model.", leaves=(".lora_A.default.weight", ".lora_B.default.weight")),
        "PEFT on the original code": under("base_model.model.", original=True),
        "bare names": under(""),
        "bare original names": under("", original=True),
        "ComfyUI": under("diffusion_model.", original=True),
        "ComfyUI, alpha": under("diffusion_model.", original=True, alpha=True),
        "ComfyUI, down and up": under("diffusion_model.", original=True, leaves=UP, alpha=True),
        "original under transformer": under("transformer.", original=True, leaves=UP, alpha=True),
        "sd-scripts": under("lora_unet_", original=True, flat=True, leaves=UP, alpha=True),
        "sd-scripts without alpha": under("lora_unet_", original=True, flat=True, leaves=UP),
        "sd-scripts, fp16": under("lora_unet_", original=True, flat=True, leaves=UP, alpha=True, dtype=torch.float16),
        "sd-scripts, bf16": under("lora_unet_", original=True, flat=True, leaves=UP, alpha=True, dtype=torch.bfloat16),
        "sd-scripts, fp8 e4m3": under(
            "lora_unet_", original=True, flat=True, leaves=UP, alpha=True, dtype=torch.float8_e4m3fn
        ),
        "sd-scripts, fp8 e5m2": under(
            "lora_unet_", original=True, flat=True, leaves=UP, alpha=True, dtype=torch.float8_e5m2
        ),
        "convolutions of 1 x 1": under("lora_unet_", original=True, flat=True, leaves=UP, alpha=True, ones=True),
        "OneTrainer": under("lora_transformer_", flat=True, leaves=UP, alpha=True),
        "OneTrainer, parts of fused": parts_of_fused,
        "SimpleTuner, LyCORIS": under("lycoris_", flat=True, leaves=UP, alpha=True),
    }
    for family in PLACES
}
NAMES["flux"]["XLabs"] = xlabs
ENCODERS: dict[str, dict[str, Make]] = {
    "sd3": {
        "sd-scripts": text_encoders(
            {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"}, flat=True
        ),
        "diffusers": text_encoders(
            {f"{name}.": name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")},
            flat=False,
            leaves=AB,
            alpha=False,
        ),
        "ComfyUI": text_encoders(
            {
                "text_encoders.clip_l.transformer.": "text_encoder",
                "text_encoders.clip_g.transformer.": "text_encoder_2",
                "text_encoders.t5xxl.transformer.": "text_encoder_3",
            },
            flat=False,
        ),
    },
    "flux": {
        "sd-scripts": text_encoders({"lora_te1_": "text_encoder", "lora_te3_": "text_encoder_2"}, flat=True),
        "OneTrainer": text_encoders({"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}, flat=True),
        "OneTrainer, new names": text_encoders({"clip_l.": "text_encoder", "t5.": "text_encoder_2"}, flat=False),
        "diffusers": text_encoders(
            {f"{name}.": name for name in ("text_encoder", "text_encoder_2")}, flat=False, leaves=AB, alpha=False
        ),
    },
}

# -- dialects: methods. Each on one linear, a wide one, a fused one and one whose halves are swapped.


def everywhere(method: Callable[[Maker, str, tuple[str, ...], bool], Tensor]) -> Make:
    def make(maker: Maker) -> None:
        for kind, (ours, theirs) in PLACES[maker.family].items():
            swapped = kind == "swapped"
            change = method(maker, "lora_unet_" + theirs.replace(".", "_"), ours, swapped)
            maker.expect(ours, change, swapped=swapped)

    return make


def loha(rank: int) -> Make:
    def method(maker: Maker, name: str, ours: tuple[str, ...], _: bool) -> Tensor:
        width_out, width_in = maker.weight(ours).shape
        factors = {
            "hada_w1_a": maker.randn(width_out, rank),
            "hada_w1_b": maker.randn(rank, width_in),
            "hada_w2_a": maker.randn(width_out, rank),
            "hada_w2_b": maker.randn(rank, width_in),
        }
        maker.file.tensors |= {f"{name}.{leaf}": value for leaf, value in factors.items()}
        maker.file.tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        a, b, c, d = (value.double() for value in factors.values())
        return ALPHA / rank * (a @ b) * (c @ d)

    return everywhere(method)


def lokr(*, w1: bool, w2: bool) -> Make:
    """With whole factors or with decomposed ones; alpha has a meaning where one is decomposed."""

    def method(maker: Maker, name: str, ours: tuple[str, ...], _: bool) -> Tensor:
        width_out, width_in = maker.weight(ours).shape
        sizes = {"w1": (4, 4), "w2": (width_out // 4, width_in // 4)}
        whole: dict[str, Tensor] = {}
        for factor, is_whole in (("w1", w1), ("w2", w2)):
            rows, columns = sizes[factor]
            if is_whole:
                whole[factor] = maker.randn(rows, columns)
                maker.file.tensors[f"{name}.lokr_{factor}"] = whole[factor]
            else:
                a, b = maker.randn(rows, 2), maker.randn(2, columns)
                maker.file.tensors |= {f"{name}.lokr_{factor}_a": a, f"{name}.lokr_{factor}_b": b}
                whole[factor] = a.double() @ b.double()
        maker.file.tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        scale = 1.0 if w1 and w2 else ALPHA / 2
        return scale * torch.kron(whole["w1"].double(), whole["w2"].double())

    return everywhere(method)


def dora(axis: str, *, inner: str = "LoRA") -> Make:
    """`dora_scale` of rows (out, 1) or columns (1, in) of the (fused) weight, as LyCORIS and OneTrainer train it."""

    def method(maker: Maker, name: str, ours: tuple[str, ...], swapped: bool) -> Tensor:
        weight = maker.weight(ours, swapped=swapped)
        width_out, width_in = weight.shape
        if inner == "LoRA":
            down, up = maker.randn(RANK, width_in), maker.randn(width_out, RANK)
            maker.file.tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            maker.file.tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
            changed = weight + ALPHA / RANK * up.double() @ down.double()
        else:
            w1, w2 = maker.randn(2, 2), maker.randn(width_out // 2, width_in // 2)
            maker.file.tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
            changed = weight + torch.kron(w1.double(), w2.double())
        shape, dim = ((width_out, 1), 1) if axis == "rows" else ((1, width_in), 0)
        scale = torch.rand(shape, generator=maker.generator) + 0.5
        maker.file.tensors[f"{name}.dora_scale"] = scale
        return scale.double() * changed / changed.norm(dim=dim, keepdim=True) - weight

    return everywhere(method)


def difference(maker: Maker, name: str, ours: tuple[str, ...], _: bool) -> Tensor:
    change = maker.randn(*maker.weight(ours).shape)
    maker.file.tensors[f"{name}.diff"] = change
    return change.double()


def difference_and_bias(maker: Maker, name: str, ours: tuple[str, ...], swapped: bool) -> Tensor:
    bias = maker.randn(maker.weight(ours).shape[0])
    maker.file.tensors[f"{name}.diff_b"] = bias
    maker.expect(ours, bias.double(), swapped=swapped, bias=True)
    return difference(maker, name, ours, swapped)


def bias_of_up(maker: Maker) -> None:
    """One module with `lora_B.bias`, one without; alpha scales the bias too."""
    for kind in ("linear", "wide"):
        ours, theirs = PLACES[maker.family][kind]
        maker.lora(f"diffusion_model.{theirs}", ours, leaves=AB)
        if kind == "linear":
            bias = maker.randn(maker.weight(ours).shape[0])
            maker.file.tensors[f"diffusion_model.{theirs}.lora_B.bias"] = bias
            maker.expect(ours, ALPHA / RANK * bias.double(), bias=True)


def bias_alone(maker: Maker) -> None:
    ours, theirs = PLACES[maker.family]["linear"]
    bias = maker.randn(maker.weight(ours).shape[0])
    maker.file.tensors[f"diffusion_model.{theirs}.diff_b"] = bias
    maker.expect(ours, bias.double(), bias=True)
    maker.expect(ours, torch.zeros_like(maker.weight(ours)))


def peft_dora(*, all_modules: bool) -> Make:
    def make(maker: Maker) -> None:
        for kind in ("linear", "wide", "outer"):
            ours, _ = PLACES[maker.family][kind]
            name = f"base_model.model.{ours[0]}"
            down, up = maker.lora(name, ours, leaves=AB, alpha=False)
            if all_modules or kind == "linear":
                weight = maker.weight(ours)
                magnitude = torch.rand(weight.shape[0], generator=maker.generator) + 0.5
                maker.file.tensors[f"{name}.lora_magnitude_vector"] = magnitude
                changed = weight + 4 / RANK * up.double() @ down.double()
                whole = magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)
                maker.expect(ours, whole - weight)
            else:
                maker.expect(ours, 4 / RANK * up.double() @ down.double())
        maker.file.config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "use_dora": all_modules}

    return make


def peft_config(maker: Maker) -> None:
    """alpha and rsLoRA stand in a file beside."""
    for kind in ("linear", "wide"):
        ours, _ = PLACES[maker.family][kind]
        down, up = maker.lora(f"base_model.model.{ours[0]}", ours, leaves=AB, alpha=False)
        alpha = 5.0 if kind == "wide" else 4.0
        maker.expect(ours, alpha / RANK**0.5 * up.double() @ down.double())
    wide = PLACES[maker.family]["wide"][0][0]
    maker.file.config = {"r": RANK, "lora_alpha": 4, "alpha_pattern": {wide: 5}, "use_rslora": True}


def diffusers_header(maker: Maker) -> None:
    """`lora_adapter_metadata` of diffusers, with a dropout that must not act."""
    for kind in ("linear", "wide"):
        ours, _ = PLACES[maker.family][kind]
        down, up = maker.lora(f"transformer.{ours[0]}", ours, leaves=AB, alpha=False)
        maker.expect(ours, (6.0 if kind == "linear" else 9.0) / RANK * up.double() @ down.double())
    wide = PLACES[maker.family]["wide"][0][0]
    maker.file.metadata = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 6,
        "transformer.alpha_pattern": {wide.split(".", 2)[2]: 9},
        "transformer.lora_dropout": 0.5,
        "transformer.target_modules": ["to_out.0"],
    }


def layers_that_are_zero(maker: Maker) -> None:
    """Half-trained and switched-off modules: zeros and alpha 0."""
    ours, theirs = PLACES[maker.family]["linear"]
    down, up = maker.lora(f"diffusion_model.{theirs}", ours, leaves=UP)
    maker.file.tensors[f"diffusion_model.{theirs}.alpha"] = torch.tensor(0.0)
    maker.expect(ours, 0 * (up.double() @ down.double()))
    ours, theirs = PLACES[maker.family]["wide"]
    down, up = maker.lora(f"diffusion_model.{theirs}", ours, leaves=UP)
    maker.file.tensors[f"diffusion_model.{theirs}.lora_up.weight"] = torch.zeros_like(up)
    maker.expect(ours, torch.zeros_like(maker.weight(ours)))


def conv(method: str) -> Make:
    """On the patch embedding, a convolution: LoCon, with a Tucker core, and LoHa and LoKr with theirs."""

    def make(maker: Maker) -> None:
        ours = ("pos_embed.proj",)
        rows, channels, side, _ = maker.module(ours[0]).weight.shape
        name, tensors = "lora_unet_x_embedder_proj", {}
        alpha, rank = {"alpha": torch.tensor(ALPHA)}, RANK
        core = lambda: maker.randn(rank, rank, side, side)  # noqa: E731
        if method == "LoCon":
            tensors = {"lora_down.weight": maker.randn(rank, channels, side, side)}
            tensors["lora_up.weight"] = maker.randn(rows, rank, 1, 1)
            down, up = (value.double().flatten(1) for value in tensors.values())
            change = up @ down
        elif method == "LoCon, Tucker":
            tensors = {
                "lora_down.weight": maker.randn(rank, channels, 1, 1),
                "lora_mid.weight": core(),
                "lora_up.weight": maker.randn(rows, rank, 1, 1),
            }
            down, mid, up = (value.double() for value in tensors.values())
            change = torch.einsum("mnkl,im,nj->ijkl", mid, up.flatten(1), down.flatten(1))
        elif method == "LoHa, Tucker":
            for i in "12":
                tensors |= {f"hada_t{i}": core(), f"hada_w{i}_a": maker.randn(rank, rows)}
                tensors[f"hada_w{i}_b"] = maker.randn(rank, channels)
            made = [
                torch.einsum("ijkl,jr,ip->prkl", *(tensors[f"hada_{leaf}"].double() for leaf in leaves))
                for leaves in (("t1", "w1_b", "w1_a"), ("t2", "w2_b", "w2_a"))
            ]
            change = made[0] * made[1]
        else:
            tensors = {"lokr_w1": maker.randn(2, 2), "lokr_t2": core(), "lokr_w2_a": maker.randn(rank, rows // 2)}
            tensors["lokr_w2_b"] = maker.randn(rank, channels // 2)
            w1, t2, a, b = (value.double() for value in tensors.values())
            change = torch.kron(w1[:, :, None, None], torch.einsum("ijkl,jr,ip->prkl", t2, b, a).contiguous())
        maker.file.tensors |= {f"{name}.{leaf}": value for leaf, value in (tensors | alpha).items()}
        maker.expect(ours, ALPHA / rank * change.flatten(1))

    return make


METHODS: dict[str, dict[str, Make]] = {
    family: {
        "LoHa": loha(2),
        "LoHa of high rank": loha(8),
        "LoKr, whole": lokr(w1=True, w2=True),
        "LoKr, w2 decomposed": lokr(w1=True, w2=False),
        "LoKr, w1 decomposed": lokr(w1=False, w2=True),
        "LoKr, both decomposed": lokr(w1=False, w2=False),
        "DoRA of rows": dora("rows"),
        "DoRA of columns": dora("columns"),
        "DoRA on LoKr": dora("rows", inner="LoKr"),
        "full difference": everywhere(difference),
        "full difference and bias": everywhere(difference_and_bias),
        "bias of the second factor": bias_of_up,
        "bias alone": bias_alone,
        "PEFT's DoRA": peft_dora(all_modules=True),
        "PEFT's DoRA on one module": peft_dora(all_modules=False),
        "PEFT's config": peft_config,
        "diffusers' header": diffusers_header,
        "zeros": layers_that_are_zero,
    }
    for family in PLACES
}
METHODS["sd3"] |= {name: conv(name) for name in ("LoCon", "LoCon, Tucker", "LoHa, Tucker", "LoKr, Tucker")}
