"""The trainer: what trains, what does not, resume by construction, what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmdit_lora.config.loading import Config, load_config
from mmdit_lora.data.cache import LATENTS, EncodingCache, Entry
from mmdit_lora.data.sampler import epoch_order
from mmdit_lora.data.shapes import DOMAINS, write_dataset
from mmdit_lora.data.split import split_records
from mmdit_lora.errors import InputError
from mmdit_lora.layout import Box, Layout
from mmdit_lora.pipelines import load_pipeline
from mmdit_lora.training.checkpoint import checkpoints
from mmdit_lora.training.encoding import LayoutEncoder
from mmdit_lora.training.held_out import compare_losses
from mmdit_lora.training.trainer import prepare_run, train
from tests.callbacks import Calls
from tests.tiny import tiny_pipeline, tiny_transformer
from tests.wandb_reader import read_offline_run


def make_config(base: Path, path: Path, out: Path, **changes: Any) -> Config:
    values: dict[str, object] = {
        "base": str(base),
        "output_dir": str(out),
        "data": {"path": str(path), "validation_share": 0.25},
        "train": {"max_steps": 4, "batch_size": 3, "learning_rate": 1e-2, "checkpoint_every": 2, "sample_every": 0}
        | {"validate_every": 0, "log_every": 1}
        # Its trial steps take as long as two of the run; `test_preflight` has them.
        | {"preflight": False}
        | changes.pop("train", {}),
        **changes,
    }
    return Config.model_validate(values)


def adapter_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def test_only_the_adapter_changes_and_the_rest_of_the_base_is_bit_equal(base: Path, data: Path, tmp_path: Path) -> None:
    before = {name: p.clone() for name, p in load_pipeline(str(base)).transformer.state_dict().items()}
    result = train(make_config(base, data, tmp_path / "run"))
    result.pipe.transformer.unload_lora()
    after = result.pipe.transformer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    trained = adapter_of(tmp_path / "run")
    assert trained
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["trainable_params"] == sum(tensor.numel() for tensor in trained.values())
    assert report["held_out_loss"]["images"] == 3


def test_a_resumed_run_gives_the_bits_of_an_undisturbed_one(base: Path, data: Path, tmp_path: Path) -> None:
    # Nine images in batches of two: epochs end within batches, and images come again, from the cache or not.
    length = {"max_steps": 9, "batch_size": 2}
    train(make_config(base, data, tmp_path / "whole", train=length))
    config = make_config(base, data, tmp_path / "halves", train=length)
    stop_after(config, step=5)
    assert [c.step for c in checkpoints(tmp_path / "halves" / "checkpoints")] == [2, 4]
    train(config, resume=True)
    whole, halves = adapter_of(tmp_path / "whole"), adapter_of(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_bf16_with_every_switch_trains_fp32_weights_and_paints(base: Path, data: Path, tmp_path: Path) -> None:
    switches = {"mixed_precision": "bf16", "gradient_checkpointing": True, "sample_every": 4, "sample_count": 2}
    config = make_config(
        base,
        data,
        tmp_path,
        train=switches,
        data={"path": str(data), "validation_share": 0.25, "flip": True, "crop": "random"},
        flow={"inside_weight": 3.0, "timesteps": "mode", "shift": 2.0},
        sample={"steps": 2},
    )
    result = train(config)
    trained = adapter_of(tmp_path)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    assert result.pipe.transformer.dtype is torch.bfloat16
    assert json.loads((tmp_path / "report.json").read_text())["family"] == result.pipe.transformer.family
    assert type(result.pipe).__name__ in (tmp_path / "adapter" / "README.md").read_text()
    assert (tmp_path / "samples" / "step_0000004.png").is_file()
    layout = result.pipe(Layout("a thing", (Box((0.1, 0.1, 0.6, 0.6), "a thing"),)), num_inference_steps=1)
    assert layout.images[0].size == (32, 32)


def test_another_seed_gives_another_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    train(make_config(base, data, tmp_path / "one"))
    train(make_config(base, data, tmp_path / "two", train={"seed": 1}))
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_accumulated_batches_draw_what_one_large_batch_draws(base: Path, data: Path, tmp_path: Path) -> None:
    # AdamW makes a step of the learning rate out of the last digits of a gradient near 0: at 1e-3 these stay below the tolerance.
    large = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-3}
    small = {"batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-3}
    for name, sizes in (("large", large), ("small", small)):
        train(make_config(base, data, tmp_path / name, lora={"dropout": 0.0}, train={"max_steps": 2, **sizes}))
    one, two = adapter_of(tmp_path / "large"), adapter_of(tmp_path / "small")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("change", [{"train": {"learning_rate": 1e-3}}, {"lora": {"r": 8}}])
def test_resume_with_another_config_is_refused(
    base: Path, data: Path, tmp_path: Path, change: dict[str, dict[str, object]]
) -> None:
    stop_after(make_config(base, data, tmp_path), step=3)
    with pytest.raises(InputError, match=r"was .* when the run was started"):
        train(make_config(base, data, tmp_path, **change), resume=True)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"data": {"filter": {"max_boxes": 1}}}, "resume with data.filter.max_boxes=null"),
        ({"data": {"box_jitter": 0.1}}, "resume with data.box_jitter=0.0"),
    ],
)
def test_a_key_that_is_younger_than_the_checkpoint_had_its_default(
    base: Path, data: Path, tmp_path: Path, change: dict[str, dict[str, Any]], hint: str
) -> None:
    config = make_config(base, data, tmp_path)
    stop_after(config, step=3)
    for checkpoint in checkpoints(tmp_path / "checkpoints"):  # as an earlier version wrote it
        state = json.loads((checkpoint.folder / "state.json").read_text())
        del state["config"]["data"]["filter"], state["config"]["data"]["box_jitter"]
        (checkpoint.folder / "state.json").write_text(json.dumps(state))
    values = config.model_dump(mode="json")
    values["data"] |= change["data"]
    with pytest.raises(InputError) as caught:
        train(Config.model_validate(values), resume=True)
    assert hint in str(caught.value)
    train(config, resume=True)


def test_resume_with_other_data_is_refused(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "data"
    write_dataset(copy, DOMAINS["basic"], count=12, seed=3)
    config = make_config(base, copy, tmp_path / "run")
    stop_after(config, step=3)
    write_dataset(copy, DOMAINS["basic"], count=12, seed=4)
    with pytest.raises(InputError, match="the data is not the one"):
        train(config, resume=True)


def test_a_folder_that_holds_a_run_is_never_mixed_with_another(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(base, data, tmp_path)
    stop_after(config, step=3)
    with pytest.raises(InputError, match="already holds a run"):
        train(config)


def test_what_a_kill_leaves_is_no_checkpoint_and_a_damaged_one_is_refused(
    base: Path, data: Path, tmp_path: Path
) -> None:
    config = make_config(base, data, tmp_path)
    stop_after(config, step=3)
    folder = tmp_path / "checkpoints"
    (folder / ".step_0000003.abc").mkdir()
    (folder / "step_0000003").mkdir()  # without its state: not renamed by us
    assert [c.step for c in checkpoints(folder)] == [2]
    weights = folder / "step_0000002" / "trainable.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match="not what was saved"):
        train(config, resume=True)


def test_old_checkpoints_are_pruned(base: Path, data: Path, tmp_path: Path) -> None:
    train(make_config(base, data, tmp_path, train={"checkpoint_every": 1, "keep_checkpoints": 2}))
    assert [c.step for c in checkpoints(tmp_path / "checkpoints")] == [3, 4]


def test_zero_gates_stop_the_method_lora_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    plain = tiny_pipeline(tmp_path / "vocabulary", tiny_transformer(open_gates=False))
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="untrained"):
        train(make_config(tmp_path / "plain", data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_stream_alone_trains_with_the_method_layout_stream(base: Path, data: Path, tmp_path: Path) -> None:
    before = load_pipeline(str(base)).transformer.state_dict()
    train(make_config(base, data, tmp_path, method="layout_stream"))
    after = load_pipeline(str(tmp_path / "base")).transformer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layout" in name for name in changed)


def test_preparing_writes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    run = prepare_run(make_config(base, data, tmp_path / "run"))
    assert run.trainable.trainable_params > 0
    assert not (tmp_path / "run").exists()


def test_wandb_offline_holds_curves_fidelity_and_images_with_boxes(base: Path, data: Path, tmp_path: Path) -> None:
    config = make_config(
        base,
        data,
        tmp_path,
        train={"sample_every": 2, "sample_count": 2, "validate_every": 2},
        sample={"steps": 2},
        tracking={"tracker": "wandb", "run_name": "a run"},
    )
    train(config)
    run = read_offline_run(tmp_path)
    assert sorted(run.series("loss")) == [1, 2, 3, 4]
    rates = run.series("learning_rate")
    assert rates[1] == pytest.approx(1e-2)
    assert rates[4] < rates[1]
    assert set(run.series("fidelity/miou")) == {2, 4}
    assert 2 in run.series("held_out/loss")
    images = run.images("samples")[4]
    assert len(images) == 2
    assert images[0]["boxes"][0]["box_caption"].startswith(("a ", "an "))
    assert run.config["train"]["learning_rate"] == 1e-2
    assert list((tmp_path / "samples").glob("*.png"))


def test_an_encoding_does_not_depend_on_what_else_is_in_the_batch(base: Path) -> None:
    pipe = load_pipeline(str(base))
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    together = LayoutEncoder(pipe).latents(pixels)
    assert torch.equal(together[3:4], LayoutEncoder(pipe).latents(pixels[3:4]))
    captions = ["one", "another caption", "a third"]
    alone = LayoutEncoder(pipe).prompts(captions[1:2])
    for name, both in LayoutEncoder(pipe).prompts(captions).items():
        assert torch.equal(both[1:2], alone[name])
    assert torch.equal(
        LayoutEncoder(pipe).phrases(captions)["a third"], LayoutEncoder(pipe).phrases(["a third"])["a third"]
    )


def test_the_cache_makes_each_entry_once_and_forgets_the_oldest() -> None:
    made: list[str] = []

    def get(*keys: str) -> list[float]:
        def make(missing: list[int]) -> list[Entry]:
            made.extend(keys[position] for position in missing)
            return [Entry({"x": torch.full((4,), float(ord(keys[position])))}) for position in missing]

        entries = cache.get_many(LATENTS, keys, make, batch=4)
        return [entry.tensors["x"][0].item() for entry in entries if entry is not None]

    cache = EncodingCache(max_bytes=3 * 16)  # three entries
    assert get("a", "b", "a") == [97, 98, 97]
    assert get("b", "a") == [98, 97]
    assert made == ["a", "b"]
    assert get("c", "d") == [99, 100]  # "b" was not used for longest
    assert get("a", "b") == [97, 98]
    assert made == ["a", "b", "c", "d", "b"]
    assert sum(entry.nbytes for entry in cache._memory[LATENTS].values()) <= cache.max_bytes


def test_every_record_comes_once_an_epoch_and_epochs_differ() -> None:
    first, second = (epoch_order(0, epoch, 100).tolist() for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert epoch_order(1, 0, 100).tolist() != first


def test_held_out_images_stay_held_out_when_others_come(data: Path) -> None:
    from mmdit_lora.data.records import read_dataset

    records = read_dataset(data)
    training, held_out = split_records(records, 0.25)
    assert len(held_out) == 3
    assert not {r.image for r in training} & {r.image for r in held_out}
    fewer, held_out_of_fewer = split_records([r for r in records if r is not training[0]], 0.25)
    assert {r.image for r in held_out_of_fewer} <= {r.image for r in held_out}
    assert fewer


def test_paired_interval_is_that_of_the_t_test() -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    trained = torch.tensor([0.9, 1.7, 2.8, 3.8])
    result = compare_losses(base, trained)
    from scipy.stats import ttest_rel

    interval = ttest_rel(trained.double(), base.double()).confidence_interval(0.95)
    assert result.difference == pytest.approx(-0.2, abs=1e-6)
    assert result.interval == pytest.approx((interval.low, interval.high), abs=1e-6)
    assert compare_losses(base[:1], trained[:1]).interval is None


def test_overrides_reach_the_run(tmp_path: Path, base: Path, data: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"base: {base}\ndata: {data}\noutput_dir: {tmp_path / 'run'}\n")
    config = load_config(file, ["train.max_steps=1", "train.batch_size=1", "train.sample_every=0", "sample.steps=1"])
    assert train(config).report["steps"] == 1


class Stop(Exception):
    """Stands for whatever ends a run."""


def stop_after(config: Config, *, step: int) -> None:
    def stop(now: int, _: dict[str, float]) -> None:
        if now == step:
            raise Stop

    with pytest.raises(Stop):
        train(config, callbacks=[Calls(logged=stop)])
