"""What every family's transformer with a layout stream shares: loading, and preparing the layout of a forward call."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdit_lora.errors import InputError, counted
from mmdit_lora.files import exists, nearest, output_path, written_as_path
from mmdit_lora.hub import no_such_base
from mmdit_lora.models.adapter_layers import AdapterMethods, adapter_layers, warn_of_adapters, without_adapters
from mmdit_lora.models.init import STREAM_INITS, StreamInit, copy_from_block
from mmdit_lora.models.latents import scaled_latents
from mmdit_lora.models.layout_stream import ChunkedFeedForward, LayoutInputs, LayoutProcessor
from mmdit_lora.models.weight_files import (
    check_sizes,
    opened_from,
    refuse_pickle,
    refuse_pickled_weights,
    strip_local_paths,
)
from mmdit_lora.resources import here_or_packaged

logger = logging.getLogger("mmdit_lora")


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


def stock_arguments(stock: type, given: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Of the arguments `given` to a class of ours (its `locals()`), those that the diffusers class `stock` takes, with `changes`.

    Raises:
        ValueError: a `layout_attention` that `LayoutStream` does not know.
    """
    if given.get("layout_attention", "siamese") not in ("siamese", "cross"):
        raise ValueError(f"layout_attention is {given['layout_attention']!r}; known: 'siamese', 'cross'")
    known = inspect.signature(stock).parameters
    return {key: value for key, value in given.items() if key in known} | changes


def open_strictly(
    load: Callable[..., Any],
    reader: Any,
    location: str,
    *,
    may_miss: Callable[[Any], list[str]] = lambda model: [],  # noqa: ARG005
    **kwargs: Any,
) -> tuple[Any, dict[str, Any]]:
    """A model by diffusers' `from_pretrained`, from safetensors only, with exactly the weights of its config.

    Args:
        load: the `from_pretrained`. reader: the class, for `load_config`. location: a folder or hub id.
        may_miss: names of which the stored weights have all or none.

    Returns:
        The model and diffusers' loading info.

    Raises:
        InputError: names are missing, unexpected or of another shape (they are listed), or there is no such folder or hub id,
            or a file of it is damaged or a pickle.
    """
    refuse_pickle(kwargs.get("use_safetensors", True) is not False, location)
    kwargs["use_safetensors"] = True
    if not exists(location) and written_as_path(location):
        raise no_such_base(location)
    if exists(location):
        refuse_pickled_weights(Path(location, kwargs.get("subfolder") or ""))
    places = ("subfolder", "revision", "cache_dir", "local_files_only", "token")
    try:
        stored = reader.load_config(location, **{key: kwargs[key] for key in places if key in kwargs})
        check_sizes(stored, location=location)
        with without_missing_weights_warning():
            # Missing and unexpected names are let through by diffusers and come with the info: all in one message.
            model, info = load(location, output_loading_info=True, **kwargs)
    except InputError:
        raise
    except (ValueError, OSError, SafetensorError) as error:  # another shape; no such or a damaged file
        if isinstance(error, OSError) and not exists(location) and nearest(location) is not None:
            raise no_such_base(location) from error
        raise InputError(f"does not hold this model: {error}", location=location) from error
    added, missing = set(may_miss(model)), set(info["missing_keys"])
    faults: dict[str, list[str]] = {
        "missing": sorted(missing if missing & added != added else missing - added),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    if any(faults.values()):
        raise InputError(f"does not hold this model: {counted(faults)}", location=location)
    return model, info


def log_new_stream(location: str, model: nn.Module, how: str) -> None:
    """One warning that a base had no layout stream, and how a new one was initialised."""
    size = sum(p.numel() for n, p in model.named_parameters() if "layout" in n) / 1e6
    logger.warning(
        "%s has no layout stream: a new one of %.2f M parameters was initialised (%s), its gates zero.",
        location,
        size,
        how,
    )


class LayoutModelMixin(AdapterMethods):
    """Mixed into a diffusers transformer, in front of it. The class builds its stream in `build_layout_stream`."""

    config: Any
    layout_processor: LayoutProcessor
    family: ClassVar[str]  # its key in `families.FAMILIES`
    gradient_checkpointing_every: int = 1
    opened_from: Path | None = None  # its folder, `subfolder` included

    def build_layout_stream(self) -> None:
        """(Re)create every module of the layout stream, freshly initialised, every gate zero."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        layout_seed: int = 0,
        layout_init: StreamInit = "copy_text",
        **kwargs: Any,
    ) -> Self:
        """diffusers' `from_pretrained` that also opens a plain base, and lets nothing pass silently.

        A base without a layout stream gets a fresh one (every gate zero, the dtype of the base) and that is logged once.
        Loading is set equality for every other name. Config keys, such as `layout_attention`, may be given too.

        Args:
            layout_seed: seeds what is random in a missing stream; two loads are equal.
            layout_init: what a missing stream starts from: copies of the text or image stream, or random weights.

        Raises:
            InputError: names are missing, unexpected or of another shape (they are listed), or there is no
                such folder or hub id, or a file of it is damaged.
        """
        want_info = kwargs.pop("output_loading_info", False)
        reader: Any = cls
        loader: Any = super().from_pretrained  # type: ignore[misc]
        location = here_or_packaged(pretrained_model_name_or_path)
        model, info = open_strictly(
            loader,
            reader,
            location,
            may_miss=lambda model: [n for n, _ in model.named_parameters() if "layout" in n],
            **kwargs,
        )
        if info["missing_keys"]:
            model.reset_layout_stream(seed=layout_seed, init=layout_init)
            log_new_stream(location, model, f"{layout_init}, seed {layout_seed}")
        on_meta = [name for name, p in model.named_parameters() if p.is_meta]
        if on_meta:
            raise RuntimeError(f"weights left on the meta device: {', '.join(on_meta[:8])}")
        model.opened_from = opened_from(location, kwargs.get("subfolder"))
        result: Any = (model, info) if want_info else model
        return result

    def reset_layout_stream(self, *, seed: int, init: StreamInit = "copy_text") -> None:
        """Give the model a fresh layout stream in its own dtype and on its own device, every gate zero.

        Args:
            seed: of what is random in it; the caller's random numbers are not used up.
            init: see `from_pretrained`. The layout processor is random in any case: the base has nothing like it.
        """
        if init not in STREAM_INITS:
            raise ValueError(f"layout_init is {init!r}; known: {', '.join(STREAM_INITS)}")
        anchor = next(p for n, p in self.named_parameters() if "layout" not in n and p.is_floating_point())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build_layout_stream()
        self.layout_processor.to(device=anchor.device, dtype=anchor.dtype)
        for block in self.layout_blocks():
            block.layout_stream.to(device=anchor.device, dtype=anchor.dtype)
            copy_from_block(block.layout_stream, block, init)
        self.train(self.training)

    def layout_blocks(self) -> list[Any]:
        """The blocks that have a layout stream, in the order of the forward pass."""
        return [module for module in self.modules() if hasattr(module, "layout_stream")]

    @property
    def phrase_dim(self) -> int:
        """P, the width of a phrase embedding."""
        config = self.config
        return config.phrase_dim or (config.joint_attention_dim if self.phrase_tokens else config.pooled_projection_dim)

    @property
    def phrase_tokens(self) -> int | None:
        """K, the text tokens that stand for a phrase, (B, N, K, P); None = one pooled embedding, (B, N, P)."""
        return getattr(self.config, "phrase_tokens", None)

    @property
    def layout_slots(self) -> int | None:
        """Boxes that every layout is padded to; None = as many as a batch needs."""
        return getattr(self.config, "layout_slots", None)

    # -- what trainer, evaluation and export need of a family: from latents to `forward` and back

    @property
    def latent_channels(self) -> int:
        """C of the VAE's latents."""
        raise NotImplementedError

    def encode_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w): the posterior's mode, normalised as the transformer takes it."""
        return scaled_latents(vae, pixels)

    @property
    def latent_multiple(self) -> int:
        """Sides of the latents must be multiples of this."""
        raise NotImplementedError

    @property
    def max_latent_side(self) -> int | None:
        """Largest side of the latents that there are position embeddings for; None = any."""
        return None

    def check_side(self, side: int, vae_scale_factor: int) -> None:
        """Whether images of `side` pixels fit, where a latent cell covers `vae_scale_factor` of them.

        Raises:
            InputError: no multiple of what an image token covers, or more than there are position embeddings for.
        """
        multiple = vae_scale_factor * self.latent_multiple
        largest = None if self.max_latent_side is None else self.max_latent_side * vae_scale_factor
        if side < multiple or side % multiple or (largest is not None and side > largest):
            nearest = max(side // multiple, 1) * multiple
            limit = "" if largest is None else f" to {largest}"
            raise InputError(
                f"is {side} pixels; this base takes multiples of {multiple} from {multiple}{limit}",
                location="the size",
                hint=f"give {nearest if largest is None else min(nearest, largest)}, or leave it out",
            )

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of the encoded captions that `model_inputs` takes, of `tokens` text tokens."""
        return {"embeds": (tokens, self.config.joint_attention_dim), "pooled": (self.config.pooled_projection_dim,)}

    def model_inputs(
        self, latents: Tensor, t: Tensor, texts: Mapping[str, Tensor], *, guidance: float = 1.0
    ) -> dict[str, Any]:
        """Keyword arguments of `forward`, all but the layout.

        Args:
            latents: (B, C, h, w) noisy latents.
            t: (B,) in [0, 1], 1 = noise.
            texts: encoded captions by name: "embeds" (B, S, E), and "pooled" (B, P) or "mask" (B, S) where the base has one.
            guidance: the embedded guidance of a guidance-distilled base; others have no such input.
        """
        raise NotImplementedError

    def as_latents(self, sample: Tensor, height: int, width: int) -> Tensor:
        """`forward`'s answer as (B, C, height, width), the sides those of the latents."""
        raise NotImplementedError

    def select_layout(self, layout: LayoutInputs | None, *, batch: int, scale: float) -> LayoutInputs | None:
        """The layouts of this call's samples.

        Guidance doubles the batch for the text only, and skip-layer guidance calls once more with a single batch: a
        pipeline passes layouts for the doubled batch, and a call with half as many samples means the second half.

        Raises:
            ValueError: the layout's batch is neither `batch` nor twice `batch`, or its phrases have another width.
        """
        if layout is None or scale == 0.0:
            return None
        wanted = (self.phrase_dim,) if self.phrase_tokens is None else (self.phrase_tokens, self.phrase_dim)
        given = tuple(layout.phrase_embeds.shape[2:])
        if given != wanted:
            raise ValueError(f"a phrase is {_times(given)} wide, this model takes {_times(wanted)}")
        if len(layout) == 2 * batch:
            return layout[batch:]
        if len(layout) != batch:
            raise ValueError(
                f"{len(layout)} layouts for a batch of {batch}: give {batch}, or {2 * batch} under guidance"
            )
        return layout

    def start_layout(
        self, attention_kwargs: dict[str, Any] | None, layout: LayoutInputs | None, scale: float, hidden_states: Tensor
    ) -> tuple[dict[str, Any] | None, Tensor | None, Tensor | None, Tensor | None]:
        """The attention kwargs without the layout that may ride in them, and what `begin_layout` makes of this call's layouts.

        Args:
            attention_kwargs: with "layout" and "layout_scale", or without. hidden_states: of the call, for batch and device.

        Raises:
            ValueError: the layout is given in both places. See also `select_layout`.
        """
        if attention_kwargs and {"layout", "layout_scale"} & attention_kwargs.keys():
            attention_kwargs = dict(attention_kwargs)
            riding, scale = attention_kwargs.pop("layout", None), attention_kwargs.pop("layout_scale", scale)
            if riding is not None and layout is not None:
                raise ValueError("the layout is given both as `layout` and in the attention kwargs; give it once")
            layout = riding if layout is None else layout
        layout = self.select_layout(layout, batch=hidden_states.shape[0], scale=scale)
        return attention_kwargs, *self.begin_layout(layout, scale, hidden_states.device)

    def begin_layout(
        self, layout: LayoutInputs | None, scale: float, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the blocks take: layout tokens (B, N, D), key mask (B, N) or None, residual gain (B, 1, 1).

        N counts tokens: the slots, or K times as many where a phrase is K text tokens.

        Args:
            device: of the image tokens. Where weights lie says nothing: offloading keeps them elsewhere, or on meta.
        """
        if layout is None:
            return None, None, None
        anchor = self.layout_processor.null_box
        layout = layout.to(device)
        phrase_states = None
        if self.phrase_tokens is not None:
            # The base's own projection of text tokens, frozen with it, as in CreatiLayout.
            phrase_states = self.context_embedder(layout.phrase_embeds.to(anchor.dtype))
        tokens = self.layout_processor(layout, phrase_states)
        if not self.config.mask_padding:
            return tokens, None, tokens.new_full((len(layout), 1, 1), scale)
        # Image tokens attend to one another in the siamese branch too, so masking the keys is not enough for a sample
        # without a box to be the base model: its residual is zeroed as well. Its keys are let through: in the cross branch
        # a softmax over none would be NaN, which times zero is NaN.
        has_layout = layout.mask.any(dim=1, keepdim=True)
        key_mask = (layout.mask | ~has_layout).repeat_interleave(self.phrase_tokens or 1, dim=1)
        return tokens, key_mask, scale * has_layout.unsqueeze(-1).to(tokens.dtype)

    def save_pretrained(self, save_directory: Any, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """As diffusers'. Adapters that are on the model are left out, with one warning: what is saved is the base.

        Raises:
            InputError: `safe_serialization` is False, which would write a pickle; or `save_directory` is no folder.
        """
        refuse_pickle(safe_serialization, str(save_directory))
        output_path(save_directory, folder=True)
        if adapter_layers(self):
            warn_of_adapters(str(save_directory), self)
        with without_adapters(self):
            super().save_pretrained(save_directory, *args, safe_serialization=True, **kwargs)  # type: ignore[misc]
        strip_local_paths(save_directory)

    # -- switches that save memory or time and change no result

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None, *, every: int = 1
    ) -> None:
        """diffusers' gradient checkpointing, on every block or on every `every`-th one (less recomputing, more memory)."""
        if every < 1:
            raise ValueError(f"every is {every}; give 1 (all blocks) or more")
        super().enable_gradient_checkpointing(gradient_checkpointing_func)  # type: ignore[misc]
        self.gradient_checkpointing_every = every

    def run_block(self, index: int, block: nn.Module, *inputs: Any) -> Any:
        """Call the `index`-th block, checkpointed where that is on. Positional: so the checkpointing function hands on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing and index % self.gradient_checkpointing_every == 0:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Run the MLPs in chunks of `chunk_size` (default 1) along `dim`, 0 = batch, 1 = tokens."""
        if dim not in (0, 1):
            raise ValueError(f"dim is {dim}; give 0 (batch) or 1 (tokens)")
        self._set_chunks(chunk_size or 1, dim)

    def disable_forward_chunking(self) -> None:
        """Run the MLPs whole again."""
        self._set_chunks(None, 0)

    def _set_chunks(self, chunk_size: int | None, dim: int) -> None:
        for module in self.modules():
            if isinstance(module, ChunkedFeedForward):
                module.set_chunk_feed_forward(chunk_size, dim)

    def enable_cache(self, config: Any) -> None:
        """Not supported: diffusers' caches (FirstBlockCache and others) know two streams.

        Seen in 0.42.1: FirstBlockCache fails at the first step that it skips, "not enough values to unpack (expected 3,
        got 2)".
        """
        raise NotImplementedError(
            f"{type(config).__name__} is not supported with a layout stream: it restores two streams where there are three"
        )

    def fuse_qkv_projections(self) -> None:
        """Not supported: diffusers' fused processors know two streams."""
        raise NotImplementedError("fused q/k/v projections are not supported with a layout stream")


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))
