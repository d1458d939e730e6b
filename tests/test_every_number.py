"""Every number that a user can give, found in the sources themselves: refused by name, or the images are finite.

What is walked: the options of every verb, the fields of the config, boxes, the numbers of an adapter's config, the arguments
of the pipelines. A new one is found by itself; a text that holds numbers must be listed below.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import app, main
from mmdit_lora.config import ranges
from mmdit_lora.config.loading import Config
from mmdit_lora.config.schema import FilterSection
from mmdit_lora.errors import InputError
from mmdit_lora.lora import load_adapter, remove_adapter
from mmdit_lora.pipelines import load_pipeline

Capture = pytest.CaptureFixture[str]
ABSURD: list[Any] = [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, -(10**400)]
EDGES: list[Any] = [*ABSURD, 0, -1, 1, 0.0, -0.0, 1e-300, 0.5, 2**31, 2**63, 10**12]
number = st.sampled_from(EDGES) | st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**20), 10**20)
quick = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# -- the command line ---------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """An option or argument of a verb that is a number, or several."""

    path: tuple[str, ...]
    name: str
    annotation: Any
    within: ranges.Range | None

    def __str__(self) -> str:
        return " ".join((*self.path, self.name))


def _parameters(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Path of the verb, name of the parameter, its annotation."""
    for name, below in getattr(command, "commands", {}).items():
        yield from _parameters(below, (*path, name))
    if path and not hasattr(command, "commands"):
        for name, parameter in inspect.signature(command.callback, eval_str=True).parameters.items():
            yield path, name, parameter.annotation


def _numbers_of_the_command_line() -> Iterator[Option]:
    for path, name, annotation in _parameters(typer.main.get_command(app)):
        if not re.search(
            r"\b(int|float)\b", str(get_args(annotation)[0] if "Annotated" in str(annotation) else annotation)
        ):
            continue
        info = next((one for one in getattr(annotation, "__metadata__", ()) if hasattr(one, "param_decls")), None)
        declared = [text for text in (info.param_decls if info else ()) or () if text.startswith("--")]
        within = getattr(getattr(info, "callback", None), "within", None)
        yield Option(path, (declared or ["--" + name.strip("_").replace("_", "-")])[0], annotation, within)


NUMBERS = list(_numbers_of_the_command_line())


def test_the_walk_finds_the_options_of_the_verbs() -> None:
    found = {str(option) for option in NUMBERS}
    assert {
        "sample --guidance",
        "sample --layout-window",
        "plan --boxes",
        "resize --energy",
        "data make --seed",
    } <= found
    assert len(found) > 40


@pytest.mark.parametrize("option", NUMBERS, ids=str)
def test_an_option_is_refused_by_name_or_in_its_range(option: Option, capsys: Capture) -> None:
    """Without the verb's other options: what an option refuses is said before what is missing."""
    within = option.within
    assert within is not None, "states no range: declare it with `cli.options.number`"
    assert -(10**12) <= within.low <= within.high <= 10**12
    upper = (
        [repr(within.high)] if "tuple" in str(option.annotation) else []
    )  # of a window; its start lies below its end
    for given_value in [math.nan, math.inf, 1e300, 10**400, -1, 0, 0.5, within.low, within.high]:
        value = given_value
        assert main([*option.path, option.name, repr(value), *upper]) == 2
        error = capsys.readouterr().err
        assert len(error) < 2000
        if within.whole and isinstance(value, float) and value.is_integer():
            value = int(value)  # "3.0" is read as 3
        taken = value in within and not (upper and value == within.high)
        assert (option.name in error.split("\n")[0]) == (not taken), (value, error)


# Texts that hold numbers: what is written before the number, and a verb whose other options are there.
def _texts(value: str) -> Iterator[tuple[str, list[str]]]:
    layout = ["--prompt", "x"]
    sample = ["sample", "--base", "data/tiny_base", "--out", "nowhere_out"]
    yield "--adapter", [*sample, *layout, "--adapter", f"nowhere={value}"]
    yield "--size", [*sample, *layout, "--size", value]
    yield "--size", [*sample, *layout, "--size", f"64x{value}"]
    yield "--box", [*sample, *layout, "--box", f"0,0,{value},1=x"]
    yield "--box", [*sample, *layout, "--box-units", "permille", "--box", f"0,0,{value},1=x"]
    shard = ["data", "shard", "nowhere", "--out", "nowhere_out", "--size"]
    yield "--size", [*shard, f"{value}GB"]
    for key in FilterSection.model_fields:
        if not key.endswith("_phrases"):
            yield "--filter", [*shard, "1GB", "--filter", f"{key}={value}"]
    yield "--seeds", ["study", "rank", "nowhere.yaml", "--out", "nowhere_out", "--seeds", f"0,{value}"]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:8])
def test_a_number_inside_a_text_is_refused_by_name(value: Any, capsys: Capture) -> None:
    for named, argv in _texts(repr(value)):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert named in error, (argv, error)
        assert len(error) < 2000


# -- the config ---------------------------------------------------------------------------------------------------------


def _leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Keys of the config and what they may hold, sections walked."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _leaves(field.annotation, (*path, name))
        else:
            yield (*path, name), field.annotation


def _forms(annotation: Any) -> list[Any]:
    """How a number may stand in such a field: itself, in a list, under a name."""
    text = str(annotation)
    if "int" not in text.replace("Constraint", "") and "float" not in text:
        return []
    if "dict[" in text:
        return [lambda value: {"layout_mlp.fc1": value}]
    if "tuple[" in text:
        size = len(get_args(get_args(annotation)[0] if "Annotated" in text else annotation)) or 2
        return [lambda value: [value, *[0.5] * (size - 1)], lambda value: [*[0.5] * (size - 1), value]]
    if "list[" in text:
        return [lambda value: [value]]
    return [lambda value: value]


KEYS = [(path, form) for path, annotation in _leaves(Config) for form in _forms(annotation)]


def test_the_walk_finds_the_numbers_of_the_config() -> None:
    found = {".".join(path) for path, _ in KEYS}
    assert {
        "lora.alpha",
        "lora.rank_pattern",
        "train.adam_betas",
        "sample.layout_window",
        "data.filter.max_boxes",
    } <= found
    assert "train.gradient_checkpointing" in found
    assert "data.buckets.resolutions" in found
    assert len(found) > 50


@pytest.mark.parametrize(("path", "form"), KEYS, ids=lambda one: ".".join(one) if isinstance(one, tuple) else "")
def test_a_key_refuses_absurd_numbers_by_name(path: tuple[str, ...], form: Any) -> None:
    for value in ABSURD:
        data: dict[str, Any] = {"base": "b", "data": {"path": "d"}}
        place = data
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = form(value)
        with pytest.raises((ValidationError, InputError)) as caught:
            Config.model_validate(data)
        named = {part for error in caught.value.errors() for part in error["loc"]}
        assert path[-1] in named or path[-1] in str(caught.value), (path, value, str(caught.value))


# -- sampling: boxes, arguments, adapters -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(base: Path) -> Any:
    return load_pipeline(str(base))


def _finite(images: Any) -> None:
    assert np.isfinite(np.asarray(images)).all()


def _sample(pipe: Any, layout: Layout, **options: Any) -> None:
    """One image of few steps; the seed is fixed, the pixels are floats, so that nothing is rounded away."""
    generator = torch.Generator().manual_seed(0)
    steps = {"num_inference_steps": 2} | options
    _finite(pipe(layout, generator=generator, output_type="np", **steps).images)


def _box(values: list[Any]) -> Box | None:
    """Coordinates are named by their box; a refusal says the numbers."""
    try:
        box = Box(tuple(values), "a red circle")
    except InputError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "box" in message or "xyxy" in message
        return None
    assert all(0 <= value <= 1 for value in box.xyxy)
    assert box.xyxy[0] < box.xyxy[2]
    assert box.xyxy[1] < box.xyxy[3]
    return box


near = number | st.floats(-0.2, 1.2)


@settings(quick, max_examples=300)
@given(st.lists(near, min_size=4, max_size=4))
def test_a_box_is_refused_or_lies_in_its_image(values: list[Any]) -> None:
    _box(values)


@settings(quick, max_examples=15)
@given(*(st.sampled_from([0, 1, 0.0, 1e-300, 1e-30, 1e-7, 0.5, 1 - 1e-16, 0.999]) for _ in range(4)))
def test_boxes_that_are_taken_give_finite_images(
    pipe: Any, left: float, top: float, right: float, bottom: float
) -> None:
    box = _box([min(left, right), min(top, bottom), max(left, right), max(top, bottom)])
    if box is not None:
        _sample(pipe, Layout("x", (box,)), num_inference_steps=1)


LAYOUT = Layout("a red circle", (Box((0.1, 0.1, 0.6, 0.6), "a red circle"),))
# What decides how much is computed is tried at its edges by `Range` alone (test_ranges.py).
COSTLY = ("num_inference_steps", "num_images_per_prompt", "height", "width", "max_sequence_length")


@settings(quick, max_examples=40)
@given(name=st.sampled_from(sorted(ranges.OF_ARGUMENT)), value=number, data=st.data())
def test_an_argument_of_the_pipeline_is_refused_by_name_or_gives_finite_images(
    pipe: Any, name: str, value: Any, data: st.DataObject
) -> None:
    within = ranges.OF_ARGUMENT[name]
    if value in within and name in COSTLY:
        return
    if value not in within:
        options = {"joint_attention_kwargs": {"scale": value}} if name == "scale" else {name: value}
        with pytest.raises(InputError, match=f"^{name}: is "):
            pipe(LAYOUT, **options)
    value = data.draw(st.sampled_from([within.low, within.high]) | st.floats(within.low, within.high))
    if name in ("layout_scale", "guidance_scale"):
        _sample(pipe, LAYOUT, **{name: value})


@settings(quick, max_examples=12)
@given(
    scale=st.sampled_from([ranges.LAYOUT_SCALE.low, ranges.LAYOUT_SCALE.high, 0.0]),
    guidance=st.sampled_from([ranges.GUIDANCE.low, ranges.GUIDANCE.high, 1e-300]),
    weight=st.sampled_from([ranges.ADAPTER_WEIGHT.low, ranges.ADAPTER_WEIGHT.high, -0.0]),
)
def test_the_ends_of_all_ranges_together_give_finite_images(
    pipe: Any, adapter: Path, scale: float, guidance: float, weight: float
) -> None:
    load_adapter(pipe.transformer, adapter, adapter_name="ends")
    try:
        pipe.set_adapters(["ends"], [weight])
        _sample(pipe, LAYOUT, layout_scale=scale, guidance_scale=guidance)
    finally:
        remove_adapter(pipe.transformer, "ends")


@settings(quick, max_examples=30)
@given(value=number)
def test_a_weight_of_an_adapter_is_refused_by_name_or_finite(pipe: Any, adapter: Path, value: Any) -> None:
    load_adapter(pipe.transformer, adapter, adapter_name="weighed")
    try:
        if value not in ranges.ADAPTER_WEIGHT:
            with pytest.raises(InputError, match="the weight of an adapter: is "):
                pipe.transformer.set_adapters(["weighed"], [value])
        else:
            pipe.transformer.set_adapters(["weighed"], [value])
            _sample(pipe, LAYOUT, num_inference_steps=1)
    finally:
        remove_adapter(pipe.transformer, "weighed")


def _numbers(config: dict[str, Any]) -> list[str]:
    """The keys of an adapter's config that hold a number, or numbers by name."""
    plain = [key for key, value in config.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    return [*plain, "rank_pattern", "alpha_pattern"]


@settings(quick, max_examples=80)
@given(value=number, data=st.data())
def test_a_number_of_an_adapter_s_config_is_refused_by_name_or_gives_finite_images(
    pipe: Any, adapter: Path, tmp_path_factory: pytest.TempPathFactory, value: Any, data: st.DataObject
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    keys = _numbers(config)
    assert {"r", "lora_alpha", "lora_dropout"} <= set(keys)
    key = data.draw(st.sampled_from(keys))
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    config[key] = {"layout_processor.layout_mlp.fc1": value} if key.endswith("pattern") else value
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        load_adapter(pipe.transformer, folder, adapter_name="changed")
    except InputError as error:
        message = str(error)
    else:
        message = ""
    if message:
        named = (key, key.split("_")[-1], "rank" if key in ("r", "rank_pattern") else "alpha", "shape")
        assert any(name in message for name in named), (key, value, message)
        assert len(message) < 2000
        return
    try:
        pipe.set_adapters(["changed"], [1.0])
        _sample(pipe, LAYOUT, num_inference_steps=1)
    finally:
        remove_adapter(pipe.transformer, "changed")
        shutil.rmtree(folder)
