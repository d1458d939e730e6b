"""Benchmarks of the field, as their authors compute them: `PROTOCOLS` lists them.

A protocol reads its set's files unchanged (`read`), says what a detector and a judge are asked (`queries`, `questions`), turns
what they saw into the published figures (`score`), and writes the files that its own tools write (`write_results`).
`look.look_at` does the seeing; `published.beside` puts the published figures beside one's own.
"""

from __future__ import annotations

from mmdit_lora.errors import unknown_key
from mmdit_lora.evaluation.protocols.coco import CocoLayout
from mmdit_lora.evaluation.protocols.cocomig import CocoMig
from mmdit_lora.evaluation.protocols.common import Case, PublishedProtocol, Question, Seen, Thing
from mmdit_lora.evaluation.protocols.denselayout import DenseLayout
from mmdit_lora.evaluation.protocols.layoutsam import LayoutSamEval
from mmdit_lora.evaluation.protocols.overlaybench import OverLayBench

PROTOCOLS: dict[str, PublishedProtocol] = {
    "coco": CocoLayout(),
    "coco-mig": CocoMig(),
    "layoutsam-eval": LayoutSamEval(),
    "denselayout": DenseLayout(),
    "overlaybench": OverLayBench(),
}


def find_protocol(name: str, *, option: str = "--protocol") -> PublishedProtocol:
    """The protocol of that name. Raises `InputError` that names the nearest one."""
    if name not in PROTOCOLS:
        raise unknown_key(name, PROTOCOLS, location=option)
    return PROTOCOLS[name]


__all__ = ["PROTOCOLS", "Case", "PublishedProtocol", "Question", "Seen", "Thing", "find_protocol"]
