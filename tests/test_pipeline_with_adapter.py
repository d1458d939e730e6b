"""A pipeline with an adapter on: what it saves, the mode that it paints in, and what its first argument may be."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from mmdit_lora import Box, Layout
from mmdit_lora.errors import InputError
from mmdit_lora.lora import add_layout_lora
from mmdit_lora.models.adapter_layers import adapter_layers
from mmdit_lora.pipelines import load_pipeline
from tests.tiny import tiny_pipeline, trained_adapter

LAYOUT = Layout("a red square", [Box((0.1, 0.1, 0.6, 0.5), "a red square")])


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    made = tiny_pipeline(tmp_path / "vocabulary")
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe: Any, what: Any = LAYOUT, **kwargs: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(what, num_inference_steps=2, output_type="np", generator=generator, **kwargs).images


# -- the first argument


def test_a_text_is_a_prompt_and_a_dict_a_layout(pipe: Any) -> None:
    plain = generate(pipe, None, prompt="a red square")
    assert np.array_equal(generate(pipe, "a red square"), plain)
    assert np.array_equal(
        generate(pipe, ["a red square", "a cyan circle"]),
        generate(pipe, None, prompt=["a red square", "a cyan circle"]),
    )
    with_layout = generate(pipe)
    assert not np.array_equal(with_layout, plain)
    for same in (LAYOUT.to_dict(), [LAYOUT.to_dict()], [LAYOUT], (LAYOUT,)):
        assert np.array_equal(generate(pipe, same), with_layout)
    assert len(generate(pipe, [LAYOUT, LAYOUT.to_dict()])) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "is a int"),
        ([3], "is a int"),
        (["a red square", LAYOUT], "texts and layouts"),
        ({"caption": "a", "boxes": [{"xyxy": [0, 0, 2, 2], "phrase": "a"}]}, "layout: "),
        ([LAYOUT, {"boxes": 3}], "layout 1: "),
    ],
)
def test_what_is_no_layout_is_refused(pipe: Any, given: Any, says: str) -> None:
    with pytest.raises(InputError) as refusal:
        generate(pipe, given)
    assert says in str(refusal.value)


def test_two_prompts_are_refused(pipe: Any) -> None:
    with pytest.raises(InputError, match="give the prompt once"):
        generate(pipe, "a red square", prompt="a cyan circle")


# -- modes


def inserted_by_add_adapter(model: Any, config: peft.LoraConfig) -> None:
    model.add_adapter(config)


def inserted_by_peft(model: Any, config: peft.LoraConfig) -> None:
    peft.inject_adapter_in_model(config, model)


@pytest.mark.parametrize("insert", [inserted_by_add_adapter, inserted_by_peft])
@pytest.mark.parametrize("training", [False, True])
def test_no_dropout_while_painting_however_an_adapter_came(pipe: Any, insert: Any, training: bool) -> None:
    bare = generate(pipe)
    pipe.transformer.train(training)
    insert(pipe.transformer, peft.LoraConfig(lora_dropout=0.5, target_modules=["layout_mlp.fc1", "layout_mlp.fc2"]))
    trained_adapter(pipe.transformer)
    modes = [module.training for module in pipe.transformer.modules()]
    one = generate(pipe)
    assert not np.array_equal(one, bare)
    assert np.array_equal(one, generate(pipe))
    assert [module.training for module in pipe.transformer.modules()] == modes
    pipe.transformer.eval()
    assert np.array_equal(one, generate(pipe))


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_diffusers_adds_follow_the_models_mode(pipe: Any, training: bool, tmp_path: Path) -> None:
    model = pipe.transformer
    model.add_adapter(peft.LoraConfig(lora_dropout=0.5, target_modules=["layout_mlp.fc1"]))
    model.save_lora_adapter(tmp_path / "lora")
    model.unload_lora()
    model.train(training)
    model.load_lora_adapter(str(tmp_path / "lora"), prefix=None)
    model.add_adapter(peft.LoraConfig(lora_dropout=0.5, target_modules=["layout_mlp.fc1"]), "another")
    assert {module.training for module in model.modules()} == {training}


# -- saving


def test_the_saved_base_is_the_base(pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = generate(pipe)
    add_layout_lora(pipe.transformer)
    trained_adapter(pipe.transformer)
    with_adapter = generate(pipe)
    with caplog.at_level(logging.WARNING, "mmdit_lora"):
        pipe.save_pretrained(tmp_path / "saved")
    assert [record.getMessage() for record in caplog.records if "without its adapters (default)" in record.getMessage()]
    assert len(caplog.records) == 1
    assert np.array_equal(generate(pipe), with_adapter)  # the pipeline itself is as it was
    assert np.array_equal(generate(load_pipeline(str(tmp_path / "saved"))), bare)

    caplog.clear()
    pipe.transformer.save_pretrained(tmp_path / "alone")
    assert len(caplog.records) == 1
    reopened = type(pipe.transformer).from_pretrained(str(tmp_path / "alone")).state_dict()
    saved = type(pipe.transformer).from_pretrained(str(tmp_path / "saved"), subfolder="transformer").state_dict()
    assert reopened.keys() == saved.keys()
    assert all(torch.equal(reopened[name], saved[name]) for name in saved)

    caplog.clear()
    pipe.save_pretrained(tmp_path / "merged", merge_adapters=True)
    assert not caplog.records
    np.testing.assert_allclose(generate(load_pipeline(str(tmp_path / "merged"))), with_adapter, atol=1e-5)
    assert np.array_equal(generate(pipe), with_adapter)
    assert len(adapter_layers(pipe.transformer)) == 6


def test_a_pipeline_that_peft_wrapped_saves_its_base(pipe: Any, tiny_adapter: Path, tmp_path: Path) -> None:
    bare = generate(pipe)
    pipe.transformer = peft.PeftModel.from_pretrained(pipe.transformer, str(tiny_adapter))
    wrapped = generate(pipe)
    assert not np.array_equal(wrapped, bare)
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(generate(load_pipeline(str(tmp_path / "saved"))), bare)
    assert np.array_equal(generate(pipe), wrapped)


def test_text_encoders_are_saved_without_their_adapters(pipe: Any, tmp_path: Path) -> None:
    bare = generate(pipe)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), pipe.text_encoder)
    styled = generate(pipe)
    assert not np.array_equal(styled, bare)
    pipe.save_pretrained(tmp_path / "saved")
    pipe.save_pretrained(tmp_path / "merged", merge_adapters=True)
    assert np.array_equal(generate(pipe), styled)
    assert np.array_equal(generate(load_pipeline(str(tmp_path / "saved"))), bare)
    np.testing.assert_allclose(generate(load_pipeline(str(tmp_path / "merged"))), styled, atol=1e-5)


def test_no_pickle_is_written(pipe: Any, tmp_path: Path) -> None:
    add_layout_lora(pipe.transformer)
    for write in (
        pipe.save_pretrained,
        pipe.transformer.save_pretrained,
        pipe.transformer.save_lora_adapter,
        lambda folder, **kwargs: pipe.save_lora_weights(folder, transformer_lora_layers={}, **kwargs),
    ):
        with pytest.raises(InputError, match="pickle"):
            write(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_a_merged_base_does_not_replace_the_base(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    pipe.save_pretrained(base)
    monkeypatch.chdir(tmp_path)
    opened = load_pipeline("base")
    monkeypatch.chdir("/")
    add_layout_lora(opened.transformer)
    trained_adapter(opened.transformer)
    (tmp_path / "link").symlink_to(base)
    files = {file: file.read_bytes() for file in base.rglob("*") if file.is_file()}
    pipe.transformer = type(pipe.transformer).from_pretrained(str(base), subfolder="transformer")
    from_same = type(pipe)(**opened.components)
    for each in (opened, pipe, from_same):
        for folder in (base, str(base), tmp_path / "link", base / "transformer" / ".."):
            with pytest.raises(InputError, match="merged weights would replace it"):
                each.save_pretrained(folder, merge_adapters=True)
    assert {file: file.read_bytes() for file in base.rglob("*") if file.is_file()} == files
    opened.save_pretrained(base)  # as in diffusers: the base over itself
    opened.save_pretrained(tmp_path / "merged", merge_adapters=True)
    assert (tmp_path / "merged" / "model_index.json").is_file()


def test_only_folders_are_written_to(pipe: Any, tmp_path: Path) -> None:
    add_layout_lora(pipe.transformer)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    for write in (
        pipe.save_pretrained,
        lambda folder: pipe.save_pretrained(folder, merge_adapters=True),
        pipe.transformer.save_pretrained,
        pipe.transformer.save_lora_adapter,
        lambda folder: pipe.save_lora_weights(folder, transformer_lora_layers={}),
    ):
        for name, kind in (("file", "a file"), ("fifo", "a FIFO")):
            with pytest.raises(InputError, match=f"is {kind}, not a folder"):
                write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
