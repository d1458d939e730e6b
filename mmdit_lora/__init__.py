"""Layout LoRA adapters for multimodal diffusion transformers (MM-DiT)."""

from mmdit_lora.layout import Box, Layout

__version__ = "0.1.0"
__all__ = ["Box", "Layout", "__version__"]
