"""Training further: from an adapter, with more steps, and where data or base have moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora.cli.main import main
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.lora import read_adapter_header
from mmdit_lora.training.checkpoint import checkpoints, trainable_parameters
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.test_trainer import adapter_of, make_config, stop_after
from tests.test_training_choices import same


@pytest.fixture(scope="module")
def first(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps; checkpoints at both."""
    out = tmp_path_factory.mktemp("first") / "first"
    train(make_config(base, data, out, train={"max_steps": 2, "checkpoint_every": 1}))
    return out


# --- from an adapter --------------------------------------------------------------------------------------------------


def test_a_run_begins_from_an_adapter_with_a_fresh_optimizer_and_schedule(
    base: Path, data: Path, tmp_path: Path, first: Path
) -> None:
    config = make_config(base, data, tmp_path / "run", lora={"start": str(first / "adapter")})
    run = prepare_run(config)
    own = {name.replace(".default", ""): p for name, p in trainable_parameters(run.pipe.transformer).items()}
    for name, value in adapter_of(first).items():
        assert torch.equal(own[name.removeprefix("base_model.model.")], value)
    assert not run.optimizer.state
    assert set(run.pipe.transformer.peft_config) == {"default"}
    rates: list[float] = []
    report = train(config, callbacks=[Calls(step=lambda record: rates.append(record.learning_rate))]).report
    assert rates[0] == config.train.learning_rate
    # The base's own loss is that of the base, not of the adapter that it began from.
    assert report["held_out_loss"]["base"] == pytest.approx(
        json.loads((first / "report.json").read_text())["held_out_loss"]["base"], rel=1e-6
    )
    assert not same(adapter_of(tmp_path / "run"), adapter_of(first))


def test_an_adapter_says_what_it_began_from_and_no_path(base: Path, data: Path, tmp_path: Path, first: Path) -> None:
    start = str(first / "adapter")
    report = train(make_config(base, data, tmp_path / "run", lora={"start": start}, train={"max_steps": 1})).report
    header = read_adapter_header(tmp_path / "run" / "adapter")
    assert header["start"] == report["start"]
    assert header["start"]["name"] == "first"
    assert len(header["start"]["fingerprint"]) == 64
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| started from | the adapter first |" in card
    assert header["start"]["fingerprint"] in card
    assert start not in card
    assert "start" not in read_adapter_header(first / "adapter")


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"r": 4}, ("of rank 16", "of rank 4")),
        ({"alpha": 8.0}, ("scaled by 2", "scaled by 0.5")),
        ({"targets": ["layout_mlp.fc1"]}, ("layout_mlp.fc1, layout_mlp.fc2)", "asks for 3 targets (layout_mlp.fc1)")),
        ({"dora": True}, ("DoRA",)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_adapter_that_does_not_fit_is_one_error_that_states_both(
    base: Path, data: Path, tmp_path: Path, first: Path, lora: dict[str, Any], says: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        prepare_run(make_config(base, data, tmp_path / "run", lora={"start": str(first / "adapter"), **lora}))
    assert caught.value.location == "lora.start"
    assert all(text in caught.value.what for text in says), caught.value.what
    assert not (tmp_path / "run").exists()


def test_another_base_of_equal_shapes_and_no_adapter_are_refused(
    base: Path, data: Path, tmp_path: Path, first: Path
) -> None:
    from tests.tiny import tiny_pipeline, tiny_transformer

    tiny_pipeline(tmp_path / "vocabulary", tiny_transformer(seed=1)).save_pretrained(tmp_path / "other")
    for place, start in ((tmp_path / "other", first / "adapter"), (base, tmp_path / "nothing"), (base, first)):
        with pytest.raises(InputError) as caught:
            prepare_run(make_config(place, data, tmp_path / "run", lora={"start": str(start)}))
        assert (caught.value.location or "").startswith("lora.start")
    with pytest.raises(ValueError, match="trains no LoRA"):
        make_config(base, data, tmp_path / "run", method="full", lora={"start": str(first / "adapter")})


def test_a_run_that_began_from_an_adapter_resumes_to_the_bit_also_without_it(
    base: Path, data: Path, tmp_path: Path, first: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(first / "adapter", start)
    config = make_config(base, data, tmp_path / "whole", lora={"start": str(start)})
    train(config)
    halves = make_config(base, data, tmp_path / "halves", lora={"start": str(start)})
    stop_after(halves, step=3)
    shutil.rmtree(start)
    train(halves, resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "halves"))
    assert read_adapter_header(tmp_path / "halves" / "adapter")["start"]["name"] == "start"


# --- more steps -------------------------------------------------------------------------------------------------------


def rates_of(config: Any, **options: Any) -> dict[int, float]:
    seen: list[StepRecord] = []
    train(config, callbacks=[Calls(step=seen.append)], **options)
    return {record.step: record.learning_rate for record in seen}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_a_finished_run_goes_on_under_the_schedule_of_its_new_length(
    base: Path, data: Path, tmp_path: Path, schedule: str
) -> None:
    length = {"lr_schedule": schedule, "warmup_steps": 1, "checkpoint_every": 3, "preflight": False, "batch_size": 1}
    whole = rates_of(make_config(base, data, tmp_path / "whole", train=length | {"max_steps": 6}))
    train(make_config(base, data, tmp_path / "run", train=length | {"max_steps": 4}))
    more = rates_of(make_config(base, data, tmp_path / "run", train=length | {"max_steps": 6}), resume=True)
    # From where it ended, though no checkpoint was due there; each rate is that of a run of six at this step.
    assert more == {step: whole[step] for step in (5, 6)}
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "run")) == (schedule == "constant")
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 6


def test_fewer_steps_than_are_done_are_refused(base: Path, data: Path, tmp_path: Path, first: Path) -> None:
    shutil.copytree(first, tmp_path / "run")
    with pytest.raises(InputError, match="the run is at step 2 already") as caught:
        train(make_config(base, data, tmp_path / "run", train={"max_steps": 1, "checkpoint_every": 1}), resume=True)
    assert caught.value.location == "train.max_steps"


def test_a_run_that_stopped_early_goes_on_without_early_stop(base: Path, data: Path, tmp_path: Path) -> None:
    wild = {"validate_every": 1, "learning_rate": 1e-10, "preflight": False}
    stopped = train(make_config(base, data, tmp_path / "run", train=wild | {"max_steps": 9, "early_stop": 1})).report
    assert stopped["steps"] < 9
    report = train(make_config(base, data, tmp_path / "run", train=wild | {"max_steps": 9}), resume=True).report
    assert report["steps"] == 9


# --- moved ------------------------------------------------------------------------------------------------------------


def test_what_moved_with_its_content_unchanged_is_gone_on_with_to_the_bit(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    for name, seed in (("data", 3), ("held", 5)):
        write_dataset(tmp_path / name, DOMAINS["basic"], count=8, seed=seed)
    (tmp_path / "old.jsonl").write_text(
        json.dumps({"caption": "a", "boxes": [{"xyxy": [0.1, 0.1, 0.5, 0.5], "phrase": "a"}]}) + "\n"
    )

    def config(out: str, place: Path) -> Any:
        return make_config(
            place / "base",
            place / "data",
            tmp_path / out,
            data={"path": str(place / "data"), "validation": str(place / "held"), "cache": str(place / "cache")},
            prior={"layouts": str(place / "old.jsonl"), "batch_size": 1},
            sample={"steps": 1},
            train={"max_steps": 3, "checkpoint_every": 1},
        )

    train(config("whole", tmp_path))
    stop_after(config("run", tmp_path), step=2)
    away = tmp_path / "away"
    away.mkdir()
    for name in ("base", "data", "held", "old.jsonl", "cache"):
        shutil.move(tmp_path / name, away / name)
    train(config("run", away), resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "run"))
    assert str(away / "data") in (tmp_path / "run" / "config.yaml").read_text()
    # Other content at the same place is refused, each by its name.
    write_dataset(away / "held", DOMAINS["basic"], count=8, seed=6)
    with pytest.raises(InputError, match="the validation set is not the one"):
        train(config("run", away), resume=True)
    shutil.rmtree(away / "held")
    write_dataset(away / "held", DOMAINS["basic"], count=8, seed=5)
    text = (away / "old.jsonl").read_text()
    (away / "old.jsonl").write_text(text.replace("0.5", "0.6"))
    with pytest.raises(InputError, match=r"the set of prior\.layouts is not the one"):
        train(config("run", away), resume=True)
    (away / "old.jsonl").write_text(text)
    settings = json.loads((away / "base" / "vae" / "config.json").read_text())
    (away / "base" / "vae" / "config.json").write_text(json.dumps(settings | {"scaling_factor": 2.0}))
    with pytest.raises(InputError, match="the VAE or a text encoder of the base is not the one"):
        train(config("run", away), resume=True)


def test_places_decide_where_a_checkpoint_of_an_earlier_version_knows_no_content(
    base: Path, data: Path, tmp_path: Path, first: Path
) -> None:
    shutil.copytree(first, tmp_path / "run")
    shutil.copytree(data, tmp_path / "moved")
    for checkpoint in checkpoints(tmp_path / "run" / "checkpoints"):
        state = json.loads((checkpoint.folder / "state.json").read_text())
        state["fingerprints"] = {key: state["fingerprints"][key] for key in ("base", "data")}
        (checkpoint.folder / "state.json").write_text(json.dumps(state))
    length = {"max_steps": 2, "checkpoint_every": 1}
    with pytest.raises(InputError, match=r"data\.path is"):
        train(make_config(base, tmp_path / "moved", tmp_path / "run", train=length), resume=True)
    train(make_config(base, data, tmp_path / "run", train=length), resume=True)


def test_the_override_that_a_refusal_names_can_be_given_as_it_stands(
    base: Path, data: Path, tmp_path: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    shutil.copytree(first, tmp_path / "run")
    length = {"max_steps": 2, "checkpoint_every": 1}
    other = make_config(base, data, tmp_path / "run", train=length, lora={"targets": ["layout_mlp.fc1"]})
    (tmp_path / "run.yaml").write_text(other.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml"), "--resume", "latest"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    override = shlex.split(said.partition("resume with ")[2].partition(", or start")[0])
    assert override == ['lora.targets=["layout_mlp.fc1", "layout_mlp.fc2"]']
    assert main(["train", str(tmp_path / "run.yaml"), *override, "--resume", "latest"]) == 0
