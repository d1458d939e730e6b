"""What several test files need, made once."""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The note of bases of the one who runs the tests stays as it is.
os.environ["MMDIT_LORA_HOME"] = tempfile.mkdtemp(prefix="mmdit_lora_home_")
atexit.register(shutil.rmtree, os.environ["MMDIT_LORA_HOME"], ignore_errors=True)
if "PYTEST_XDIST_WORKER" in os.environ:  # several workers with as many threads as cores fight for them
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for what tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="module")
def forks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts processes that have imported all that the test's own file imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([request.module.__name__])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    yield context
    if before is None:
        del os.environ["OMP_NUM_THREADS"]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading side of an export runs here: a fresh process costs seconds. `-m slow` and the command line's tests have it."""
    from mmdit_lora.export.read_back import answers, read

    def read_back(to: str, written: Path, base: str, stream: str | None) -> dict[str, torch.Tensor]:
        return answers(read(to, str(written), base, stream))

    monkeypatch.setattr("mmdit_lora.export.export._read_back", read_back)


@pytest.fixture(scope="session")
def flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stock classes, without a layout stream: a small FLUX.2 klein."""
    from tests.streams import MAKERS
    from tests.streams.common import seeded

    folder = tmp_path_factory.mktemp("flux2") / "base"
    with seeded(0):
        MAKERS["flux2"].pipeline(MAKERS["flux2"].transformer()).save_pretrained(folder)
    index = folder / "model_index.json"
    stated = {"max_sequence_length": 40, "default_sample_size": 16, "num_inference_steps": 2, "guidance_scale": 3.0}
    index.write_text(json.dumps(json.loads(index.read_text()) | stated))
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of the real classes at tiny size, its gates open as if its layout stream had been trained."""
    from tests.tiny import tiny_pipeline

    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline(folder / "vocabulary").save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen procedural scenes."""
    from mmdit_lora.data.shapes import DOMAINS, write_dataset

    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, DOMAINS["basic"], count=12, seed=3)
    return folder


@pytest.fixture(scope="session")
def adapter(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder that the trainer wrote, on `base`."""
    from mmdit_lora.config.loading import Config
    from mmdit_lora.training.trainer import train

    out = tmp_path_factory.mktemp("trained") / "run"
    train(
        Config.model_validate(
            {
                "base": str(base),
                "output_dir": str(out),
                "data": {"path": str(data), "validation_share": 0.0},
                "train": {
                    "max_steps": 3,
                    "batch_size": 4,
                    "learning_rate": 3e-2,
                    "sample_every": 0,
                    "checkpoint_every": 0,
                },
            }
        )
    )
    return out / "adapter"


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder of `tiny_transformer()`, its weights random."""
    from mmdit_lora.lora import add_layout_lora, base_fingerprint, save_adapter
    from tests.tiny import tiny_transformer, trained_adapter

    folder = tmp_path_factory.mktemp("lora") / "adapter"
    model = tiny_transformer()
    add_layout_lora(model)
    trained_adapter(model)
    save_adapter(model, folder, metadata={"base": "tiny", "fingerprint": base_fingerprint(model)}, card="# Card\n")
    return folder


@pytest.fixture(scope="session")
def adapted(tiny_adapter: Path) -> torch.Tensor:
    """What the tiny transformer predicts with `tiny_adapter`."""
    from mmdit_lora.lora import load_adapter
    from tests.tiny import tiny_transformer, velocity

    model = tiny_transformer()
    load_adapter(model, tiny_adapter)
    with torch.no_grad():
        return velocity(model)
