"""Layout-conditioned MM-DiT models: the layout stream and one file per family."""

from mmdit_lora.models.layout_stream import LayoutInputs, LayoutMLP, LayoutProcessor, LayoutStream
from mmdit_lora.models.sd3 import LayoutSD3Transformer2DModel

__all__ = ["LayoutInputs", "LayoutMLP", "LayoutProcessor", "LayoutSD3Transformer2DModel", "LayoutStream"]
