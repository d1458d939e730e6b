"""Training in a random subspace: the Fastfood transform, what it moves, and what it leaves alone; and (IA)^3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmdit_lora.analysis.studies.ia3 import add_ia3, fold_ia3, ia3
from mmdit_lora.analysis.studies.subspace import (
    Fastfood,
    add_subspace,
    fold_subspace,
    hadamard,
    subspace,
    subspace_linears,
)
from mmdit_lora.config.loading import load_config
from mmdit_lora.errors import InputError
from mmdit_lora.training.checkpoint import trainable_parameters
from mmdit_lora.training.trainable import FoldedMethod
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.test_trainer import make_config
from tests.tiny import tiny_transformer, velocity

SIZES = [(1, 5), (3, 8), (5, 64), (16, 100)]


def dense(size: int) -> torch.Tensor:
    """H of a size by its definition: (-1) to the number of common bits of row and column."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def matrix(fastfood: Fastfood) -> torch.Tensor:
    return torch.stack([fastfood(column) for column in torch.eye(fastfood.columns)], dim=1)


@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_the_fast_hadamard_transform_is_the_matrix(width: int) -> None:
    x = torch.randn(3, width)
    assert torch.allclose(hadamard(x), x @ dense(width), atol=1e-5)


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_fastfood_is_the_product_of_its_parts(columns: int, rows: int) -> None:
    fastfood = Fastfood(columns, rows, seed=4)
    h = dense(fastfood.width)
    blocks = []
    for signs, order, normals in zip(fastfood.signs, fastfood.order, fastfood.normals, strict=True):  # type: ignore[arg-type]
        permutation = torch.eye(fastfood.width)[order]
        blocks.append(h @ torch.diag(normals) @ permutation @ h @ torch.diag(signs))
    whole = torch.cat(blocks)[:rows, :columns] / (fastfood.width * rows) ** 0.5
    assert torch.allclose(matrix(fastfood), whole, atol=1e-5)
    assert matrix(fastfood).shape == (rows, columns)


def test_fastfood_is_linear_and_a_function_of_its_seed() -> None:
    fastfood = Fastfood(6, 50, seed=1)
    one, other = torch.randn(2, 6)
    assert torch.allclose(fastfood(2 * one - 3 * other), 2 * fastfood(one) - 3 * fastfood(other), atol=1e-5)
    assert torch.equal(fastfood(one), Fastfood(6, 50, seed=1)(one))
    assert not torch.allclose(fastfood(one), Fastfood(6, 50, seed=2)(one))
    assert not fastfood.state_dict()  # drawn again, never stored


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_fastfood_keeps_norms_in_expectation(columns: int, rows: int) -> None:
    v = torch.randn(columns, generator=torch.Generator().manual_seed(0))
    squares = torch.stack([Fastfood(columns, rows, seed)(v).square().sum() for seed in range(600)])
    error = squares.std() / 600**0.5
    assert abs(squares.mean() - v.square().sum()) < 4 * error
    assert error < 0.1 * v.square().sum()


@pytest.mark.parametrize("structured", [False, True])
def test_exactly_d_numbers_train_and_the_base_is_as_it_was(structured: bool) -> None:
    model = tiny_transformer()
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = velocity(model)
    report = add_subspace(model, 37, structured=structured, seed=0)
    trained = trainable_parameters(model)
    assert sum(p.numel() for p in trained.values()) == 37 == report["dimension"]
    assert report["scales"] == (4 if structured else 0)  # three blocks and the processor
    assert torch.equal(velocity(model), expected)

    velocity(model).square().mean().backward()
    assert trained["layout_processor.layout_theta"].grad.abs().min() > 0
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(trained)

    with torch.no_grad():
        trained["layout_processor.layout_theta"].normal_()
        if structured:
            trained["layout_processor.layout_theta_scales"].mul_(torch.tensor([2.0, 1.0, 1.0, 0.0]))
    moved = velocity(model)
    assert not torch.allclose(moved, expected)
    changed = fold_subspace(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    last = "layout_processor." if structured else "none"  # its scale is 0
    assert differ == {name for name in changed if not name.startswith(last)}
    assert changed.keys() == {f"{name}.weight" for name in subspace_linears(model)}
    assert torch.allclose(velocity(model), moved, atol=1e-5)
    assert not fold_subspace(model)


def test_each_weight_moves_by_about_a_step_whatever_the_dimension() -> None:
    for dimension in (50, 1000):
        model = tiny_transformer()
        before = {name: linear.weight.clone() for name, linear in subspace_linears(model).items()}
        add_subspace(model, dimension, structured=False, seed=0)
        with torch.no_grad():
            model.layout_processor.layout_theta.fill_(0.01)  # as one step of Adam with this learning rate leaves it
        fold_subspace(model)
        moved = torch.cat([(model.get_submodule(n).weight - w).flatten() for n, w in before.items()])
        assert moved.square().mean().sqrt().item() == pytest.approx(0.01, rel=0.15)


@pytest.mark.parametrize(("dimension", "structured"), [(4, True), (10**9, False)])
def test_a_dimension_that_cannot_be_is_refused(dimension: int, structured: bool) -> None:
    with pytest.raises(InputError, match=r"dimension of the subspace"):
        add_subspace(tiny_transformer(), dimension, structured=structured, seed=0)


def test_ia3_scales_the_outputs_of_fc1_and_the_inputs_of_fc2() -> None:
    model = tiny_transformer()
    expected = velocity(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_ia3(model, ["layout_mlp.fc1", "layout_mlp.fc2"])
    assert torch.equal(velocity(model), expected)
    trained = trainable_parameters(model)
    linears = {n: m for n, m in subspace_linears(tiny_transformer()).items() if "layout_mlp.fc" in n}
    widths = [m.out_features if n.endswith("fc1") else m.in_features for n, m in linears.items()]
    assert sum(p.numel() for p in trained.values()) == sum(widths)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
    moved = velocity(model)
    changed = fold_ia3(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    name = "transformer_blocks.0.layout_stream.layout_mlp.fc2.weight"
    factors = 1 + torch.linspace(-0.5, 0.5, before[name].shape[1])
    assert torch.allclose(changed[name], before[name] * factors)
    assert {n for n in before if not torch.equal(before[n], after[n])} <= changed.keys()
    assert torch.allclose(velocity(model), moved, atol=1e-5)
    assert not torch.allclose(moved, expected)


@pytest.mark.parametrize(
    ("method", "more", "numbers"),
    [
        (subspace(20, structured=True), {}, 20),
        (ia3(), {}, None),
        (None, {"stream": {"parts": ["layout_mlp."]}}, None),
    ],
)
def test_a_run_saves_a_plain_base_with_only_its_own_weights_changed(
    base: Path, data: Path, tmp_path: Path, method: FoldedMethod | None, more: dict[str, Any], numbers: int | None
) -> None:
    from safetensors.torch import load_file

    config = make_config(base, data, tmp_path / "run", method="layout_stream", **more, train={"max_steps": 2})
    result = train(config, method=method)
    (was,), (now,) = [list((folder / "transformer").glob("*.safetensors")) for folder in (base, tmp_path / "run/base")]
    before, after = load_file(was), load_file(now)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layout" in name for name in changed)
    assert result.report["method"] == ("layout_stream" if method is None else method.name)
    if numbers is None:
        assert all("layout_mlp." in name for name in changed)
    if numbers is not None:
        assert result.report["trainable_params"] == numbers
    own = result.pipe.transformer.state_dict()
    assert all(torch.equal(own[name], value) for name, value in after.items())
    assert not any(isinstance(module, Fastfood) for module in result.pipe.transformer.modules())


def test_a_subspace_run_that_was_stopped_goes_on_to_the_same_weights(base: Path, data: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"method": "layout_stream"}
    method = subspace(12)
    steps = {"max_steps": 4, "checkpoint_every": 2}
    train(make_config(base, data, tmp_path / "whole", **changes, train=steps), method=method)

    class Enough(Exception):
        pass

    def stop(record: Any) -> None:
        if record.step == 3:
            raise Enough

    with pytest.raises(Enough):
        train(
            make_config(base, data, tmp_path / "stopped", **changes, train=steps),
            callbacks=[Calls(step=stop)],
            method=method,
        )
    train(make_config(base, data, tmp_path / "stopped", **changes, train=steps), resume=True, method=method)
    files = [next((tmp_path / run / "base/transformer").glob("*.safetensors")) for run in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_part_that_is_nowhere_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path / "run", method="layout_stream", stream={"parts": ["layout_mpl"]})
    with pytest.raises(InputError, match="layout_mpl"):
        prepare_run(config)


def test_linears_that_nothing_reads_are_not_moved() -> None:
    names = subspace_linears(tiny_transformer())
    assert "transformer_blocks.0.layout_stream.attn.add_q_proj" in names
    assert "transformer_blocks.2.layout_stream.attn.add_q_proj" not in names
    assert all(isinstance(linear, nn.Linear) and "layout" in name for name, linear in names.items())


def test_a_config_that_names_a_study_s_method_is_refused_and_a_section_of_defaults_is_not(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    file.write_text("base: b\ndata: d\nsubspace: {dimension: 1000, structured: false, seed: null}\n")
    assert load_config(file).method == "lora"
    for method in ("ia3", "subspace"):
        with pytest.raises(InputError, match=rf"method: is {method}, which only studies train(.|\n)*study methods"):
            load_config(file, [f"method={method}"])
