"""A commented config that fits the data it is for; the comments are the descriptions of the config's fields."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from mmdit_lora.config import SECTIONS, Config
from mmdit_lora.config_filter import Section
from mmdit_lora.config_yaml import dump_yaml
from mmdit_lora.data.records import Record, read_dataset

# A run of this many epochs is a start to judge from; the bounds keep tiny and huge sets within one sitting.
_EPOCHS, _MIN_STEPS, _MAX_STEPS = 50, 200, 20_000


def commented_config(
    data_folder: str | Path, *, base: str = "data/tiny_base", bbox_format: str = "xyxy", bbox_units: str = "relative"
) -> str:
    """YAML with every key of the config, a comment on each, and values that fit the data set found at `data_folder`.

    Raises:
        InputError: the folder is no readable data set.
    """
    conventions = {"bbox_format": bbox_format, "bbox_units": bbox_units}
    records = read_dataset(data_folder, **conventions)
    values = {
        "base": base,
        "data": {"path": str(data_folder), **conventions},
        "train": _training_values(len(records)),
    }
    lines = [f"# {_summary(records)}", "# Start with: mmdit-lora train THIS_FILE", ""]
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


def _training_values(records: int) -> dict[str, int]:
    """A batch below 8 where there are few pictures, about `_EPOCHS` epochs, four looks at the result."""
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


def _summary(records: list[Record]) -> str:
    pictures = len({record.image for record in records})
    boxes = sum(len(record.layout.boxes) for record in records)
    return f"{pictures} pictures, {len(records)} layouts, {boxes} boxes ({boxes / len(records):.1f} a layout)."


def _entry(key: str, value: Any, info: FieldInfo) -> list[str]:
    assert value is not PydanticUndefined, f"{key} has no value"
    if isinstance(value, Section):
        lines = [f"# {info.description}", f"{key}:"]
        for inner, field in type(value).model_fields.items():
            lines += [f"  {line}" for line in _entry(inner, getattr(value, inner), field)]
        return lines
    plain = list(value) if isinstance(value, tuple) else value
    return [f"# {info.description}", dump_yaml({key: plain}).rstrip("\n")]
