"""FLUX.1 (dev and schnell) with a layout stream: subclasses of diffusers' transformer and of its two blocks.

Only the forwards that must carry the third stream are restated (diffusers 0.42.1,
models/transformers/transformer_flux.py). With `phrase_tokens`, `layout_single_blocks` and `mask_padding=False` the stream
is numerically that of CreatiLayout (HuiZhang0812/CreatiLayout at 860d8bd, src/models/transformer_flux_SiamLayout.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput

# `ModelMixin` must be in this namespace: diffusers' loader looks for it in the module that model_index.json names.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from mmdit_lora.models.adapter_layers import scaled_by_attention_kwargs
from mmdit_lora.models.attention import JointAttnProcessor, RotaryEmbedding
from mmdit_lora.models.base import LayoutModelMixin, stock_arguments
from mmdit_lora.models.latents import cartesian_ids, pack, unpack
from mmdit_lora.models.layout_stream import (
    LayoutBlock,
    LayoutInputs,
    LayoutProcessor,
    LayoutStream,
    SingleLayoutStream,
    within_fp16,
)

__all__ = ["LayoutFluxTransformer2DModel", "ModelMixin"]


class LayoutFluxTransformerBlock(LayoutBlock, FluxTransformerBlock):
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

        hidden_states = self.feed_forward(self.ff, self.norm2, hidden_states, shift_mlp, scale_mlp, gate_mlp)
        if others:  # of an IP-Adapter
            hidden_states = hidden_states + others[0]

        encoder_hidden_states = encoder_hidden_states + text_gate_msa.unsqueeze(1) * text_attn_out
        encoder_hidden_states = self.feed_forward(
            self.ff_context, self.norm2_context, encoder_hidden_states, text_shift_mlp, text_scale_mlp, text_gate_mlp
        )
        return within_fp16(encoder_hidden_states), hidden_states, layout_states


class LayoutFluxSingleTransformerBlock(LayoutBlock, FluxSingleTransformerBlock):
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


LAYOUT_POSITION = -1.0  # all three rotary ids of every layout token, as in CreatiLayout (`fix_bbox_ids`)


class LayoutFluxTransformer2DModel(LayoutModelMixin, FluxTransformer2DModel):
    """diffusers' `FluxTransformer2DModel` with a layout stream.

    All arguments of the base are restated, so that a saved config is complete. Added:

    Args:
        phrase_dim: P, the width of a phrase embedding; default `pooled_projection_dim`, or `joint_attention_dim` with
            `phrase_tokens`.
        phrase_tokens: K, the T5 tokens that stand for a phrase, projected by the base's own `context_embedder` (CreatiLayout:
            30); None = one pooled CLIP embedding a phrase.
        mask_padding, layout_slots, layout_attention, layout_mlp_dim: as in `LayoutSD3Transformer2DModel`.
        layout_single_blocks: the single-stream blocks have a layout stream too, as in CreatiLayout.
    """

    family: ClassVar[str] = "flux"
    _no_split_modules: ClassVar[list[str]] = ["LayoutFluxTransformerBlock", "LayoutFluxSingleTransformerBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["LayoutFluxTransformerBlock", "LayoutFluxSingleTransformerBlock"]
    # The base's plans split image tokens and heads over devices, and know nothing of layout tokens.
    _cp_plan = None
    _tp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        phrase_dim: int | None = None,
        phrase_tokens: int | None = None,
        mask_padding: bool = True,
        layout_slots: int | None = None,
        layout_attention: str = "siamese",
        layout_mlp_dim: int | None = None,
        layout_single_blocks: bool = False,
    ) -> None:
        # The base's blocks would be built only to be replaced.
        super().__init__(**stock_arguments(FluxTransformer2DModel, locals(), num_layers=0, num_single_layers=0))
        self.register_to_config(num_layers=num_layers, num_single_layers=num_single_layers)
        sizes = {
            "dim": self.inner_dim,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
        }
        self.transformer_blocks = nn.ModuleList(LayoutFluxTransformerBlock(**sizes) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            LayoutFluxSingleTransformerBlock(**sizes) for _ in range(num_single_layers)
        )
        if layout_attention == "cross":
            for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
                block.attn.set_processor(JointAttnProcessor(image_first=False))
        self.build_layout_stream()
        self._guidance_branch = "cond"

    def build_layout_stream(self) -> None:
        """(Re)create every module of the layout stream, freshly initialised, every gate zero."""
        config = self.config
        self.layout_processor = LayoutProcessor(None if self.phrase_tokens else self.phrase_dim, self.inner_dim)
        sizes = {"dim": self.inner_dim, "num_heads": config.num_attention_heads, "head_dim": config.attention_head_dim}
        options = {"attention": config.layout_attention, "mlp_dim": config.layout_mlp_dim}
        singles: list[Any] = list(self.single_transformer_blocks) if config.layout_single_blocks else []
        doubles: list[Any] = list(self.transformer_blocks)
        for index, block in enumerate(doubles):
            last = not singles and index == len(doubles) - 1
            block.layout_stream = LayoutStream(**sizes, **options, qk_norm="rms_norm", last=last)
        for index, block in enumerate(singles):
            block.layout_stream = SingleLayoutStream(**sizes, **options, last=index == len(singles) - 1)

    @property
    def latent_channels(self) -> int:
        return self.config.in_channels // 4  # a token is 2 x 2 cells

    @property
    def latent_multiple(self) -> int:
        return 2

    def model_inputs(
        self, latents: Tensor, t: Tensor, texts: Mapping[str, Tensor], *, guidance: float = 1.0
    ) -> dict[str, Any]:
        height, width = latents.shape[-2:]
        image_ids = cartesian_ids(1, height // 2, width // 2, device=latents.device)
        inputs: dict[str, Any] = {
            "hidden_states": pack(latents),
            "encoder_hidden_states": texts["embeds"],
            "pooled_projections": texts["pooled"],
            "timestep": t,
            "img_ids": image_ids.to(latents),
            "txt_ids": latents.new_zeros(texts["embeds"].shape[1], 3),
        }
        if self.config.guidance_embeds:
            inputs["guidance"] = torch.full_like(t, guidance)
        return inputs

    def as_latents(self, sample: Tensor, height: int, width: int) -> Tensor:
        return unpack(sample, height, width)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """diffusers' pipelines say with it which call of true classifier-free guidance follows, "cond" or "uncond".

        Both calls get the same attention kwargs, in which the layout rides; "uncond" is meant without it.
        """
        before, self._guidance_branch = self._guidance_branch, name
        try:
            with super().cache_context(name, **kwargs):
                yield
        finally:
            self._guidance_branch = before

    def select_layout(self, layout: LayoutInputs | None, *, batch: int, scale: float) -> LayoutInputs | None:
        layout = super().select_layout(layout, batch=batch, scale=scale)
        if layout is not None and self._guidance_branch == "uncond":
            layout = layout.dropped()
        return layout

    @scaled_by_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor | None = None,
        timestep: Tensor | None = None,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        controlnet_block_samples: list[Tensor] | None = None,
        controlnet_single_block_samples: list[Tensor] | None = None,
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
        layout: LayoutInputs | None = None,
        layout_scale: float = 1.0,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict the velocity; what diffusers' class has is as there.

        Args:
            hidden_states: (B, L, 4 C) packed noisy latents.
            layout, layout_scale: see `LayoutSD3Transformer2DModel.forward`.

        Raises:
            ValueError: the layout is given twice, its batch fits neither B nor 2B, or its phrases are of another size.
        """
        joint_attention_kwargs, layout_states, layout_key_mask, layout_gain = self.start_layout(
            joint_attention_kwargs, layout, layout_scale, hidden_states
        )

        hidden_states = self.x_embedder(hidden_states)
        assert timestep is not None
        timestep = timestep.to(hidden_states.dtype) * 1000
        embedded = (timestep,) if guidance is None else (timestep, guidance.to(hidden_states.dtype) * 1000)
        temb = self.time_text_embed(*embedded, pooled_projections)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        assert img_ids is not None
        assert txt_ids is not None
        img_ids, txt_ids = (ids[0] if ids.ndim == 3 else ids for ids in (img_ids, txt_ids))
        # Text, image, layout: the block's own attention reads the first two, that of the layout stream the last two.
        layout_ids = img_ids.new_full((0 if layout_states is None else layout_states.shape[1], 3), LAYOUT_POSITION)
        rotary_emb = self.pos_embed(torch.cat([txt_ids, img_ids, layout_ids]))
        image_rotary_emb = tuple(part[: len(txt_ids) + len(img_ids)] for part in rotary_emb)
        layout_rotary_emb = tuple(part[len(txt_ids) :] for part in rotary_emb)

        if joint_attention_kwargs is not None and "ip_adapter_image_embeds" in joint_attention_kwargs:
            ip_embeds = joint_attention_kwargs.pop("ip_adapter_image_embeds")
            joint_attention_kwargs.update(ip_hidden_states=self.encoder_hid_proj(ip_embeds))

        doubles = len(self.transformer_blocks)
        for index, block in enumerate([*self.transformer_blocks, *self.single_transformer_blocks]):
            third: tuple[Any, ...] = (layout_states, layout_key_mask, layout_gain, layout_rotary_emb)
            if layout_states is None or not hasattr(block, "layout_stream"):
                third = ()
            encoder_hidden_states, hidden_states, layout_states = self.run_block(
                index,
                block,
                hidden_states,
                encoder_hidden_states,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                *third,
            )
            if index < doubles and controlnet_block_samples is not None:
                samples, place, blocks = controlnet_block_samples, index, doubles
            elif index >= doubles and controlnet_single_block_samples is not None:
                samples, place = controlnet_single_block_samples, index - doubles
                blocks = len(self.single_transformer_blocks)
            else:
                continue
            repeat = controlnet_blocks_repeat and index < doubles  # for XLabs' ControlNet
            place = place % len(samples) if repeat else place // ceil(blocks / len(samples))
            hidden_states = hidden_states + samples[place]

        output = self.proj_out(self.norm_out(hidden_states, temb))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


# transformer/config.json of black-forest-labs/FLUX.1-dev and FLUX.1-schnell.
_SCHNELL: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}

PRESETS: dict[str, dict[str, Any]] = {"flux-dev": _SCHNELL | {"guidance_embeds": True}, "flux-schnell": _SCHNELL}
