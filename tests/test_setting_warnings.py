"""What is said before step 1 of settings that may mean something else than was intended: one line each, no more."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from mmdit_lora.config.loading import Config
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.pipelines.sampling import long_texts
from mmdit_lora.training.preflight import FEW_IMAGES, idle_keys, preflight, setting_warnings
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.test_preflight import short_texts
from tests.test_trainer import make_config


@pytest.fixture(scope="module")
def short(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose texts are read whole."""
    return short_texts(data, tmp_path_factory.mktemp("short") / "shapes")


def said(base: Path, data: Path, out: Path, **changes: Any) -> list[str]:
    return [found for found, _ in setting_warnings(prepare_run(make_config(base, data, out, **changes)))]


def test_nothing_is_said_of_a_run_as_it_is_meant(base: Path, short: Path, tmp_path: Path) -> None:
    assert said(base, short, tmp_path) == []
    plain = Config.model_validate({"base": str(base), "output_dir": str(tmp_path / "run"), "data": str(short)})
    assert list(setting_warnings(prepare_run(plain))) == []


@pytest.mark.parametrize(
    ("train_section", "text"),
    [
        (
            {"max_steps": 6, "warmup_steps": 1000, "learning_rate": 1e-3},
            "train.warmup_steps 1,000 is not below max_steps 6: the learning rate reaches 5e-06 at most, 0.5 % of what is set",
        ),
        ({"warmup_steps": 4}, "the learning rate reaches 0.0075 at most, 75 % of what is set"),
        ({"sample_every": 5}, "train.sample_every 5 is beyond max_steps 4: no image is sampled"),
        ({"validate_every": 9}, "train.validate_every 9 is beyond max_steps 4: the only validation is at the end"),
        ({"checkpoint_every": 9}, "train.checkpoint_every 9 is beyond max_steps 4: the only checkpoint is at the end"),
        ({"ema_decay": 0.999}, "averages over some 1,000 steps, and the run has 4: the decay rises to 0.308 only"),
        ({"final": "best"}, "train.final best has 0 validations to choose from"),
        ({"final": "best", "validate_every": 4}, "train.final best has 1 validation to choose from"),
        ({"early_stop": 3, "validate_every": 2}, "train.early_stop 3 never comes: the run is validated 2 times"),
    ],
)
def test_a_setting_that_does_not_fit_the_run_is_said_once(
    base: Path, short: Path, tmp_path: Path, train_section: dict[str, Any], text: str
) -> None:
    run = prepare_run(make_config(base, short, tmp_path, train=train_section))
    report = preflight(run, costly=False)
    lines = [check.found for check in report.checks if check.state == "warning"]
    assert len(lines) == 1
    assert text in lines[0]
    assert [check.name for check in report.checks if check.state == "warning"] == ["settings"]
    assert all(check.hint for check in report.checks if check.state == "warning")


def test_the_rate_that_a_long_warm_up_is_said_to_reach_is_the_one_it_reaches(
    base: Path, short: Path, tmp_path: Path
) -> None:
    rates: list[float] = []
    config = make_config(base, short, tmp_path, train={"warmup_steps": 8, "max_steps": 3, "preflight": False})
    train(config, callbacks=[Calls(step=lambda record: rates.append(record.learning_rate))])
    (line,) = [found for found, _ in setting_warnings(prepare_run(config, resume=True))]
    assert f"reaches {max(rates):g} at most" in line


def test_keys_without_effect_are_one_line(base: Path, short: Path, tmp_path: Path) -> None:
    flow = {"min_snr_gamma": 3.0, "mode_scale": 1.0}
    (line,) = said(base, short, tmp_path, flow=flow, prior={"weight": 2.0})
    assert line == (
        "without effect here: flow.mode_scale (flow.timesteps is logit_normal); flow.min_snr_gamma (flow.weighting is none); "
        "prior.weight (prior.layouts is null)"
    )
    full = make_config(base, short, tmp_path, method="full", lora={"r": 4})
    assert list(idle_keys(full)) == ["lora.r (method is full)"]


def test_the_hold_out_is_named_where_it_leaves_too_few(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path, train={"batch_size": 10}))
    (failed,) = preflight(run, costly=False).failed
    assert failed.found == (
        "a step takes 10 images, and there are 9 to train on: 3 of 12 are held out by data.validation_share 0.25"
    )
    assert failed.hint is not None
    assert "data.validation_share=0" in failed.hint


def test_long_captions_are_counted_in_one_line_and_not_told_one_by_one(
    base: Path, short: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "long"
    shutil.copytree(short, folder)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, entry in enumerate(lines):
        if number % 2:
            entry["caption"] = f"{'abcdefg ' * 5}{number}"
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = {"max_steps": 1, "sample_every": 1, "sample_count": 1}
    config = make_config(
        base,
        folder,
        tmp_path / "run",
        data={"path": str(folder), "validation_share": 0.25},
        train=section,
        sample={"steps": 1},
    )
    looked: list[Any] = []
    with caplog.at_level(logging.WARNING):
        train(config, callbacks=[Calls(preflight=looked.append)])
    (first,) = [check for check in looked[0].checks if check.name == "data"]
    assert first.state == "warning"
    assert "6 of 12 captions are longer than the 16 tokens that CLIP reads: the rest is cut off there" in first.found
    told = [record.getMessage() for record in caplog.records]
    assert not [text for text in told if "truncated" in text or "indexing errors" in text]
    # Whoever asks the pipeline itself still hears of it.
    with caplog.at_level(logging.WARNING):
        load_pipeline(str(base)).encode_caption("abcdefg " * 5)
    assert [record for record in caplog.records if "was truncated" in record.getMessage()]


def test_texts_are_counted_as_the_encoders_cut_them(base: Path) -> None:
    pipe = load_pipeline(str(base))
    reads = 16 - 2  # start and end
    assert long_texts(pipe, ["a" * reads], "captions") is None
    assert long_texts(pipe, ["a" * (reads + 1)], "captions") is not None
    assert long_texts(pipe, ["a", "b" * 99], "phrases") == (
        "1 of 2 phrases are longer than the 16 tokens that CLIP reads: the rest is cut off there"
    )
    assert long_texts(pipe, [], "captions") is None


def test_a_language_model_reads_as_many_tokens_as_the_base_says(flux2: Path) -> None:
    pipe = load_pipeline(str(flux2))
    limit = pipe.config.max_sequence_length
    assert long_texts(pipe, ["a" * (limit - 2)], "captions") is None  # not CLIP's 77
    found = long_texts(pipe, ["a", "a b " * limit], "captions")
    assert (
        found
        == f"1 of 2 captions are longer than the {limit} tokens that the text encoder reads: the rest is cut off there"
    )
    assert long_texts(pipe, ["a b " * limit], "phrases") is None


def test_few_images_for_a_layout_stream_are_told(flux2: Path, short: Path, tmp_path: Path) -> None:
    def warnings(path: str) -> list[str]:
        stream = {"method": "layout_stream", "stream": {"width": 16}}
        config = make_config(flux2, short, tmp_path, **stream, data={"path": path, "resolution": 64})
        return [found for found, _ in setting_warnings(prepare_run(config))]

    assert warnings(str(short)) == [
        f"a layout stream is to learn from 11 images: below some {FEW_IMAGES:,} it learns to obey few boxes"
    ]
    assert warnings(f"shapes://sparse?count={2 * FEW_IMAGES}&seed=1") == []
