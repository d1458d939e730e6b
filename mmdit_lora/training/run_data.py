"""The pictures of a run: read, filtered, and parted into those to train on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdit_lora.config import Config
from mmdit_lora.config_filter import FilterSection
from mmdit_lora.data.buckets import Buckets, make_buckets, one_size, parse_ratio
from mmdit_lora.data.check import quick_check
from mmdit_lora.data.filters import Filtered, crop_loss, filter_records
from mmdit_lora.data.records import Record, read_dataset
from mmdit_lora.data.shards import ShardedRecords, Subset, is_sharded, open_shards, spread
from mmdit_lora.errors import InputError
from mmdit_lora.pipelines import LayoutPipeline
from mmdit_lora.training.split import split_records

_LOOKS, _CROPS = 64, 1000  # records of shards that are looked at before a run


@dataclass(frozen=True)
class RunData:
    """Records to train on and records held out, and what `data.filter` took of them.

    Args:
        training: what the filter left of `data.path`. validation: of `data.validation`; None where a share of the former
            is held out. remarks: lines for people, from reading them.
    """

    records: Sequence[Record]
    held_out: Sequence[Record]
    training: Filtered
    validation: Filtered | None
    remarks: tuple[str, ...] = ()

    def losses(self, config: Config, buckets: Buckets) -> tuple[dict[str, Any], list[str]]:
        """What filter and centre crop cost: counts for the report, and lines for people.

        Raises:
            InputError: a file is no picture, or one is too small for any bucket.
        """
        records = self.records
        looked_at = spread(records, _CROPS) if isinstance(records, ShardedRecords | Subset) else records
        crop = crop_loss(looked_at, buckets, min_visible=config.data.min_visible)
        counts: dict[str, Any] = {"filter": self.training.to_dict(), "center_crop": crop.to_dict()}
        lines = [*self.remarks, self.training.summary, crop.summary]
        if self.validation is not None:
            counts["filter_validation"] = self.validation.to_dict()
            summary = self.validation.summary
            lines.append(summary and f"{config.data.validation}: {summary}")
        return counts, [line for line in lines if line]


def read_data(config: Config) -> RunData:
    """Raises `InputError`: a folder is no data set, the filter leaves nothing, or too little to hold a share out."""
    data = config.data

    remarks: list[str] = []

    def read(path: str) -> Filtered:
        if is_sharded(path):
            found = _read_shards(path, config)
            remarks.extend(found.remarks)
            return Filtered(found, [], {}, found.boxes)
        records = read_dataset(path, bbox_format=data.bbox_format, bbox_units=data.bbox_units, tell=remarks.append)
        quick_check(records)
        return filter_records(records, data.filter)

    training = read(data.path)
    if data.validation is not None:
        validation = read(data.validation)
        return RunData(training.records, validation.records, training, validation, tuple(remarks))
    return RunData(*split_records(training.records, data.validation_share), training, None, tuple(remarks))


def _read_shards(path: str, config: Config) -> ShardedRecords:
    """The index knows every layout's and header's state as of when it was made; a few records are looked at all the same."""
    if config.data.filter != FilterSection():
        raise InputError(
            f"does not act on shards, and {path} is some",
            where="data.filter",
            cure="filter when the shards are written: `mmdit-lora data shard D --out S --filter ...`",
        )
    records = open_shards(path, bbox_format=config.data.bbox_format, bbox_units=config.data.bbox_units)
    for record in spread(records, _LOOKS):
        record.read_bytes()
    return records


def run_buckets(config: Config, pipe: LayoutPipeline) -> Buckets:
    """The sizes of the training pictures.

    Raises:
        InputError: the base cannot have a resolution, or a ratio is none.
    """
    data, chosen = config.data, config.data.buckets
    key = "data.buckets.resolutions" if chosen.resolutions else "data.resolution"
    resolutions = chosen.resolutions or [data.resolution or pipe.default_side]
    for side in resolutions:
        try:
            pipe.check_side(side)
        except InputError as error:
            raise InputError(error.what, where=key, cure=error.cure) from None
    if not chosen.has_sizes:
        return one_size((resolutions[0],) * 2)
    try:
        ratios = [parse_ratio(text) for text in chosen.ratios] or [1.0]
    except InputError as error:
        raise InputError(error.what, where="data.buckets.ratios", cure=error.cure) from None
    transformer, cell = pipe.transformer, pipe.vae_scale_factor
    most = transformer.max_latent_side
    return make_buckets(
        resolutions,
        ratios,
        multiple=cell * transformer.latent_multiple,
        largest_side=None if most is None else most * cell,
        upscale=chosen.upscale,
    )
