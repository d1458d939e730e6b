"""Layout in, picture out: thin subclasses of the diffusers pipelines."""

from mmdit_lora.pipelines.loading import load_pipeline, quiet
from mmdit_lora.pipelines.painting import PaintSettings, check_side, paint
from mmdit_lora.pipelines.stable_diffusion_3 import LayoutStableDiffusion3Pipeline

__all__ = ["LayoutStableDiffusion3Pipeline", "PaintSettings", "check_side", "load_pipeline", "paint", "quiet"]
