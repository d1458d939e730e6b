"""The base without its transformer's weights: what `data cache` encodes with, and what `data check run.yaml` asks for sizes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.data.cache import EncodingCache
from mmdit_lora.training.fill_cache import fill_cache
from mmdit_lora.training.load_base import load_base, open_encoders
from mmdit_lora.training.setup import run_buckets
from mmdit_lora.training.trainer import train
from tests.data_makers import line, make_image, objects
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer


def config_of(base: Path, data: Path, out: Path, **section: Any) -> Config:
    length = {"max_steps": 2, "batch_size": 2, "checkpoint_every": 0, "sample_every": 0, "validate_every": 0}
    return Config.model_validate(
        {"base": str(base), "output_dir": str(out), "data": {"path": str(data), **section}, "train": length}
    )


def without_weights(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("family", ["three encoders", "phrase tokens"])
def test_the_cache_is_filled_without_the_transformers_weights(
    family: str, base: Path, data: Path, tmp_path: Path
) -> None:
    if family == "phrase tokens":
        base = tmp_path / "whole"
        transformer = tiny_flux_transformer(phrase_tokens=3)
        tiny_flux_pipeline(tmp_path / "tokenizer", transformer).save_pretrained(base)
    hollow = without_weights(base, tmp_path / "hollow")
    fill_cache(config_of(hollow, data, tmp_path), EncodingCache(tmp_path / "cache"))
    report = train(config_of(base, data, tmp_path / "run", cache=str(tmp_path / "cache"))).report
    # What it was filled with is what the run, with its own encoders, asks for.
    assert set(report["cache"]["misses"]) <= {"weights"}  # hashes of the files of another folder
    assert report["cache"]["hits"]["latents"] > 0
    uncached = train(config_of(base, data, tmp_path / "plain")).report
    assert uncached["cache"] is None
    assert uncached["held_out_loss"] == report["held_out_loss"]


def test_sizes_are_known_without_texts_and_weights(base: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(base, data, tmp_path, resolution=32, buckets={"ratios": ["1:1", "2:1"]})
    light = open_encoders(config, torch.float32, texts=False)
    assert light.text_encoder is None
    assert light.transformer.device.type == "meta"
    assert run_buckets(config, light) == run_buckets(config, load_base(config, torch.float32)[0])


def test_a_run_tells_what_it_read_and_made(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(config_of(base, data, tmp_path / "run", cache=str(tmp_path / "cache")).to_yaml())
    assert main(["train", str(path)]) == 0
    assert f"cache {tmp_path / 'cache'}: " in (said := capsys.readouterr().err)
    assert " 0 made" not in said
    assert main(["train", str(path), f"output_dir={tmp_path / 'again'}"]) == 0
    assert " 0 made" in capsys.readouterr().err


# --- data check with a run's config -----------------------------------------------------------------------------------


@pytest.fixture
def oblong(base: Path, tmp_path: Path) -> Path:
    """A config, and images of three shapes whose boxes lie at the ends of the long side."""
    folder = tmp_path / "set"
    lines = []
    for number, size in enumerate([(120, 60), (120, 60), (60, 120), (64, 64)]):
        make_image(folder / f"{number}.png", size)
        ends = objects([[0.0, 0.0, 0.12, 0.12], [0.88, 0.88, 1.0, 1.0]], ["a", "b"])
        lines.append(json.dumps(line(f"{number}.png", caption="a, b", objects=ends)))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "run.yaml"
    config = config_of(base, folder, tmp_path / "run", resolution=32, validation_share=0.0)
    path.write_text(config.to_yaml())
    return path


def findings(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    report = json.loads(capsys.readouterr().out)
    return {found["name"]: found for found in report["findings"]} | {"buckets": report["buckets"]}


def test_a_set_is_judged_as_the_run_would_use_it(oblong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(oblong), "--json"]) == 0
    square = findings(capsys)
    assert square["cropped-boxes"]["count"] == 6
    assert square["buckets"] == {}
    text = oblong.read_text().replace("ratios: []", 'ratios: ["1:1", "2:1", "1:2"]')
    assert text != oblong.read_text()
    oblong.write_text(text)
    assert main(["data", "check", str(oblong), "--json"]) == 0
    shaped = findings(capsys)
    assert "cropped-boxes" not in shaped
    assert sum(shaped["buckets"].values()) == 4
    assert shaped["sparse-buckets"]["count"] == 2  # one image each, and a batch of two


@pytest.mark.parametrize(
    "option",
    [["--from", "voc"], ["--resolution", "64"], ["--against", "x"], ["--base", "b"], ["--bbox-format", "xywh"]],
)
def test_what_the_config_says_is_not_said_twice(
    oblong: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(oblong), *option]) == 2
    assert f"{option[0]}: is said by the config" in capsys.readouterr().err


def test_images_are_sampled_in_the_shape_that_was_asked_for(base: Path, tmp_path: Path) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({"caption": "c", "boxes": [{"xyxy": [0.1, 0.1, 0.5, 0.6], "phrase": "a red circle"}]}))
    command = ["sample", "--base", str(base), "--layout", str(layout), "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--size", "32x24"]) == 0
    with Image.open(tmp_path / "out" / "0000.png") as image:
        assert image.size == (32, 24)
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["settings"]["size"] == [24, 32]
