"""Every key of the config does something: a run with another value differs where it should, and nowhere else where that is known.

One table says of each key what else makes it act and where the difference is; one list names the keys for which nothing can
differ, with the reason. Whatever key is added to the config without a line here fails the first test.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from mmdit_lora.config.loading import Config
from mmdit_lora.config.schema import nested
from mmdit_lora.models import LayoutInputs
from mmdit_lora.training import trainer
from mmdit_lora.training.loss import Objective, flow_matching_loss, predict
from mmdit_lora.training.preflight import Preflight
from mmdit_lora.training.setup import prepare_run
from mmdit_lora.training.step import StepRecord
from mmdit_lora.training.tracking import NullTracker
from tests.callbacks import Calls
from tests.test_layout_stream_method import stock_sd3
from tests.tiny import plain_twin, tiny_pipeline, tiny_transformer
from tests.tiny_flux import tiny_flux_pipeline

FC1 = "layout_processor.layout_mlp.fc1"


@dataclass(frozen=True)
class Row:
    """How one key is seen to act.

    Args:
        value: another one than the default (or than `also` gives).
        differs: parts of `Outcome` that must differ.
        same: parts that must not.
        also: what makes the key act, in both runs. A text in braces is a place of `places`.
    """

    value: Any
    differs: str
    same: str = ""
    also: dict[str, Any] = field(default_factory=dict)


PLAIN = {"base": "{plain}", "method": "layout_stream"}
FLUX = {"base": "{flux_plain}", "method": "layout_stream", "data.resolution": 32}
IMAGES = {"train.sample_every": 1, "train.max_steps": 1, "sample.steps": 2, "train.sample_count": 2}
HELD_OUT = {"data.validation_share": 0.34, "train.validate_every": 1}
PRIOR = {"prior.layouts": "{layouts}", "prior.batch_size": 1, "sample.steps": 1, "lora.dropout": 0.0}
SAVING = {"train.checkpoint_every": 1, "train.max_steps": 3}

ROWS: dict[str, Row] = {
    "base": Row("{base_2}", "losses weights", "samples times"),
    "method": Row("layout_stream", "files weights", "samples times"),
    "output_dir": Row("{elsewhere}", "place", "weights files"),
    "license": Row("mit", "card", "weights"),
    "data.path": Row("{data_2}", "losses weights", "times"),
    "data.validation": Row("{data_2}", "held_out", "weights", {"data.validation_share": 0.0}),
    "data.validation_share": Row(0.34, "held_out count samples"),
    "data.bbox_format": Row("xywh", "losses weights", "times samples"),
    "data.bbox_units": Row("pixel", "losses weights", "times samples", {"data.path": "{ones}"}),
    "data.resolution": Row(16, "buckets losses weights", "samples"),
    "data.crop": Row("random", "losses weights", "samples"),
    "data.flip": Row(True, "losses weights", "samples"),
    "data.min_visible": Row(0.9, "losses weights center_crop", "times samples"),
    "data.box_jitter": Row(0.2, "losses weights", "times samples"),
    "data.cache": Row("{cache}", "cache", "weights losses files"),
    "data.cache_variants": Row(1, "losses weights", "samples", {"data.crop": "random"}),
    "data.filter.min_area": Row(0.1, "filter losses weights", "times samples"),
    "data.filter.max_boxes": Row(1, "filter losses weights", "times samples"),
    "data.filter.include_phrases": Row(["red"], "filter losses weights", "times samples"),
    "data.filter.exclude_phrases": Row(["red"], "filter losses weights", "times"),
    "data.buckets.ratios": Row(["3:2"], "buckets losses weights"),
    "data.buckets.resolutions": Row([16], "buckets losses weights"),
    "data.buckets.upscale": Row(True, "buckets losses weights", "", {"data.buckets.resolutions": [48]}),
    "data.buckets.group_boxes": Row(True, "samples"),
    "lora.r": Row(4, "weights params", "times samples"),
    "lora.alpha": Row(8.0, "weights losses", "params times"),
    "lora.dropout": Row(0.5, "weights losses", "params times"),
    "lora.targets": Row(["layout_mlp.fc1"], "weights params", "times"),
    "lora.rank_pattern": Row({FC1: 2}, "weights params", "times"),
    "lora.alpha_pattern": Row({FC1: 2.0}, "weights losses", "params times"),
    "lora.init": Row("gaussian", "weights losses", "params times"),
    "lora.rslora": Row(True, "weights losses", "params times"),
    "lora.dora": Row(True, "weights params", "times"),
    "lora.start": Row("{adapter}", "weights losses header card", "params times"),
    "stream.kind": Row("generic", "weights params", "times", PLAIN),
    "stream.width": Row(16, "weights params", "times", PLAIN | {"stream.kind": "generic"}),
    "stream.attention": Row("cross", "weights", "times", PLAIN),
    "stream.init": Row("copy_image", "weights", "times", PLAIN),
    "stream.seed": Row(7, "weights", "times", PLAIN),
    "stream.single_blocks": Row(True, "weights params", "times", FLUX),
    "stream.phrase_tokens": Row(2, "weights params", "times", FLUX),
    "stream.parts": Row(["layout_mlp"], "weights params", "times", {"method": "layout_stream"}),
    "flow.timesteps": Row("uniform", "times losses weights", "samples"),
    "flow.logit_mean": Row(1.0, "times losses weights", "samples"),
    "flow.logit_std": Row(2.0, "times losses weights", "samples"),
    "flow.mode_scale": Row(0.5, "times losses weights", "samples", {"flow.timesteps": "mode"}),
    "flow.shift": Row(3.0, "times losses weights", "samples"),
    "flow.scheduler_shift": Row(True, "times losses weights", "samples"),
    "flow.weighting": Row("min_snr", "losses weights", "times samples"),
    "flow.min_snr_gamma": Row(0.1, "losses weights", "times samples", {"flow.weighting": "min_snr"}),
    "flow.inside_weight": Row(5.0, "losses weights", "times samples"),
    "flow.guidance": Row(3.5, "losses weights", "times samples", {"base": "{flux}", "data.resolution": 32}),
    "train.max_steps": Row(3, "steps weights rates"),
    "train.batch_size": Row(3, "samples weights", "rates"),
    "train.gradient_accumulation": Row(2, "samples weights", "rates"),
    "train.optimizer": Row("prodigy", "weights", "times samples"),
    "train.learning_rate": Row(3e-3, "weights rates", "times samples"),
    "train.lora_plus": Row(4.0, "weights", "times samples"),
    "train.lr_schedule": Row("linear", "rates weights", "times samples", {"train.max_steps": 3}),
    "train.warmup_steps": Row(2, "rates weights", "times samples"),
    "train.weight_decay": Row(1.0, "weights", "times samples rates"),
    "train.adam_betas": Row([0.1, 0.2], "weights", "times samples rates"),
    "train.max_grad_norm": Row(1e-6, "weights", "times samples rates norms"),
    "train.mixed_precision": Row("bf16", "losses weights", "times samples"),
    "train.seed": Row(1, "samples times losses weights", "rates params"),
    "train.caption_dropout": Row(1.0, "losses weights", "times samples"),
    "train.layout_dropout": Row(1.0, "losses weights", "times samples", {"method": "full"}),
    "train.box_dropout": Row(1.0, "losses weights", "times samples"),
    "train.phrase_dropout": Row(1.0, "losses weights", "times samples"),
    "train.quantization": Row("int8", "losses weights", "times samples"),
    "train.ema_decay": Row(0.9, "weights card", "losses rates", {"train.max_steps": 3}),
    "train.final": Row("best", "weights", "losses rates", HELD_OUT | SAVING | {"train.learning_rate": 300.0}),
    "train.early_stop": Row(1, "steps", "", HELD_OUT | {"train.max_steps": 6, "train.learning_rate": 1e-10}),
    "train.checkpoint_every": Row(1, "files", "weights losses"),
    "train.keep_checkpoints": Row(1, "files", "weights losses", SAVING),
    "train.validate_every": Row(1, "best_step", "weights losses", {"data.validation_share": 0.34}),
    "train.sample_every": Row(1, "files images card", "weights losses", {"sample.steps": 1}),
    "train.sample_count": Row(1, "images", "weights losses files", IMAGES),
    "train.preflight": Row(True, "checks", "weights losses"),
    "train.log_every": Row(2, "logged", "weights losses"),
    "prior.layouts": Row("{layouts}", "files weights", "times", PRIOR | {"prior.layouts": None}),
    "prior.count": Row(1, "files weights", "times", PRIOR),
    "prior.batch_size": Row(2, "weights", "times", PRIOR),
    "prior.weight": Row(30.0, "weights", "times", PRIOR),
    "tracking.tracker": Row("tensorboard", "files tracker", "weights"),
    "tracking.project": Row("other", "tracker", "weights", {"tracking.tracker": "wandb"}),
    "tracking.run_name": Row("a-name", "tracker", "weights", {"tracking.tracker": "wandb"}),
    "tracking.wandb_mode": Row("disabled", "tracker", "weights", {"tracking.tracker": "wandb"}),
    "sample.steps": Row(1, "images", "weights files", IMAGES),
    "sample.guidance_scale": Row(1.0, "images", "weights files", IMAGES),
    "sample.layout_scale": Row(0.0, "images", "weights files", IMAGES),
    "sample.layout_window": Row([0.0, 0.5], "images", "weights files", IMAGES),
    "sample.seed": Row(1, "images", "weights files", IMAGES),
}

# Keys for which nothing of a run can differ, and why.
NOTHING = {
    "version": "of the file's format: checked before a run is read (tests/test_config.py)",
    "stream_weights": "a part of the base: with another one, the base is another (tests/test_generic_training.py)",
    "data.workers": "processes that read ahead what is read anyway; the draws do not know of them (tests/test_loader.py)",
    "train.gradient_checkpointing": "the same computation, made twice to keep less: seen on the model below",
    "train.attention_backend": "the same attention by another kernel: seen on the model below",
    "train.compile": "the same computation, compiled: minutes (tests/test_layout_stream_method.py)",
}


def keys(model: type[BaseModel] = Config, above: tuple[str, ...] = ()) -> Iterator[str]:
    for name in model.model_fields:
        inner = nested(model, (name,))
        if inner is None:
            yield ".".join((*above, name))
        else:
            yield from keys(inner, (*above, name))


def test_every_key_has_a_row_or_a_reason() -> None:
    assert set(keys()) == ROWS.keys() | NOTHING.keys()
    assert not ROWS.keys() & NOTHING.keys()
    assert all(reason for reason in NOTHING.values())


# --- the runs ---------------------------------------------------------------------------------------------------------


def write_images(folder: Path, seed: int, boxes: Callable[[int], list[list[float]]]) -> None:
    """Six oblong images of noise."""
    folder.mkdir()
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(6):
        Image.fromarray(generator.integers(0, 255, (32, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        own = boxes(number)
        phrases = ["a red b", "a blue c", "d"][: len(own)]
        lines.append(
            {
                "file_name": f"{number}.png",
                "caption": f"e{'fgh' * (number % 3)}",
                "objects": {"bbox": own, "phrase": phrases},
            }
        )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Bases, data sets and the like, by the names that `ROWS` gives them."""
    root = tmp_path_factory.mktemp("places")
    # Valid under every reading; the centre crop cuts the first, the last is small.
    boxes = [[0.05, 0.1, 0.4, 0.5], [0.35, 0.3, 0.6, 0.65], [0.4, 0.4, 0.55, 0.5]]
    write_images(root / "data", 0, lambda number: boxes[: 1 + 2 * (number % 2)])
    write_images(root / "data_2", 1, lambda _: boxes)
    write_images(root / "ones", 0, lambda _: [[0, 0, 1, 1]])
    for name, seed in (("base", 0), ("base_2", 1)):
        tiny_pipeline(root / "words", tiny_transformer(seed=seed, num_layers=2)).save_pretrained(root / name)
    flux = tiny_flux_pipeline(root / "words")
    flux.save_pretrained(root / "flux")
    parts = {name: part for name, part in flux.components.items() if name != "transformer"}
    FluxPipeline(**parts, transformer=plain_twin(flux.transformer)).save_pretrained(root / "flux_plain")
    layouts = [{"caption": "a", "boxes": [{"xyxy": box, "phrase": "b"}]} for box in boxes[:2]]
    (root / "layouts.jsonl").write_text("".join(json.dumps(layout) + "\n" for layout in layouts))
    places = {path.stem: str(path) for path in root.iterdir()}
    places |= {
        "plain": str(stock_sd3(root / "stock")),
        "cache": str(root / "cache"),
        "elsewhere": str(root / "elsewhere"),
    }
    trained = trainer.train(make(places, root / "before", {"lora.dropout": 0.0}))
    return places | {"adapter": str(trained.folder / "adapter")}


def make(places: dict[str, str], out: Path, changes: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "base": places["base"],
        "output_dir": str(out),
        "data": {"path": places["data"], "validation_share": 0.0},
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1, "preflight": False}
        | {"checkpoint_every": 0, "sample_every": 0, "validate_every": 0, "caption_dropout": 0.0},
    }
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value.format(**places) if isinstance(value, str) else value
    return Config.model_validate(values)


def outcome(config: Config) -> dict[str, Any]:
    """All that a run shows of itself, part by part, as plain values."""
    seen: list[StepRecord] = []
    logged: list[int] = []
    looked: list[Preflight] = []
    tracker: dict[str, Any] = {}
    real = trainer.make_tracker

    def told(name: str, **options: Any) -> Any:  # what W&B makes of it: tests/test_tracking.py
        tracker.update(name=name, **{key: options[key] for key in ("project", "run_name", "mode")})
        return NullTracker() if name == "wandb" else real(name, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_tracker", told)
        calls = Calls(seen.append, lambda step, _: logged.append(step), looked.append)
        result = trainer.train(config, callbacks=[calls])
    folder, report = result.folder, result.report
    adapter = folder / "adapter"
    if config.method == "lora":
        weights = load_file(adapter / "adapter_model.safetensors")
    else:
        stream = folder / "stream" / "layout_stream.safetensors"
        whole = folder / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(stream if stream.exists() else whole)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {
        "weights": {name: digest(tensor) for name, tensor in weights.items()},
        "losses": [record.losses.tolist() for record in seen],
        "times": [record.times.tolist() for record in seen],
        "samples": [[name.rpartition(":")[2] for name in record.samples] for record in seen],
        "rates": [record.learning_rate for record in seen],
        "norms": [record.grad_norm for record in seen[:1]],
        "files": sorted(name for name in files if "events.out" not in name) + ["events"] * ("events.out" in str(files)),
        "place": str(folder),
        "images": {
            path.name: digest(torch.tensor(np.asarray(Image.open(path)))) for path in folder.glob("samples/*.png")
        },
        "card": (adapter / "README.md").read_text() if adapter.exists() else "",
        "header": report["start"],
        "held_out": report["held_out_loss"],
        "params": report["trainable_params"],
        "checks": [check.name for check in looked[0].checks],
        "logged": logged,
        "tracker": tracker,
        "count": report["images"],
        **{key: report[key] for key in ("steps", "buckets", "filter", "center_crop", "best_step")},
        "cache": report["cache"] is not None and bool(list(Path(config.data.cache or "").rglob("*.safetensors"))),
    }


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().float().numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def base_outcomes() -> dict[str, dict[str, Any]]:
    """What the runs of the default values gave: rows with the same `also` share one."""
    return {}


@pytest.mark.parametrize("key", ROWS)
def test_another_value_differs_where_it_should(
    key: str, places: dict[str, str], base_outcomes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    row = ROWS[key]
    if key == "train.quantization":
        pytest.importorskip("torchao")
    if row.value == "prodigy":
        pytest.importorskip("prodigyopt")
    group = json.dumps(row.also, sort_keys=True)
    if group not in base_outcomes:
        base_outcomes[group] = outcome(make(places, tmp_path / "base", row.also))
    before, after = base_outcomes[group], outcome(make(places, tmp_path / "other", row.also | {key: row.value}))
    for part in row.differs.split():
        assert before[part] != after[part], f"{key} does not change {part}"
    for part in row.same.split():
        assert before[part] == after[part], f"{key} changes {part}"


def test_what_changes_no_result_is_set_all_the_same(places: dict[str, str], tmp_path: Path) -> None:
    plain = prepare_run(make(places, tmp_path, {})).bare_model
    switched = prepare_run(
        make(places, tmp_path, {"train.gradient_checkpointing": 2, "train.attention_backend": "_native_math"})
    ).bare_model
    assert not plain.is_gradient_checkpointing
    assert switched.is_gradient_checkpointing
    backends = {
        str(getattr(m.processor, "_attention_backend", None)) for m in switched.modules() if hasattr(m, "processor")
    }
    assert any("native_math" in name.lower() for name in backends)


# --- by how much ------------------------------------------------------------------------------------------------------


def test_the_inside_of_boxes_weighs_what_is_set(places: dict[str, str], tmp_path: Path) -> None:
    run = prepare_run(make(places, tmp_path, {"flow.inside_weight": 5.0}))
    model = run.bare_model.eval()
    batch = run.examples.batch(range(2))
    boxes = torch.tensor(
        [[[0.25, 0.5, 0.5, 0.75], [0.0, 0.0, 1.0, 1.0]], [[0.0, 0.0, 0.5, 1.0], [0.25, 0.25, 1.0, 0.5]]]
    )
    mask = torch.tensor([[True, False], [True, True]])  # the second of the first sample is padding
    phrases = batch.layout.phrase_embeds[:, :1].expand(-1, 2, -1)
    batch = type(batch)(**{**vars(batch), "layout": LayoutInputs(boxes, phrases, mask)})
    with torch.no_grad():
        found = flow_matching_loss(model, batch, run.objective)
        error = (predict(model, batch) - (batch.noise - batch.x0)) ** 2
    assert error.shape[-2:] == (16, 16)
    weight = torch.ones(2, 16, 16)
    weight[0, 8:12, 4:8] = 5
    weight[1, :, :8] = 5
    weight[1, 4:8, 4:] = 5
    by_hand = torch.stack([(w / w.mean() * e).mean() for w, e in zip(weight, error, strict=True)])
    torch.testing.assert_close(found, by_hand)
    with torch.no_grad():
        assert not torch.allclose(found, flow_matching_loss(model, batch, Objective()))


def first_losses(places: dict[str, str], out: Path, **changes: Any) -> tuple[Tensor, Tensor]:
    seen: list[StepRecord] = []
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    trainer.train(make(places, out, changes | {"train.max_steps": 1}), callbacks=[Calls(step=seen.append)])
    return seen[0].losses, seen[0].times


def test_min_snr_weighs_the_loss_by_its_formula(places: dict[str, str], tmp_path: Path) -> None:
    plain, t = first_losses(places, tmp_path / "plain")
    weighed, _ = first_losses(places, tmp_path / "weighed", flow__weighting="min_snr", flow__min_snr_gamma=0.5)
    snr = ((1 - t) / t) ** 2
    torch.testing.assert_close(weighed, plain * torch.minimum(snr, torch.tensor(0.5)) * t**2)


def test_the_shift_moves_times_by_its_formula(places: dict[str, str], tmp_path: Path) -> None:
    (_, plain), (_, shifted) = (first_losses(places, tmp_path / str(s), flow__shift=s) for s in (1.0, 3.0))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_of_a_step_is_that_of_its_formula(places: dict[str, str], tmp_path: Path, schedule: str) -> None:
    steps, warm, peak = 5, 2, 1e-2
    run = prepare_run(
        make(places, tmp_path, {"train.max_steps": steps, "train.warmup_steps": warm, "train.lr_schedule": schedule})
    )
    after = {
        "constant": lambda _: 1.0,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    }[schedule]
    found = []
    for _ in range(steps):
        found.append(run.schedule.get_last_lr()[0])
        run.optimizer.step()
        run.schedule.step()
    expected = [peak * (s / warm if s < warm else after((s - warm) / (steps - warm))) for s in range(steps)]
    assert found == pytest.approx(expected)


def test_gradients_are_scaled_down_to_the_norm_that_is_set(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, norms = torch.optim.AdamW.step, []

    def step(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(g.square().sum().item() for g in grads)))
        return real(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    seen: list[StepRecord] = []
    for most in (1e-3, 1e6):
        config = make(places, tmp_path / str(most), {"train.max_grad_norm": most, "train.max_steps": 1})
        trainer.train(config, callbacks=[Calls(step=seen.append)])
    assert norms[0] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1] == pytest.approx(seen[1].grad_norm, rel=1e-5)  # below the norm they are left alone
    assert norms[1] > 2e-3


def test_weight_decay_shrinks_by_rate_times_decay(places: dict[str, str], tmp_path: Path) -> None:
    started = prepare_run(make(places, tmp_path, {}))
    initial = {n.replace(".default", ""): p.clone() for n, p in started.bare_model.named_parameters() if "lora_A" in n}
    for decay in (0.0, 3.0):
        out = tmp_path / str(decay)
        trainer.train(make(places, out, {"train.weight_decay": decay, "train.max_steps": 1}))
        saved = load_file(out / "adapter" / "adapter_model.safetensors")
        for name, value in initial.items():  # lora_B is 0 in step 1, so lora_A has no gradient
            torch.testing.assert_close(saved[f"base_model.model.{name}"], value * (1 - 1e-2 * decay))


def test_dropouts_of_one_leave_nothing(places: dict[str, str], tmp_path: Path) -> None:
    drawn = partial(lambda changes: prepare_run(make(places, tmp_path, changes)).examples)
    usual = drawn({}).batch(range(4))
    assert usual.layout.mask.sum(1).max() == 3
    assert not drawn({"method": "full", "train.layout_dropout": 1.0}).batch(range(4)).layout.mask.any()
    one = drawn({"train.box_dropout": 1.0}).batch(range(4))
    assert one.layout.mask.sum(1).tolist() == [1] * 4
    examples = drawn({"train.caption_dropout": 1.0, "train.phrase_dropout": 1.0})
    silent = examples.batch(range(4))
    nothing = examples.encoder.prompts([""])["embeds"]
    assert torch.equal(silent.texts["embeds"], nothing.expand_as(silent.texts["embeds"]))
    empty = examples.encoder.phrases([""])[""]
    assert all(torch.equal(embeds, empty) for embeds in silent.layout.phrase_embeds[silent.layout.mask])
    for other in (one, silent):  # the image's own draws are what they were
        assert torch.equal(other.noise, usual.noise)
        assert torch.equal(other.t, usual.t)
        assert torch.equal(other.x0, usual.x0)
