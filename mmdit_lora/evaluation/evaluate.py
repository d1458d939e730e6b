"""Is the layout obeyed? The base and the base with its adapter, on the same layouts and noise, with ceiling and floor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit_lora.data.records import Record
from mmdit_lora.data.sources import open_dataset
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.cache import DETECTIONS, DetectionCache, ImageCache, LazyImages, images_of
from mmdit_lora.evaluation.clip import Clip, kid, spread
from mmdit_lora.evaluation.detectors import Detector, SelfTest, open_detector, self_test
from mmdit_lora.evaluation.intervals import Bootstrap, Table, ratio
from mmdit_lora.evaluation.metrics import (
    MatchedImage,
    average_precision,
    box_groups,
    box_metrics,
    image_groups,
    match_images,
    metric_sums,
)
from mmdit_lora.layout import Layout
from mmdit_lora.lora import base_fingerprint
from mmdit_lora.models.adapter_layers import adapter_layers, without_adapters
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate

ADAPTERS = ("adapter", *(f"adapter_{number}" for number in range(2, 10)))
CONDITIONS = ("base", *ADAPTERS, "text_only", "layout_only", "images", "ground_truth", "shuffled")
VARIED = 16  # layouts that are generated from several noises
_CHUNK = 64  # images that are decoded at once
_SEED_STEP = 1_000_003  # between the seeds of an image and of its variations: more than an evaluation has images
_TESTED = 256  # of the data set's own images that the detector is tested on


@dataclass(frozen=True)
class Condition:
    """Images of one kind, and the detections in them matched to the layouts.

    Args:
        clip: sums of the CLIP scores, see `metric_sums`. extra: metrics of all images together (COCO's average precision,
            spread, KID).
    """

    images: Sequence[Image.Image]
    matches: list[MatchedImage]
    clip: dict[str, Table] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sums(self) -> dict[str, Table]:
        return metric_sums(self.matches) | self.clip

    @property
    def fidelity(self) -> dict[str, float]:
        """Every metric by name (see `metrics.FIGURES`), and the number of boxes."""
        return {name: ratio(table) for name, table in self.sums.items()} | self.extra | {"boxes": _boxes(self.matches)}

    @property
    def image_ious(self) -> list[float]:
        """Mean IoU of each image, over its boxes; NaN without any."""
        return [image.miou for image in self.matches]


@dataclass(frozen=True)
class Evaluation:
    """Conditions by name, in the order of `CONDITIONS`, all on `layouts`.

    `base`, with an adapter `adapter` (several, each apart: `adapter`, `adapter_2`, ...); `text_only` and `layout_only`:
    generated without boxes, and without a caption, by the last of these; `images`: made by something else; `ground_truth`: the
    data set's own images (through the VAE: the ceiling); `shuffled`: those against the layouts of others (the floor).
    """

    layouts: list[Layout]
    conditions: dict[str, Condition]
    settings: SamplingConfig
    seed: int
    detector: SelfTest | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`."""
        bootstrap = Bootstrap(len(self.layouts))
        report: dict[str, Any] = {
            name: one.fidelity | {"intervals": {key: bootstrap.interval(table) for key, table in one.sums.items()}}
            for name, one in self.conditions.items()
        }
        report["differences"] = self._differences(bootstrap)
        report["by_boxes"] = {
            group: {"layouts": len(rows)}
            | {name: _ratios([one.matches[row] for row in rows]) for name, one in self.conditions.items()}
            for group, rows in image_groups(self.layouts).items()
        }
        report["phrases"] = len({" ".join(box.phrase.split()) for layout in self.layouts for box in layout.boxes})
        for key, groups in box_groups(self.layouts).items():
            report[key] = {
                group: {"boxes": len(places)}
                | {
                    name: box_metrics([one.matches[row].boxes[box] for row, box in places])
                    for name, one in self.conditions.items()
                    if name != "shuffled"  # its boxes are those of other layouts
                }
                for group, places in groups.items()
            }
        report["detector"] = None if self.detector is None else self.detector.to_dict()
        return report | {"layouts": len(self.layouts), "seed": self.seed, "settings": asdict(self.settings)}

    def _differences(self, bootstrap: Bootstrap) -> dict[str, Any]:
        """Of each generated condition to the one that it is compared with, paired by images."""
        adapters = [name for name in ADAPTERS if name in self.conditions]
        last = adapters[-1] if adapters else "base"
        pairs = [(name, "base") for name in adapters] + [(name, "adapter") for name in adapters[1:]]
        pairs += [(name, last) for name in ("text_only", "layout_only", "images")]
        out = {}
        for one, other in pairs:
            if one in self.conditions and other in self.conditions:
                a, b = self.conditions[one].sums, self.conditions[other].sums
                out[f"{one}_minus_{other}"] = {
                    name: {
                        "value": ratio(a[name]) - ratio(b[name]),
                        "interval": bootstrap.difference(a[name], b[name]),
                    }
                    for name in a
                    if name in b
                }
        return out


def evaluate(
    pipeline: LayoutPipeline | None,
    data: str | Path | Sequence[Record],
    settings: SamplingConfig | None = None,
    *,
    count: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    adapters: Sequence[str] | Mapping[str, float] | None = None,
    detector: Detector | str = "shapes",
    ablations: bool = False,
    variations: int = 0,
    clip: Clip | str | None = None,
    images: Sequence[Image.Image] | str | Path | None = None,
    cache_dir: str | Path | None = None,
    test_detector: bool = False,
    on_progress: Callable[[str, int], None] | None = None,
) -> Evaluation:
    """Measure how well layouts are obeyed, without and with the adapter, on the same noise.

    Example:
        >>> pipe = load_pipeline("data/tiny_base")
        >>> load_adapter(pipe.transformer, "outputs/quickstart/adapter")
        >>> result = evaluate(pipe, "outputs/page256", steps=20, count=64)
        >>> result.conditions["adapter"].fidelity["miou"] - result.conditions["base"].fidelity["miou"]

    Args:
        pipeline: an active adapter on its transformer becomes the condition `adapter`, and is off for `base`. None: nothing
            is generated, and the ground truth is the data set's images as they are.
        data: a data set folder, `shapes://DOMAIN?count=N&seed=S`, or records. count: only the first layouts.
        settings: how images are sampled. steps: sampling steps, in place of `settings.steps`.
        adapters: names (and weights) of adapters on the transformer, each a condition of its own; afterwards all are active.
            None = those that are active act together.
        detector: the detector or its spec, e.g. "grounding-dino:FOLDER"; "shapes" reads procedural scenes.
        ablations: also generate without boxes, and without captions.
        variations: generate the first `VARIED` layouts from so many other noises too, for the metric `spread`.
        clip: a CLIP model, folder or hub id, for the metrics `clip_score`, `clip_box` and `kid_clip`.
        images: made by something else, one per record, or their folder (see `images_of`).
        cache_dir: keeps generated images and detections, from which a call that was stopped continues; None = in memory.
        test_detector: try it on the data set's own images (`Evaluation.detector`).
        on_progress: called with the condition and the number of its images that are done.

    Raises:
        InputError: the data set cannot be read, there is no box, the detector cannot look for a phrase, or `cache_dir` holds
            another evaluation.
    """
    if count is not None and count < 1:
        raise InputError(f"is {count}", location="count", hint="give 1 or more, or None for all")
    records = list((open_dataset(data) if isinstance(data, str | Path) else data)[:count])
    settings = settings or SamplingConfig()
    if steps is not None:
        settings = replace(settings, steps=steps)
    detector = open_detector(detector) if isinstance(detector, str) else detector
    _refuse_unknown_phrases(records, detector)
    images_dir = str(images) if isinstance(images, str | Path) else None
    if isinstance(images, str | Path):
        images = images_of(Path(images), records)
    weights = adapters if isinstance(adapters, Mapping) or adapters is None else dict.fromkeys(adapters, 1.0)
    if pipeline is not None and weights:
        pipeline.transformer.set_adapters(list(weights), list(weights.values()))
    cache = None
    if cache_dir is not None:
        plan = _plan(pipeline, records, settings, seed) | {"each": weights, "images": images_dir}
        cache = ImageCache(Path(cache_dir), plan)
    measure = _Measure(detector, Clip(clip) if isinstance(clip, str) else clip, cache)
    layouts = [record.layout for record in records]
    if pipeline is None:
        truth: Sequence[Image.Image] = LazyImages([record.load for record in records])
    else:
        size = settings.size or (pipeline.default_side,) * 2
        prepared = [prepare(record.load(), record.layout, size) for record in records]
        layouts = [layout for _, layout in prepared]
        truth = through_vae(pipeline, [pixels for pixels, _ in prepared], batch_size=settings.batch_size)
        del prepared
    conditions = {"ground_truth": measure(truth, layouts), "shuffled": measure(truth, layouts[1:] + layouts[:1])}

    def sample(name: str, asked: Sequence[Layout], number: int = 0) -> Sequence[Image.Image]:
        assert pipeline is not None
        progress = partial(on_progress or (lambda *_: None), f"{name}, noise {number + 1}" if number else name)
        run = generate if cache is None else partial(cache.generate, f"{name}_noise_{number + 1}" if number else name)
        return run(pipeline, asked, settings, seed=seed + number * _SEED_STEP, on_progress=progress)

    if pipeline is not None:
        for name, active, asked in _to_generate(pipeline.transformer, layouts, weights, ablations):
            with active:
                generated = sample(name, asked)
                others = [sample(name, asked[:VARIED], number + 1) for number in range(variations)]
            conditions[name] = measure(generated, layouts)
            if others:
                conditions[name].extra["spread"] = spread([generated[:VARIED], *others])
    if images is not None:
        conditions["images"] = measure(images, [record.layout for record in records])
    tested = None
    if test_detector and len(records) > 1:
        some = records[:_TESTED]
        tested = self_test(detector, [record.load() for record in some], [record.layout for record in some])
    if cache is not None:
        cache.begin()
    ordered = {name: conditions[name] for name in CONDITIONS if name in conditions}
    return Evaluation(layouts, ordered, settings, seed, tested)


class _Measure:
    """Detects objects in images and matches them with layouts; scores them by CLIP if it is given."""

    def __init__(self, detector: Detector, clip: Clip | None, cache: ImageCache | None) -> None:
        self.detector, self.clip = detector, clip
        cached = None if cache is None else DetectionCache(cache.folder / DETECTIONS)
        self._detect = detector.detect if cached is None else partial(cached.detect, detector)
        self._truth: Tensor | None = None  # features of the first images

    def __call__(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> Condition:
        matches: list[MatchedImage] = []
        tables: list[dict[str, Table]] = []
        features: list[Tensor] = []
        for start in range(0, len(images), _CHUNK):
            shown, asked = images[start : start + _CHUNK], layouts[start : start + _CHUNK]
            matches += match_images(self.detector, self._detect(shown, asked), asked)
            if self.clip is not None:
                table, feature = self.clip.score(shown, asked)
                tables.append(table)
                features.append(feature)
        extra = average_precision(matches, self.detector)
        if self.clip is None:
            return Condition(images, matches, {}, extra)
        own = torch.cat(features)
        if self._truth is None:
            self._truth = own
        elif (distance := kid(own, self._truth)) is not None:
            extra["kid_clip"] = distance
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        return Condition(images, matches, {name: table for name, table in joined.items() if table[:, 1].any()}, extra)


def _plan(
    pipeline: LayoutPipeline | None, records: Sequence[Record], settings: SamplingConfig, seed: int
) -> dict[str, Any]:
    """What generated images depend on."""
    layouts = json.dumps([record.layout.to_dict() for record in records], ensure_ascii=False)
    plan: dict[str, Any] = {
        "layouts": hashlib.sha256(layouts.encode()).hexdigest(),
        "settings": asdict(settings),
        "seed": seed,
    }
    if pipeline is None:
        return plan
    transformer = pipeline.transformer
    scalings = [sorted(layer.scaling.items()) for _, layer in adapter_layers(transformer) if hasattr(layer, "scaling")]
    return plan | {
        "base": str(pipeline.config.get("_name_or_path")),
        "weights": base_fingerprint(transformer),  # with the adapters': they are parameters of the transformer
        "adapter_weights": hashlib.sha256(repr(scalings).encode()).hexdigest(),
        "dtype": str(transformer.dtype),
    }


def _to_generate(
    transformer: Any, layouts: Sequence[Layout], weights: Mapping[str, float] | None, ablations: bool
) -> Iterator[tuple[str, AbstractContextManager[None], Sequence[Layout]]]:
    """Conditions to generate, what activates their adapters, and their layouts."""
    active: Callable[[], AbstractContextManager[None]] = partial(without_adapters, transformer)
    yield "base", active(), layouts
    if weights is not None:
        for name, adapter in zip(ADAPTERS, weights, strict=False):
            active = partial(_only_adapter, transformer, adapter, weights)
            yield name, active(), layouts
    elif getattr(transformer, "peft_config", None):
        active = nullcontext
        yield "adapter", active(), layouts
    if ablations:
        yield "text_only", active(), [Layout(layout.caption) for layout in layouts]
        yield "layout_only", active(), [Layout("", layout.boxes) for layout in layouts]


@contextmanager
def _only_adapter(transformer: Any, name: str, weights: Mapping[str, float]) -> Iterator[None]:
    """Within it, only this adapter is active; then all of them."""
    transformer.set_adapters([name], [weights[name]])
    try:
        yield
    finally:
        transformer.set_adapters(list(weights), list(weights.values()))


def _refuse_unknown_phrases(records: Sequence[Record], detector: Detector) -> None:
    for record in records:
        for box in record.layout.boxes:
            if not detector.knows(box.phrase):
                raise InputError(
                    f"{detector.name} cannot look for {box.phrase!r}",
                    location=record.location,
                    hint="take a detector that can (--detector), e.g. grounding-dino:FOLDER; without one, compare the "
                    "held-out denoising loss that `train` writes into report.json",
                )
    if not any(record.layout.boxes for record in records):
        raise InputError("these layouts hold no boxes: there is nothing to measure", hint="give layouts with boxes")


@torch.no_grad()
def through_vae(pipeline: LayoutPipeline, pixels: Sequence[Tensor], *, batch_size: int) -> list[Image.Image]:
    """(3, H, W) images in [-1, 1], encoded and decoded: the best that this base could generate."""
    out: list[Image.Image] = []
    for start in range(0, len(pixels), batch_size):
        x = torch.stack(list(pixels[start : start + batch_size])).to(pipeline.vae.device, pipeline.vae.dtype)
        decoded = pipeline.vae.decode(pipeline.vae.encode(x).latent_dist.mode()).sample
        out += pipeline.image_processor.postprocess(decoded.float(), output_type="pil")
    return out


def _ratios(images: Sequence[MatchedImage]) -> dict[str, float]:
    return {name: ratio(table) for name, table in metric_sums(images).items()} | {"boxes": _boxes(images)}


def _boxes(images: Sequence[MatchedImage]) -> int:
    return sum(len(image.boxes) for image in images)
