"""The weight updates of an adapter, module by module, as PEFT applies them to its base."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from mmdit_lora.analysis.spectrum import Directions, frobenius, of_product, top
from mmdit_lora.errors import InputError
from mmdit_lora.hub import pipeline_index
from mmdit_lora.lora import load_adapter
from mmdit_lora.lora.known_bases import base_of, stream_of
from mmdit_lora.pipelines import LayoutPipeline, load_pipeline

ADAPTER = "default"


@dataclass(frozen=True)
class Update:
    """What an adapter does to one linear: W' = W + scale * up @ down; with DoRA the rows of that are rescaled to `magnitude`
    (arXiv 2402.09353, equation 5).

    Args:
        name: of the module.
        weight: W, (m, n), not quantised.
        up, down: B (m, r) and A (r, n), as stored.
        scale: alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (arXiv 2312.03732), by the patterns of the config.
        magnitude: (m,) of DoRA.
        bias: whether it also adds to the bias (`lora_bias`), which is no part of W.
    """

    name: str
    weight: Tensor
    up: Tensor
    down: Tensor
    scale: float
    magnitude: Tensor | None = None
    bias: bool = False

    @property
    def rank(self) -> int:
        """r, as stored."""
        return self.down.shape[0]

    def low_rank(self) -> Directions:
        """SVD of scale * B A: the update itself, or with DoRA the part of it that has a rank. r values."""
        return of_product(self.scale * self.up.double(), self.down)

    def change(self) -> Tensor | None:
        """W' - W, (m, n) in fp64, of DoRA, where it has no low rank; None of a plain update."""
        if self.magnitude is None:
            return None
        weight = self.weight.double()
        moved = weight + self.scale * (self.up.double() @ self.down.double())
        return (self.magnitude.double() / torch.linalg.vector_norm(moved, dim=1))[:, None] * moved - weight

    def directions(self) -> tuple[float, Directions]:
        """||W' - W||_F, and its r largest singular values with their directions."""
        change = self.change()
        if change is not None:
            return frobenius(change), top(change, self.rank)
        low = self.low_rank()
        return frobenius(low.values), low

    def difference(self, other: Update) -> float:
        """||dW - dW_other||_F of two updates of the same linear."""
        ours, theirs = self.change(), other.change()
        if ours is not None and theirs is not None:
            return frobenius(ours - theirs)
        up = torch.cat([self.scale * self.up.double(), -other.scale * other.up.double()], dim=1)
        return frobenius(of_product(up, torch.cat([self.down.double(), other.down.double()])).values)


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter on its base.

    Args:
        pipe: with the adapter on its transformer, as `ADAPTER`, in evaluation mode.
        header: the adapter's own metadata; empty of one that another tool wrote.
    """

    folder: Path
    base: str
    pipe: LayoutPipeline
    config: peft.LoraConfig
    header: dict[str, Any]

    def updates(self) -> Iterator[Update]:
        """In the model's order."""
        return updates(self.pipe.transformer)


def open_adapter(
    adapter: str | Path,
    *,
    base: str | None = None,
    stream: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    to_sample: bool = False,
) -> OpenedAdapter:
    """Put an adapter on its base, strictly.

    Args:
        base: folder or hub id; None = the one that the adapter names.
        stream: folder of a generic layout stream; None = the one that the adapter names, if any.
        dtype: of the base's weights.
        to_sample: with the VAE and the text encoders; else the transformer alone.

    Raises:
        InputError: it is no adapter, is damaged, names no base, or is of another base; or the base is none.
    """
    base, stream = base or base_of(adapter), stream or stream_of(adapter)
    components: dict[str, None] = {}
    if not to_sample:
        with suppress(OSError, ValueError):  # opening it says what is wrong
            index = pipeline_index(base)
            needless = ("vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor")
            components = dict.fromkeys(name for name in index if name.startswith(needless))
    pipe = load_pipeline(base, dtype=dtype, components=components, stream=stream)
    stored = load_adapter(pipe.transformer, adapter)
    pipe.transformer.eval()
    return OpenedAdapter(Path(adapter), base, pipe, stored.config, stored.header)


def updates(model: nn.Module, adapter_name: str = ADAPTER) -> Iterator[Update]:
    """The updates of an adapter of `model`, as PEFT would apply them.

    Raises:
        InputError: it is a variant of LoRA that is neither plain nor DoRA.
    """
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter_name not in module.scaling:
            continue
        dora = bool(module.use_dora.get(adapter_name))
        variant = getattr(module, "lora_variant", {}).get(adapter_name)
        if variant is not None and not dora:
            raise InputError(f"{name} is a {type(variant).__name__}; known are LoRA, rank-stabilised LoRA and DoRA")
        layer: Any = module
        up = layer.lora_B[adapter_name]
        yield Update(
            name,
            weight=cast(Tensor, dequantize_module_weight(layer.get_base_layer())).detach(),
            up=up.weight.detach(),
            down=layer.lora_A[adapter_name].weight.detach(),
            scale=float(layer.scaling[adapter_name]),
            magnitude=layer.lora_magnitude_vector[adapter_name].weight.detach() if dora else None,
            bias=getattr(up, "bias", None) is not None,
        )
