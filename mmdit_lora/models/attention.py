"""The attentions that a layout stream needs beyond diffusers' own; both go through diffusers' attention dispatcher.

Shape letters: B batch, N layout tokens, L image tokens, D model width.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

RotaryEmbedding = tuple[Tensor, Tensor]  # cosines and sines, each (tokens, head_dim)


def split_heads(x: Tensor, heads: int, norm: nn.Module | None = None) -> Tensor:
    """(B, S, D) -> (B, S, heads, head_dim), each head normalised by `norm`."""
    x = x.unflatten(-1, (heads, -1))
    return x if norm is None else norm(x)


class JointAttnProcessor:
    """Joint attention of one or two token streams with an optional key mask, rotary embedding, and the queries as a by-product.

    What diffusers' `JointAttnProcessor2_0` (which knows no mask and ignores `set_attention_backend`, diffusers 0.42.1,
    models/attention_processor.py:1484) and `FluxAttnProcessor` compute, bit for bit.

    Args:
        image_first: the order in which the two streams are joined. It decides the order of a mask and of rotary positions.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, *, image_first: bool = True) -> None:
        self.image_first = image_first

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
        return_query: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """(B, L, D) and (B, N, D) -> the same shapes.

        Args:
            attention_mask: broadcasts to (B, heads, L + N, L + N), True = attend.
            return_query: answer also the queries of `hidden_states`, (B, L, heads, head_dim), normalised, without positions.
        """
        query = image_query = split_heads(attn.to_q(hidden_states), attn.heads, attn.norm_q)
        key = split_heads(attn.to_k(hidden_states), attn.heads, attn.norm_k)
        value = split_heads(attn.to_v(hidden_states), attn.heads)
        if encoder_hidden_states is not None:
            query = self._join(
                query, split_heads(attn.add_q_proj(encoder_hidden_states), attn.heads, attn.norm_added_q)
            )
            key = self._join(key, split_heads(attn.add_k_proj(encoder_hidden_states), attn.heads, attn.norm_added_k))
            value = self._join(value, split_heads(attn.add_v_proj(encoder_hidden_states), attn.heads))
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        out = self.attend(query, key, value, attention_mask)
        count = hidden_states.shape[1]
        image_out, other_out = out, None
        if encoder_hidden_states is not None:
            first = count if self.image_first else out.shape[1] - count
            parts = out.split((first, out.shape[1] - first), dim=1)
            image_out, other_out = parts if self.image_first else parts[::-1]
        if not getattr(attn, "pre_only", False):
            image_out = attn.to_out[1](attn.to_out[0](image_out.contiguous()))
        if other_out is not None and not attn.context_pre_only:
            other_out = attn.to_add_out(other_out.contiguous())
        outputs: tuple[Tensor, ...] = (image_out,) if other_out is None else (image_out, other_out)
        outputs += (image_query,) if return_query else ()
        return outputs if len(outputs) > 1 else image_out

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """(B, S, heads, head_dim) queries over (B, T, heads, head_dim) keys -> (B, S, D)."""
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return out.flatten(2).to(query.dtype)

    def _join(self, image: Tensor, other: Tensor) -> Tensor:
        return torch.cat([image, other] if self.image_first else [other, image], dim=1)


class LayoutCrossAttention(AttentionModuleMixin, nn.Module):
    """Image tokens read the layout tokens, with queries that the block's own attention made already; layout tokens read
    one another, through the same keys and values.

    Module names are those that the layout side has in a joint attention.

    Args:
        last: no layout token is read any more after this block, so that only keys and values are made.
    """

    processor: Any
    norm_added_q: nn.Module | None
    to_add_out: nn.Linear
    add_q_proj: nn.Linear
    _default_processor_cls: ClassVar[type] = JointAttnProcessor
    _available_processors: ClassVar[list[type]] = [JointAttnProcessor]

    def __init__(self, *, dim: int, num_heads: int, head_dim: int, qk_norm: str | None, last: bool) -> None:
        super().__init__()
        self.heads, inner = num_heads, num_heads * head_dim
        self.add_k_proj = nn.Linear(dim, inner)
        self.add_v_proj = nn.Linear(dim, inner)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.last = last
        if not last:
            self.add_q_proj = nn.Linear(dim, inner)
            self.norm_added_q = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else None
            self.to_add_out = nn.Linear(inner, dim)
        self.processor = JointAttnProcessor()

    def forward(
        self, layout_states: Tensor, image_query: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) layout tokens and (B, L, heads, head_dim) queries -> (B, L, D), and (B, N, D) or None in a last block.

        Args:
            key_mask: (B, N) bool, True = a token that may be attended to, at least one in each sample; None = all.
        """
        mask = None if key_mask is None else key_mask[:, None, None, :]
        key = split_heads(self.add_k_proj(layout_states), self.heads, self.norm_added_k)
        value = split_heads(self.add_v_proj(layout_states), self.heads)
        image_out = self.processor.attend(image_query.to(key.dtype), key, value, mask)
        if self.last:
            return image_out, None
        query = split_heads(self.add_q_proj(layout_states), self.heads, self.norm_added_q)
        return image_out, self.to_add_out(self.processor.attend(query, key, value, mask))
