"""A small FLUX.3 klein base: a modular pipeline, called here as others are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers import ClassifierFreeGuidance, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.streams.common import TEMPLATE, flux2_vae, scheduler
from tests.streams.qwen_parts import SIZES, VISION, ids, qwen3_vl_processor

SAMPLING: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 80}
CHECKPOINTS = ("flux3-klein",)


def transformer() -> Flux3Transformer2DModel:
    return Flux3Transformer2DModel(
        in_channels=16,
        cond_in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8 * 8,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()


class Pipeline:
    """The modular pipeline with the call of others."""

    def __init__(self, **parts: Any) -> None:
        blocks = Flux3AutoBlocks()
        blocks.sub_blocks.pop("prompt_upsampler")
        self.modular = blocks.init_pipeline()
        self.modular.update_components(**parts)
        self.transformer = parts["transformer"]
        self.components = parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.modular, name)

    def set_progress_bar_config(self, **options: Any) -> None:
        self.modular.set_progress_bar_config(**options)

    def __call__(
        self, *, guidance_scale: float = 3.0, output_type: str = "latent", latents: Any = None, **options: Any
    ) -> Any:
        self.modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
        if latents is not None:
            rows, columns = options["height"] // 4, options["width"] // 4
            latents = latents.transpose(1, 2).unflatten(-1, (rows, columns))
        state = self.modular(output_type="pt", latents=latents, **options)
        painted = state.get("latents").flatten(2).transpose(1, 2)
        return SimpleNamespace(images=painted if output_type == "latent" else state.get("images"))


def pipeline(transformer: Any) -> Pipeline:
    text = {**SIZES, "num_hidden_layers": 32}  # the pipeline reads eight of them, up to the last
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids())
    processor = qwen3_vl_processor()
    processor.chat_template = TEMPLATE
    return Pipeline(
        scheduler=scheduler(shift=6.93),
        vae=flux2_vae(),
        text_encoder=Qwen3VLForConditionalGeneration(config).eval(),
        tokenizer=processor,
        transformer=transformer,
    )
