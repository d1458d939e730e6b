"""One sampled image, bit for bit, however an adapter came to its base: twice in a row, in training and in evaluation mode."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from mmdit_lora import Box, Layout
from mmdit_lora.cli.main import main
from mmdit_lora.export import Target
from mmdit_lora.export.export import export_adapter
from mmdit_lora.export.read_back import answers, read
from mmdit_lora.lora import add_layout_lora, base_fingerprint, load_adapter, save_adapter
from mmdit_lora.pipelines import load_pipeline
from tests.tiny import trained_adapter

BASE = Path(__file__).resolve().parent.parent / "data" / "tiny_base"
BOXES = Box((0.05, 0.05, 0.95, 0.30), "a red square"), Box((0.1, 0.45, 0.35, 0.95), "a cyan circle")
LAYOUT = Layout("a red square and a cyan circle", BOXES)
STEPS = 2
FORMATS: tuple[Target, ...] = ("peft", "diffusers", "kohya", "merged")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter as the trainer writes it, with the default dropout, and every export of it."""
    folder = tmp_path_factory.mktemp("one_image")
    model = load_pipeline(str(BASE)).transformer
    fingerprint = base_fingerprint(model)
    add_layout_lora(model)
    trained_adapter(model)
    save_adapter(model, folder / "trained", metadata={"base": str(BASE), "fingerprint": fingerprint})
    made = {"trained": folder / "trained"}
    with pytest.MonkeyPatch.context() as patch:
        # A fresh process costs seconds: `-m slow` has it, in tests/test_export.py.
        patch.setattr("mmdit_lora.export.export._read_back", lambda to, path, *at: answers(read(to, str(path), *at)))
        for to in FORMATS:
            made[to] = folder / (f"{to}.safetensors" if to == "kohya" else to)
            export_adapter(made["trained"], to=to, out=made[to], base=str(BASE))
    return made


@cache
def bare() -> Any:
    return load_pipeline(str(BASE))


def opened(*, training: bool = False) -> Any:
    """The base's pipeline, with a transformer of its own."""
    pipe = type(bare())(**bare().components)
    pipe.register_to_config(**{key: bare().config[key] for key in ("max_sequence_length", "guidance_scale")})
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer = copy.deepcopy(bare().transformer).train(training)
    return pipe


def generate(pipe: Any) -> np.ndarray:
    return pipe(LAYOUT, num_inference_steps=STEPS, output_type="np", generator=torch.Generator().manual_seed(0)).images


@pytest.fixture(scope="module")
def image(files: dict[str, Path]) -> np.ndarray:
    """Of base + adapter by hand: the weights in PEFT's layers, dropout at 0."""
    pipe = opened()
    load_adapter(pipe.transformer, files["trained"])
    for name, module in pipe.transformer.named_modules():
        if ".lora_dropout" in name and isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    painted = generate(pipe)
    assert np.abs(painted - generate(opened())).max() > 0.05
    return painted


def by_load_adapter(pipe: Any, path: Path) -> None:
    load_adapter(pipe.transformer, path)


def by_load_lora_weights(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(str(path))


def by_weight_name(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(str(path), weight_name="pytorch_lora_weights.safetensors", adapter_name="layout")


def by_the_file(pipe: Any, path: Path) -> None:
    pipe.load_lora_weights(str(path / "adapter_model.safetensors"))


def by_diffusers_own(pipe: Any, path: Path) -> None:
    pipe.transformer.load_lora_adapter(str(path))


def by_peft(pipe: Any, path: Path) -> None:
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(path))


def by_peft_to_train_on(pipe: Any, path: Path) -> None:
    pipe.transformer = PeftModel.from_pretrained(pipe.transformer, str(path), is_trainable=True)


WAYS: list[tuple[Callable[[Any, Path], None], str]] = [
    *((by_load_adapter, form) for form in ("trained", "peft", "diffusers", "kohya")),
    *((by_load_lora_weights, form) for form in ("trained", "peft", "diffusers", "kohya")),
    (by_weight_name, "diffusers"),
    (by_the_file, "trained"),
    (by_the_file, "peft"),
    (by_diffusers_own, "diffusers"),
    *((by_peft, form) for form in ("trained", "peft")),
    (by_peft_to_train_on, "trained"),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("way", "form"), WAYS, ids=lambda given: getattr(given, "__name__", given))
def test_the_image_is_the_same_however_the_adapter_came(
    files: dict[str, Path], image: np.ndarray, way: Callable[[Any, Path], None], form: str, training: bool
) -> None:
    pipe = opened(training=training)
    way(pipe, files[form])
    assert np.array_equal(generate(pipe), image)
    assert np.array_equal(generate(pipe), image)
    pipe.transformer.train(not training)
    assert np.array_equal(generate(pipe), image)


def test_the_merged_base_paints_it_to_rounding(files: dict[str, Path], image: np.ndarray) -> None:
    for training in (False, True):
        pipe = load_pipeline(str(files["merged"]))
        pipe.transformer.train(training)
        np.testing.assert_allclose(generate(pipe), image, atol=1e-4)
        assert np.array_equal(generate(pipe), generate(pipe))


def test_the_command_line_paints_it_of_every_export(files: dict[str, Path], image: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text(json.dumps(LAYOUT.to_dict()))
    want = (image[0] * 255).round().astype(np.uint8)
    for form in ("trained", "peft", "diffusers", "kohya"):
        given = ["--base", str(BASE), "--adapter", str(files[form]), "--layout", str(tmp_path / "layout.json")]
        assert main(["sample", *given, "--steps", str(STEPS), "--out", str(tmp_path / form)]) == 0
        with Image.open(tmp_path / form / "0000.png") as painted:
            assert np.array_equal(np.asarray(painted), want), form


def test_exports_state_no_dropout_and_remember_the_trained_one(files: dict[str, Path]) -> None:
    from safetensors import safe_open

    assert json.loads((files["trained"] / "adapter_config.json").read_text())["lora_dropout"] == 0.1
    assert json.loads((files["peft"] / "adapter_config.json").read_text())["lora_dropout"] == 0
    for form, file in (
        ("peft", files["peft"] / "adapter_model.safetensors"),
        ("diffusers", files["diffusers"] / "pytorch_lora_weights.safetensors"),
        ("kohya", files["kohya"]),
    ):
        with safe_open(file, framework="pt") as opened_file:
            metadata = opened_file.metadata()
        assert json.loads(metadata["mmdit_lora"])["lora_dropout"] == 0.1, form
        if form == "diffusers":
            assert json.loads(metadata["lora_adapter_metadata"])["transformer.lora_dropout"] == 0


def test_no_file_states_where_the_base_was(files: dict[str, Path]) -> None:
    for form, path in files.items():
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            head = file.read_bytes()[:200_000]
            assert str(BASE.parent).encode() not in head, f"{form}: {file.name}"
