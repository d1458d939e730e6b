"""Layout in, image out: thin subclasses of the diffusers pipelines."""

from mmdit_lora.pipelines.base import LayoutPipeline
from mmdit_lora.pipelines.flux import LayoutFluxImg2ImgPipeline, LayoutFluxInpaintPipeline, LayoutFluxPipeline
from mmdit_lora.pipelines.loading import PIPELINES, load_pipeline, quiet
from mmdit_lora.pipelines.sampling import SamplingConfig, generate
from mmdit_lora.pipelines.stable_diffusion_3 import (
    LayoutStableDiffusion3Img2ImgPipeline,
    LayoutStableDiffusion3InpaintPipeline,
    LayoutStableDiffusion3Pipeline,
)

__all__ = [
    "PIPELINES",
    "LayoutFluxImg2ImgPipeline",
    "LayoutFluxInpaintPipeline",
    "LayoutFluxPipeline",
    "LayoutPipeline",
    "LayoutStableDiffusion3Img2ImgPipeline",
    "LayoutStableDiffusion3InpaintPipeline",
    "LayoutStableDiffusion3Pipeline",
    "SamplingConfig",
    "generate",
    "load_pipeline",
    "quiet",
]
