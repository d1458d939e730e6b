"""Prior preservation: the old domain, painted by the base itself, on which the adapter is held to the base's predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmdit_lora.config.loading import Config
from mmdit_lora.data.records import read_dataset
from mmdit_lora.errors import InputError
from mmdit_lora.training.loss import Objective, predict
from mmdit_lora.training.prior_preservation import prior_losses, without_adapter
from mmdit_lora.training.setup import Run
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.test_trainer import adapter_of, make_config


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("old") / "old.jsonl"
    boxes = [{"xyxy": [0.1, 0.1, 0.5, 0.6], "phrase": "a red circle"}]
    lines = [{"caption": f"old scene {n}", "boxes": boxes} for n in range(5)]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"caption": "nothing", "boxes": []}]))
    return file


def config_of(
    base: Path, data: Path, out: Path, layouts: Path, *, prior: dict[str, Any] | None = None, **train: Any
) -> Config:
    section = {"layouts": str(layouts), "batch_size": 2} | (prior or {})
    return make_config(base, data, out, prior=section, sample={"steps": 2}, train=train)


def started(config: Config) -> Run:
    run = prepare_run(config)
    run.start_prior()
    return run


def test_the_base_paints_the_old_layouts_and_a_killed_painting_goes_on(
    base: Path, data: Path, layouts: Path, tmp_path: Path
) -> None:
    run = started(config_of(base, data, tmp_path / "one", layouts))
    folder = tmp_path / "one" / "prior"
    records = read_dataset(folder)
    assert [record.layout.caption for record in records] == [f"old scene {n}" for n in range(5)]  # none without a box
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "000003.png").unlink()
    (folder / "metadata.jsonl").unlink()
    run.start_prior()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    fewer = started(config_of(base, data, tmp_path / "two", layouts, prior={"count": 2}))
    assert fewer.prior is not None
    assert len(fewer.prior.records) == 2


def test_a_new_adapter_has_moved_nothing_and_is_switched_on_again(
    base: Path, data: Path, layouts: Path, tmp_path: Path
) -> None:
    run = started(config_of(base, data, tmp_path, layouts))
    assert run.prior is not None
    model, batch = run.pipe.transformer, run.prior.batch(range(2))
    assert prior_losses(run.model, model, batch, Objective()).tolist() == [0.0, 0.0]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name in trained:
            model.get_parameter(name).add_(0.05)
        plain = predict(model, batch)
        with without_adapter(model):
            base_alone = predict(model, batch)
        assert not torch.equal(plain, base_alone)
        assert torch.equal(predict(model, batch), plain)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    found = prior_losses(run.model, model, batch, Objective())
    torch.testing.assert_close(found, ((plain - base_alone) ** 2).flatten(1).mean(1))
    found.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained


def test_the_old_domain_is_drawn_apart_and_the_new_as_without_it(
    base: Path, data: Path, layouts: Path, tmp_path: Path
) -> None:
    run = started(config_of(base, data, tmp_path, layouts))
    plain = prepare_run(make_config(base, data, tmp_path / "plain"))
    assert run.prior is not None
    own, bare, old = (
        run.examples.batch(range(2)),
        plain.examples.batch(range(2)),
        run.prior.batch(range(2)),
    )
    assert torch.equal(own.noise, bare.noise)
    assert torch.equal(own.t, bare.t)
    assert not torch.equal(own.t, old.t)
    first = [run.prior.record_at(n).location for n in range(5)]
    assert len(set(first)) == 5


def test_it_holds_the_base_where_it_was(base: Path, data: Path, layouts: Path, tmp_path: Path) -> None:
    def moved(out: Path, **prior: Any) -> float:
        config = config_of(base, data, out, layouts, prior=prior, max_steps=8, learning_rate=0.05)
        if not prior:
            config = config.model_copy(update={"prior": config.prior.model_copy(update={"layouts": None})})
        model = train(config).pipe.transformer.eval()
        run = started(config_of(base, data, tmp_path / f"measured_{out.name}", layouts))
        assert run.prior is not None
        with torch.no_grad():
            batches = [run.prior.batch(range(2 * n, 2 * n + 2)) for n in range(3)]
            return sum(prior_losses(model, model, batch, Objective()).mean().item() for batch in batches)

    free, held = moved(tmp_path / "free"), moved(tmp_path / "held", weight=100.0)
    assert held < free / 2


def test_a_resumed_run_with_it_is_the_undisturbed_one(base: Path, data: Path, layouts: Path, tmp_path: Path) -> None:
    length = {"max_steps": 5, "checkpoint_every": 2, "log_every": 1}
    train(config_of(base, data, tmp_path / "whole", layouts, **length))
    config = config_of(base, data, tmp_path / "halves", layouts, **length)

    class Stop(Exception):
        pass

    def stop(step: int, _: dict[str, float]) -> None:
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, callbacks=[Calls(logged=stop)])
    train(config, resume=True)
    one, two = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "halves")
    assert all(torch.equal(one[name], two[name]) for name in one)
    without = make_config(base, data, tmp_path / "without", train=length)
    train(without)
    assert not all(torch.equal(tensor, one[name]) for name, tensor in adapter_of(tmp_path / "without").items())


def test_what_it_cannot_do_is_refused(base: Path, data: Path, layouts: Path, tmp_path: Path) -> None:
    config = config_of(base, data, tmp_path / "no", layouts)
    with pytest.raises(InputError, match="layout_stream") as caught:
        prepare_run(config.model_copy(update={"method": "layout_stream"}))
    assert caught.value.location == "prior.layouts"
    empty = tmp_path / "empty.jsonl"
    empty.write_text(json.dumps({"caption": "nothing", "boxes": []}) + "\n")
    with pytest.raises(InputError, match="no layout with a box"):
        prepare_run(config_of(base, data, tmp_path / "no", empty))
    assert not (tmp_path / "no").exists()
