"""A layout stream from nothing on a plain base of each family, then LoRA on it; `method: full`; the switches of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.load_base import load_base
from mmdit_lora.training.loss import Objective, flow_matching_loss
from mmdit_lora.training.trainer import prepare_run, train
from tests.test_trainer import adapter_of, make_config
from tests.tiny import plain_twin, tiny_pipeline, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline, tiny_flux_transformer


def stock_sd3(folder: Path) -> Path:
    pipe = tiny_pipeline(folder, tiny_transformer(open_gates=False, qk_norm="rms_norm"))
    parts = {name: part for name, part in pipe.components.items() if name != "transformer"}
    StableDiffusion3Pipeline(**parts, transformer=plain_twin(pipe.transformer)).save_pretrained(folder / "plain")
    return folder / "plain"


def stock_flux(folder: Path) -> Path:
    pipe = tiny_flux_pipeline(folder, tiny_flux_transformer(open_gates=False))
    parts = {name: part for name, part in pipe.components.items() if name != "transformer"}
    FluxPipeline(**parts, transformer=plain_twin(pipe.transformer)).save_pretrained(folder / "plain")
    return folder / "plain"


MAKERS: dict[str, Callable[[Path], Path]] = {"two streams": stock_sd3, "single blocks": stock_flux}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "siamese": ("two streams", {}),
    "cross": ("two streams", {"attention": "cross", "init": "copy_image"}),
    "distilled": ("single blocks", {}),
    "distilled, tokens, single blocks": ("single blocks", {"phrase_tokens": 3, "single_blocks": True}),
    "distilled, cross": ("single blocks", {"attention": "cross", "single_blocks": True, "init": "random"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of stock classes for each family: no layout stream, no class of ours."""
    return {name: make(tmp_path_factory.mktemp("plain")) for name, make in MAKERS.items()}


def stream_config(base: Path, data: Path, out: Path, **changes: Any) -> Config:
    size = {"path": str(data), "validation_share": 0.25, "resolution": 32}
    return make_config(base, data, out, **{"method": "layout_stream", "data": size, **changes})


def weights_of(folder: Path, part: str = "transformer") -> dict[str, Tensor]:
    (file,) = (folder / part).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("case", CASES)
def test_a_plain_base_gets_a_stream_that_an_adapter_can_be_trained_on(
    plain: dict[str, Path], data: Path, tmp_path: Path, case: str
) -> None:
    name, stream = CASES[case]
    base = plain[name]
    with pytest.raises(InputError, match="untrained"):
        prepare_run(stream_config(base, data, tmp_path / "early", method="lora", stream=stream))

    train(stream_config(base, data, tmp_path / "run", stream=stream))
    before, after = weights_of(base), weights_of(tmp_path / "run" / "base")
    assert before
    assert before.keys() == {key for key in after if "layout" not in key}
    assert all(torch.equal(before[key], after[key]) for key in before)
    gates = [value for key, value in after.items() if key.endswith("layout_stream.out_proj.weight")]
    assert len(gates) == len({key.split(".layout_stream")[0] for key in after if ".layout_stream" in key})
    assert all(gate.any() for gate in gates)

    config = load_pipeline(str(tmp_path / "run" / "base")).transformer.config
    assert config.layout_attention == stream.get("attention", "siamese")
    train(stream_config(tmp_path / "run" / "base", data, tmp_path / "lora", method="lora"))
    adapter = adapter_of(tmp_path / "lora")
    assert all(value.any() for key, value in adapter.items() if "lora_B" in key)
    assert any("single_transformer_blocks" in key for key in adapter) == stream.get("single_blocks", False)


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_stream_trains_and_every_zero_gate_gets_a_gradient_at_once(
    plain: dict[str, Path], data: Path, tmp_path: Path, case: str
) -> None:
    name, stream = CASES[case]
    run = prepare_run(stream_config(plain[name], data, tmp_path / "run", stream=stream))
    model = run.pipe.transformer
    trained = set(trainable_parameters(model))
    assert trained == {key for key, _ in model.named_parameters() if "layout" in key}
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    buffers = {key for key, _ in model.named_buffers()}
    assert frozen == weights_of(plain[name]).keys() - buffers
    assert run.trainable.trainable_params == sum(p.numel() for p in trainable_parameters(model).values())

    batch = run.examples.batch(range(3))
    flow_matching_loss(run.model, batch).mean().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == trained
    gates = {key for key in trained if ".out_proj." in key}
    assert gates
    assert {key for key, gradient in gradients.items() if gradient.any()} == gates  # the rest waits behind zeros
    run.optimizer.step()
    run.optimizer.zero_grad()
    flow_matching_loss(run.model, batch).mean().backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached > gates
    assert any(key.startswith("layout_processor") for key in reached)


@pytest.mark.parametrize("name", MAKERS)
def test_everything_trains_with_the_method_full(plain: dict[str, Path], data: Path, tmp_path: Path, name: str) -> None:
    config = stream_config(plain[name], data, tmp_path, method="full", train={"layout_dropout": 0.5, "max_steps": 2})
    run = prepare_run(config)
    assert all(p.requires_grad for p in run.pipe.transformer.parameters())
    train(config)
    before, after = weights_of(plain[name]), weights_of(tmp_path / "base")
    assert sum(not torch.equal(before[key], after[key]) for key in before) > 0.9 * len(before)
    frozen = weights_of(plain[name], "vae")
    assert all(torch.equal(value, frozen[key]) for key, value in weights_of(tmp_path / "base", "vae").items())


@pytest.mark.parametrize("method", ["layout_stream", "full"])
def test_half_precision_rounds_nothing_that_does_not_train(
    plain: dict[str, Path], data: Path, tmp_path: Path, method: str
) -> None:
    base = plain["two streams"]
    precise = {"mixed_precision": "bf16", "sample_every": 4, "sample_count": 1}
    result = train(stream_config(base, data, tmp_path, method=method, train=precise, sample={"steps": 2}))
    for part in ("transformer", "vae", "text_encoder"):
        before, after = weights_of(base, part), weights_of(tmp_path / "base", part)
        assert {value.dtype for value in after.values()} <= {torch.float32, torch.int64}
        if (part, method) != ("transformer", "full"):
            assert all(torch.equal(before[key], after[key]) for key in before), part
    assert weights_of(tmp_path / "base")["layout_processor.layout_mlp.fc1.weight"].any()
    assert {p.dtype for p in result.pipe.transformer.parameters()} == {torch.bfloat16}


def test_the_stream_starts_as_the_config_says(plain: dict[str, Path], data: Path, tmp_path: Path) -> None:
    def started(**stream: Any) -> dict[str, Tensor]:
        config = stream_config(plain["two streams"], data, tmp_path, stream=stream, train={"seed": 5})
        model = load_base(config, torch.float32)[0].transformer
        return {key: value for key, value in model.state_dict().items() if "layout" in key}

    base = weights_of(plain["two streams"])
    fc1 = "transformer_blocks.0.layout_stream.layout_mlp.fc1.weight"
    phrase = "layout_processor.phrase_mlp.fc1.weight"
    default, again = started(), started(init="copy_text", seed=5)
    assert all(torch.equal(default[key], again[key]) for key in default)
    assert torch.equal(default[fc1], base["transformer_blocks.0.ff_context.net.0.proj.weight"])
    assert torch.equal(started(init="copy_image")[fc1], base["transformer_blocks.0.ff.net.0.proj.weight"])
    assert not torch.equal(started(init="random")[fc1], default[fc1])
    assert not torch.equal(started(seed=6)[phrase], default[phrase])


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ({"attention": "cross"}, "stream.attention: is cross"),
        ({"init": "copy_text"}, "stream.init: is copy_text"),
        ({"seed": 0}, "stream.seed: is 0"),
        ({"single_blocks": True}, "no such choice"),
        ({"phrase_tokens": 3}, "no such choice"),
    ],
)
def test_a_base_with_another_stream_is_refused(
    base: Path, data: Path, tmp_path: Path, stream: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        prepare_run(make_config(base, data, tmp_path / "run", stream=stream))
    assert "null" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_base_with_the_stream_that_is_asked_for_is_taken(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", stream={"attention": "siamese"})
    assert prepare_run(config).pipe.transformer.config.layout_attention == "siamese"


# -- embedded guidance ---------------------------------------------------------------------------------------------------


def test_embedded_guidance_reaches_a_distilled_base_and_is_refused_elsewhere(
    plain: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    def loss(guidance: float) -> Tensor:
        config = stream_config(plain["single blocks"], data, tmp_path, flow={"guidance": guidance})
        run = prepare_run(config)
        return flow_matching_loss(run.model, run.examples.batch(range(2)), Objective(guidance=config.flow.guidance))

    assert not torch.equal(loss(1.0), loss(3.5))
    with pytest.raises(InputError, match="not guidance-distilled"):
        prepare_run(stream_config(plain["two streams"], data, tmp_path, flow={"guidance": 3.5}))


# -- switches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "switch",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": 2},
        {"attention_backend": "_native_math"},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_switches_change_no_result(base: Path, data: Path, tmp_path: Path, switch: dict[str, Any]) -> None:
    short = {"max_steps": 2, "checkpoint_every": 0}
    lora = {"dropout": 0.0} if "compile" in switch else {}  # compiled code draws its dropout elsewhere
    train(make_config(base, data, tmp_path / "plain", train=short, lora=lora))
    result = train(make_config(base, data, tmp_path / "switched", train=short | switch, lora=lora))
    if "gradient_checkpointing" in switch:
        assert result.pipe.transformer.gradient_checkpointing
        assert result.pipe.transformer.gradient_checkpointing_every == int(switch["gradient_checkpointing"])
    one, two = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "switched")
    assert one.keys() == two.keys()
    for key in one:
        # AdamW turns rounding of a tiny gradient into a part of a step of 1e-2.
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("sage", "no backward pass"),
        ("sage_hub", "no backward pass"),
        ("_native_mat", "did you mean '_native_math'"),
        ("_native_flash", "mask"),
        ("flash_varlen", "cannot train this base here"),
    ],
)
def test_an_attention_backend_that_cannot_train_is_refused(
    base: Path, data: Path, tmp_path: Path, name: str, says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        prepare_run(make_config(base, data, tmp_path / "run", train={"attention_backend": name}))
    assert "train.attention_backend" in str(caught.value)
    train(make_config(base, data, tmp_path / "run", train={"max_steps": 1, "checkpoint_every": 0}))  # nothing sticks
