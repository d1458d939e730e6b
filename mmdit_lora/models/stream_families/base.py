"""What a family says of itself so that the generic layout stream, training and sampling can serve it.

A family is one file of at most 60 lines beside this one: it describes stock diffusers classes and restates none of their code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from mmdit_lora.models.latents import scaled_latents, unpack

Call = Mapping[str, Any]  # the arguments of one call of the transformer's `forward`, by name
Where = Literal["all", "head", "tail", "index"]


def inner_dim(config: Any) -> int:
    """heads x head_dim, as most diffusers transformers state their width."""
    return int(config.num_attention_heads * config.attention_head_dim)


def grid_of_ids(ids: Tensor) -> tuple[int, int]:
    """(height, width) in tokens of the image whose position ids (L, A) or (B, L, A) come first; columns 1 and 2 are its rows
    and columns. Reference images follow it, told apart by another first coordinate.
    """
    ids = ids[0] if ids.ndim == 3 else ids
    ids = ids[ids[:, 0] == ids[0, 0]]
    height, width = (ids[:, 1:3].amax(0) - ids[:, 1:3].amin(0) + 1).long().tolist()
    return height, width


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(n, S, E) text states and (n, S) mask -> (n, E): the mean of the tokens that are there."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


def chat_phrases(
    captions: Callable[[Any, Sequence[str], int], dict[str, Tensor]], max_length: int = 64
) -> Callable[[Any, Sequence[str]], Tensor]:
    """Phrases as the mean state of the tokens that the pipeline's chat template makes of each."""

    def phrases(pipe: Any, texts: Sequence[str]) -> Tensor:
        template = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        chats = [pipe.tokenizer.apply_chat_template([{"role": "user", "content": text}], **template) for text in texts]
        padding = {"padding": "max_length", "truncation": True, "max_length": max_length, "return_tensors": "pt"}
        states = captions(pipe, texts, max_length)["embeds"]
        return masked_mean(states, pipe.tokenizer(chats, **padding).attention_mask.to(states.device))

    return phrases


def beyond_one(scale: float, count: int) -> dict[str, Any]:  # noqa: ARG001
    """Of pipelines that add scale x (cond - uncond) to cond: theirs is ours - 1."""
    return {"guidance_scale": max(scale - 1, 0)}


def true_cfg(scale: float, count: int) -> dict[str, Any]:
    """Qwen's pipelines guide where there is a negative prompt, one a prompt; the published one is a space."""
    return {"true_cfg_scale": scale} | ({"negative_prompt": [" "] * count} if scale > 1 else {})


@dataclass(frozen=True)
class StreamFamily:
    """A family of transformers of diffusers.

    Shapes: B samples, L image tokens, S text tokens, E width of text states, C latent channels, h x w latents.

    What has a default is as in most families: 2 x 2 cells of the latents a token, `img_ids`, a `timestep` of 0..1.

    Args:
        name: as adapters, streams and `plan --family` name it.
        transformer: the diffusers class. pipelines: the diffusers pipelines that call it, text to image first.
        blocks: name of a ModuleList -> where the first argument of its blocks (and their output) holds the image tokens of
            the image that is generated: "all" of it, its "head", its "tail" (behind the text; reference images follow), or at
            the `index`.
        width: D, the width of the image tokens, from the transformer's config. phrase_dim: E of a phrase.
        grid: rows and columns of image tokens, from model and call. time: (B,), a clock of about 0..1000.
        index: (B, L) places of the image tokens, for "index".
        unchecked: name of a ModuleList -> arguments of `forward` that the stock class gives its blocks, and forgets where it
            checkpoints them.
        guidance: how pipelines guide: "calls" (two calls, marked by `cache_context`), "alternate" (two calls, not marked,
            the guided one first), a doubled batch ("uncond_first", "cond_first"), or "single" (one call, also where another
            transformer is called without text).
        guide: (guidance scale, number of prompts) -> arguments of a pipeline's call that guide so.
        latents: pixels -> x0, by the VAE, normalised as the transformer takes them.
        channels, multiple: of x0: C, and what h and w are multiples of.
        inputs: (model, x_t, t in [0, 1], texts, guidance) -> arguments of `forward`. outputs: (its answer, h, w) -> velocity.
        captions: (pipe, texts, max_length) -> texts of the transformer by name, each (n, ...): "embeds" (n, S, E), where the
            base masks them "mask" (n, S), where it has one "pooled" (n, P).
        pooled_dim: P; None = there is no pooled embedding.
        masked: `inputs` needs the "mask" of captions; else captions without one have all their tokens.
        ragged: captions are as long as the longest of those that are encoded together.
        phrases: (pipe, phrases) -> (n, E).
        text_dim: E of a caption's tokens, or (layers, E); None = as of phrases.
        vae_scale_factor: pixels a latent cell covers, along a side, in the published checkpoints.
        presets: name of a published checkpoint -> the transformer's arguments.
    """

    name: str
    transformer: str
    pipelines: tuple[str, ...]
    blocks: Mapping[str, Where]
    inputs: Callable[[Any, Tensor, Tensor, Mapping[str, Tensor], float], dict[str, Any]]
    captions: Callable[[Any, Sequence[str], int], dict[str, Tensor]]
    phrases: Callable[[Any, Sequence[str]], Tensor]
    width: Callable[[Any], int] = inner_dim
    phrase_dim: Callable[[Any], int] = lambda config: config.joint_attention_dim
    grid: Callable[[Any, Call], tuple[int, int]] = lambda model, call: grid_of_ids(call["img_ids"])  # noqa: ARG005
    time: Callable[[Call], Tensor] = lambda call: 1000 * call["timestep"]
    outputs: Callable[[Any, int, int], Tensor] = unpack
    guidance: Literal["calls", "alternate", "uncond_first", "cond_first", "single"] = "calls"
    guide: Callable[[float, int], dict[str, Any]] = lambda scale, count: {"guidance_scale": scale}  # noqa: ARG005
    index: Callable[[Any, Call], Tensor] | None = None
    unchecked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pooled_dim: Callable[[Any], int] | None = None
    masked: bool = False
    ragged: bool = False
    latents: Callable[[Any, Tensor], Tensor] = scaled_latents
    channels: Callable[[Any], int] = lambda config: config.in_channels // 4
    multiple: int = 2
    max_side: Callable[[Any], int | None] = lambda config: None  # noqa: ARG005
    max_length: int = 512
    vae_scale_factor: int = 8
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text_dim: Callable[[Any], int | tuple[int, ...]] | None = None

    def text_shapes(self, config: Any, tokens: int) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of encoded captions of `tokens` text tokens."""
        width = self.phrase_dim(config) if self.text_dim is None else self.text_dim(config)
        shapes: dict[str, tuple[int, ...]] = {"embeds": (tokens, *(width if isinstance(width, tuple) else (width,)))}
        shapes |= {} if self.pooled_dim is None else {"pooled": (self.pooled_dim(config),)}
        return shapes | ({"mask": (tokens,)} if self.masked else {})
