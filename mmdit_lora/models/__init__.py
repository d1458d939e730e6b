"""Layout-conditioned MM-DiT models: the layout stream, and the families that carry it."""

from mmdit_lora.models.base import LayoutModelMixin
from mmdit_lora.models.families import FAMILIES, Family, family_of
from mmdit_lora.models.flux import LayoutFluxTransformer2DModel
from mmdit_lora.models.generic_stream import add_layout_stream, remove_layout_stream
from mmdit_lora.models.init import StreamInit
from mmdit_lora.models.layout_stream import (
    LayoutInputs,
    LayoutMLP,
    LayoutProcessor,
    LayoutStream,
    SingleLayoutStream,
)
from mmdit_lora.models.sd3 import LayoutSD3Transformer2DModel
from mmdit_lora.models.stream_files import load_layout_stream, save_layout_stream

__all__ = [
    "FAMILIES",
    "Family",
    "LayoutFluxTransformer2DModel",
    "LayoutInputs",
    "LayoutMLP",
    "LayoutModelMixin",
    "LayoutProcessor",
    "LayoutSD3Transformer2DModel",
    "LayoutStream",
    "SingleLayoutStream",
    "StreamInit",
    "add_layout_stream",
    "family_of",
    "load_layout_stream",
    "remove_layout_stream",
    "save_layout_stream",
]
