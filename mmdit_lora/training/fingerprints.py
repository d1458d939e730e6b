"""What a run is made of, by content: fingerprints decide whether it may go on, not the places where things lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mmdit_lora.errors import InputError
from mmdit_lora.layout import Layout
from mmdit_lora.lora import base_fingerprint
from mmdit_lora.pipelines import LayoutPipeline

# Keys of the config that say where something lies; the fingerprints say what it is (entries of a cache are found by content).
PLACES = ("base", "stream_weights", "data.path", "data.validation", "data.cache", "prior.layouts", "lora.start")
_NAMES = {
    "base": "base",
    "encoders": "VAE or a text encoder of the base",
    "data": "data",
    "validation": "validation set",
    "prior": "set of prior.layouts",
    "start": "adapter of lora.start",
}
_SHOWN_DIGITS = 12


def fingerprint_encoders(pipe: LayoutPipeline) -> str:
    """SHA-256 over all that makes latents and embeddings: weights (see `base_fingerprint`), vocabularies, scales of the VAE."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, nn.Module) and name != "transformer":
            digest.update(f"{name} {base_fingerprint(part)}\n".encode())
        elif hasattr(part, "get_vocab"):
            entry = (sorted(part.get_vocab().items()), part.model_max_length)
            digest.update(f"{name} {json.dumps(entry)}\n".encode())
    scales = [getattr(pipe.vae.config, key, None) for key in ("scaling_factor", "shift_factor")]
    digest.update(json.dumps([scales, pipe.config.max_sequence_length]).encode())
    return digest.hexdigest()


def fingerprint_layouts(layouts: Sequence[Layout]) -> str:
    """SHA-256 over layouts, in order."""
    return hashlib.sha256(json.dumps([layout.to_dict() for layout in layouts], sort_keys=True).encode()).hexdigest()


def knows_places(saved: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's fingerprints cover all of `PLACES`; those of earlier versions do not."""
    return "encoders" in saved


def first_change(saved: Mapping[str, str], now: Mapping[str, str], *, location: str) -> InputError | None:
    """The first thing that is not what the run was started with.

    Args:
        saved: the fingerprints in the checkpoint, which is at `location`.
    """
    for name in _NAMES:
        before, after = saved.get(name), now.get(name)
        if before == after or (before is None and not knows_places(saved)):
            continue
        if name in ("data", "validation") and saved.get("split") != now.get("split"):
            return InputError(
                "the images that data.validation_share holds out are not those that this run was started with: versions "
                "before held out others",
                location=location,
                hint="finish the run with the version that started it, or start a new one in another output_dir",
            )
        digests = [digest[:_SHOWN_DIGITS] if digest else "none" for digest in (after, before)]
        return InputError(
            f"the {_NAMES[name]} is not the one that this run was started with: {digests[0]}, and {digests[1]} in the "
            "checkpoint",
            location=location,
            hint="put it back as it was (its place does not matter), or start a new run in another output_dir",
        )
    return None
