"""The two blocks of FLUX.1 with a third stream (diffusers 0.42.1, models/transformers/transformer_flux.py)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor

from mmdit_lora.models.layout_attention import LayoutCrossAttention, RotaryEmbedding
from mmdit_lora.models.layout_stream import ChunkedFeedForward, LayoutStream, SingleLayoutStream, within_fp16


class _ThirdStream(ChunkedFeedForward):
    """What both kinds of blocks share."""

    def share_queries(self) -> dict[str, Any]:
        """Arguments that make the block's attention answer its queries too, where the layout stream reads them."""
        stream = getattr(self, "layout_stream", None)
        return {"return_query": True} if stream is not None and isinstance(stream.attn, LayoutCrossAttention) else {}


class LayoutFluxTransformerBlock(_ThirdStream, FluxTransformerBlock):
    """diffusers' `FluxTransformerBlock` with a third stream, `layout_stream`."""

    layout_stream: LayoutStream

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        layout_states: Tensor | None = None,
        layout_key_mask: Tensor | None = None,
        layout_gain: Tensor | None = None,
        layout_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One block; arguments that diffusers' block has are as there.

        Args:
            layout_states: (B, N, D) layout tokens; None = the base's own block.
            layout_key_mask: (B, N) bool, True = a token that may be attended to; None = all.
            layout_gain: (B, 1, 1) factor of the layout residual: the layout scale, 0 for samples without a layout.
            layout_rotary_emb: of the image and layout tokens, in this order.

        Returns:
            Text tokens, image tokens, layout tokens (None without, or after the last block with a stream).
        """
        norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.norm1(hidden_states, emb=temb)
        norm_text, text_gate_msa, text_shift_mlp, text_scale_mlp, text_gate_mlp = self.norm1_context(
            encoder_hidden_states, emb=temb
        )
        query_kwargs = self.share_queries() if layout_states is not None else {}
        attn_out, text_attn_out, *others = self.attn(
            hidden_states=norm_hidden_states,
            encoder_hidden_states=norm_text,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
            **query_kwargs,
        )
        attn_out = gate_msa.unsqueeze(1) * attn_out
        if layout_states is not None:
            # The residual has no time gate, and the text never sees the layout.
            residual, layout_states = self.layout_stream(
                norm_hidden_states,
                layout_states,
                temb,
                layout_key_mask,
                image_query=others.pop() if query_kwargs else None,
                rotary_emb=layout_rotary_emb,
            )
            attn_out = attn_out + layout_gain * residual
        hidden_states = hidden_states + attn_out

        norm_hidden_states = self.norm2(hidden_states) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
        hidden_states = hidden_states + gate_mlp.unsqueeze(1) * self.in_chunks(self.ff, norm_hidden_states)
        if others:  # of an IP-Adapter
            hidden_states = hidden_states + others[0]

        encoder_hidden_states = encoder_hidden_states + text_gate_msa.unsqueeze(1) * text_attn_out
        norm_text = self.norm2_context(encoder_hidden_states) * (1 + text_scale_mlp[:, None]) + text_shift_mlp[:, None]
        text_ff = self.in_chunks(self.ff_context, norm_text)
        encoder_hidden_states = within_fp16(encoder_hidden_states + text_gate_mlp.unsqueeze(1) * text_ff)
        return encoder_hidden_states, hidden_states, layout_states


class LayoutFluxSingleTransformerBlock(_ThirdStream, FluxSingleTransformerBlock):
    """diffusers' `FluxSingleTransformerBlock`, with a third stream where the model has `layout_single_blocks`."""

    layout_stream: SingleLayoutStream

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: RotaryEmbedding | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        layout_states: Tensor | None = None,
        layout_key_mask: Tensor | None = None,
        layout_gain: Tensor | None = None,
        layout_rotary_emb: RotaryEmbedding | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `LayoutFluxTransformerBlock.forward`."""
        text_tokens = encoder_hidden_states.shape[1]
        residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        norm_hidden_states, gate = self.norm(residual, emb=temb)
        query_kwargs = self.share_queries() if layout_states is not None else {}
        attn_out = self.attn(
            hidden_states=norm_hidden_states,
            image_rotary_emb=image_rotary_emb,
            **(joint_attention_kwargs or {}),
            **query_kwargs,
        )
        image_query = None
        if query_kwargs:
            attn_out, query = attn_out
            image_query = query[:, text_tokens:]
        out = gate.unsqueeze(1) * self._project(attn_out, norm_hidden_states)
        text_out, image_out = out[:, :text_tokens], out[:, text_tokens:]
        if layout_states is not None:
            layout_residual, layout_states = self.layout_stream(
                hidden_states,
                layout_states,
                temb,
                layout_key_mask,
                image_query=image_query,
                rotary_emb=layout_rotary_emb,
            )
            image_out = image_out + layout_gain * layout_residual
        return within_fp16(encoder_hidden_states + text_out), within_fp16(hidden_states + image_out), layout_states

    def _project(self, attn_out: Tensor, norm_hidden_states: Tensor) -> Tensor:
        """The fused output projection of attention and MLP, the MLP in chunks where that is on."""
        if self._chunk_size is None:
            return self.proj_out(torch.cat([attn_out, self.act_mlp(self.proj_mlp(norm_hidden_states))], dim=2))
        dim = attn_out.shape[-1]

        def project(both: Tensor) -> Tensor:
            mlp = self.act_mlp(self.proj_mlp(both[..., dim:]))
            return self.proj_out(torch.cat([both[..., :dim], mlp], dim=2))

        return self.in_chunks(project, torch.cat([attn_out, norm_hidden_states], dim=2))
