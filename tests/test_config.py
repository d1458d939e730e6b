"""The config: defaults, YAML as people write it, overrides, errors that name key, place and cure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError

from mmdit_lora.config.loading import SECTIONS, Config, load_config
from mmdit_lora.config.schema import bounds, limits_text, nested
from mmdit_lora.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = "base: data/tiny_base\ndata: some/folder\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_two_keys_are_enough_and_the_rest_are_the_agreed_defaults(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, REQUIRED))
    assert (config.base, config.method, config.output_dir) == ("data/tiny_base", "lora", "outputs/run")
    assert config.data.path == "some/folder"
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.1)
    assert config.lora.targets == ["layout_mlp.fc1", "layout_mlp.fc2"]
    assert (config.train.max_steps, config.train.learning_rate, config.train.adam_betas) == (1000, 1e-4, (0.9, 0.999))
    assert config.sample.layout_window == (0.0, 1.0)


@pytest.mark.parametrize(
    ("yaml_text", "key", "value"),
    [
        ("train: {learning_rate: 1e-4}", "train.learning_rate", 1e-4),  # a string in YAML 1.1
        ("train: {mixed_precision: no}", "train.mixed_precision", "no"),  # False in YAML 1.1
        ("train: {max_steps: 010}", "train.max_steps", 10),  # 8 in YAML 1.1
        ("tracking: {run_name: 2026-01-31}", "tracking.run_name", "2026-01-31"),  # a date in YAML 1.1
        ("output_dir: 2026-13-45 10:00:00", "output_dir", "2026-13-45 10:00:00"),  # to PyYAML a raw ValueError
        ("lora: {alpha: 8}", "lora.alpha", 8.0),
        ("lora:\n  # r: 8", "lora.r", 16),
        ("defaults: &d {r: 4}\n", None, None),
        ("data: {path: elsewhere, flip: true}", "data.flip", True),
    ],
)
def test_yaml_as_people_write_it(tmp_path: Path, yaml_text: str, key: str | None, value: object) -> None:
    base = REQUIRED if not yaml_text.startswith("data:") else "base: b\n"
    path = write(tmp_path, base + yaml_text)
    if key is None:
        with pytest.raises(InputError, match="unknown key 'defaults'"):
            load_config(path)
        return
    found = load_config(path)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_overrides_win_the_last_one_most(tmp_path: Path) -> None:
    path = write(tmp_path, REQUIRED + "train: {max_steps: 5}\n")
    overrides = ["train.max_steps=10", "train.max_steps=20", "data.flip=true", "lora.targets=[to_q]", "method=full"]
    config = load_config(path, overrides)
    assert (config.train.max_steps, config.data.flip, config.data.path) == (20, True, "some/folder")
    assert (config.lora.targets, config.method) == (["to_q"], "full")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.max_step=10", "did you mean 'max_steps'?"),
        ("max_steps=10", "did you mean 'train.max_steps'?"),
        ("train.r=10", "did you mean 'lora.r'?"),
        ("trian.max_steps=10", "did you mean 'train'?"),
        ("lora.r.x=1", "unknown key 'x'"),
        ("train.max_steps", "key=value"),
        ("train.max_steps='10'", "valid integer"),
        ("train.max_steps=1.5", "valid integer"),
        ("train.max_steps=true", "valid integer"),
        ("train.max_steps=0", "greater than or equal to 1"),
        ("train.learning_rate=fast", "valid number"),
        ("train.learning_rate=.nan", "finite"),
        ("train.adam_betas=[0.9]", "adam_betas"),
        ("train.adam_betas=[0.9, '0.99']", "valid number"),
        ("train.adam_betas=[0.9, 1.0]", "two numbers in [0, 1)"),
        ("data.flip=yes", "true or false"),
        ("data.bbox_format=yxyx", "'xyxy', 'xywh' or 'cxcywh'"),
        ("data.validation=./some/folder", "training folder itself"),
        ("data.validation_share=1", "less than 1"),
        ("train.layout_dropout=0.1", "method full"),
        ("sample.layout_window=[0.5, 0.5]", "from < to"),
        ("flow.shift=0", "from 0.001 to 1,000"),
        ("flow.inside_weight=0", "from 0.001 to 1,000"),
        ("train.learning_rate=1e300", "from 1e-10 to 1,000"),
        ("train.learning_rate=-.inf", "finite"),
        ("train.max_steps=10000000", "from 1 to 9,999,999"),
        ("lora.dropout=7", "from 0 to below 1"),
        ("lora.alpha_pattern={fc1: .nan}", "finite"),
        ('lora.rank_pattern={"(": 4}', "nor a regular expression"),
        ('output_dir="a\\0b"', "NUL"),
        ("tracking.run_name=2024", 'In quotes it is one: "2024"'),
        ("lora.start=''", "at least 1 character"),
        ("flow.guidance=-1", "greater than or equal to 0"),
        ("stream.attention=croos", "'siamese' or 'cross'"),
        ("stream.init=copy", "'copy_text', 'copy_image' or 'random'"),
        ("stream.phrase_tokens=0", "greater than or equal to 1"),
        ("attention=cross", "did you mean 'stream.attention'?"),
        ("train.gradient_checkpointing=0", "every k-th block"),
        ("train.gradient_checkpointing=often", "every k-th block"),
        ("train.quantization=int4", "'none', 'int8' or 'nf4'"),
        ("base=", "valid string"),
        ("lora=16", "key: value"),
        ("lora.r=[", "not YAML"),
        ("lora.r=" + "9" * 5000, "lora.r"),
    ],
)
def test_a_wrong_override_is_named_and_cured(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, REQUIRED), [override])
    assert says in str(caught.value)
    assert override[:12] in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("value", ["int8", "nf4"])
def test_a_quantised_base_stays_frozen(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, REQUIRED + f"train: {{quantization: {value}}}\n")
    with pytest.raises(InputError, match="method full") as caught:
        load_config(path, ["method=full"])
    assert "config.yaml:3" in str(caught.value)
    for method in ("lora", "layout_stream"):
        assert load_config(path, [f"method={method}"]).train.quantization == value


@pytest.mark.parametrize("value", [True, False, 1, 3])
def test_checkpointing_is_on_or_off_or_every_so_many_blocks(tmp_path: Path, value: object) -> None:
    config = load_config(write(tmp_path, REQUIRED), [f"train.gradient_checkpointing={str(value).lower()}"])
    assert config.train.gradient_checkpointing == value
    assert type(config.train.gradient_checkpointing) is type(value)
    again = tmp_path / "resolved.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        (REQUIRED + "train:\n  max_steps: 10\n  bach_size: 2\n", 5, "did you mean 'batch_size'?"),
        (REQUIRED + "train:\n  max_steps: ten\n", 4, "train.max_steps is 'ten'"),
        (REQUIRED + "train:\n  gradient_checkpointing: x\n", 4, "train.gradient_checkpointing is 'x'"),
        (REQUIRED + "lora: {r: 8}\nlora: {r: 4}\n", 4, "stands twice (first in line 3)"),
        (REQUIRED + "lora:\n  r: 8\n  r: 4\n", 5, "'r' stands twice"),
        (REQUIRED + "lora: !!python/object/apply:os.system ['true']\n", 3, "YAML tag"),
        (REQUIRED + "lora:\n  r: [1\n", 5, "not YAML"),
        (REQUIRED + "output_dir: !!timestamp 2024-01-01\n", 3, "YAML tag"),
        (REQUIRED + "license: !!binary aGk=\n", 3, "YAML tag"),
        ("data: d\nbase: {a: 1}\n", 2, "base is"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, text))
    assert f"config.yaml:{line}" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "missing"), [("base: b\n", "'data'"), ("data: d\n", "'base'"), ("base: b\ndata: {}\n", "'data.path'")]
)
def test_what_is_required(tmp_path: Path, text: str, missing: str) -> None:
    with pytest.raises(InputError, match=f"{missing} is missing"):
        load_config(write(tmp_path, text))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["tracking.run_name='1e-4'", "tracking.project='no'"],  # strings that read as something else unquoted
        [
            "tracking.run_name='a: \"b\" # ü'",
            "train.learning_rate=1e-5",
            "data.resolution=512",
            "method=full",
            "train.layout_dropout=0.1",
        ],
    ],
)
def test_the_resolved_config_reads_back_equal_with_any_reader(tmp_path: Path, overrides: list[str]) -> None:
    config = load_config(write(tmp_path, REQUIRED), overrides)
    again = tmp_path / "resolved.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config
    assert yaml.safe_load(config.to_yaml()) == config.model_dump(mode="json")


def test_a_config_does_not_change() -> None:
    config = Config.model_validate({"base": "b", "data": "d"})
    with pytest.raises(ValidationError):
        config.base = "other"  # type: ignore[misc]


def test_every_key_is_described_in_one_plain_line() -> None:
    for model in (Config, *SECTIONS.values()):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert "\n" not in field.description, name


def numbers(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted name and field of every key that takes a number, also in a list, a mapping or a union."""
    for name, field in model.model_fields.items():
        inner = nested(model, (name,))
        if inner is not None:
            yield from numbers(inner, (*above, name))
        elif re.search(r"\b(int|float)\b", str(field.annotation)):
            yield ".".join((*above, name)), field


NUMBERS = dict(numbers(Config))


def test_every_number_has_both_bounds() -> None:
    assert len(NUMBERS) > 50
    for key, field in NUMBERS.items():
        kinds = {type(limit) for limit in bounds(field)}
        assert kinds & {Ge, Gt}, key
        assert kinds & {Le, Lt}, key


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e300", "-1e300", "-777", "1" + "0" * 30, "-" + "9" * 400])
def test_absurd_numbers_are_refused_by_name_with_the_range(tmp_path: Path, value: str) -> None:
    path = write(tmp_path, REQUIRED)
    shapes = {"rank_pattern": "{fc1: %s}", "alpha_pattern": "{fc1: %s}", "resolutions": "[%s]"}
    for key, field in NUMBERS.items():
        is_pair = "tuple" in str(field.annotation)
        text = shapes.get(key.split(".")[-1], "[0.5, %s]" if is_pair else "%s")
        with pytest.raises(InputError) as caught:
            load_config(path, [f"{key}={text % value}"])
        assert key in str(caught.value), key
        if key != "version":
            assert limits_text(bounds(field)) in str(caught.value), key


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_the_repositorys_own_configs_are_valid_and_say_how_they_are_run(file: Path) -> None:
    load_config(file)
    head = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "mmdit-lora" in head
    assert "Hardware:" in head or "NOT RUN HERE" in head


# --- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0", "-1", "two", "true", "1.5", "999"])
def test_a_version_that_is_none_or_to_come_is_refused(tmp_path: Path, version: str) -> None:
    with pytest.raises(InputError, match="version") as caught:
        load_config(write(tmp_path, f"version: {version}\n{REQUIRED}"))
    assert caught.value.location == str(tmp_path / "config.yaml")
    assert ("newer" in str(caught.value)) == (version == "999")
