"""The families that the generic layout stream serves: one file each, and this table."""

from __future__ import annotations

from mmdit_lora.models.stream_families.base import StreamFamily
from mmdit_lora.models.stream_families.chroma import CHROMA
from mmdit_lora.models.stream_families.flux import FLUX
from mmdit_lora.models.stream_families.flux2 import FLUX2
from mmdit_lora.models.stream_families.flux3 import FLUX3
from mmdit_lora.models.stream_families.ideogram4 import IDEOGRAM4
from mmdit_lora.models.stream_families.krea2 import KREA2
from mmdit_lora.models.stream_families.longcat import LONGCAT
from mmdit_lora.models.stream_families.lumina2 import LUMINA2
from mmdit_lora.models.stream_families.ovis import OVIS
from mmdit_lora.models.stream_families.qwen_image import QWEN_IMAGE
from mmdit_lora.models.stream_families.qwen_image21 import QWEN_IMAGE21
from mmdit_lora.models.stream_families.sd3 import SD3
from mmdit_lora.models.stream_families.z_image import Z_IMAGE

__all__ = ["STREAM_FAMILIES", "StreamFamily", "family_of_class"]

STREAM_FAMILIES: dict[str, StreamFamily] = {
    family.name: family
    for family in (
        SD3,
        FLUX,
        FLUX2,
        Z_IMAGE,
        QWEN_IMAGE,
        KREA2,
        LUMINA2,
        QWEN_IMAGE21,
        CHROMA,
        LONGCAT,
        OVIS,
        IDEOGRAM4,
        FLUX3,
    )
}


def family_of_class(name: str) -> StreamFamily:
    """The family of a diffusers transformer class.

    Raises:
        ValueError: none is described; it lists those that are.
    """
    for family in STREAM_FAMILIES.values():
        if family.transformer == name:
            return family
    known = ", ".join(sorted(family.transformer for family in STREAM_FAMILIES.values()))
    raise ValueError(f"no layout stream for a {name}; known are {known}")
