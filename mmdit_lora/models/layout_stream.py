"""The layout stream: all that is added to a base MM-DiT. Nothing in this file knows a model family.

Numerically the SiamLayout stream of CreatiLayout (arXiv 2412.03859; HuiZhang0812/CreatiLayout at 860d8bd,
src/models/attention_sd3_SiamLayout.py), plus a key mask for padding boxes, which it lacks.

Shape letters: B batch, N layout slots, K text tokens of a phrase, L image tokens, D model width, P phrase width. Inside the
blocks N counts layout tokens, slots x K.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_fourier_embeds_from_boundingbox
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from torch import Tensor, nn

from mmdit_lora.models.attention import JointAttnProcessor, LayoutCrossAttention, RotaryEmbedding

FOURIER_FREQUENCIES = 8
FOURIER_DIM = FOURIER_FREQUENCIES * 2 * 4  # sine and cosine of four coordinates


@dataclass(frozen=True)
class LayoutInputs:
    """A batch of layouts as the model takes it.

    Args:
        boxes: (B, N, 4) float, xyxy in [0, 1]. Padding slots hold anything finite.
        phrase_embeds: (B, N, P) float, one pooled text embedding a box; or (B, N, K, P), K text tokens a box.
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
        if self.phrase_embeds.ndim not in (3, 4) or tuple(self.phrase_embeds.shape[:2]) != batch_slots:
            raise ValueError(
                f"phrase_embeds must be {(*batch_slots, 'P')} or {(*batch_slots, 'K', 'P')} for that mask, "
                f"is {tuple(self.phrase_embeds.shape)}"
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
    """Boxes and phrases to layout tokens.

    Fourier features of the box beside the projected phrase, through an MLP (GLIGEN, arXiv 2301.07093, eq. 5). Padding
    slots take learned null features, which only count where padding is attended to (`mask_padding: false`).

    Args:
        phrase_dim: P of pooled phrases, projected by `phrase_mlp`; None = phrases come as tokens of the base's own text
            stream, already D wide, and there is no `phrase_mlp`.
    """

    def __init__(self, phrase_dim: int | None, dim: int) -> None:
        super().__init__()
        self.phrase_mlp = None if phrase_dim is None else LayoutMLP(phrase_dim, dim, dim, act="silu")
        self.layout_mlp = LayoutMLP(dim + FOURIER_DIM, dim // 2, dim, act="silu")
        self.null_phrase = nn.Parameter(torch.zeros(dim))
        self.null_box = nn.Parameter(torch.zeros(FOURIER_DIM))

    def forward(self, layout: LayoutInputs, phrase_states: Tensor | None = None) -> Tensor:
        """Layout tokens, (B, N, D), or (B, N K, D) of `phrase_states` (B, N, K, D), the text tokens of the phrases."""
        dtype = self.null_box.dtype
        # At least in fp32 whatever the model's dtype: at 56 rad/unit, bf16 coordinates are wrong by up to 0.24 in the features.
        boxes = layout.boxes.to(torch.promote_types(dtype, torch.float32))
        box = get_fourier_embeds_from_boundingbox(FOURIER_FREQUENCIES, boxes).to(dtype)  # (B, N, 64)
        if self.phrase_mlp is not None:
            phrase_states = self.phrase_mlp(layout.phrase_embeds.to(dtype)).unsqueeze(2)  # (B, N, 1, D)
        assert phrase_states is not None
        real = layout.mask[..., None, None]
        phrase = torch.where(real, phrase_states, self.null_phrase)
        box = torch.where(real, box.unsqueeze(2), self.null_box).expand(-1, -1, phrase.shape[2], -1)
        return self.layout_mlp(torch.cat([phrase, box], dim=-1).flatten(1, 2))


class LayoutStream(nn.Module):
    """The layout's part of one block with streams of its own for image and text.

    The image side gives a residual that leaves through the zero-initialised `out_proj` (the *gate*); the layout side
    goes on to the next block. Where no later block reads the layout tokens (`last=True`) there is no `layout_mlp`: it
    would never get a gradient.

    Args:
        attention: "siamese": image and layout tokens attend to one another in an attention of their own (CreatiLayout).
            "cross": image tokens read the layout tokens, with the queries of the block's own attention, and layout tokens
            read one another; on the image's side only `out_proj` is left to compute.
        mlp_dim: hidden width of `layout_mlp`; None = 4 x `dim`.
    """

    mlp_feeds_own_gate = False  # the MLP's output is read by the next block's gate

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        head_dim: int,
        qk_norm: str | None,
        last: bool,
        attention: str = "siamese",
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.last = last
        self.norm1: nn.Module
        if last:
            self.norm1 = AdaLayerNormContinuous(dim, dim, elementwise_affine=False, eps=1e-6)
        else:
            self.norm1 = AdaLayerNormZero(dim)
        sizes: dict[str, Any] = {
            "dim": dim,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "qk_norm": qk_norm,
            "last": last,
        }
        self.attn = make_attention(attention, **sizes, added_kv_proj_dim=dim, context_pre_only=last)
        self.out_proj = zero_linear(dim)
        if not last:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
            self.layout_mlp = LayoutMLP(dim, mlp_dim or 4 * dim, dim, act="gelu_tanh")

    def forward(
        self,
        norm_hidden_states: Tensor,
        layout_states: Tensor,
        temb: Tensor,
        key_mask: Tensor | None,
        *,
        image_query: Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """One block of the stream.

        Args:
            norm_hidden_states: (B, L, D) image tokens behind the block's own first norm.
            layout_states: (B, N, D) layout tokens.
            temb: (B, D) time and text embedding.
            key_mask: (B, N) bool, True = a token that may be attended to; None = all.
            image_query: (B, L, heads, head_dim), of the block's own attention; only "cross" reads it.
            rotary_emb: of L image and N layout tokens, in this order; only "siamese" reads it.

        Returns:
            The image residual (B, L, D), and the layout tokens for the next block (B, N, D), None after the last one.
        """
        if self.last:
            norm_layout = self.norm1(layout_states, temb)
        else:
            norm_layout, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(layout_states, emb=temb)
        if isinstance(self.attn, LayoutCrossAttention):
            image_out, layout_out = self.attn(norm_layout, image_query, key_mask)
        else:
            image_out, layout_out = self.attn(
                hidden_states=norm_hidden_states,
                encoder_hidden_states=norm_layout,
                attention_mask=joint_mask(key_mask, norm_hidden_states.shape[1]),
                image_rotary_emb=rotary_emb,
            )
        residual = self.out_proj(image_out)
        if self.last:
            return residual, None

        layout_states = layout_states + gate_msa.unsqueeze(1) * layout_out
        norm_layout = self.norm2(layout_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        layout_states = layout_states + gate_mlp.unsqueeze(1) * self.layout_mlp(norm_layout)
        return residual, within_fp16(layout_states)


class ChunkedFeedForward(nn.Module):
    """A block whose MLPs can run in chunks, to save memory: diffusers' `set_chunk_feed_forward`."""

    _chunk_size: int | None = None
    _chunk_dim: int = 0

    if TYPE_CHECKING:  # what a diffusers block brings; nn.Module's own answer, "Tensor | Module", fits nothing

        def __getattr__(self, name: str) -> Any: ...

    def set_chunk_feed_forward(self, chunk_size: int | None, dim: int = 0) -> None:
        """Chunks of `chunk_size` along `dim`, 0 = batch, 1 = tokens; None = whole. The last chunk may be smaller."""
        self._chunk_size, self._chunk_dim = chunk_size, dim

    def in_chunks(self, feed_forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`feed_forward(x)`; x (B, S, D)."""
        if self._chunk_size is None:
            return feed_forward(x)
        parts = x.split(self._chunk_size, dim=self._chunk_dim)
        return torch.cat([feed_forward(part) for part in parts], dim=self._chunk_dim)


class LayoutBlock(ChunkedFeedForward):
    """What the blocks that carry a layout stream share, mixed into a diffusers block, in front of it."""

    def share_queries(self) -> dict[str, Any]:
        """Arguments that make the block's attention return its queries too, where the layout stream reads them."""
        stream = getattr(self, "layout_stream", None)
        return {"return_query": True} if stream is not None and isinstance(stream.attn, LayoutCrossAttention) else {}

    def feed_forward(
        self, mlp: nn.Module, norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
    ) -> Tensor:
        """x + gate * mlp(norm(x) * (1 + scale) + shift), the MLP in chunks where that is on; x (B, S, D), the others (B, D)."""
        return x + gate.unsqueeze(1) * self.in_chunks(mlp, norm(x) * (1 + scale[:, None]) + shift[:, None])


class SingleLayoutStream(ChunkedFeedForward):
    """The layout's part of a block whose tokens share one set of weights, attention and MLP side by side.

    "siamese": image and layout tokens together pass a whole copy of such a block; the image side leaves through `out_proj`
    (HuiZhang0812/CreatiLayout at 860d8bd, src/models/transformer_flux_SiamLayout.py). The block's fused output
    projection is split in two, `attn.to_out` and `layout_mlp.fc2`, so that the LoRA's targets are what they are elsewhere.
    "cross": only layout tokens pass the copy; image tokens read their keys and values.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        head_dim: int,
        last: bool,
        attention: str = "siamese",
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.mlp_feeds_own_gate = attention != "cross"
        self.norm1 = AdaLayerNormZeroSingle(dim)
        # In "siamese" the image's own way to the gate passes the MLP, in the last block too.
        self.last = last and attention == "cross"
        sizes: dict[str, Any] = {
            "dim": dim,
            "num_heads": num_heads,
            "head_dim": head_dim,
            "qk_norm": "rms_norm",
            "last": self.last,
        }
        # The bias of the fused projection is that of `layout_mlp.fc2`.
        self.attn = make_attention(attention, **sizes, out_bias=False)
        self.out_proj = zero_linear(dim)
        if not self.last:
            self.layout_mlp = LayoutMLP(dim, mlp_dim or 4 * dim, dim, act="gelu_tanh")

    def forward(
        self,
        hidden_states: Tensor,
        layout_states: Tensor,
        temb: Tensor,
        key_mask: Tensor | None,
        *,
        image_query: Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `LayoutStream.forward`, but `hidden_states` are the image tokens before the block's norm, (B, L, D)."""
        if isinstance(self.attn, LayoutCrossAttention):
            norm_layout, gate = self.norm1(layout_states, emb=temb)
            image_out, layout_out = self.attn(norm_layout, image_query, key_mask)
            residual = self.out_proj(image_out)
            if self.last:
                return residual, None
            layout_states = layout_states + gate.unsqueeze(1) * (layout_out + self.layout_mlp(norm_layout))
            return residual, within_fp16(layout_states)
        count = hidden_states.shape[1]
        norm_states, gate = self.norm1(torch.cat([hidden_states, layout_states], dim=1), emb=temb)
        out = self.attn(norm_states, attention_mask=joint_mask(key_mask, count), image_rotary_emb=rotary_emb)
        out = gate.unsqueeze(1) * (out + self.in_chunks(self.layout_mlp, norm_states))
        return self.out_proj(out[:, :count]), within_fp16(layout_states + out[:, count:])


def make_attention(
    kind: str, *, dim: int, num_heads: int, head_dim: int, qk_norm: str | None, last: bool, **siamese: Any
) -> nn.Module:
    """The attention of a layout stream, "cross" or "siamese".

    Args:
        siamese: further arguments of diffusers' `Attention`.
    """
    if kind == "cross":
        return LayoutCrossAttention(dim=dim, num_heads=num_heads, head_dim=head_dim, qk_norm=qk_norm, last=last)
    return Attention(
        query_dim=dim,
        heads=num_heads,
        dim_head=head_dim,
        out_dim=dim,
        bias=True,
        qk_norm=qk_norm,
        eps=1e-6,
        processor=JointAttnProcessor(),
        **siamese,
    )


def zero_linear(dim_in: int, dim_out: int | None = None) -> nn.Linear:
    """(..., dim_in) -> (..., dim_out), all zero; as a gate from `dim_in` to the same width."""
    linear = nn.Linear(dim_in, dim_out or dim_in)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def joint_mask(key_mask: Tensor | None, image_tokens: int) -> Tensor | None:
    """(B, N) -> (B, 1, 1, L + N): image first, layout second; broadcasts over heads and queries."""
    if key_mask is None:
        return None
    image_keys = key_mask.new_ones(key_mask.shape[0], image_tokens)
    return torch.cat([image_keys, key_mask], dim=1)[:, None, None, :]


def within_fp16(x: Tensor) -> Tensor:
    """Clipped to what fp16 holds, as the base does with its own streams where its activations grow that large."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
