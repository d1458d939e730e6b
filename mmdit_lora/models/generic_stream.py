"""One layout stream for every diffusers transformer: attached to the base's own blocks, which stay as they are.

    report = add_layout_stream(transformer, width=1024)
    transformer(**its_own_arguments, layout=LayoutInputs(...), layout_scale=1.0)
    save_layout_stream(transformer, "my_stream")

Each block becomes an instance of a subclass of its own class. Its `forward` lets the image tokens attend to the layout tokens,
adds what they read to the block's input through a zero-initialised `out_proj` (the *gate*), and calls the stock `forward`. So
no diffusers code is restated, stock parameter names stay, and offloading, FSDP, checkpointing and regional compilation, which
wrap `block.forward`, take the stream along. (A module hook would run outside of them: under block-level group offload its
weights are not there.)

The attention is SiamLayout's (CreatiLayout, arXiv 2412.03859): image and layout tokens in one softmax. What differs from the
stream that is built into `LayoutSD3Transformer2DModel`: its own norms, modulated by its own time embedding (bases of 2025 share
one modulation over blocks, or have none a block); positions of image tokens as the box that a token covers, in the Fourier
features that boxes have too, since most bases know positions inside their own attention only; a width of its own.

Shape letters: B batch, L image tokens, N layout tokens, D width of the base, W width of the stream, T of its time embedding.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from types import FunctionType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox, get_timestep_embedding
from torch import Tensor, nn

from mmdit_lora.models.base import LayoutModelMixin
from mmdit_lora.models.fingerprint import FINGERPRINT
from mmdit_lora.models.layout_stream import (
    FOURIER_DIM,
    FOURIER_FREQUENCIES,
    LayoutInputs,
    LayoutMLP,
    LayoutProcessor,
    within_fp16,
    zero_linear,
)
from mmdit_lora.models.stream_families import family_of_class
from mmdit_lora.models.stream_families.base import Call, StreamFamily

logger = logging.getLogger("mmdit_lora")

MAX_WIDTH = 1024  # of a stream where none is given: full width would cost 0.8 times the base and more
TIME_CHANNELS = 256
_HEAD_DIMS = (128, 64, 32, 16, 8)


@dataclass(frozen=True)
class StreamConfig:
    """How a stream is built.

    Args:
        attention: "siamese": image tokens attend to one another and to layout tokens. "cross": to layout tokens only.
        width: W. heads: attention heads. time_dim: T.
    """

    attention: str
    width: int
    heads: int
    time_dim: int


@dataclass(frozen=True)
class LayoutStreamReport:
    """What `add_layout_stream` added: the family, how the stream is built, its blocks and parameters."""

    family: str
    config: StreamConfig
    blocks: int
    parameters: int
    base_parameters: int

    def __str__(self) -> str:
        return (
            f"{self.family}: a layout stream of width {self.config.width} ({self.config.attention}) on {self.blocks} blocks, "
            f"{self.parameters / 1e6:.2f} M parameters beside the base's {self.base_parameters / 1e6:.2f} M, every gate zero"
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class StreamState:
    """Of one call. Only `tokens` change from block to block.

    Args:
        tokens: (B, N, W). key_mask: (B, N) bool, True = may be attended to. gain: (B, 1, 1), factor of the residual.
        time: (B, T). position: (L, FOURIER_DIM).
        tail: tokens from the image's first one to the end of a sequence that has the text first: L, and reference images.
        index: (B, L) places of the image tokens, or None.
        unchecked: arguments, by class of block, that the stock class forgets where it checkpoints.
    """

    tokens: Tensor
    key_mask: Tensor
    gain: Tensor
    time: Tensor
    position: Tensor
    tail: int
    index: Tensor | None
    unchecked: Mapping[type, Mapping[str, Any]]


class CallState:
    """What a model and its blocks share while one call runs, and what `with_layout` has set for calls to come.

    A plain object: dynamo guards on its attributes, and not on those of a `threading.local`. So threads take turns.
    """

    def __init__(self) -> None:
        self.stream: StreamState | None = None
        self.offered: tuple[LayoutInputs, float] | None = None  # by `with_layout`
        self.start = 1.0  # the scale that it began with
        self.rows = slice(None)  # of it
        self.alternates = False
        self.calls = 0
        self.condition: str | None = None  # of diffusers' `cache_context`
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has a state of its own, which its blocks share."""
        return CallState, ()


class GenericLayoutStream(nn.Module):
    """The layout's part of one block.

    Args:
        dim: D of the base. last: no later block reads the layout tokens; there is no `layout_mlp` then, which would never get
            a gradient.
    """

    mlp_feeds_own_gate = False  # the MLP's output is read by the next block's gate

    def __init__(self, dim: int, config: StreamConfig, *, last: bool) -> None:
        super().__init__()
        width, head_dim = config.width, config.width // config.heads
        self.heads, self.last = config.heads, last
        self.norm_image = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.time_image = zero_linear(config.time_dim, 2 * dim)
        self.image_in = nn.Linear(dim, width, bias=False) if width != dim else nn.Identity()
        self.position_in = nn.Linear(FOURIER_DIM, width, bias=False)
        self.to_q, self.norm_q = nn.Linear(width, width), nn.RMSNorm(head_dim, eps=1e-6)
        if config.attention == "siamese":
            self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width)
            self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.time_layout = zero_linear(config.time_dim, (2 if last else 6) * width)
        self.add_k_proj, self.add_v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.out_proj = zero_linear(width, dim)
        if not last:
            self.add_q_proj, self.norm_added_q = nn.Linear(width, width), nn.RMSNorm(head_dim, eps=1e-6)
            self.to_add_out = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.layout_mlp = LayoutMLP(width, 4 * width, width, act="gelu_tanh")

    def forward(self, image: Tensor, state: StreamState) -> tuple[Tensor, Tensor]:
        """(B, L, D) image tokens -> their residual (B, L, D), and the layout tokens of the next block (B, N, W)."""
        tokens, count = state.tokens, image.shape[1]
        shift, scale = self.time_image(state.time).unsqueeze(1).chunk(2, -1)
        content = self.image_in(self.norm_image(image) * (1 + scale) + shift)
        placed = content + self.position_in(state.position)
        shift, scale, *more = self.time_layout(state.time).unsqueeze(1).chunk(2 if self.last else 6, -1)
        layout = self.norm1(tokens) * (1 + scale) + shift

        query = self._heads(self.to_q(placed), self.norm_q)
        key, value = self._heads(self.add_k_proj(layout), self.norm_added_k), self._heads(self.add_v_proj(layout))
        mask = state.key_mask[:, None, None]
        if hasattr(self, "to_k"):
            key = torch.cat([self._heads(self.to_k(placed), self.norm_k), key], dim=2)
            value = torch.cat([self._heads(self.to_v(content)), value], dim=2)
            mask = F.pad(mask, (count, 0), value=True)
        if not self.last:
            query = torch.cat([query, self._heads(self.add_q_proj(layout), self.norm_added_q)], dim=2)
        out = self.attend(query, key.to(query), value.to(query), mask)
        out = out.transpose(1, 2).flatten(2)

        residual = self.out_proj(out[:, :count])
        if self.last:
            return residual, tokens
        gate, mlp_shift, mlp_scale, mlp_gate = more
        tokens = tokens + (1 + gate) * self.to_add_out(out[:, count:])
        layout = self.norm2(tokens) * (1 + mlp_scale) + mlp_shift
        return residual, within_fp16(tokens + (1 + mlp_gate) * self.layout_mlp(layout))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        """(B, heads, S, d), (B, heads, T, d) twice and (B, 1, 1, T) -> (B, heads, S, d). Image tokens come first."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        return (x if norm is None else norm(x)).transpose(1, 2)


class StreamBlock(nn.Module):
    """Mixed into a block's own class, in front of it."""

    layout_stream: GenericLayoutStream
    layout_where: str
    layout_call: CallState
    layout_argument: str  # name of the block's first argument

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self.layout_call.stream
        if state is None:
            return super().forward(*args, **kwargs)
        x = args[0] if args else kwargs[self.layout_argument]
        count = state.position.shape[0]
        if self.layout_where == "index":
            assert state.index is not None
            places = state.index.unsqueeze(-1).expand(-1, -1, x.shape[-1])
            residual, tokens = self.layout_stream(x.gather(1, places), state)
            x = x.scatter_add(1, places, (state.gain * residual).to(x.dtype))
        else:
            start = x.shape[1] - state.tail if self.layout_where == "tail" else 0
            image = x[:, start : start + count]
            residual, tokens = self.layout_stream(image, state)
            moved = image + (state.gain * residual).to(x.dtype)
            x = moved if count == x.shape[1] else torch.cat([x[:, :start], moved, x[:, start + count :]], dim=1)
        self.layout_call.stream = replace(state, tokens=tokens)
        if args:
            return super().forward(x, *args[1:], **kwargs)
        return super().forward(**{**kwargs, self.layout_argument: x})


class StreamModel(LayoutModelMixin):
    """Mixed into a transformer's own class, in front of it: what the rest of the package knows of a model with a layout."""

    stream_family: StreamFamily
    stream_config: StreamConfig
    layout_call: CallState
    layout_time: nn.Module
    _arguments: list[str]
    phrase_tokens: ClassVar[None] = None

    def forward(self, *args: Any, layout: LayoutInputs | None = None, layout_scale: float = 1.0, **kwargs: Any) -> Any:
        """As the stock class; with a layout, image tokens read it.

        Args:
            layout: of the B samples, or of B of the 2B that guidance has made; None = the stock model, bit for bit, unless
                `with_layout` offers one.
            layout_scale: factor of the residual; 0 = the stock model.

        Raises:
            ValueError: the layouts are of another number than the samples, or their phrases of another width.
        """
        shared = self.layout_call
        with shared.lock:
            if shared.offered is not None and layout is None:
                layout, layout_scale = self._offered(shared)
            if layout is None or layout_scale == 0:
                return super().forward(*args, **kwargs)
            call = dict(zip(self._arguments, args, strict=False)) | kwargs
            shared.stream = self._begin(layout, layout_scale, call)
            try:
                return super().forward(*args, **kwargs)
            finally:
                shared.stream = None

    def _offered(self, shared: CallState) -> tuple[LayoutInputs | None, float]:
        """What `with_layout` has for this call: nothing for one that has no text either."""
        assert shared.offered is not None
        shared.calls += 1
        if shared.condition == "uncond" or (shared.alternates and shared.calls % 2 == 0):
            return None, 0.0
        layout, scale = shared.offered
        return (layout if shared.rows == slice(None) else layout[shared.rows]), scale

    def _begin(self, layout: LayoutInputs, scale: float, call: Call) -> StreamState:
        family = self.stream_family
        first = next(value for value in call.values() if isinstance(value, Tensor | list))
        batch, device = len(first), (first if isinstance(first, Tensor) else first[0]).device
        layout = layout.to(device)
        if batch == 2 * len(layout) and family.guidance in ("uncond_first", "cond_first"):
            halves = [layout.dropped(), layout]
            layout = LayoutInputs.cat(halves if family.guidance == "uncond_first" else halves[::-1])
        selected = self.select_layout(layout, batch=batch, scale=scale)
        assert selected is not None
        dtype = self.layout_processor.null_box.dtype
        real = selected.mask.any(dim=1, keepdim=True)
        clock = family.time(call).to(device).float().expand(batch)
        # In fp32: 1000 and 999 are one number in bf16.
        time = get_timestep_embedding(clock, TIME_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        height, width = family.grid(self, call)
        ids = call.get("img_ids")
        return StreamState(
            tokens=self.layout_processor(selected),
            # A sample without a box attends to its null tokens, since a softmax over none is NaN, and its gain is 0.
            key_mask=selected.mask | ~real,
            gain=scale * real.unsqueeze(-1).to(dtype),
            time=self.layout_time(time.to(dtype)),
            position=token_boxes(height, width, device).to(dtype),
            tail=ids.shape[-2] if isinstance(ids, Tensor) else height * width,
            index=None if family.index is None else family.index(self, call).to(device),
            unchecked={
                type(next(self.get_submodule(name).children())): {key: call[key] for key in keys if key in call}
                for name, keys in family.unchecked.items()
            },
        )

    @contextmanager
    def with_layout(
        self, layout: LayoutInputs, scale: float = 1.0, *, alternates: bool = False
    ) -> Iterator[Callable[[float], None]]:
        """Calls inside it, such as those of a stock pipeline, see this layout; calls without text do not.

        Args:
            alternates: calls come in pairs, of which the second has no text, and are not marked by `cache_context`.

        Yields:
            A function that changes the scale.
        """
        shared = self.layout_call

        def rescale(scale: float) -> None:
            shared.offered = (layout, scale)

        with shared.lock:
            if shared.offered is not None:
                raise RuntimeError("the model is already in a `with_layout`")
            shared.offered, shared.alternates, shared.calls, shared.start = (layout, scale), alternates, 0, scale
            try:
                yield rescale
            finally:
                shared.offered, shared.alternates = None, False

    @contextmanager
    def rows_of_layout(self, rows: slice) -> Iterator[None]:
        """Calls inside it are those of one more sampling loop, for some of the samples of the layout that `with_layout` offers."""
        shared = self.layout_call
        shared.rows, shared.calls = rows, 0
        if shared.offered is not None:
            shared.offered = shared.offered[0], shared.start
        try:
            yield
        finally:
            shared.rows = slice(None)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As diffusers'. Pipelines call it to say whether a call has the text ("cond") or not ("uncond")."""
        before, self.layout_call.condition = self.layout_call.condition, name
        try:
            with super().cache_context(name, **kwargs):  # type: ignore[misc]
                yield
        finally:
            self.layout_call.condition = before

    def enable_gradient_checkpointing(
        self, gradient_checkpointing_func: Callable[..., Any] | None = None, *, every: int = 1
    ) -> None:
        """As diffusers', on every block or every `every`-th one; the layout tokens are an input and output of each block."""
        func = gradient_checkpointing_func or _checkpoint
        super().enable_gradient_checkpointing(_with_layout_tokens(func, self.layout_call, every), every=every)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers': the base, without its layout stream, which `save_layout_stream` writes."""
        logger.warning(
            "%s: the base is saved without its layout stream; save_layout_stream writes that", save_directory
        )
        with _without_stream(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    # -- what training and evaluation need of a family

    @property
    def family(self) -> str:  # type: ignore[override]
        return self.stream_family.name

    @property
    def phrase_dim(self) -> int:
        return self.stream_family.phrase_dim(self.config)

    @property
    def latent_channels(self) -> int:
        return self.stream_family.channels(self.config)

    @property
    def latent_multiple(self) -> int:
        return self.stream_family.multiple

    @property
    def max_latent_side(self) -> int | None:
        return self.stream_family.max_side(self.config)

    def text_shapes(self, tokens: int) -> dict[str, tuple[int, ...]]:
        return self.stream_family.text_shapes(self.config, tokens)

    def model_inputs(
        self, latents: Tensor, t: Tensor, texts: Mapping[str, Tensor], *, guidance: float = 1.0
    ) -> dict[str, Any]:
        return self.stream_family.inputs(self, latents, t, texts, guidance)

    def as_latents(self, sample: Any, height: int, width: int) -> Tensor:
        return self.stream_family.outputs(sample, height, width)

    def encode_latents(self, vae: Any, pixels: Tensor) -> Tensor:
        return self.stream_family.latents(vae, pixels).float()

    def build_layout_stream(self) -> None:
        family, config, call = self.stream_family, self.stream_config, self.layout_call
        dim, blocks = family.width(self.config), stream_blocks(self, family)
        self.layout_processor = LayoutProcessor(family.phrase_dim(self.config), config.width)
        self.layout_time = nn.Sequential(
            nn.Linear(TIME_CHANNELS, config.time_dim),
            nn.SiLU(),
            nn.Linear(config.time_dim, config.time_dim),
            nn.SiLU(),
        )
        for index, (block, where) in enumerate(blocks):
            block.layout_stream = GenericLayoutStream(dim, config, last=index == len(blocks) - 1)
            block.layout_where, block.layout_call = where, call
            if not isinstance(block, StreamBlock):
                block.layout_argument = list(inspect.signature(type(block).forward).parameters)[1]
                block.__class__ = _subclass(type(block), StreamBlock)

    def reset_layout_stream(self, *, seed: int, init: Any = "random") -> None:
        """Give the model a fresh stream in its own dtype and on its own device, every gate zero."""
        if init != "random":
            raise ValueError(f"a generic layout stream starts from random weights, not from {init!r}")
        anchor = next(p for n, p in self.named_parameters() if "layout" not in n and p.is_floating_point())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.build_layout_stream()
        for name, module in self.named_modules():
            if name in ("layout_processor", "layout_time") or name.endswith(".layout_stream"):
                module.to(device=anchor.device, dtype=anchor.dtype)
        self.train(self.training)


def add_layout_stream(
    transformer: nn.Module, *, attention: str = "siamese", width: int | None = None, seed: int = 0
) -> LayoutStreamReport:
    """Give a stock diffusers transformer a layout stream, every gate zero: its answers are as before until that is trained.

    Args:
        transformer: of a class that `stream_families` describes; changed in place. Before it is offloaded or compiled.
        attention: "siamese" or "cross", see `StreamConfig`.
        width: W; None = the base's, at most `MAX_WIDTH`. The LoRA of rank r has 10 W r parameters a block.
        seed: of the random weights; the caller's random numbers are not used up.

    Raises:
        ValueError: no family describes the class, it has a stream already, `width` or `attention` is none, or the model is
            offloaded or wrapped: its blocks would be called past the stream.
    """
    model: Any = transformer
    if isinstance(transformer, LayoutModelMixin):
        raise ValueError(f"this {type(transformer).__name__} has a layout stream already")
    family = family_of_class(type(transformer).__name__)
    if attention not in ("siamese", "cross"):
        raise ValueError(f"attention is {attention!r}; known: 'siamese', 'cross'")
    blocks = stream_blocks(transformer, family)
    hooks = ("forward", "_hf_hook", "_diffusers_hook")  # they have taken the forward, or the modules, of now
    if any(hook in vars(module) for module in transformer.modules() for hook in hooks):
        raise ValueError("the model is offloaded or hooked; add the layout stream first, then offload")
    width = width or min(family.width(model.config), MAX_WIDTH)
    base_parameters = sum(p.numel() for p in transformer.parameters())
    model.stream_family, model.layout_call = family, CallState()
    model.stream_config = stream_config(model.config, attention=attention, width=width)
    # `inspect` follows `__wrapped__` to the parameters of a decorated forward.
    model._arguments = list(inspect.signature(type(transformer).forward).parameters)[1:]
    repeated = {*(getattr(model, "_repeated_blocks", None) or ()), *(type(block).__name__ for block, _ in blocks)}
    model._repeated_blocks = sorted(repeated)  # SD3's is empty
    model.__class__ = _subclass(type(transformer), StreamModel)
    model.reset_layout_stream(seed=seed)
    if model.is_gradient_checkpointing:
        model.enable_gradient_checkpointing()
    added = sum(p.numel() for p in transformer.parameters()) - base_parameters
    return LayoutStreamReport(family.name, model.stream_config, len(blocks), added, base_parameters)


def remove_layout_stream(transformer: nn.Module) -> None:
    """Take the stream off: the model is of its stock class again, with its own parameters alone.

    Raises:
        ValueError: it has none that `add_layout_stream` made.
    """
    model: Any = transformer
    if not isinstance(transformer, StreamModel):
        raise ValueError(f"this {type(transformer).__name__} has no layout stream to take off")
    for block, _ in stream_blocks(transformer, transformer.stream_family):
        del block.layout_stream, block.layout_where, block.layout_call, block.layout_argument
        block.__class__ = type(block).__bases__[1]
    checkpoints = transformer.is_gradient_checkpointing
    for name in ("layout_processor", "layout_time", "stream_family", "stream_config", "layout_call", "_arguments"):
        delattr(model, name)
    model.__dict__.pop("_repeated_blocks", None)
    for name in ("gradient_checkpointing_every", FINGERPRINT):
        model.__dict__.pop(name, None)
    model.__class__ = type(model).__bases__[1]
    if checkpoints:
        model.enable_gradient_checkpointing()


def stream_config(config: Any, *, attention: str, width: int) -> StreamConfig:
    """How a stream of `width` is built on a base.

    Raises:
        ValueError: no usual size of a head divides the width.
    """
    head_dims = [size for size in (getattr(config, "attention_head_dim", None), *_HEAD_DIMS) if size]
    head_dim = next((size for size in head_dims if width % size == 0), None)
    if width < 8 or head_dim is None:
        raise ValueError(f"width is {width}; give a multiple of 64 (or at least of 8)")
    return StreamConfig(attention, width, width // head_dim, min(width, TIME_CHANNELS))


def stream_blocks(model: nn.Module, family: StreamFamily) -> list[tuple[Any, str]]:
    """The blocks that carry the stream, in the order of the forward pass, and where each has its image tokens."""
    lists = [(model.get_submodule(name), where) for name, where in family.blocks.items()]
    return [(block, where) for blocks, where in lists for block in blocks.children()]


def stream_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the layout stream by name, without LoRA."""
    return {name: p for name, p in model.named_parameters() if "layout" in name and "lora_" not in name}


def token_boxes(height: int, width: int, device: torch.device) -> Tensor:
    """(L, FOURIER_DIM) features of the box that each image token covers, row by row, as `LayoutProcessor` has those of boxes."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    boxes = torch.stack([x / width, y / height, (x + 1) / width, (y + 1) / height], dim=-1).flatten(0, 1)
    return get_fourier_embeds_from_boundingbox(FOURIER_FREQUENCIES, boxes.float()[None])[0]


def _checkpoint(block: Any, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)


def _with_layout_tokens(func: Callable[..., Any], shared: CallState, every: int) -> Callable[..., Any]:
    """A checkpointing function that hands the layout tokens to each block and takes them from it: what backward computes
    again is what was computed."""
    seen = 0

    def run(block: Any, *args: Any) -> Any:
        nonlocal seen
        seen += 1
        state = shared.stream
        more = {} if state is None else state.unchecked.get(type(block), {})
        if seen % every:
            return block(*args, **more)
        if state is None or not isinstance(block, StreamBlock):
            return func(block, *args)

        def call(tokens: Tensor, *args: Any) -> Any:
            with shared.lock:
                outside, shared.stream = shared.stream, replace(state, tokens=tokens)
                try:
                    out = block(*args, **more)
                    assert shared.stream is not None
                    return out, shared.stream.tokens
                finally:
                    shared.stream = outside

        out, tokens = func(call, state.tokens, *args)
        shared.stream = replace(state, tokens=tokens)
        return out

    return run


@contextmanager
def _without_stream(model: Any) -> Iterator[None]:
    """The model's modules without the stream's; afterwards as before."""
    taken = [(model, name, model._modules.pop(name)) for name in ("layout_processor", "layout_time")]
    for block, _ in stream_blocks(model, model.stream_family):
        taken.append((block, "layout_stream", block._modules.pop("layout_stream")))
    try:
        yield
    finally:
        for module, name, part in taken:
            module._modules[name] = part


_SUBCLASSES: dict[tuple[type, type], type] = {}


def _subclass(of: type, mixin: type) -> type:
    """`of` with `mixin` in front, under its own name: `_repeated_blocks`, `_no_split_modules` and saved configs go by it.

    Its `forward` has a code object of its own: dynamo counts recompilations by code object (limit 8), which the blocks of a
    family would share.
    """
    if (of, mixin) not in _SUBCLASSES:
        forward: Any = mixin.forward  # type: ignore[attr-defined]
        code = forward.__code__.replace(co_name=f"forward_{of.__name__}")
        own = FunctionType(code, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        if mixin is StreamModel:  # modular pipelines go by the names of its arguments
            stated: Any = inspect.signature(of.forward)  # type: ignore[attr-defined]
            layout = [p for p in inspect.signature(forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
            vars(own)["__signature__"] = stated.replace(parameters=[*stated.parameters.values(), *layout])
        body: Mapping[str, Any] = {"__module__": of.__module__, "__doc__": of.__doc__, "forward": own}
        _SUBCLASSES[of, mixin] = type(of.__name__, (mixin, of), dict(body))
    return _SUBCLASSES[of, mixin]
