"""The model families: one visible dict. Nothing outside this room and the families' own files knows their names."""

from __future__ import annotations

from mmdit_lora.models import flux, sd3
from mmdit_lora.models.base import Family

FAMILIES: dict[str, Family] = {
    "sd3": sd3.FAMILY,
    "flux": flux.FAMILY,
}
