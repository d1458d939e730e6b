"""Numbers outside their range are refused by name; latents and images that are not finite are never written."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from mmdit_lora.cli.main import main
from mmdit_lora.config import ranges
from mmdit_lora.config.loading import Config
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.errors import InputError, NonFiniteError
from mmdit_lora.layout import Box, Layout
from mmdit_lora.pipelines import SamplingConfig, generate, load_pipeline
from mmdit_lora.training.trainer import train

BASE = "data/tiny_base"
LAYOUT = Layout("a red circle", (Box((0.1, 0.1, 0.6, 0.6), "a red circle"),))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(BASE)


def test_a_range_holds_what_it_says_and_no_nan() -> None:
    steps, share = ranges.STEPS, ranges.Range(0, 1, above=True)
    assert all(value in steps for value in (1, 10_000, np.int64(3)))
    assert not any(value in steps for value in (0, 10_001, 10**400, 1.0, True, math.nan, math.inf, "3", None))
    assert all(value in share for value in (1, 1e-300, np.float32(0.5)))
    assert not any(value in share for value in (0, 0.0, -0.0, math.nan, math.inf, -math.inf, 1.1, [0.5], 10**400))
    with pytest.raises(InputError, match=r"^x: is nan\n  hint: give a number above 0, up to 1$"):
        share.check(math.nan, "x")


def test_a_script_s_argument_is_refused_with_its_range(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=ranges.STEPS.parse)
    assert parser.parse_args(["--steps", "3"]).steps == 3
    for text in ("0", "x", "1.5", "9" * 5000):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(["--steps", text])
        assert caught.value.code == 2
        assert "argument --steps: is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layout_scale", math.nan),
        ("layout_scale", 1e30),
        ("guidance_scale", math.inf),
        ("guidance_scale", -1),
        ("num_inference_steps", 0),
        ("num_images_per_prompt", 0),
        ("sigmas", [1.0, math.nan]),
        ("height", 0),
        ("width", 10**9),
        ("max_sequence_length", 0),
        ("skip_layer_guidance_scale", math.inf),
        ("mu", math.nan),
        ("joint_attention_kwargs", {"scale": math.nan}),
    ],
)
def test_the_pipeline_refuses_by_name(pipe: Any, name: str, value: Any) -> None:
    named = "scale" if name == "joint_attention_kwargs" else name
    for layout in (LAYOUT, None):
        with pytest.raises(InputError, match=rf"^{named}: is "):
            pipe(layout, prompt="x", **{name: value})


def test_a_side_below_the_base_s_smallest_names_it(pipe: Any) -> None:
    with pytest.raises(InputError, match="is 2 pixels; this base takes multiples of 8 from 8 to 64"):
        pipe(LAYOUT, height=2)


@pytest.mark.parametrize(
    "options",
    [
        {"layout_scale": math.nan},
        {"guidance_scale": 1e30},
        {"steps": 0},
        {"batch_size": 0},
        {"size": (0, 64)},
        {"layout_window": (0.0, math.nan)},
        {"layout_window": (0.5, 0.5)},
    ],
)
def test_paint_settings_refuse_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^{next(iter(options))}: is "):
        SamplingConfig(**options)


@pytest.mark.parametrize("weights", [math.nan, [1.0, math.inf], 1e300, {"transformer_blocks": math.nan}, "1"])
def test_set_adapters_refuses_by_name(pipe: Any, weights: Any) -> None:
    for one in (pipe, pipe.transformer):
        with pytest.raises(InputError, match="the weight of an adapter: is "):
            one.set_adapters(["a"], weights)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--guidance", "inf"], "--guidance"),
        (["--guidance", "1e30"], "--guidance"),
        (["--guidance", "nan"], "--guidance"),
        (["--layout-scale", "nan"], "--layout-scale"),
        (["--layout-window", "0", "nan"], "--layout-window"),
        (["--layout-window", "0.5", "0.5"], "--layout-window"),
        (["--adapter", "F=nan"], "the weight in --adapter F=nan: is nan"),
        (["--adapter", "F=1e300"], "a number from -100 to 100"),
        (["--size", "0"], "--size"),
        (["--size", "999999"], "from 1 to 16,384"),
        (["--size", "2"], "--size: is 2 pixels; this base takes multiples of 8 from 8 to 64"),
        (["--steps", "9" * 5000], "--steps"),
    ],
)
def test_the_command_line_refuses_by_name(
    argv: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = tmp_path / "layout.json"
    layout.write_text('{"caption": "x", "boxes": []}', encoding="utf-8")
    out = tmp_path / "out"
    assert main(["sample", "--base", BASE, "--layout", str(layout), "--out", str(out), *argv]) == 2
    message = capsys.readouterr().err
    assert named in message
    assert len(message) < 2000
    assert not out.exists()


# -- what is not finite is not written ----------------------------------------------------------------------------------


class _Spoiled:
    """The VAE, whose decoder makes some images of all calls NaN, infinite."""

    def __init__(self, vae: Any, bad: set[int]) -> None:
        self.vae, self.bad, self.seen = vae, bad, 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        decoded = self.vae(*args, **options)
        for number in range(len(decoded[0])):
            if self.seen + number in self.bad:
                decoded[0][number, 0, 0, 0] = math.nan if number % 2 else math.inf
        self.seen += len(decoded[0])
        return decoded


def test_images_that_are_not_finite_are_counted_over_batches(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoiled = _Spoiled(pipe.vae.decode, {4, 5, 7})
    monkeypatch.setattr(pipe.vae, "decode", spoiled)
    with pytest.raises(NonFiniteError) as caught:
        generate(pipe, [LAYOUT] * 10, SamplingConfig(steps=1, batch_size=4), seed=0)
    assert str(caught.value).startswith(
        "3 of 8 images hold NaN or infinity: numbers 4, 5, 7 (float32); 2 more were not sampled; none of them is kept"
    )


def test_latents_that_are_not_finite_name_the_step(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = pipe.scheduler.step

    def step(noise: torch.Tensor, t: Any, latents: torch.Tensor, **options: Any) -> Any:
        (after,) = stock(noise, t, latents, **options)
        if pipe.scheduler.step_index == 2:
            after[1] = math.nan
        return (after,)

    monkeypatch.setattr(pipe.scheduler, "step", step)
    for kind, what in (("latent", "latents"), ("pil", "images"), ("np", "images"), ("pt", "images")):
        with pytest.raises(NonFiniteError) as caught:
            pipe([LAYOUT, LAYOUT], num_inference_steps=3, output_type=kind)
        assert str(caught.value).startswith(
            f"1 of 2 {what} hold NaN or infinity: number 1 (float32, the latents from step 2 on)"
        )


def test_sample_and_evaluate_write_nothing_of_what_is_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "data", DOMAINS["basic"], count=3, seed=0)
    bad: set[int] = set()

    def spoiled(base: str, **options: Any) -> Any:
        pipe = load_pipeline(base, **options)
        pipe.vae.decode = _Spoiled(pipe.vae.decode, bad)
        return pipe

    monkeypatch.setattr("mmdit_lora.pipelines.load_pipeline", spoiled)
    common = ["--base", BASE, "--steps", "1", "--batch-size", "6"]
    bad |= {4, 5}  # the VAE sees the data set's own three first
    argv = ["evaluate", *common, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "evaluated")]
    assert main(argv) == 1
    assert "error: 2 of 3 images hold NaN or infinity: numbers 1, 2" in capsys.readouterr().err
    assert not list((tmp_path / "evaluated").rglob("*.png"))
    assert not (tmp_path / "evaluated" / "report.json").exists()
    bad |= {0}
    argv = ["sample", *common, "--layout", str(tmp_path / "data"), "--out", str(tmp_path / "sampled")]
    assert main(argv) == 1
    assert "error: 1 of 3 images hold NaN or infinity: number 0" in capsys.readouterr().err
    assert not (tmp_path / "sampled").exists()


def test_training_goes_on_without_the_samples_that_are_not_finite(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = AutoencoderKL.decode
    monkeypatch.setattr(
        AutoencoderKL, "decode", lambda self, *args, **kwargs: _Spoiled(stock, {0})(self, *args, **kwargs)
    )
    length = {"max_steps": 2, "batch_size": 2, "sample_every": 2, "sample_count": 1, "checkpoint_every": 0}
    config = {"base": str(base), "data": str(data), "output_dir": str(tmp_path / "run"), "train": length}
    train(Config.model_validate(config))
    assert "no samples of step 2: 1 of 1 images hold NaN or infinity: number 0" in caplog.text
    assert (tmp_path / "run" / "adapter" / "README.md").is_file()
    assert not list((tmp_path / "run").rglob("*.png"))
