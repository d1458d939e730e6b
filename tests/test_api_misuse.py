"""What a user of diffusers and PEFT would try: it works as there, or one message says what to give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mmdit_lora
from mmdit_lora import LayoutCollator, LayoutDataset, LayoutEncoder, add_layout_lora, load_adapter, save_adapter
from mmdit_lora.errors import InputError
from mmdit_lora.lora.reading import read_adapter_header
from mmdit_lora.pipelines import load_pipeline

DATA = "shapes://basic?count=6&seed=1"


@pytest.fixture(scope="module")
def pipe(base: Path) -> Any:
    return load_pipeline(str(base))


def test_the_dtype_may_have_its_older_name(base: Path) -> None:
    assert load_pipeline(str(base), torch_dtype=torch.bfloat16).transformer.dtype is torch.bfloat16
    assert load_pipeline(str(base), dtype=torch.bfloat16, torch_dtype=torch.bfloat16).vae.dtype is torch.bfloat16
    with pytest.raises(InputError, match="say two things"):
        load_pipeline(str(base), dtype=torch.float32, torch_dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"dtype: is 'bf16'(.|\n)*torch.bfloat16"):
        load_pipeline(str(base), dtype="bf16")  # type: ignore[arg-type]


def test_iteration_over_a_data_set_ends_and_positions_go_on() -> None:
    dataset = LayoutDataset(DATA, size=32)
    assert [sample.position for sample in dataset] == list(range(6))
    assert dataset[6].position == 6, "of the next epoch"
    for wrong in (-1, "a", 1.5):
        with pytest.raises(IndexError, match="whole numbers from 0 on"):
            dataset[wrong]  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "said"),
    [({"size": 0}, "size: is 0"), ({"size": 32, "samples": -1}, "samples: is -1"), ({"size": (32, 7)}, "7")],
)
def test_sizes_and_counts_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        LayoutDataset(DATA, **options)


def test_an_adapter_needs_no_metadata(pipe: Any, tmp_path: Path) -> None:
    add_layout_lora(pipe.transformer, adapter_name="mine")
    save_adapter(pipe.transformer, tmp_path / "mine", adapter_name="mine")
    header = read_adapter_header(tmp_path / "mine")
    assert header["family"] == pipe.transformer.family
    assert header["r"] == 16
    pipe.transformer.delete_adapters("mine")
    load_adapter(pipe.transformer, tmp_path / "mine", adapter_name="mine")
    pipe.transformer.delete_adapters("mine")


def test_what_is_no_model_batch_or_callback_is_told(pipe: Any, base: Path, tmp_path: Path) -> None:
    for call in (add_layout_lora, lambda wrong: load_adapter(wrong, tmp_path)):
        with pytest.raises(InputError, match="give its transformer"):
            call(pipe)
    with pytest.raises(TypeError, match="give its transformer"):
        mmdit_lora.flow_matching_loss(pipe, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="the batch is a NoneType"):
        mmdit_lora.flow_matching_loss(pipe.transformer, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no samples"):
        LayoutCollator()([])
    with pytest.raises(TypeError, match="give what LayoutCollator makes"):
        LayoutEncoder(pipe)([])  # type: ignore[arg-type]
    for wrong in (None, ""):
        with pytest.raises(InputError, match="give a pipeline folder or a hub id"):
            load_pipeline(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="give a YAML file, a dict or a Config"):
        mmdit_lora.train(None)  # type: ignore[arg-type]
    config = {"base": str(base), "output_dir": str(tmp_path / "run"), "data": {"path": DATA}}
    with pytest.raises(InputError, match="subclasses of Callback"):
        mmdit_lora.train(config, callbacks=[print])  # type: ignore[list-item]
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="count: is 0"):
        mmdit_lora.evaluate(pipe, DATA, count=0)
    with pytest.raises(InputError, match="known domains"):
        LayoutDataset("shapes://nowhere?count=3", size=32)
