"""What every family's transformer with a layout stream shares: loading, and preparing the layout of a forward call."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdit_lora.errors import InputError
from mmdit_lora.models.layout_stream import LayoutInputs, LayoutProcessor

logger = logging.getLogger("mmdit_lora")


def take_layout(
    attention_kwargs: dict[str, Any] | None, layout: LayoutInputs | None, layout_scale: float
) -> tuple[dict[str, Any] | None, LayoutInputs | None, float]:
    """The layout and its scale, from the two arguments or from the attention kwargs, which lose them.

    Raises:
        ValueError: the layout is given in both places.
    """
    if attention_kwargs is None or not {"layout", "layout_scale"} & attention_kwargs.keys():
        return attention_kwargs, layout, layout_scale
    rest = {key: value for key, value in attention_kwargs.items() if key not in ("layout", "layout_scale")}
    riding = attention_kwargs.get("layout")
    if riding is not None and layout is not None:
        raise ValueError("the layout is given both as `layout` and in the attention kwargs; give it once")
    return rest, riding if layout is None else layout, attention_kwargs.get("layout_scale", layout_scale)


@contextmanager
def without_missing_weights_warning() -> Iterator[None]:
    """Drop diffusers' list of some 600 "newly initialized" names; the user's own verbosity stays as it is."""
    source = logging.getLogger("diffusers.models.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        # Its two neighbours, about unused and misshapen weights, are in our error message.
        return not record.getMessage().startswith("Some weights of")

    source.addFilter(keep)
    try:
        yield
    finally:
        source.removeFilter(keep)


class LayoutModelMixin(nn.Module):
    """Mixed into a diffusers transformer, in front of it. The class builds its stream in `build_layout_stream`."""

    config: Any
    layout_processor: LayoutProcessor

    if TYPE_CHECKING:  # what the diffusers class brings; nn.Module's own answer, "Tensor | Module", fits nothing

        def __getattr__(self, name: str) -> Any: ...

    def build_layout_stream(self) -> None:
        """(Re)create every module of the layout stream, freshly initialised, every gate zero."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *, layout_seed: int = 0, **kwargs: Any) -> Self:
        """diffusers' `from_pretrained` that also opens a plain base, and lets nothing pass silently.

        A base without a layout stream gets a fresh one (initialised from `layout_seed`, every gate zero, the dtype of
        the base) and that is logged once. Loading is set equality for every other name.

        Args:
            layout_seed: seeds the initialisation of a missing stream; two loads are equal.

        Raises:
            InputError: names are missing, unexpected or of another shape (they are listed), or there is no
                such folder or hub id, or a file of it is damaged.
        """
        want_info = kwargs.pop("output_loading_info", False)
        where = str(pretrained_model_name_or_path)
        try:
            with without_missing_weights_warning():
                # Missing and unexpected names are let through by diffusers and come with the info: all in one message.
                loaded = super().from_pretrained(where, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except (ValueError, OSError, SafetensorError) as error:  # another shape; no such or a damaged file
            raise InputError(f"does not hold this model: {error}", where=where) from error
        model, info = loaded
        added = {name for name, _ in model.named_parameters() if "layout" in name}
        missing = set(info["missing_keys"])
        faults: dict[str, list[str]] = {
            "missing": sorted(missing if missing & added != added else missing - added),
            "unexpected": sorted(info["unexpected_keys"]),
            "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
        }
        if any(faults.values()):
            listed = "; ".join(
                f"{len(names)} {kind}: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                for kind, names in faults.items()
                if names
            )
            raise InputError(f"does not hold this model: {listed}", where=where)
        if missing:
            model.reset_layout_stream(seed=layout_seed)
            logger.warning(
                "%s has no layout stream: a new one of %.2f M parameters was initialised (seed %d), its gates zero.",
                where,
                sum(p.numel() for n, p in model.named_parameters() if "layout" in n) / 1e6,
                layout_seed,
            )
        on_meta = [name for name, p in model.named_parameters() if p.is_meta]
        if on_meta:
            raise RuntimeError(f"weights left on the meta device: {', '.join(on_meta[:8])}")
        return (model, info) if want_info else model  # type: ignore[return-value]

    def reset_layout_stream(self, *, seed: int) -> None:
        """Give the model a fresh layout stream in its own dtype and on its own device, seeded, every gate zero."""
        anchor = next(p for n, p in self.named_parameters() if "layout" not in n)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build_layout_stream()
        for name, module in self.named_modules():
            if name.rpartition(".")[2] in ("layout_stream", "layout_processor"):
                module.to(device=anchor.device, dtype=anchor.dtype)
        self.train(self.training)

    @property
    def phrase_dim(self) -> int:
        """P, the width of a phrase embedding."""
        return self.layout_processor.phrase_mlp.fc1.in_features

    def select_layout(self, layout: LayoutInputs | None, *, batch: int, scale: float) -> LayoutInputs | None:
        """The layouts of this call's samples.

        Guidance doubles the batch for the text only, and skip-layer guidance calls once more with a single batch: a
        pipeline passes layouts for the doubled batch, and a call with half as many samples means the second half.

        Raises:
            ValueError: the layout's batch is neither `batch` nor twice `batch`, or its phrases have another width.
        """
        if layout is None or scale == 0.0:
            return None
        width = self.phrase_dim
        if layout.phrase_embeds.shape[-1] != width:
            raise ValueError(f"phrase embeddings are {layout.phrase_embeds.shape[-1]} wide, this model takes {width}")
        if len(layout) == 2 * batch:
            return layout[batch:]
        if len(layout) != batch:
            raise ValueError(
                f"{len(layout)} layouts for a batch of {batch}: give {batch}, or {2 * batch} under guidance"
            )
        return layout

    def begin_layout(
        self, layout: LayoutInputs | None, scale: float
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the blocks take: layout tokens (B, N, D), key mask (B, N) or None, residual gain (B, 1, 1)."""
        if layout is None:
            return None, None, None
        layout = layout.to(self.layout_processor.null_box.device)
        tokens = self.layout_processor(layout)
        if not self.config.mask_padding:
            return tokens, None, tokens.new_full((len(layout), 1, 1), scale)
        # Image tokens attend to one another in the layout branch too, so masking the keys is not enough for a sample
        # without a box to be the base model: its residual is zeroed as well.
        has_layout = layout.mask.any(dim=1)[:, None, None]
        return tokens, layout.mask, scale * has_layout.to(tokens.dtype)

    def fuse_qkv_projections(self) -> None:
        """Not supported: diffusers' fused processors know two streams."""
        raise NotImplementedError("fused q/k/v projections are not supported with a layout stream")
