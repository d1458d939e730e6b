"""What `train` can be told: moving average, best weights, early stop, optimizers, weights of the loss; and how it stops."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.cli.main import main
from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.flow import time_weight
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.held_out import HeldOutLosses, layout_matters
from mmdit_lora.training.loss import flow_matching_loss
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.stopping import Diverged, Interrupted
from mmdit_lora.training.throughput import Throughput
from mmdit_lora.training.trainer import prepare_run, train
from mmdit_lora.training.validation import gradient_norms
from tests.callbacks import Calls
from tests.test_trainer import adapter_of, make_config

EVERY = {"checkpoint_every": 1, "keep_checkpoints": 20}


def short(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default", "")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return {short(n) for n in one} == {short(n) for n in two} and all(
        torch.equal(one[a], two[b]) for a, b in zip(sorted(one, key=short), sorted(two, key=short), strict=True)
    )


def weights_at(out: Path, step: int) -> dict[str, Tensor]:
    (found,) = [c for c in checkpoints(out / "checkpoints") if c.step == step]
    return load_file(found.folder / "trainable.safetensors")


# --- moving average ---------------------------------------------------------------------------------------------------


def test_the_adapter_is_the_moving_average_of_the_steps(base: Path, data: Path, tmp_path: Path) -> None:
    train(make_config(base, data, tmp_path / "run", train=EVERY | {"max_steps": 5, "ema_decay": 0.5}))
    average = weights_at(tmp_path / "run", 1)  # the first update takes the weights as they are
    for step in range(2, 6):
        decay = min((1 + step - 1) / (10 + step - 1), 0.5)
        now = weights_at(tmp_path / "run", step)
        average = {name: decay * value + (1 - decay) * now[name] for name, value in average.items()}
    saved = adapter_of(tmp_path / "run")
    for name, value in saved.items():
        own = next(v for n, v in average.items() if short(n) == short(name))
        torch.testing.assert_close(value, own, rtol=1e-5, atol=1e-7)
    assert not same(saved, weights_at(tmp_path / "run", 5))


@pytest.mark.parametrize(
    "choice",
    [
        {"ema_decay": 0.9, "validate_every": 2},
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"lora_plus": 4.0},
        {"final": "best", "validate_every": 1, "learning_rate": 0.3},
    ],
    ids=lambda choice: next(iter(choice)),
)
def test_a_resumed_run_is_the_undisturbed_one_whatever_was_chosen(
    base: Path, data: Path, tmp_path: Path, choice: dict[str, Any]
) -> None:
    if choice.get("optimizer") == "prodigy":
        pytest.importorskip("prodigyopt")
    length = {"max_steps": 7, "checkpoint_every": 2, "log_every": 1} | choice
    train(make_config(base, data, tmp_path / "whole", train=length))
    config = make_config(base, data, tmp_path / "halves", train=length)

    class Stop(Exception):
        pass

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 5:
            raise Stop

    with pytest.raises(Stop):
        train(config, callbacks=[Calls(logged=stop)])
    train(config, resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "halves"))
    if "ema_decay" not in choice and "final" not in choice:
        plain = make_config(base, data, tmp_path / "plain", train=length | dict.fromkeys(choice) | _DEFAULTS)
        train(plain)
        assert not same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "plain"))


_DEFAULTS = {"optimizer": "adamw", "learning_rate": 1e-2, "lora_plus": 1.0}


# --- best, early stop -------------------------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_become_the_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    wild = {
        "max_steps": 12,
        "validate_every": 1,
        "learning_rate": 200.0,
        "seed": 1,
        "keep_checkpoints": 1,
        "lr_schedule": "constant",
    }
    seen: dict[int, float] = {}

    def validated(out: Path) -> dict[str, Any]:
        config = make_config(base, data, out, train=wild | {"final": "best", "checkpoint_every": 4})
        return train(config).report

    report = validated(tmp_path / "best")
    best = report["best_step"]
    assert 0 < best < 12, "the run was to get worse in the end"
    assert report["adapter_step"] == best
    kept = [c.step for c in checkpoints(tmp_path / "best" / "checkpoints")]
    assert kept == [best, 12]
    assert same(adapter_of(tmp_path / "best"), weights_at(tmp_path / "best", best))
    seen = {
        step: train(
            make_config(base, data, tmp_path / f"to{step}", train=wild | {"max_steps": step, "checkpoint_every": 0})
        ).report["held_out_loss"]["trained"]
        for step in (best, 12)
    }
    assert report["held_out_loss"]["trained"] == pytest.approx(seen[best], rel=1e-6)
    assert seen[best] < seen[12]


def test_a_run_that_gets_no_better_stops(base: Path, data: Path, tmp_path: Path) -> None:
    wild = {"max_steps": 50, "validate_every": 1, "learning_rate": 10.0, "lr_schedule": "constant", "early_stop": 3}
    report = train(make_config(base, data, tmp_path / "run", train=wild)).report
    assert report["steps"] == report["best_step"] + 3 < 50


# --- optimizers, adapters, losses -------------------------------------------------------------------------------------


def test_lora_plus_gives_lora_b_its_own_rate(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path, train={"lora_plus": 8.0, "weight_decay": 0.02}))
    names = {id(p): name for name, p in run.pipe.transformer.named_parameters()}
    seen = {}
    for group in run.optimizer.param_groups:
        kinds = {"lora_A" in names[id(p)] for p in group["params"]}
        assert len(kinds) == 1
        seen["A" if kinds.pop() else "B"] = (group["initial_lr"], group["weight_decay"])
    assert seen == {"A": (1e-2, 0.02), "B": (pytest.approx(8e-2), 0.02)}
    trained = {id(p) for p in run.pipe.transformer.parameters() if p.requires_grad}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == trained


@pytest.mark.parametrize(
    ("method", "settings", "location"),
    [
        ("layout_stream", {"lora_plus": 2.0}, "train.lora_plus"),
        ("lora", {"lora_plus": 2.0, "optimizer": "prodigy"}, "train.lora_plus"),
        pytest.param(
            "lora",
            {"optimizer": "adamw_8bit"},
            "train.optimizer",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it"),
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    base: Path, data: Path, tmp_path: Path, method: str, settings: dict[str, Any], location: str
) -> None:
    with pytest.raises(InputError) as caught:
        prepare_run(make_config(base, data, tmp_path / "run", method=method, train=settings))
    assert caught.value.location == location
    assert not (tmp_path / "run").exists()


def test_ranks_of_their_own_and_gaussian_starts(base: Path, data: Path, tmp_path: Path) -> None:
    lora = {"r": 4, "rank_pattern": {"layout_processor.layout_mlp.fc1": 2}, "init": "gaussian"}
    config = make_config(base, data, tmp_path / "run", lora=lora)
    train(config)
    ranks = {name: t.shape[0] for name, t in adapter_of(tmp_path / "run").items() if "lora_A" in name}
    assert {n for n, r in ranks.items() if r == 2} == {n for n in ranks if "layout_processor.layout_mlp.fc1" in n}
    assert set(ranks.values()) == {2, 4}
    other = make_config(base, data, tmp_path / "run", lora=lora | {"rank_pattern": {}})
    with pytest.raises(InputError, match="rank_pattern"):
        train(other, resume=True)
    with pytest.raises(InputError, match="no_such"):
        prepare_run(make_config(base, data, tmp_path / "no", lora={"rank_pattern": {"no_such": 2}}))


def test_targets_beyond_the_layout_mlp_train_and_nothing_else(base: Path, data: Path, tmp_path: Path) -> None:
    targets = ["layout_stream.attn.add_q_proj", "ff_context.net.2", "layout_mlp.fc1"]
    result = train(make_config(base, data, tmp_path / "run", lora={"r": 2, "targets": targets}))
    trained = adapter_of(tmp_path / "run")
    for target in targets:
        assert any(f"{target}.lora_B" in n for n in trained)
    still = {short(n).rpartition(".lora_B")[0] for n, t in trained.items() if "lora_B" in n and not t.any()}
    # Queries of the last block's layout tokens, whose outputs nothing reads: told, as the only ones.
    assert still == set(
        prepare_run(make_config(base, data, tmp_path / "other", lora={"targets": targets})).trainable.details[
            "dead_targets"
        ]
    )
    assert len(still) == 1
    assert all(any(f"{target}.lora_" in n for target in targets) for n in trained)
    assert result.report["trainable_params"] == sum(t.numel() for t in trained.values())


def test_weights_over_time_are_those_of_diffusers_and_of_the_paper() -> None:
    t = torch.linspace(0.02, 0.98, 49)
    for kind in ("none", "sigma_sqrt", "cosmap"):
        torch.testing.assert_close(time_weight(t, kind), compute_loss_weighting_for_sd3(kind, sigmas=t).float())
    snr = ((1 - t) / t) ** 2
    # The loss of x_0 is t^2 times that of the velocity; min-SNR-gamma weights it by min(SNR, gamma).
    torch.testing.assert_close(time_weight(t, "min_snr", gamma=5.0), snr.clamp(max=5.0) * t**2)


def test_the_weighting_scales_each_samples_loss(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path, flow={"weighting": "min_snr", "min_snr_gamma": 2.0}))
    run.model.eval()
    batch = run.examples.batch(range(4))
    with torch.no_grad():
        plain, weighted = flow_matching_loss(run.model, batch), flow_matching_loss(run.model, batch, run.objective)
    torch.testing.assert_close(weighted, plain * time_weight(batch.t, "min_snr", gamma=2.0))
    assert not torch.equal(weighted, plain)


# --- what is measured -------------------------------------------------------------------------------------------------


def test_gradient_norms_of_blocks_are_parts_of_the_whole(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path))
    flow_matching_loss(run.model, run.examples.batch(range(3))).mean().backward()
    norms = gradient_norms(run.pipe.transformer)
    blocks = run.pipe.transformer.config.num_layers
    assert {f"grad_norm/transformer_blocks.{n:02d}" for n in range(blocks - 1)} < set(norms)
    assert "grad_norm/layout_processor" in norms
    whole = math.sqrt(sum(p.grad.square().sum().item() for p in run.model.parameters() if p.grad is not None))
    assert math.sqrt(sum(value**2 for value in norms.values())) == pytest.approx(whole, rel=1e-5)


def test_losses_by_time_go_from_clear_to_noisy() -> None:
    times = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    found = HeldOutLosses(losses=10 * times, times=times)
    assert found.by_time(2) == pytest.approx([2.0, 7.0])
    assert found.per_image.tolist() == pytest.approx([9, 1, 5, 3])


def test_what_the_layout_is_worth_is_zero_where_its_scale_is(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path))
    assert run.held_out is not None
    model = run.pipe.transformer
    worth = layout_matters(model, run.held_out, torch.device("cpu"))
    assert all(value != 0 for value in worth.values())
    with torch.no_grad():
        for block in model.transformer_blocks:
            if getattr(block, "layout_stream", None) is not None:
                block.layout_stream.out_proj.weight.zero_()
                block.layout_stream.out_proj.bias.zero_()
    assert layout_matters(model, run.held_out, torch.device("cpu")) == dict.fromkeys(worth, 0.0)


def test_the_meter_counts_each_shape_once_and_reads_shares() -> None:
    meter, calls = Throughput(), []

    def once() -> None:
        calls.append(1)
        torch.ones(8, 4) @ torch.ones(4, 2)

    for _ in range(3):
        meter.count((8, 4), once)
    with meter.phase("data"):
        sum(range(10000))
    read = meter.read(samples=6)
    assert len(calls) == 1
    assert read["tflops"] > 0
    assert 0 < read["share_data"] < 1
    assert read["share_data"] + read["share_other"] == pytest.approx(1)  # nothing was computed; the count is left out
    assert "tflops" not in meter.read(samples=0)


def test_a_callback_sees_every_step_and_what_it_sees_is_the_logged_loss(base: Path, data: Path, tmp_path: Path) -> None:
    seen: list[StepRecord] = []
    logged: dict[int, float] = {}
    train(
        make_config(base, data, tmp_path / "run"),
        callbacks=[
            Calls(step=seen.append, logged=lambda step, scalars: logged.__setitem__(step, scalars["loss"])),
        ],
    )
    assert [record.step for record in seen] == [1, 2, 3, 4]
    assert all(len(record.samples) == len(record.times) == len(record.losses) == 3 for record in seen)
    assert logged == {record.step: record.loss for record in seen}
    assert seen[0].samples[0].endswith(tuple("0123456789"))  # file:line


# --- stops ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_resumed_run_is_the_undisturbed_one(
    base: Path, data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    length = {"max_steps": 6, "checkpoint_every": 100}
    train(make_config(base, data, tmp_path / "whole", train=length))
    config = make_config(base, data, tmp_path / "stopped", train=length)

    def send(record: StepRecord) -> None:
        if record.step == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"{number.name}; step 3 is saved"):
        train(config, callbacks=[Calls(step=send)])
    assert signal.getsignal(number) is before
    assert [c.step for c in checkpoints(tmp_path / "stopped" / "checkpoints")] == [3]
    train(config, resume=True)
    assert same(adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "stopped"))


def test_a_loss_that_is_no_number_names_its_samples_and_keeps_the_last_checkpoint(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = {"learning_rate": 1e3, "checkpoint_every": 1, "lr_schedule": "constant", "max_grad_norm": 1e9}
    config = make_config(base, data, tmp_path / "run", train=wild, lora={"alpha": 1e6})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "run.yaml")]) == 1
    said = capsys.readouterr().err
    assert "in step 3" in said
    assert "metadata.jsonl:" in said
    assert "step_0000002 is from before" in said
    assert "Traceback" not in said
    kept = checkpoints(tmp_path / "run" / "checkpoints")
    assert [checkpoint.step for checkpoint in kept] == [1, 2]
    kept[-1].state()
    assert not (tmp_path / "run" / "adapter").exists()
    with pytest.raises(Diverged):
        train(config, resume=True)


def test_what_was_found_out_of_a_run_is_in_its_report(base: Path, data: Path, tmp_path: Path) -> None:
    config: Config = make_config(base, data, tmp_path / "run", train={"validate_every": 2})
    train(config)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == report["adapter_step"] == 4
    assert report["best_step"] in (2, 4)


def test_a_run_goes_on_in_other_parts_of_the_same_batch_and_in_no_other_batch(
    base: Path, data: Path, tmp_path: Path
) -> None:
    length = {"max_steps": 4, "checkpoint_every": 2, "batch_size": 4}
    config = make_config(base, data, tmp_path / "whole", train=length | {"lr_schedule": "constant"})
    train(config)
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step_0000004")  # goes on from step 2
    parts = length | {"lr_schedule": "constant", "batch_size": 2, "gradient_accumulation": 2}
    before = adapter_of(tmp_path / "whole")
    train(make_config(base, data, tmp_path / "whole", train=parts), resume=True)
    for name, tensor in adapter_of(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="a step has 3 samples over all processes, and had 4"):
        train(
            make_config(base, data, tmp_path / "whole", train=parts | {"batch_size": 3, "gradient_accumulation": 1}),
            resume=True,
        )
