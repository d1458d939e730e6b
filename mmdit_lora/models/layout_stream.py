"""The layout stream: all that is added to a base MM-DiT. Nothing in this file knows a model family.

Numerically the SiamLayout stream of CreatiLayout (arXiv 2412.03859; HuiZhang0812/CreatiLayout at 860d8bd,
src/models/attention_sd3_SiamLayout.py), plus a key mask for padding boxes, which it lacks.

Shape letters: B batch, N layout slots, L image tokens, D model width, P phrase width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn

FOURIER_FREQUENCIES = 8
FOURIER_DIM = FOURIER_FREQUENCIES * 2 * 4  # sine and cosine of four coordinates


@dataclass(frozen=True)
class LayoutInputs:
    """A batch of layouts as the model takes it.

    Args:
        boxes: (B, N, 4) float, xyxy in [0, 1]. Padding slots hold anything finite.
        phrase_embeds: (B, N, P) float, one pooled text embedding a box.
        mask: (B, N) bool, True = a real box.

    Raises:
        ValueError: the three do not agree in B and N, or `mask` is not bool.
    """

    boxes: Tensor
    phrase_embeds: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        batch_slots = tuple(self.mask.shape)
        if self.mask.ndim != 2 or self.mask.dtype is not torch.bool:
            raise ValueError(f"mask must be (B, N) bool, is {batch_slots} {self.mask.dtype}")
        if tuple(self.boxes.shape) != (*batch_slots, 4):
            raise ValueError(
                f"boxes must be {(*batch_slots, 4)} for a mask of {batch_slots}, is {tuple(self.boxes.shape)}"
            )
        if self.phrase_embeds.ndim != 3 or tuple(self.phrase_embeds.shape[:2]) != batch_slots:
            raise ValueError(
                f"phrase_embeds must be {(*batch_slots, 'P')} for that mask, is {tuple(self.phrase_embeds.shape)}"
            )

    def __len__(self) -> int:
        return self.mask.shape[0]

    def __getitem__(self, index: slice | Tensor) -> LayoutInputs:
        """The samples at `index` (a slice or an index tensor over the batch)."""
        return LayoutInputs(self.boxes[index], self.phrase_embeds[index], self.mask[index])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayoutInputs:
        """Moved to `device`; phrase embeddings cast to `dtype`. Boxes stay fp32: bf16 holds 507 of 1001 coordinates."""
        return LayoutInputs(
            self.boxes.to(device=device, dtype=torch.float32),
            self.phrase_embeds.to(device=device, dtype=dtype),
            self.mask.to(device=device),
        )

    def dropped(self) -> LayoutInputs:
        """The same layouts with every box masked: "no layout" in a form that keeps the graph and DDP alive."""
        return LayoutInputs(self.boxes, self.phrase_embeds, torch.zeros_like(self.mask))

    def repeat_interleave(self, repeats: int) -> LayoutInputs:
        """Each sample `repeats` times in a row, as diffusers repeats prompts for several images a prompt."""
        return LayoutInputs(
            self.boxes.repeat_interleave(repeats, dim=0),
            self.phrase_embeds.repeat_interleave(repeats, dim=0),
            self.mask.repeat_interleave(repeats, dim=0),
        )

    @staticmethod
    def cat(parts: Sequence[LayoutInputs]) -> LayoutInputs:
        """Joined along the batch; all parts must have the same number of slots."""
        return LayoutInputs(
            torch.cat([p.boxes for p in parts]),
            torch.cat([p.phrase_embeds for p in parts]),
            torch.cat([p.mask for p in parts]),
        )


class LayoutMLP(nn.Module):
    """Two linears with an activation between, `fc1 -> act -> fc2`: the modules that the LoRA adapts.

    Args:
        act: "silu" in the layout processor, "gelu_tanh" in the blocks, as in the reference.
    """

    def __init__(self, dim_in: int, dim_hidden: int, dim_out: int, act: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim_in, dim_hidden)
        self.act = {"silu": nn.SiLU(), "gelu_tanh": nn.GELU(approximate="tanh")}[act]
        self.fc2 = nn.Linear(dim_hidden, dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return self.fc2(self.act(self.fc1(x)))


class LayoutProcessor(nn.Module):
    """Boxes and phrases to layout tokens, (B, N, 4) and (B, N, P) -> (B, N, D).

    Fourier features of the box beside the projected phrase, through an MLP (GLIGEN, arXiv 2301.07093, eq. 5). Padding
    slots take learned null features, which only count where padding is attended to (`mask_padding: false`).
    """

    def __init__(self, phrase_dim: int, dim: int) -> None:
        super().__init__()
        self.phrase_mlp = LayoutMLP(phrase_dim, dim, dim, act="silu")
        self.layout_mlp = LayoutMLP(dim + FOURIER_DIM, dim // 2, dim, act="silu")
        self.null_phrase = nn.Parameter(torch.zeros(dim))
        self.null_box = nn.Parameter(torch.zeros(FOURIER_DIM))

    def forward(self, layout: LayoutInputs) -> Tensor:
        dtype = self.null_box.dtype
        # In fp32 whatever the model's dtype: at 56 rad/unit, bf16 coordinates are wrong by up to 0.24 in the features.
        box = get_fourier_embeds_from_boundingbox(FOURIER_FREQUENCIES, layout.boxes.float()).to(dtype)  # (B, N, 64)
        phrase = self.phrase_mlp(layout.phrase_embeds.to(dtype))  # (B, N, D)
        real = layout.mask.unsqueeze(-1)
        phrase = torch.where(real, phrase, self.null_phrase)
        box = torch.where(real, box, self.null_box)
        return self.layout_mlp(torch.cat([phrase, box], dim=-1))


class LayoutStream(nn.Module):
    """The layout's part of one block: image tokens and layout tokens attend to one another, then the layout MLP.

    The image side gives a residual that leaves through the zero-initialised `out_proj` (the *gate*); the layout side
    goes on to the next block. After the last joint attention no layout output is read, so that block has no
    `layout_mlp` (`last=True`): an MLP there would never get a gradient.
    """

    def __init__(self, *, dim: int, num_heads: int, head_dim: int, qk_norm: str | None, last: bool) -> None:
        super().__init__()
        self.last = last
        self.norm1: nn.Module
        if last:
            self.norm1 = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        else:
            self.norm1 = AdaLayerNormZero(dim)
        self.attn = Attention(
            query_dim=dim,
            added_kv_proj_dim=dim,
            heads=num_heads,
            dim_head=head_dim,
            out_dim=dim,
            context_pre_only=last,
            bias=True,
            qk_norm=qk_norm,
            eps=1e-6,
            processor=JointAttnProcessor(),
        )
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)
        if not last:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.layout_mlp = LayoutMLP(dim, 4 * dim, dim, act="gelu_tanh")

    def forward(
        self, norm_hidden_states: Tensor, layout_states: Tensor, temb: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """One block of the stream.

        Args:
            norm_hidden_states: (B, L, D) image tokens behind the block's own first norm.
            layout_states: (B, N, D) layout tokens.
            temb: (B, D) time and text embedding.
            key_mask: (B, N) bool, True = a slot that may be attended to; None = all.

        Returns:
            The image residual (B, L, D), and the layout tokens for the next block (B, N, D), None after the last one.
        """
        if self.last:
            norm_layout = self.norm1(layout_states, temb)
        else:
            norm_layout, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(layout_states, emb=temb)

        attention_mask = None
        if key_mask is not None:
            image_keys = key_mask.new_ones(key_mask.shape[0], norm_hidden_states.shape[1])
            # Image first, layout second: the order in which the attention joins its keys. Broadcast over heads, queries.
            attention_mask = torch.cat([image_keys, key_mask], dim=1)[:, None, None, :]
        image_out, layout_out = self.attn(
            hidden_states=norm_hidden_states, encoder_hidden_states=norm_layout, attention_mask=attention_mask
        )
        residual = self.out_proj(image_out)
        if self.last:
            return residual, None

        layout_states = layout_states + gate_msa.unsqueeze(1) * layout_out
        norm_layout = self.norm2(layout_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        return residual, layout_states + gate_mlp.unsqueeze(1) * self.layout_mlp(norm_layout)


class JointAttnProcessor:
    """Joint attention of one or two token streams with an optional key mask, through diffusers' attention dispatcher.

    What diffusers' `JointAttnProcessor2_0` computes, which knows no mask and ignores `set_attention_backend`
    (diffusers 0.42.1, models/attention_processor.py:1484).
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, L, D), (B, N, D) -> the same shapes; `attention_mask` broadcasts to (B, heads, L + N, L + N), True = attend."""

        def heads(x: Tensor, norm: nn.Module | None) -> Tensor:  # (B, S, D) -> (B, S, heads, head_dim)
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states), None)
        if encoder_hidden_states is not None:
            query = torch.cat([query, heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q)], dim=1)
            key = torch.cat([key, heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k)], dim=1)
            value = torch.cat([value, heads(attn.add_v_proj(encoder_hidden_states), None)], dim=1)

        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        out = out.flatten(2).to(query.dtype)
        image_out = attn.to_out[1](attn.to_out[0](out[:, : hidden_states.shape[1]]))
        if encoder_hidden_states is None:
            return image_out
        other_out = out[:, hidden_states.shape[1] :]
        return image_out, other_out if attn.context_pre_only else attn.to_add_out(other_out)
