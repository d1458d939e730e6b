"""Configs for Accelerate, and a base that is spread over processes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from mmdit_lora.cli.main import main
from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.deepspeed import set_engine
from mmdit_lora.training.sharding import check_sharding
from tests.test_trainer import make_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_reads_its_configs(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(file.stem, 8)
    assert file.read_text().startswith("# ")
    assert f"configs/accelerate/{file.name}" in file.read_text()
    if file.stem == "fsdp2":
        assert config.distributed_type == DistributedType.FSDP
        assert config.fsdp_config["fsdp_version"] == 2
    if file.stem.startswith("zero"):
        assert config.distributed_type == DistributedType.DEEPSPEED
        assert config.deepspeed_config["zero_stage"] == int(file.stem[-1])


def test_the_cluster_files_are_whole() -> None:
    job = yaml.safe_load((ROOT / "configs" / "cluster" / "kubernetes.yaml").read_text())
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[-2:] == ["--resume", "latest"]
    shell = shutil.which("bash")
    if shell is None:
        pytest.skip("no bash")
    subprocess.run([shell, "-n", str(ROOT / "configs" / "cluster" / "slurm.sh")], check=True)


@pytest.mark.parametrize(
    ("kind", "changes", "location"),
    [
        (DistributedType.DEEPSPEED, {"method": "full"}, "method"),
        (DistributedType.DEEPSPEED, {"prior": {"layouts": "old.jsonl"}}, "prior.layouts"),
        (DistributedType.DEEPSPEED, {"train": {"ema_decay": 0.9}}, "train.ema_decay"),
        (DistributedType.DEEPSPEED, {"train": {"mixed_precision": "fp16"}}, "train.mixed_precision"),
        (DistributedType.DEEPSPEED, {"train": {"optimizer": "prodigy"}}, "train.optimizer"),
        (DistributedType.FSDP, {"method": "layout_stream"}, "method"),
        (DistributedType.FSDP, {"prior": {"layouts": "old.jsonl"}}, "prior.layouts"),
    ],
)
def test_what_cannot_be_spread_is_refused(
    kind: DistributedType, changes: dict[str, Any], location: str, base: Path, data: Path, tmp_path: Path
) -> None:
    config = make_config(base, data, tmp_path, **changes)
    with pytest.raises(InputError) as caught:
        check_sharding(kind, config)
    assert caught.value.location == location
    check_sharding(DistributedType.MULTI_GPU, config)
    check_sharding(DistributedType.NO, config)
    check_sharding(kind, make_config(base, data, tmp_path))


@pytest.mark.parametrize(
    ("zero", "location"),
    [
        ({"stage": 1}, "zero_stage"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "offload_optimizer_device"),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, None),
        ({"stage": 3}, None),
    ],
)
def test_zero_is_taken_at_stages_2_and_3_with_the_optimizer_on_the_device(
    zero: dict[str, Any], location: str | None, base: Path, data: Path, tmp_path: Path
) -> None:
    config = make_config(base, data, tmp_path, train={"max_grad_norm": 0.7, "batch_size": 2})
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero})
    accelerator: Any = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    if location is None:
        set_engine(accelerator, config)
        assert plugin.deepspeed_config["gradient_clipping"] == 0.7
        assert plugin.deepspeed_config["train_micro_batch_size_per_gpu"] == 2
        return
    with pytest.raises(InputError) as caught:
        set_engine(accelerator, config)
    assert location in (caught.value.location or "")


def launched(*command: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return subprocess.run(
        [*torchrun, "-m", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def written(
    folder: Path, name: str, base: Path, images: Path, batch: int, *, accumulate: int = 1, average: bool = True
) -> Path:
    train = {"max_steps": 6, "batch_size": batch, "learning_rate": 1e-3, "checkpoint_every": 3, "validate_every": 3}
    train["gradient_accumulation"] = accumulate
    content = {
        "base": str(base),
        "output_dir": str(folder / name),
        "data": {"path": str(images), "validation_share": 0.25},
        "train": train | {"sample_every": 3, "sample_count": 2, "ema_decay": 0.5 * average, "log_every": 1},
        "sample": {"steps": 2},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def needs_deepspeed(*stages: int) -> list[Any]:
    absent = importlib.util.find_spec("deepspeed") is None or shutil.which("c++") is None
    reason = "needs DeepSpeed (uv sync --group zero) and a C++ compiler, which it builds its communication with"
    return [pytest.param(f"zero{stage}", marks=pytest.mark.skipif(absent, reason=reason)) for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", *needs_deepspeed(2, 3)])
def test_spread_over_two_processes_it_trains_saves_and_resumes_as_in_one(
    kind: str, base: Path, data: Path, tmp_path: Path
) -> None:
    average, accumulate = kind == "fsdp2", 1 if kind == "fsdp2" else 2
    alone = written(tmp_path, "one", base, data, 4 * accumulate, average=average)
    assert main(["train", str(alone)]) == 0
    config = written(tmp_path, "spread", base, data, 2, accumulate=accumulate, average=average)
    done = launched("tests.spread_child", kind, str(config))
    assert done.returncode == 0, done.stderr[-3000:]
    folders = {name: tmp_path / name for name in ("one", "spread")}
    kept = {name: checkpoints(folder / "checkpoints") for name, folder in folders.items()}
    assert [c.step for c in kept["one"]] == [c.step for c in kept["spread"]]
    for ours, theirs in zip(kept["one"], kept["spread"], strict=True):
        for file in ("trainable", "optimizer", *(["average"] if average else [])):
            one, two = (load_file(c.folder / f"{file}.safetensors") for c in (ours, theirs))
            assert one.keys() == two.keys()
            for key in one:
                assert one[key].shape == two[key].shape  # whole, not a process's part
                torch.testing.assert_close(one[key].float(), two[key].float(), rtol=1e-3, atol=1e-5)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders.values()]
    assert adapters[0].keys() == adapters[1].keys()
    for key in adapters[0]:
        torch.testing.assert_close(adapters[0][key], adapters[1][key], rtol=1e-3, atol=1e-5)
    # Back to step 3, and on from there: spread again, and with one process.
    before = adapters[1]
    for again in (lambda: launched("tests.spread_child", kind, str(config), "--resume"), None):
        shutil.rmtree(kept["spread"][-1].folder)
        if again is not None:
            done = again()
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert main(["train", str(config), "train.batch_size=4", "--resume", "latest"]) == 0
        now = load_file(folders["spread"] / "adapter" / "adapter_model.safetensors")
        for key in before:
            torch.testing.assert_close(now[key], before[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_accelerates_own_launcher_starts_a_run(base: Path, data: Path, tmp_path: Path) -> None:
    config = written(tmp_path, "run", base, data, 2)
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "configs/accelerate/one_gpu.yaml"),
    ]
    done = subprocess.run(
        [*launcher, "-m", "mmdit_lora", "train", str(config)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("wrote ") == 1
    assert checkpoints(tmp_path / "run" / "checkpoints")[-1].step == 6


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="Accelerate's own config of a spread base needs two GPUs")
@pytest.mark.parametrize("kind", ["fsdp2", *needs_deepspeed(2, 3)])
def test_spread_by_accelerates_config_on_gpus(kind: str, base: Path, data: Path, tmp_path: Path) -> None:
    config = written(tmp_path, "run", base, data, 2, average=kind == "fsdp2")
    file = str(ROOT / "configs" / "accelerate" / f"{kind}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "2"]
    done = subprocess.run([*command, "-m", "mmdit_lora", "train", str(config)], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "run" / "adapter").is_dir()
