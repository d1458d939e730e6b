"""Small stock pipelines of every family that the generic layout stream serves: one module each.

Each has `transformer()` and `pipeline(transformer)`, with random weights, in eval mode; `SAMPLING`, arguments of a call under
the base's own guidance; `CHECKPOINTS`, names of published ones that the family has presets for.
"""

from importlib import import_module
from typing import Any

from mmdit_lora.models.stream_families import STREAM_FAMILIES

MAKERS: dict[str, Any] = {name: import_module(f"tests.streams.{name}") for name in STREAM_FAMILIES}
