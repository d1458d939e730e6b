"""Detectors and judges as plug-ins: `DETECTORS` and `JUDGES` list them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

from pydantic import ValidationError

from mmdit_lora.errors import InputError, shown, unknown_key
from mmdit_lora.evaluation.detectors.base import Detection, Detector, Options, known_layouts
from mmdit_lora.evaluation.detectors.judge import Judge
from mmdit_lora.evaluation.detectors.matching import BoxMatch, match
from mmdit_lora.evaluation.detectors.self_testing import JudgeTest, SelfTest, self_test, self_test_judge


class Plugin(NamedTuple):
    """One kind of detector or judge: the form of its spec, and its class, `MODULE.CLASS` of this package.

    The class has a field `options_type` and is called with (target, options, spec=, device=). Its module is imported
    when one is opened, as most are heavy.
    """

    form: str
    path: str


DETECTORS = {
    "shapes": Plugin("shapes", "shapes.ShapesDetector"),
    "torchvision": Plugin("torchvision:MODEL=FILE.safetensors|COCO_V1", "torchvision.TorchvisionDetector"),
    "grounding-dino": Plugin("grounding-dino:FOLDER_OR_HUB_ID", "zero_shot.GroundingDino"),
    "owlv2": Plugin("owlv2:FOLDER_OR_HUB_ID", "zero_shot.Owlv2"),
}
JUDGES = {
    "transformers": Plugin("transformers:FOLDER_OR_HUB_ID", "judge.TransformersJudge"),
    "openai": Plugin("openai:http://localhost:8000/v1#MODEL", "judge.EndpointJudge"),
}


def open_detector(spec: str = "shapes", *, device: str | None = None, **options: Any) -> Detector:
    """The detector that `spec` names: a key of `DETECTORS`, `:` and its target, `?key=value&key=value` for options.

    Args:
        device: "cpu", "cuda", ...; None: the first GPU if there is one.
        options: as after the `?`; these win.

    Raises:
        InputError: no such detector or option, or no weights; the message then says how to get them.
    """
    detector: Detector = _open(DETECTORS, spec, "detector", device, options)
    return detector


def open_judge(spec: str, *, device: str | None = None, **options: Any) -> Judge:
    """The judge that `spec` names: a key of `JUDGES`. Arguments and errors as in `open_detector`."""
    judge: Judge = _open(JUDGES, spec, "judge", device, options)
    return judge


def _open(plugins: dict[str, Plugin], spec: str, what: str, device: str | None, options: dict[str, Any]) -> Any:
    head, _, query = spec.partition("?")
    kind, _, target = head.partition(":")
    if kind not in plugins:
        forms = ", ".join(plugin.form for plugin in plugins.values())
        hint = f"{unknown_key(kind, plugins).hint}; the forms are {forms}"
        raise InputError(f"no such {what}: {kind!r}", location=spec or None, hint=hint)
    given: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"the option {part!r} is not of the form key=value", location=spec)
        if given.setdefault(key, value) != value:
            raise InputError(f"gives {shown(key)} two values", location=spec, hint="keep one of the two")
    module, _, name = plugins[kind].path.partition(".")
    plugin: Any = getattr(import_module(f"{__name__}.{module}"), name)
    parsed = _parse_options(plugin.options_type, given | options, spec)
    return plugin(target or None, parsed, spec=spec, device=device)


def _parse_options(kind: type[Options], values: dict[str, Any], spec: str) -> Options:
    for key in values:
        if key not in kind.model_fields:
            raise unknown_key(key, kind.model_fields, location=spec)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        what = f"{key} is {shown(values[key])}: {first['msg'].lower()}"
        raise InputError(what, location=spec, hint=f"{key}: {kind.model_fields[key].description}") from None


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
