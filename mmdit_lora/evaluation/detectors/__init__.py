"""Detectors and judges as plug-ins: `DETECTORS` and `JUDGES` are all there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.evaluation.detectors.common import Detection, Detector, known_layouts, parse_options
from mmdit_lora.evaluation.detectors.judge import Judge
from mmdit_lora.evaluation.detectors.matching import BoxMatch, match
from mmdit_lora.evaluation.detectors.self_testing import JudgeTest, SelfTest, self_test, self_test_judge


@dataclass(frozen=True)
class Plugin:
    """One kind of detector or judge.

    Args:
        form: of its spec, for messages and help. help: what it is, in a line.
        module: of this package; imported only when one is opened, as most are heavy.
        opener, options: names in it of `opener(target, options, spec=, device=)` and of its options' class.
    """

    form: str
    help: str
    module: str
    opener: str
    options: str


DETECTORS: dict[str, Plugin] = {
    "shapes": Plugin("shapes", "exact reader of procedural scenes", "shapes", "open_shapes", "Options"),
    "torchvision": Plugin(
        "torchvision:MODEL=FILE.safetensors|COCO_V1",
        "a detector of torchvision's, with COCO's classes or those of the file",
        "torchvision",
        "open_torchvision",
        "TorchvisionOptions",
    ),
    "grounding-dino": Plugin(
        "grounding-dino:FOLDER_OR_HUB_ID",
        "open vocabulary, through transformers",
        "zero_shot",
        "open_grounding_dino",
        "GroundingDinoOptions",
    ),
    "owlv2": Plugin(
        "owlv2:FOLDER_OR_HUB_ID", "open vocabulary, through transformers", "zero_shot", "open_owlv2", "Owlv2Options"
    ),
}


def open_detector(spec: str = "shapes", *, device: str | None = None, **options: Any) -> Detector:
    """The detector that `spec` names: a key of `DETECTORS`, `:` and what it takes, `?key=value&key=value` for options.

    Args:
        device: "cpu", "cuda", ...; None: the first GPU where there is one.
        options: as behind the `?`, over them.

    Raises:
        InputError: no such detector or option, or no weights; the message then says how to get them.
    """
    detector: Detector = _open(DETECTORS, spec, "detector", device, options)
    return detector


JUDGES: dict[str, Plugin] = {
    "transformers": Plugin(
        "transformers:FOLDER_OR_HUB_ID",
        "an image-text-to-text model of transformers",
        "judge",
        "open_transformers",
        "TransformersOptions",
    ),
    "openai": Plugin(
        "openai:http://localhost:8000/v1#MODEL",
        "a server that speaks OpenAI's chat form",
        "judge",
        "open_endpoint",
        "EndpointOptions",
    ),
}


def open_judge(spec: str, *, device: str | None = None, **options: Any) -> Judge:
    """The judge that `spec` names: a key of `JUDGES`. Arguments and errors as in `open_detector`."""
    judge: Judge = _open(JUDGES, spec, "judge", device, options)
    return judge


def _open(plugins: dict[str, Plugin], spec: str, what: str, device: str | None, options: dict[str, Any]) -> Any:
    head, _, query = spec.partition("?")
    kind, _, target = head.partition(":")
    if kind not in plugins:
        error = unknown_key(kind, plugins)
        forms = ", ".join(plugin.form for plugin in plugins.values())
        raise InputError(
            f"no such {what}: {kind!r}", location=spec or None, hint=f"{error.hint}; the forms are {forms}"
        )
    given: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"the option {part!r} is not of the form key=value", location=spec)
        if given.setdefault(key, value) != value:
            raise InputError(f"gives {shown(key)} two values", location=spec, hint="keep one of the two")
    plugin = plugins[kind]
    module = import_module(f"{__name__}.{plugin.module}")
    parsed = parse_options(getattr(module, plugin.options), {**given, **options}, location=spec)
    opener: Callable[..., Any] = getattr(module, plugin.opener)
    return opener(target or None, parsed, spec=spec, device=device)


__all__ = [
    "DETECTORS",
    "JUDGES",
    "BoxMatch",
    "Detection",
    "Detector",
    "Judge",
    "JudgeTest",
    "Plugin",
    "SelfTest",
    "known_layouts",
    "match",
    "open_detector",
    "open_judge",
    "self_test",
    "self_test_judge",
]
