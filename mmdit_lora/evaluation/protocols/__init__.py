"""Benchmarks of the field, as their authors compute them: `PROTOCOLS` lists them.

A protocol reads its set's files unchanged (`read`), gives the queries of a detector and the questions of a judge (`queries`,
`questions`), computes the published scores from their answers (`score`), and writes the files that its own tools write
(`write_results`). `runner.score_protocol` does all of it for a folder of images; `published` puts the published scores
beside.
"""

from __future__ import annotations

from mmdit_lora.errors import unknown_key
from mmdit_lora.evaluation.protocols.base import Case, Observation, PublishedProtocol, Question, Region
from mmdit_lora.evaluation.protocols.coco import CocoLayout
from mmdit_lora.evaluation.protocols.cocomig import CocoMig
from mmdit_lora.evaluation.protocols.denselayout import DenseLayout
from mmdit_lora.evaluation.protocols.layoutsam import LayoutSamEval
from mmdit_lora.evaluation.protocols.overlaybench import OverLayBench

_ALL: tuple[PublishedProtocol, ...] = CocoLayout(), CocoMig(), LayoutSamEval(), DenseLayout(), OverLayBench()
PROTOCOLS = {protocol.name: protocol for protocol in _ALL}


def find_protocol(name: str) -> PublishedProtocol:
    """The protocol of that name. Raises `InputError` that names the nearest one."""
    if name not in PROTOCOLS:
        raise unknown_key(name, PROTOCOLS, location="--protocol")
    return PROTOCOLS[name]


__all__ = ["PROTOCOLS", "Case", "Observation", "PublishedProtocol", "Question", "Region", "find_protocol"]
