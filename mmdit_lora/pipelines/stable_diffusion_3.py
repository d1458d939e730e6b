"""The pipelines of SD3 and SD3.5 with a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import StableDiffusion3Img2ImgPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_inpaint import StableDiffusion3InpaintPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmdit_lora.lora.style_names import JOINT_BLOCKS, FamilyNames, encoder_prefixes
from mmdit_lora.models.layout_stream import LayoutInputs
from mmdit_lora.models.sd3 import LayoutSD3Transformer2DModel
from mmdit_lora.pipelines.base import LayoutPipeline


class _StableDiffusion3(LayoutPipeline):
    """What the family's three pipelines share.

    Args:
        max_sequence_length: T5 tokens of the text that this base was trained with (zeros where it has no T5); the default
            of calls.
        num_inference_steps, guidance_scale: defaults of calls that this base states; diffusers' own where it states none.
            Everything else as in diffusers.
    """

    transformer_class = LayoutSD3Transformer2DModel
    opens = ("LayoutStableDiffusion3Pipeline", "StableDiffusion3Pipeline")

    style_names = FamilyNames(
        JOINT_BLOCKS, encoder_prefixes(clip_l="text_encoder", clip_g="text_encoder_2", t5="text_encoder_3")
    )
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3"]

    # A base may come without T5, and a saved one then says null.
    _optional_components: ClassVar[list[str]] = ["text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"]

    def __init__(
        self,
        transformer: LayoutSD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: PreTrainedModel | None = None,
        tokenizer_3: PreTrainedTokenizerBase | None = None,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: Any = None,
        max_sequence_length: int = 256,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Pooled CLIP-L beside pooled CLIP-G embeddings, (n, P); no T5, as in CreatiLayout."""
        device = device or self.encoding_device
        pooled = [self._get_clip_prompt_embeds(list(phrases), device=device, clip_model_index=n)[1] for n in (0, 1)]
        return torch.cat(pooled, dim=-1)

    @torch.no_grad()
    def encode_caption(self, caption: str | Sequence[str], device: torch.device | None = None) -> dict[str, Tensor]:
        embeds, _, pooled, _ = self.encode_prompt(
            caption if isinstance(caption, str) else list(caption),
            None,
            None,
            device=device or self.encoding_device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.config.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def layout_under_guidance(self, inputs: LayoutInputs, guidance_scale: float) -> LayoutInputs:
        # diffusers' batch is then [without, with], and "without" has neither text nor layout.
        return LayoutInputs.cat([inputs.dropped(), inputs]) if guidance_scale > 1 else inputs


class LayoutStableDiffusion3Pipeline(_StableDiffusion3, StableDiffusion3Pipeline):
    """diffusers' `StableDiffusion3Pipeline` that takes layouts: see `LayoutPipeline`, also for `from_pretrained`."""


class LayoutStableDiffusion3Img2ImgPipeline(_StableDiffusion3, StableDiffusion3Img2ImgPipeline):
    """The same from an image: `LayoutStableDiffusion3Img2ImgPipeline.from_pipe(pipe)(layout, image=..., strength=0.6)`."""


class LayoutStableDiffusion3InpaintPipeline(_StableDiffusion3, StableDiffusion3InpaintPipeline):
    """The same inside a mask: `.from_pipe(pipe)(layout, image=..., mask_image=..., strength=0.6)`."""
