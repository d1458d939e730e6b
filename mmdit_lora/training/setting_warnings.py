"""Settings that are allowed and may mean something else than was intended: one line each, before step 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from mmdit_lora.config import Config
from mmdit_lora.config_filter import Section
from mmdit_lora.training.run import Run

# Keys -> the key that they act through, and whether they do at a value of it.
_Acts = Callable[[Any], bool]
_ACT_THROUGH: tuple[tuple[tuple[str, ...], str, _Acts], ...] = (
    (("flow.logit_mean", "flow.logit_std"), "flow.timesteps", lambda v: v == "logit_normal"),
    (("flow.mode_scale",), "flow.timesteps", lambda v: v == "mode"),
    (("flow.min_snr_gamma",), "flow.weighting", lambda v: v == "min_snr"),
    (
        tuple(f"lora.{key}" for key in ("r", "alpha", "dropout", "rank_pattern", "alpha_pattern", "rslora", "dora")),
        "method",
        lambda v: v == "lora",
    ),
    (("lora.targets",), "method", lambda v: v in ("lora", "ia3")),
    (("lora.init",), "lora.start", lambda v: v is None),
    (("subspace.dimension", "subspace.structured", "subspace.seed"), "method", lambda v: v == "subspace"),
    (("stream.parts",), "method", lambda v: v == "layout_stream"),
    (("prior.count", "prior.batch_size", "prior.weight"), "prior.layouts", lambda v: v is not None),
    (("tracking.project", "tracking.wandb_mode"), "tracking.tracker", lambda v: v == "wandb"),
    (("tracking.run_name",), "tracking.tracker", lambda v: v != "none"),
    (("train.sample_count", "sample.seed"), "train.sample_every", lambda v: v > 0),
    (("train.keep_checkpoints",), "train.checkpoint_every", lambda v: v > 0),
    (("data.validation_share",), "data.validation", lambda v: v is None),
    (("data.resolution",), "data.buckets.resolutions", lambda v: not v),
)


def setting_warnings(run: Run) -> Iterator[tuple[str, str]]:
    """Per warning: what was found, and how to mend it."""
    config, train = run.config, run.config.train
    steps, given = train.max_steps, train.model_fields_set
    if train.warmup_steps >= steps:
        reached = max(
            base * factor(steps - 1)
            for base, factor in zip(run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True)
        )
        share = 100 * (steps - 1) / train.warmup_steps
        yield (
            f"train.warmup_steps {train.warmup_steps:,} is not below max_steps {steps:,}: the learning rate reaches "
            f"{reached:g} at most, {share:.2g} % of what is set",
            f"lower train.warmup_steps, e.g. to {steps // 20}, or raise train.max_steps",
        )
    if train.optimizer == "prodigy" and train.learning_rate < 0.1:
        yield (
            f"train.learning_rate {train.learning_rate:g} is a factor of the rate that prodigy finds by itself",
            "set it to 1.0",
        )
    if train.ema_decay and steps < (horizon := round(1 / (1 - train.ema_decay))):
        ends = min(train.ema_decay, steps / (9 + steps))
        yield (
            f"train.ema_decay {train.ema_decay:g} averages over some {horizon:,} steps, and the run has {steps:,}: the decay "
            f"rises to {ends:.3g} only",
            "lower train.ema_decay, or leave it out",
        )
    yield from _looks(run)
    for key, cost in (
        ("sample_every", "no picture is painted"),
        ("validate_every", "the only validation is at the end"),
        ("checkpoint_every", "the only checkpoint is at the end, and a kill before it loses all"),
    ):
        if key in given and (every := getattr(train, key)) > steps:
            yield (
                f"train.{key} {every:,} is beyond max_steps {steps:,}: {cost}",
                f"set train.{key}={max(steps // 4, 1)}",
            )
    if run.prior_layouts and config.prior.batch_size > len(run.prior_layouts):
        yield (
            f"prior.batch_size {config.prior.batch_size} is more than the {len(run.prior_layouts)} layouts of "
            "prior.layouts: a batch holds some of them twice",
            "lower prior.batch_size, or give more layouts",
        )
    if idle := list(idle_keys(config)):
        yield f"without effect here: {'; '.join(idle)}", "leave them out, or set what they act through"


def _looks(run: Run) -> Iterator[tuple[str, str]]:
    """What waits for validations, where there are too few."""
    train = run.config.train
    every = train.validate_every if run.held_out is not None else 0
    count = (train.max_steps // every + (train.max_steps % every > 0)) if every else 0
    if train.sample_every:  # its pictures may be judged too
        count = max(count, train.max_steps // train.sample_every)
    cure = "lower train.validate_every" if run.held_out is not None else "hold pictures out: data.validation_share=0.1"
    if train.final == "best" and count < 2:
        yield f"train.final best has {count} validation{'s' * (count != 1)} to choose from: it is the last", cure
    if train.early_stop and count <= train.early_stop:
        yield f"train.early_stop {train.early_stop} never comes: the run is validated {count} times", cure


def idle_keys(config: Config) -> Iterator[str]:
    """Keys that differ from their default, and can do nothing here: each with what it would act through."""
    for keys, through, acts in _ACT_THROUGH:
        if acts(value := _value(config, through)):
            continue
        for key in keys:
            if _value(config, key) != _default(key):
                yield f"{key} ({through} is {'null' if value is None else value})"
    data = config.data
    if data.cache_variants is not None and data.crop == "center" and not data.flip:
        yield "data.cache_variants (data.crop is center, and data.flip false)"
    if data.buckets.upscale and not data.buckets.has_sizes:
        yield "data.buckets.upscale (there are no buckets)"


def _value(config: Section, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _default(key: str) -> Any:
    *sections, name = key.split(".")
    model: Any = Config
    for part in sections:
        model = model.model_fields[part].annotation
    return model.model_fields[name].default
