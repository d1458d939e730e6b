"""The pipelines of FLUX.1 (dev and schnell) with a layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.flux.pipeline_flux_img2img import FluxImg2ImgPipeline
from diffusers.pipelines.flux.pipeline_flux_inpaint import FluxInpaintPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmdit_lora.lora.style_names import DOUBLE_AND_SINGLE_BLOCKS, FamilyNames, encoder_prefixes
from mmdit_lora.models.flux import LayoutFluxTransformer2DModel
from mmdit_lora.pipelines.base import LayoutPipeline

# T5's length for a phrase in CreatiLayout, of which the first `phrase_tokens` are kept.
PHRASE_LENGTH = 77


class _Flux(LayoutPipeline):
    """What the family's three pipelines share.

    `guidance_scale` is the embedded guidance of a guidance-distilled base (dev; schnell ignores it), which sees the layout.
    `true_cfg_scale` with `negative_prompt` is guidance by a second call, which has neither text nor layout.

    Args:
        max_sequence_length, num_inference_steps, guidance_scale: defaults of calls that this base states; diffusers' own
            where it states none.
        default_sample_size: side of the latents where a call gives no size. Everything else as in diffusers.
    """

    transformer_class = LayoutFluxTransformer2DModel
    opens = ("LayoutFluxPipeline", "FluxPipeline")
    style_names = FamilyNames(DOUBLE_AND_SINGLE_BLOCKS, encoder_prefixes(clip_l="text_encoder", t5="text_encoder_2"))
    _lora_loadable_modules: ClassVar[list[str]] = ["transformer", "text_encoder", "text_encoder_2"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: PreTrainedModel,
        tokenizer_2: PreTrainedTokenizerBase,
        transformer: LayoutFluxTransformer2DModel,
        image_encoder: PreTrainedModel | None = None,
        feature_extractor: Any = None,
        max_sequence_length: int = 512,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        default_sample_size: int = 128,
    ) -> None:
        super().__init__(**{name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self.default_sample_size = default_sample_size

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str], device: torch.device | None = None) -> Tensor:
        """T5 embeddings of the first K tokens, (n, K, P), without a mask, as in CreatiLayout; or pooled CLIP, (n, P)."""
        device = device or self.encoding_device
        tokens = self.transformer.phrase_tokens
        if tokens is None:
            return self._get_clip_prompt_embeds(list(phrases), device=device)
        length = max(PHRASE_LENGTH, tokens)
        embeds = self._get_t5_prompt_embeds(list(phrases), max_sequence_length=length, device=device)
        return embeds[:, :tokens]

    @torch.no_grad()
    def encode_caption(self, caption: str | Sequence[str], device: torch.device | None = None) -> dict[str, Tensor]:
        length = self.config.max_sequence_length
        device = device or self.encoding_device
        texts = caption if isinstance(caption, str) else list(caption)
        embeds, pooled, _ = self.encode_prompt(texts, None, max_sequence_length=length, device=device)
        return {"embeds": embeds, "pooled": pooled}


class LayoutFluxPipeline(_Flux, FluxPipeline):
    """diffusers' `FluxPipeline` that takes layouts: see `LayoutPipeline`, also for `from_pretrained`."""


class _FromImage(_Flux):
    """Pipelines whose loop does not tell the transformer which of the two calls under `true_cfg_scale` it is in."""

    def __call__(self, *args: Any, true_cfg_scale: float = 1.0, **kwargs: Any) -> Any:
        negative = ("negative_prompt", "negative_prompt_embeds")
        guided = true_cfg_scale > 1 and any(kwargs.get(name) is not None for name in negative)
        if not guided:
            return super().__call__(*args, **kwargs)
        with every_second_call_without_layout(self.transformer):
            return super().__call__(*args, true_cfg_scale=true_cfg_scale, **kwargs)


class LayoutFluxImg2ImgPipeline(_FromImage, FluxImg2ImgPipeline):
    """The same from an image: `LayoutFluxImg2ImgPipeline.from_pipe(pipe)(layout, image=..., strength=0.6)`."""


class LayoutFluxInpaintPipeline(_FromImage, FluxInpaintPipeline):
    """The same inside a mask: `.from_pipe(pipe)(layout, image=..., mask_image=..., strength=0.6)`."""


@contextmanager
def every_second_call_without_layout(transformer: nn.Module) -> Iterator[None]:
    """diffusers calls the transformer twice a step, first with the prompt, then with the negative one: that has no layout."""
    negative = cycle((False, True))

    def drop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attention = kwargs.get("joint_attention_kwargs") or {}
        if next(negative) and attention.get("layout") is not None:
            kwargs = {**kwargs, "joint_attention_kwargs": {**attention, "layout": attention["layout"].dropped()}}
        return args, kwargs

    hook = transformer.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
