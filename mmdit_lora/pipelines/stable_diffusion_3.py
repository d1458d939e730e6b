"""The SD3 pipeline with a layout: it prepares inputs and schedules; the sampling loop is diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_output import StableDiffusion3PipelineOutput
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmdit_lora.data.collate import collate_layouts
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.models import LayoutInputs, LayoutSD3Transformer2DModel


class LayoutStableDiffusion3Pipeline(StableDiffusion3Pipeline):
    """diffusers' `StableDiffusion3Pipeline` that takes layouts.

    `from_pretrained` opens a folder or hub id with a layout stream, and a plain SD3 one, whose transformer gets a fresh
    stream with zero gates (so it paints as before until the stream is trained).

    Args:
        max_sequence_length: T5 tokens of the text that this base was trained with (zeros where it has no T5); the default
            of calls.
        num_inference_steps, guidance_scale: defaults of calls that this base states; diffusers' own where it states none.
            Everything else as in diffusers.
    """

    transformer: LayoutSD3Transformer2DModel
    vae: AutoencoderKL
    vae_scale_factor: int
    config: Any

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
        super().__init__(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(
            max_sequence_length=max_sequence_length,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """As diffusers' `from_pretrained`; the transformer becomes ours if it is not yet.

        Without `dtype` everything is fp32, as is diffusers' own default for its models. (transformers would take what the
        file holds, and a base saved in fp16 would open as a mixture that cannot be run.)
        """
        path = str(pretrained_model_name_or_path)
        if kwargs.get("dtype") is None and kwargs.get("torch_dtype") is None:
            kwargs["dtype"] = torch.float32
        if kwargs.get("transformer") is None:
            passed_on = (
                "dtype",
                "torch_dtype",
                "dtype",  # its new name
                "variant",
                "revision",
                "cache_dir",
                "token",
                "local_files_only",
                "use_safetensors",
            )
            model_kwargs = {key: kwargs[key] for key in passed_on if key in kwargs}
            kwargs["transformer"] = LayoutSD3Transformer2DModel.from_pretrained(
                path, subfolder="transformer", **model_kwargs
            )
        return super().from_pretrained(path, **kwargs)

    @torch.no_grad()
    def encode_phrases(self, phrases: Sequence[str]) -> Tensor:
        """Pooled CLIP-L beside pooled CLIP-G embeddings, (n, P); no T5, as in CreatiLayout."""
        pooled = [self._get_clip_prompt_embeds(list(phrases), clip_model_index=index)[1] for index in (0, 1)]
        return torch.cat(pooled, dim=-1)

    def prepare_layout(self, layouts: Sequence[Layout]) -> LayoutInputs:
        """A batch of layouts on the pipeline's device, phrases encoded, padded to the base's `layout_slots` if it states them.

        Raises:
            InputError: a layout has more boxes than the base has slots.
        """
        phrases = sorted({box.phrase for layout in layouts for box in layout.boxes})
        embeds: Any = self.encode_phrases(phrases) if phrases else []
        inputs = collate_layouts(
            layouts,
            dict(zip(phrases, embeds, strict=True)),
            phrase_dim=self.transformer.phrase_dim,
            slots=self.transformer.config.layout_slots,
        )
        return inputs.to(self._execution_device, self.transformer.dtype)

    @torch.no_grad()
    def __call__(
        self,
        layout: Layout | Sequence[Layout] | None = None,
        prompt: str | list[str] | None = None,
        *,
        layout_scale: float = 1.0,
        layout_window: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        sigmas: list[float] | None = None,
        max_sequence_length: int | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> StableDiffusion3PipelineOutput | tuple[Any, ...]:
        """Pictures that obey layouts. Every argument of diffusers' pipeline is taken too.

        Args:
            layout: one layout, a list (one picture each), or None: text to image, with the base's own result.
            prompt: texts instead of the layouts' captions, as many as there are layouts.
            layout_scale: factor of the layout residual; 0 = off.
            layout_window: the part of the sampling steps where the layout acts, (start, end) in [0, 1]. CreatiLayout
                samples with (0, 0.3); an adapter is best sampled as it was trained, over all steps.

        Raises:
            InputError: a layout has more boxes than the base has slots.
            ValueError: the numbers of prompts and layouts differ, or the window is empty or covers no step.
        """
        num_inference_steps = num_inference_steps or self.config.num_inference_steps
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        layouts = [layout] if isinstance(layout, Layout) else layout
        if layouts is not None:
            if not layouts:
                raise ValueError("no layout: give at least one, or None for text to image")
            if (
                kwargs.get("prompt_embeds") is not None
            ):  # encoded texts instead of the captions; diffusers takes only one
                given = len(kwargs["prompt_embeds"])
            else:
                texts = [item.caption for item in layouts] if prompt is None else prompt
                prompt = [texts] if isinstance(texts, str) else list(texts)
                given = len(prompt)
            if given != len(layouts):
                raise ValueError(f"{given} prompts for {len(layouts)} layouts")
            inputs = self.prepare_layout(layouts).repeat_interleave(num_images_per_prompt)
            if (
                guidance_scale > 1
            ):  # diffusers' batch is then [without, with], and "without" has neither text nor layout
                inputs = LayoutInputs.cat([inputs.dropped(), inputs])

            steps = len(sigmas) if sigmas is not None else num_inference_steps
            schedule = LayoutSchedule(layout_scale, layout_window, steps)
            joint_attention_kwargs = {
                **(joint_attention_kwargs or {}),
                "layout": inputs,
                "layout_scale": schedule(0),
            }
            user_callback = callback_on_step_end
            callback_on_step_end_tensor_inputs = getattr(
                user_callback, "tensor_inputs", callback_on_step_end_tensor_inputs
            )

            def callback_on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                # Schedulers of higher order call the model more often than there are steps: share out what is there.
                pipe._joint_attention_kwargs["layout_scale"] = schedule((step + 1) * steps / pipe.num_timesteps)
                return tensors if user_callback is None else user_callback(pipe, step, timestep, tensors)

        return super().__call__(
            prompt=prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            sigmas=sigmas,
            max_sequence_length=max_sequence_length or self.config.max_sequence_length,
            joint_attention_kwargs=joint_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            **kwargs,
        )


class LayoutSchedule:
    """Layout scale as a function of the sampling step: `scale` inside the window, 0 outside, where the stream is skipped.

    Raises:
        InputError: the window is not 0 <= start < end <= 1, or rounds to no step at all (`int(0.3 * 3)` is 0).
    """

    def __init__(self, scale: float, window: tuple[float, float], steps: int) -> None:
        start, end = window
        if not 0 <= start < end <= 1:
            raise InputError(f"is {window}", where="layout_window", cure="give 0 <= start < end <= 1")
        self.scale = scale
        self.first, self.last = int(start * steps), int(end * steps)
        if self.first == self.last:
            raise InputError(
                f"{window} covers none of {steps} steps",
                where="layout_window",
                cure="take more steps or a wider window",
            )

    def __call__(self, step: float) -> float:
        """Scale at `step` (0 = the first, the noisiest)."""
        return self.scale if self.first <= step < self.last else 0.0
