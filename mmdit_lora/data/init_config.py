"""A commented config that fits the data it is for; the comments are the descriptions of the config's fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmdit_lora.config.loading import SECTIONS, Config, dump_yaml
from mmdit_lora.config.schema import BucketsSection, Section
from mmdit_lora.data.buckets import MIN_VISIBLE, make_buckets, one_size, parse_ratio, record_bucket
from mmdit_lora.data.filters import crop_loss
from mmdit_lora.data.records import Record
from mmdit_lora.data.sources import sample_dataset

# A run of this many epochs shows whether the data works; the bounds keep runs on tiny and huge sets short.
_EPOCHS, _MIN_STEPS, _MAX_STEPS = 50, 200, 20_000
_RATIOS = ("1:1", "5:4", "4:5", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16", "2:1", "1:2")
_SAMPLED = 2000  # records, for the shapes of images; and of shards, for all figures


def commented_config(
    data_folder: str | Path, *, base: str = "data/tiny_base", bbox_format: str = "xyxy", bbox_units: str = "relative"
) -> str:
    """YAML with every key of the config, a comment on each, and values that fit the data set found at `data_folder`.

    Raises:
        InputError: the folder is no readable data set.
    """
    import torch

    conventions = {"bbox_format": bbox_format, "bbox_units": bbox_units}
    records, total = sample_dataset(data_folder, _SAMPLED, bbox_format=bbox_format, bbox_units=bbox_units)
    ratios = fitting_ratios(records)
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    values: dict[str, Any] = {
        "base": base,
        "data": {"path": str(data_folder), **conventions, "buckets": BucketsSection(ratios=ratios)},
        "train": _training_values(total) | ({"mixed_precision": "bf16"} if has_bf16 else {}),
    }
    images, boxes = len({record.image for record in records}), sum(len(record.layout.boxes) for record in records)
    counts = f"{images} images, {len(records)} layouts, {boxes} boxes ({boxes / len(records):.1f} a layout)."
    lines = [f"# {counts}" if len(records) == total else f"# A sample of {total} layouts: {counts}"]
    if ratios:
        lines.append(f"# Buckets of the images' own shapes, {', '.join(ratios)}: a square would cut boxes off.")
    lines += ["# Look at it first: mmdit-lora data check THIS_FILE", "# Start with: mmdit-lora train THIS_FILE", ""]
    for name, info in Config.model_fields.items():
        if name not in SECTIONS:
            lines += _entry(name, values.get(name, info.default), info)
    for name, model in SECTIONS.items():
        chosen = values.get(name, {})
        assert isinstance(chosen, Mapping)
        lines += ["", f"# {Config.model_fields[name].description}", f"{name}:"]
        for key, info in model.model_fields.items():
            lines += [f"  {line}" for line in _entry(key, chosen.get(key, info.default), info)]
    return "\n".join(lines) + "\n"


def fitting_ratios(records: Sequence[Record]) -> list[str]:
    """Shapes for `data.buckets.ratios`: of `_RATIOS` those that are nearest to a twentieth of the images or more; none
    where a square loses less than a hundredth of the boxes. The first `_SAMPLED` images' headers are read.

    Raises:
        InputError: a file is no image.
    """
    sample = records[:_SAMPLED]
    square = crop_loss(sample, one_size((512, 512)), min_visible=MIN_VISIBLE)
    if square.lost < 0.01 * square.boxes or not square.lost:
        return []
    shapes = make_buckets([512], [parse_ratio(text) for text in _RATIOS], multiple=1, upscale=True)
    names = dict(zip(shapes.sizes[0], _RATIOS, strict=True))
    counts = Counter(names[record_bucket(record, shapes)] for record in sample)
    return [text for text in _RATIOS if counts[text] >= len(sample) / 20]


def _training_values(records: int) -> dict[str, int]:
    """A batch below 8 where there are few images, about `_EPOCHS` epochs, four validations."""
    batch = max(1, min(8, records // 4))
    steps = min(max(_EPOCHS * records // batch, _MIN_STEPS), _MAX_STEPS)
    often = max(steps // 4, 1)
    return {
        "max_steps": steps,
        "batch_size": batch,
        "warmup_steps": steps // 20,
        "checkpoint_every": often,
        "validate_every": often,
        "sample_every": often,
        "sample_count": min(8, records),
    }


def _entry(key: str, value: Any, info: FieldInfo) -> list[str]:
    assert value is not PydanticUndefined, f"{key} has no value"
    if isinstance(value, Section):
        lines = [f"# {info.description}", f"{key}:"]
        for inner, field in type(value).model_fields.items():
            lines += [f"  {line}" for line in _entry(inner, getattr(value, inner), field)]
        return lines
    plain = list(value) if isinstance(value, tuple) else value
    return [f"# {info.description}", dump_yaml({key: plain}).rstrip("\n")]
