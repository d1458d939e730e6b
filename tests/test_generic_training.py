"""A stock base that no family of ours restates: its generic stream from nothing, an adapter on it, and images of both."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import mmdit_lora
from mmdit_lora import Box, Layout
from mmdit_lora.analysis.attribute import attribute, image_attention
from mmdit_lora.analysis.inspection import inspect_adapter
from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.export.export import export_adapter
from mmdit_lora.export.read_back import probe
from mmdit_lora.models.generic_stream import StreamBlock
from mmdit_lora.pipelines import SamplingConfig, load_pipeline
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.load_base import load_base, open_encoders
from mmdit_lora.training.preflight import dry_run
from mmdit_lora.training.trainer import prepare_run, train
from tests.test_trainer import adapter_of, make_config

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = Layout("two things", [Box((0.1, 0.1, 0.5, 0.5), "red circle"), Box((0.5, 0.4, 0.9, 0.9), "blue square")])


def config(base: Path, data: Path, out: Path, **changes: Any) -> Any:
    size = {"path": str(data), "validation_share": 0.25, "resolution": 32}
    return make_config(base, data, out, **{"data": size, **changes})


@pytest.fixture(scope="module")
def stream(flux2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained one, with a gate that opened."""
    out = tmp_path_factory.mktemp("run")
    train(config(flux2, data, out, method="layout_stream", stream={"width": 16}))
    return out / "stream"


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def test_a_stream_is_trained_beside_its_base_and_an_adapter_on_it(
    flux2: Path, stream: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = weights(flux2 / "transformer")
    trained = weights(stream)
    assert not (stream.parent / "base").exists(), "no copy of the base"
    assert all("layout" in name for name in trained)
    assert (
        sum(value.numel() for value in trained.values())
        == json.loads((stream / "config.json").read_text())["parameters"]
    )
    assert any(value.any() for name, value in trained.items() if "out_proj" in name), "the gates have opened"

    with pytest.raises(InputError, match="untrained"):
        prepare_run(config(flux2, data, tmp_path / "early"))
    run = config(flux2, data, tmp_path / "run", stream_weights=str(stream))
    result = train(run)
    assert result.report["family"] == "flux2"
    assert 0 < result.report["trainable_params"] < sum(value.numel() for value in trained.values())
    assert all("layout_mlp" in name for name in adapter_of(tmp_path / "run"))
    now = dict(result.pipe.transformer.named_parameters())
    for name, value in {**before, **trained}.items():
        own = now.get(name, now.get(f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"))
        assert own is not None
        assert torch.equal(own, value), name

    (tmp_path / "layout.json").write_text(json.dumps(LAYOUT.to_dict()))
    arguments = ["--base", flux2, "--layout", tmp_path / "layout.json", "--steps", 2, "--size", "32"]
    with_stream = ["--stream", stream, "--adapter", tmp_path / "run" / "adapter"]
    assert main([*map(str, ["sample", *arguments, *with_stream, "--out", tmp_path / "images"])]) == 0
    assert list((tmp_path / "images").glob("*.png"))
    capsys.readouterr()
    # Without its stream, or with another, the adapter is not for this base.
    other = ["--adapter", tmp_path / "run" / "adapter"]
    assert main([*map(str, ["sample", *arguments, *other, "--out", tmp_path / "other"])]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("method", ["layout_stream", "lora"])
def test_a_resumed_run_is_the_undisturbed_one(
    flux2: Path, stream: Path, data: Path, tmp_path: Path, method: str
) -> None:
    settings = {"stream_weights": str(stream)} if method == "lora" else {"method": method, "stream": {"width": 16}}

    def steps(out: Path, count: int, **more: Any) -> Any:
        constant = {
            "lr_schedule": "constant",
            "warmup_steps": 0,
        }  # a run that goes on has the schedule of its new length
        return config(
            flux2, data, out, train={"max_steps": count, "checkpoint_every": 1} | constant, **settings, **more
        )

    train(steps(tmp_path / "whole", 4))
    train(steps(tmp_path / "parts", 2))
    train(steps(tmp_path / "parts", 4), resume=True)
    part = "stream" if method == "layout_stream" else "adapter"
    whole, parts = weights(tmp_path / "whole" / part), weights(tmp_path / "parts" / part)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_command_says_that_it_wrote_a_stream(
    flux2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "run"
    content = {"base": str(flux2), "method": "layout_stream", "output_dir": str(out), "stream": {"width": 16}}
    content |= {"data": {"path": str(data), "resolution": 32}, "train": {"max_steps": 1, "batch_size": 2}}
    file.write_text(yaml.safe_dump(content))
    assert main(["train", str(file)]) == 0
    assert f"wrote {out / 'stream'}\n" in capsys.readouterr().err
    assert (out / "stream" / "layout_stream.safetensors").is_file()


def test_a_new_stream_gets_gradients_everywhere_within_the_dry_run(flux2: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(config(flux2, data, tmp_path / "run", method="layout_stream", stream={"width": 16}))
    assert dry_run(run).still == ["layout_processor.null_phrase", "layout_processor.null_box"]


def test_latents_and_texts_are_those_of_the_pipeline(flux2: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(config(flux2, data, tmp_path / "run", method="layout_stream", stream={"width": 16}))
    batch = run.examples.batch(range(2))
    assert batch.x0.shape == (2, 4, 16, 16)
    captions = [run.examples.record_at(position).layout.caption for position in range(2)]
    embeds, _ = run.pipe.encode_prompt(captions, max_sequence_length=40)
    torch.testing.assert_close(batch.texts["embeds"], embeds, atol=1e-5, rtol=1e-5)
    packed = run.pipe._patchify_latents(batch.x0)
    mean = run.pipe.vae.bn.running_mean.view(1, -1, 1, 1)
    std = (run.pipe.vae.bn.running_var.view(1, -1, 1, 1) + run.pipe.vae.config.batch_norm_eps).sqrt()
    decoded = run.pipe.vae.decode(run.pipe._unpatchify_latents(packed * std + mean)).sample
    assert decoded.shape == (2, 3, 32, 32)


def test_encoders_open_without_the_transformers_weights(flux2: Path, stream: Path, data: Path, tmp_path: Path) -> None:
    run = config(flux2, data, tmp_path / "run", stream_weights=str(stream))
    pipe = open_encoders(run, torch.float32)
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    whole, _ = load_base(run, torch.float32)
    assert pipe.transformer.stream_config == whole.transformer.stream_config
    for name, value in whole.encode_caption("a red circle").items():
        assert torch.equal(pipe.encode_caption("a red circle")[name], value)
    assert torch.equal(pipe.encode_phrases(["a", "b c"]), whole.encode_phrases(["a", "b c"]))


def test_a_built_in_family_may_have_a_generic_stream(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stock = tmp_path / "stock"
    pipe = load_pipeline(str(base))
    parts = {name: part for name, part in pipe.components.items() if name != "transformer"}
    from diffusers import StableDiffusion3Pipeline

    from tests.tiny import plain_twin

    StableDiffusion3Pipeline(**parts, transformer=plain_twin(pipe.transformer)).save_pretrained(stock)
    train(config(stock, data, out, method="layout_stream", stream={"kind": "generic", "width": 16}))
    opened = load_pipeline(str(stock), stream=out / "stream")
    image = opened(
        LAYOUT, num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(0)
    ).images[0]
    assert image.size == (32, 32)


def test_a_base_with_a_stream_of_its_own_takes_no_generic_one(
    base: Path, stream: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sample", "--base", str(base), "--prompt", "a red circle", "--out", str(tmp_path / "images")]
    for folder, said in (
        (stream, "has a built-in layout stream"),
        (tmp_path / "nothing", "no layout stream: config.json"),
    ):
        assert main([*arguments, "--stream", str(folder)]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "full"}, "a generic layout stream lies beside its base"),
        ({"stream": {"single_blocks": True}}, "has no such choice"),
        ({"stream": {"kind": "built-in"}}, "has no such choice"),
        ({"stream": {"init": "copy_text"}}, "has no such choice"),
        ({"stream_weights": "STREAM", "stream": {"width": 32}}, "the stream of"),
        ({"stream_weights": "nowhere"}, "no layout stream"),
    ],
)
def test_what_contradicts_is_refused(
    flux2: Path, stream: Path, data: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    given = {key: str(stream) if value == "STREAM" else value for key, value in changes.items()}
    with pytest.raises(InputError, match=said):
        mmdit_lora.train(config(flux2, data, tmp_path / "run", **{"method": "layout_stream", **given}))
    assert not (tmp_path / "run").exists()


def in_two_processes(config: Path, *more: str) -> list[str]:
    """The command that starts a run spread over two processes (gloo)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*torchrun, "-m", "mmdit_lora", "train", str(config), *more]


@pytest.mark.slow
def test_a_stream_trained_by_two_processes_is_killed_and_goes_on_to_the_bit(
    flux2: Path, data: Path, tmp_path: Path
) -> None:
    plan = {"max_steps": 24, "batch_size": 2, "checkpoint_every": 1, "keep_checkpoints": 2, "learning_rate": 1e-3}
    content = {
        "base": str(flux2),
        "method": "layout_stream",
        "data": {"path": str(data), "validation_share": 0.25, "resolution": 32},
        "stream": {"width": 16},
        "train": plan | {"sample_every": 0, "log_every": 1, "ema_decay": 0.9},
    }
    files = {name: tmp_path / f"{name}.yaml" for name in ("whole", "killed", "alone")}
    for name, file in files.items():
        file.write_text(yaml.safe_dump(content | {"output_dir": str(tmp_path / name)}))
    options: dict[str, Any] = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE}
    whole = subprocess.run(in_two_processes(files["whole"]), timeout=300, check=False, **options)
    assert whole.returncode == 0, whole.stderr.decode()[-3000:]
    for goal in (5,):
        process = subprocess.Popen(
            in_two_processes(files["killed"], "--resume", "latest"), start_new_session=True, **options
        )
        folder, deadline = tmp_path / "killed" / "checkpoints", time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if (found := checkpoints(folder)) and found[-1].step >= goal:
                break
            time.sleep(0.005)
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)  # torchrun and what it started
        process.communicate(timeout=60)
    done = subprocess.run(in_two_processes(files["killed"], "--resume", "latest"), timeout=300, check=False, **options)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, two = weights(tmp_path / "whole" / "stream"), weights(tmp_path / "killed" / "stream")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.any() for name, value in one.items() if "out_proj" in name)

    assert main(["verify-resume", str(files["alone"]), "--steps", "4", "--kills", "1"]) == 0


@pytest.fixture(scope="module")
def adapter(flux2: Path, stream: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on that stream."""
    out = tmp_path_factory.mktemp("on_stream") / "run"
    train = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "lr_schedule": "constant", "warmup_steps": 0}
    mmdit_lora.train(config(flux2, data, out, stream_weights=str(stream), train=train))
    return out / "adapter"


@pytest.mark.slow
@pytest.mark.parametrize("to", ["diffusers", "merged"])
def test_a_fresh_process_reads_an_adapter_on_a_stream(adapter: Path, tmp_path: Path, to: Any) -> None:
    assert export_adapter(adapter, to, tmp_path / "out").max_abs_diff <= 1e-5


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("to", ["peft", "diffusers", "kohya", "merged"])
def test_an_adapter_on_a_stream_is_exported(flux2: Path, stream: Path, adapter: Path, tmp_path: Path, to: Any) -> None:
    out = tmp_path / ("out.safetensors" if to == "kohya" else "out")
    report = export_adapter(adapter, to, out)  # base and stream are those that the run beside it names
    assert report.effect > 100 * report.max_abs_diff
    assert report.max_image_diff is not None
    if to == "merged":  # a stream, and no copy of the base
        assert sorted(file.name for file in out.iterdir() if not file.name.startswith(".")) == [
            "config.json",
            "layout_stream.safetensors",
        ]
        merged, plain = weights(out), weights(stream)
        changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
        assert changed
        assert all("layout_mlp" in name for name in changed)
        assert load_pipeline(str(flux2), stream=out).transformer.stream_config.width == 16


@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_finds_its_stream_or_says_that_it_does_not(
    flux2: Path,
    stream: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MMDIT_LORA_HOME", str(tmp_path / "home"))
    moved = tmp_path / "elsewhere"
    shutil.copytree(adapter, moved)
    assert main(["verify", str(moved), "--base", str(flux2)]) == 2
    assert "give --stream FOLDER" in capsys.readouterr().err
    assert main(["verify", str(moved), "--base", str(flux2), "--stream", str(stream), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["effect"] > 0
    assert main(["verify", str(moved)]) == 0, "this machine has noted where base and stream are"


def test_an_adapter_on_a_stream_is_inspected_resized_and_attributed(
    flux2: Path, stream: Path, adapter: Path, tmp_path: Path
) -> None:
    found = inspect_adapter(adapter)
    assert all("layout_mlp" in module.name for module in found.modules)
    assert main(["resize", str(adapter), "--rank", "4", "--out", str(tmp_path / "small")]) == 0
    assert load_file(tmp_path / "small" / "adapter_model.safetensors").keys() == adapter_of(adapter.parent).keys()

    pipe = load_pipeline(str(flux2), stream=stream)
    result = attribute(pipe, LAYOUT, SamplingConfig(steps=2, size=(32, 32), guidance_scale=3.0), seed=0)
    blocks = {name for name, module in pipe.transformer.named_modules() if isinstance(module, StreamBlock)}
    for box in result.boxes:
        assert box.attention_lift_by_block.keys() == blocks
        assert 0 < box.attention < 1
    assert not any("attend" in vars(module) for module in pipe.transformer.modules())


def test_the_attention_that_is_shown_is_the_stream_s_own(flux2: Path, stream: Path) -> None:
    """With value 1 for one box and 0 elsewhere, what an image token reads is its attention to that box."""
    model = load_pipeline(str(flux2), stream=stream).transformer
    inputs = probe(model)
    seen_by_hand: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(".layout_stream"):
            plain = module.attend

            def attend(
                query: Tensor, key: Tensor, value: Tensor, mask: Tensor, name: str = name, plain: Any = plain
            ) -> Tensor:
                one = torch.zeros_like(value)
                one[:, :, -3] = 1  # the first of three boxes
                seen_by_hand[name.removesuffix(".layout_stream")] = plain(query, key, one, mask)[-1].mean((0, 2))
                return plain(query, key, value, mask)

            vars(module)["attend"] = attend
    with torch.no_grad():
        model(**inputs, return_dict=False)
        for module in model.modules():
            vars(module).pop("attend", None)
        with image_attention(model) as seen:
            model(**inputs, return_dict=False)
    assert seen.keys() == seen_by_hand.keys()
    for name, (total, calls) in seen.items():
        assert calls == 1
        torch.testing.assert_close(total[:, 0], seen_by_hand[name][: len(total)], atol=1e-6, rtol=1e-5)
