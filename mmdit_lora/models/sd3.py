"""SD3 and SD3.5 with a layout stream: a subclass of diffusers' transformer and of its block.

Only the two forwards that must carry the third stream are restated (diffusers 0.42.1,
models/transformers/transformer_sd3.py and models/attention.py `JointTransformerBlock`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput

# `ModelMixin` must be in this namespace: diffusers' loader looks for it in the module that model_index.json names.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from torch import Tensor, nn

from mmdit_lora.models.adapter_layers import scaled_by_attention_kwargs
from mmdit_lora.models.attention import JointAttnProcessor
from mmdit_lora.models.base import LayoutModelMixin, stock_arguments
from mmdit_lora.models.layout_stream import LayoutBlock, LayoutInputs, LayoutProcessor, LayoutStream

__all__ = ["LayoutSD3Transformer2DModel", "LayoutSD3TransformerBlock", "ModelMixin"]


class LayoutSD3TransformerBlock(LayoutBlock, JointTransformerBlock):
    """diffusers' `JointTransformerBlock` with a third stream, `layout_stream`."""

    layout_stream: LayoutStream

    def __init__(
        self, *, dim: int, num_attention_heads: int, attention_head_dim: int, last: bool, **kwargs: Any
    ) -> None:
        super().__init__(dim, num_attention_heads, attention_head_dim, context_pre_only=last, **kwargs)
        self.attn.set_processor(JointAttnProcessor())
        if self.attn2 is not None:
            self.attn2.set_processor(JointAttnProcessor())

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        layout_states: Tensor | None = None,
        layout_key_mask: Tensor | None = None,
        layout_gain: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """One block; arguments that diffusers' block has are as there.

        Args:
            layout_states: (B, N, D) layout tokens; None = the base's own block.
            layout_key_mask: (B, N) bool, True = a slot that may be attended to; None = all.
            layout_gain: (B, 1, 1) factor of the layout residual: the layout scale, 0 for samples without a layout.

        Returns:
            Text tokens (None after the last block), image tokens, layout tokens (None without, or after the last block).
        """
        if layout_states is None:
            return *super().forward(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs), None

        # Image and text, as in the base.
        norm_hidden_states, gate_msa, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(hidden_states, emb=temb)
        if self.context_pre_only:
            norm_text = self.norm1_context(encoder_hidden_states, temb)
        else:
            norm_text, text_gate_msa, text_shift_mlp, text_scale_mlp, text_gate_mlp = self.norm1_context(
                encoder_hidden_states, emb=temb
            )
        attention_kwargs = joint_attention_kwargs or {}
        query_kwargs = self.share_queries()
        attn_out, text_attn_out, *queries = self.attn(
            hidden_states=norm_hidden_states, encoder_hidden_states=norm_text, **attention_kwargs, **query_kwargs
        )

        # Image and layout. The residual has no time gate, and the text never sees the layout.
        residual, layout_states = self.layout_stream(
            norm_hidden_states, layout_states, temb, layout_key_mask, image_query=queries[0] if queries else None
        )
        hidden_states = hidden_states + (gate_msa.unsqueeze(1) * attn_out + layout_gain * residual)

        if self.use_dual_attention:
            norm_hidden_states2, gate_msa2 = dual
            attn_out2 = self.attn2(hidden_states=norm_hidden_states2, **attention_kwargs)
            hidden_states = hidden_states + gate_msa2.unsqueeze(1) * attn_out2

        hidden_states = self.feed_forward(self.ff, self.norm2, hidden_states, shift_mlp, scale_mlp, gate_mlp)
        if self.context_pre_only:
            return None, hidden_states, layout_states
        encoder_hidden_states = encoder_hidden_states + text_gate_msa.unsqueeze(1) * text_attn_out
        encoder_hidden_states = self.feed_forward(
            self.ff_context, self.norm2_context, encoder_hidden_states, text_shift_mlp, text_scale_mlp, text_gate_mlp
        )
        return encoder_hidden_states, hidden_states, layout_states


class LayoutSD3Transformer2DModel(LayoutModelMixin, SD3Transformer2DModel):
    """diffusers' `SD3Transformer2DModel` with a layout stream.

    All arguments of the base are restated, so that a saved config is complete. Added:

    Args:
        phrase_dim: P, the width of a phrase embedding; default `pooled_projection_dim`.
        mask_padding: True: padding slots are masked in attention, and a sample without a box is the base model. False:
            null tokens fill the slots and are attended to, as in CreatiLayout.
        layout_slots: pad every layout to this many slots (done by collate and pipeline, never by the model); None = as
            many as the batch needs.
        layout_attention: "siamese" or "cross", see `LayoutStream`.
        layout_mlp_dim: hidden width of the blocks' `layout_mlp`; None = 4 x the model's width.
    """

    family: ClassVar[str] = "sd3"
    _no_split_modules: ClassVar[list[str]] = ["LayoutSD3TransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["LayoutSD3TransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        phrase_dim: int | None = None,
        mask_padding: bool = True,
        layout_slots: int | None = None,
        layout_attention: str = "siamese",
        layout_mlp_dim: int | None = None,
    ) -> None:
        # The base's blocks would be built only to be replaced.
        super().__init__(**stock_arguments(SD3Transformer2DModel, locals(), num_layers=0))
        self.register_to_config(num_layers=num_layers)
        self.transformer_blocks = nn.ModuleList(
            LayoutSD3TransformerBlock(
                dim=self.inner_dim,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                last=index == num_layers - 1,
                qk_norm=qk_norm,
                use_dual_attention=index in dual_attention_layers,
            )
            for index in range(num_layers)
        )
        self.build_layout_stream()

    def build_layout_stream(self) -> None:
        """(Re)create every module of the layout stream, freshly initialised, every gate zero."""
        config = self.config
        self.layout_processor = LayoutProcessor(config.phrase_dim or config.pooled_projection_dim, self.inner_dim)
        blocks: Any = self.transformer_blocks
        for block in blocks:
            block.layout_stream = LayoutStream(
                dim=self.inner_dim,
                num_heads=config.num_attention_heads,
                head_dim=config.attention_head_dim,
                qk_norm=config.qk_norm,
                last=block.context_pre_only,
                attention=config.layout_attention,
                mlp_dim=config.layout_mlp_dim,
            )

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels

    @property
    def latent_multiple(self) -> int:
        return self.config.patch_size

    @property
    def max_latent_side(self) -> int | None:
        return self.config.pos_embed_max_size * self.config.patch_size

    def model_inputs(
        self, latents: Tensor, t: Tensor, texts: Mapping[str, Tensor], *, guidance: float = 1.0
    ) -> dict[str, Any]:
        del guidance  # no base of this family is guidance-distilled
        return {
            "hidden_states": latents,
            "encoder_hidden_states": texts["embeds"],
            "pooled_projections": texts["pooled"],
            "timestep": 1000 * t,
        }

    def as_latents(self, sample: Tensor, height: int, width: int) -> Tensor:
        assert sample.shape[-2:] == (height, width)
        return sample

    @scaled_by_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        block_controlnet_hidden_states: list[Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        skip_layers: list[int] | None = None,
        layout: LayoutInputs | None = None,
        layout_scale: float = 1.0,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity; what diffusers' class has is as there.

        Args:
            hidden_states: (B, C, H, W) noisy latents.
            layout: layouts of the B samples, or of 2B of which the second half is meant (see `select_layout`); None = the
                base model. May ride in `joint_attention_kwargs["layout"]` instead, which stock pipelines hand through.
            layout_scale: factor of the layout residual; 0 skips the stream. Also `joint_attention_kwargs["layout_scale"]`.

        Raises:
            ValueError: the layout is given twice, its batch fits neither B nor 2B, or its phrase width is not `phrase_dim`.
        """
        joint_attention_kwargs, layout_states, layout_key_mask, layout_gain = self.start_layout(
            joint_attention_kwargs, layout, layout_scale, hidden_states
        )

        height, width = hidden_states.shape[-2:]
        hidden_states = self.pos_embed(hidden_states).contiguous()
        temb = self.time_text_embed(timestep, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)

        if joint_attention_kwargs is not None and "ip_adapter_image_embeds" in joint_attention_kwargs:
            ip_embeds = joint_attention_kwargs.pop("ip_adapter_image_embeds")
            ip_hidden_states, ip_temb = self.image_proj(ip_embeds, timestep)
            joint_attention_kwargs.update(ip_hidden_states=ip_hidden_states, temb=ip_temb)

        for index, block in enumerate(self.transformer_blocks):
            if skip_layers is None or index not in skip_layers:
                encoder_hidden_states, hidden_states, layout_states = self.run_block(
                    index,
                    block,
                    hidden_states,
                    encoder_hidden_states,
                    temb,
                    joint_attention_kwargs,
                    layout_states,
                    layout_key_mask,
                    layout_gain,
                )
            if block_controlnet_hidden_states is not None and not block.context_pre_only:
                interval = len(self.transformer_blocks) / len(block_controlnet_hidden_states)
                hidden_states = hidden_states + block_controlnet_hidden_states[int(index / interval)]

        hidden_states = self.proj_out(self.norm_out(hidden_states, temb))
        patch = self.config.patch_size
        hidden_states = hidden_states.unflatten(1, (height // patch, width // patch))
        hidden_states = hidden_states.unflatten(-1, (patch, patch, self.out_channels))
        sample = torch.einsum("nhwpqc->nchpwq", hidden_states).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers, -3.5-medium and -3.5-large.
_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}

PRESETS: dict[str, dict[str, Any]] = {
    "sd3-medium": _MEDIUM,
    "sd3.5-medium": _MEDIUM
    | {"pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd3.5-large": _MEDIUM
    | {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"},
}
