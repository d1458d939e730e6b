"""Is the layout obeyed? The base and the base with its adapter, on the same layouts and noise, with ceiling and floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdit_lora.data.records import Record
from mmdit_lora.data.transforms import prepare
from mmdit_lora.errors import InputError
from mmdit_lora.evaluation.clip import Clip, kid, spread
from mmdit_lora.evaluation.detection_cache import DetectionCache
from mmdit_lora.evaluation.detectors import Detection, Detector, SelfTest, open_detector, self_test
from mmdit_lora.evaluation.groups import box_groups, image_groups, phrase_groups
from mmdit_lora.evaluation.image_cache import ImageCache, Lazy
from mmdit_lora.evaluation.intervals import Bootstrap, value
from mmdit_lora.evaluation.metrics import Judged, Table, average_precision, box_sums, judged, sums
from mmdit_lora.layout import Layout
from mmdit_lora.pipelines import LayoutPipeline, SamplingConfig, generate

ADAPTERS = ("adapter", *(f"adapter_{number}" for number in range(2, 10)))
SIDES = ("base", *ADAPTERS, "text_only", "layout_only", "images", "ground_truth", "shuffled")
_AT_ONCE = 64  # images that are held decoded while they are judged
VARIED = 16
_FAR = 1_000_003  # between the seeds of an image and of its variations: further than an evaluation is long
_TESTED = 256  # of the data set's own images that the detector is tried on

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Condition:
    """Images of one kind, and what a detector saw in them."""

    images: Sequence[Image.Image]
    judged: list[Judged]
    clip: dict[str, Table] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    @cached_property
    def sums(self) -> dict[str, Table]:
        return sums(self.judged) | self.clip

    @property
    def fidelity(self) -> dict[str, float]:
        """Every figure by name (see `judged.FIGURES`), those that only all images together have (`whole`: COCO's average
        precision, spread, KID), and the number of boxes."""
        found = {name: value(table) for name, table in self.sums.items()}
        return found | self.whole | {"boxes": sum(len(image.boxes) for image in self.judged)}

    @property
    def image_ious(self) -> list[float]:
        """Mean IoU of each image, over its boxes; NaN where it has none."""
        return [image.miou for image in self.judged]


@dataclass(frozen=True)
class Evaluation:
    """Sides by name, in the order of `SIDES`, all on `layouts`.

    `base`, with an adapter `adapter` (several, each apart: `adapter`, `adapter_2`, ...); `text_only` and `layout_only`: painted without boxes, and without a caption, by the last
    of these; `images`: made by something else; `ground_truth`: the data set's own images (through the VAE: the ceiling);
    `shuffled`: those against the layouts of others (the floor).
    """

    layouts: list[Layout]
    sides: dict[str, Condition]
    settings: SamplingConfig
    seed: int
    detector: SelfTest | None = None

    def to_dict(self) -> dict[str, Any]:
        """What `report.json` holds."""
        draws = Bootstrap(len(self.layouts))
        report: dict[str, Any] = {
            name: side.fidelity | {"intervals": {key: draws.interval(table) for key, table in side.sums.items()}}
            for name, side in self.sides.items()
        }
        report["differences"] = self._differences(draws)
        report["by_boxes"] = {
            name: {
                "layouts": len(rows),
                **{side: _figures([self.sides[side].judged[row] for row in rows]) for side in self.sides},
            }
            for name, rows in image_groups(self.layouts).items()
        }
        report["phrases"] = len({" ".join(box.phrase.split()) for layout in self.layouts for box in layout.boxes})
        for key, groups in (*box_groups(self.layouts).items(), ("by_phrase", phrase_groups(self.layouts))):
            report[key] = {
                name: {
                    "boxes": len(places),
                    **{
                        side: box_sums([found.judged[row].boxes[box] for row, box in places])
                        for side, found in self.sides.items()
                        if side != "shuffled"  # its boxes are those of other layouts
                    },
                }
                for name, places in groups.items()
            }
        report["detector"] = None if self.detector is None else self.detector.to_dict()
        return report | {"layouts": len(self.layouts), "seed": self.seed, "settings": asdict(self.settings)}

    def _differences(self, draws: Bootstrap) -> dict[str, Any]:
        """Of each painted side to the one that it is compared with, paired by images."""
        adapters = [name for name in ADAPTERS if name in self.sides]
        whole = adapters[-1] if adapters else "base"
        pairs = [(name, "base") for name in adapters] + [(name, "adapter") for name in adapters[1:]]
        pairs += [(name, whole) for name in ("text_only", "layout_only", "images")]
        out = {}
        for one, other in pairs:
            if one in self.sides and other in self.sides:
                a, b = self.sides[one].sums, self.sides[other].sums
                out[f"{one}_minus_{other}"] = {
                    name: {"value": value(a[name]) - value(b[name]), "interval": draws.difference(a[name], b[name])}
                    for name in a
                    if name in b
                }
        return out


def evaluate(
    pipe: LayoutPipeline | None,
    records: Sequence[Record],
    settings: SamplingConfig,
    *,
    seed: int = 0,
    detector: Detector | None = None,
    each: Mapping[str, float] | None = None,
    ablations: bool = False,
    variations: int = 0,
    clip: Clip | None = None,
    images: Sequence[Image.Image] | None = None,
    store: ImageCache | None = None,
    test_detector: bool = False,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Paint the records' layouts and look at the images.

    Args:
        pipe: an active adapter on its transformer becomes the side `adapter`, and is off for `base`. None: nothing is painted,
            and the ground truth is the records' images as they are.
        detector: None = the exact reader of procedural scenes.
        each: names and weights of adapters on the transformer, each a side of its own; None = all that are active together.
        ablations: also paint without boxes, and without captions.
        variations: paint the first `VARIED` layouts from so many other noises too, for the figure `spread`.
        clip: for the figures `clip_score`, `clip_box` and `kid_clip`.
        images: made by something else, one a record.
        store: where painted images are kept and found again; None = in memory only.
        test_detector: try it on the records' own images (`Evaluation.detector`).
        on_progress: called with the side and the number of its images that are done.

    Raises:
        InputError: there is no box, or the detector cannot look for a phrase.
    """
    detector = detector or open_detector()
    _refuse_unreadable(records, detector)
    tell = on_progress or (lambda *_: None)
    look = _Look(detector, clip, None if store is None else DetectionCache(store.folder / "seen"))
    layouts = [record.layout for record in records]
    if pipe is None:
        truth: Sequence[Image.Image] = Lazy([record.load for record in records])
    else:
        size = settings.size or (pipe.default_side,) * 2
        prepared = [prepare(record.load(), record.layout, size) for record in records]
        layouts = [layout for _, layout in prepared]
        truth = through_vae(pipe, [pixels for pixels, _ in prepared], batch_size=settings.batch_size)
        del prepared
    sides = {"ground_truth": look.at(truth, layouts)}
    sides["shuffled"] = look.at(truth, layouts[1:] + layouts[:1])
    if pipe is not None:
        painter = partial(_in_memory, pipe) if store is None else partial(store.generate, pipe)
        for name, active, wanted in _painted(pipe, layouts, each, ablations):
            say = partial(tell, name)
            with _only(pipe, active, each):
                generated = painter(wanted, settings, seed=seed, on_progress=say, side=name)
                others = [
                    painter(
                        wanted[:VARIED],
                        settings,
                        seed=seed + (n + 1) * _FAR,
                        on_progress=partial(tell, f"{name}, noise {n + 2}"),
                        side=f"{name}_noise_{n + 2}",
                    )
                    for n in range(variations)
                ]
            sides[name] = look.at(generated, layouts, others=[generated[:VARIED], *others] if others else ())
    if images is not None:
        sides["images"] = look.at(images, [record.layout for record in records])
    sides = {name: sides[name] for name in SIDES if name in sides}
    tested = None
    if test_detector and len(records) > 1:
        tried = records[:_TESTED]
        tested = self_test(detector, [record.load() for record in tried], [record.layout for record in tried])
    return Evaluation(layouts, sides, settings, seed, tested)


class _Look:
    """What looks at images: a detector, and CLIP where it is given."""

    def __init__(self, detector: Detector, clip: Clip | None, kept: DetectionCache | None) -> None:
        self.detector, self.clip, self.kept = detector, clip, kept
        self._truth: Tensor | None = None  # features of the images that were looked at first

    def at(
        self, images: Sequence[Image.Image], layouts: Sequence[Layout], others: Sequence[Sequence[Image.Image]] = ()
    ) -> Condition:
        seen: list[Judged] = []
        tables: list[dict[str, Table]] = []
        features: list[Tensor] = []
        for start in range(0, len(images), _AT_ONCE):
            shown, asked = images[start : start + _AT_ONCE], layouts[start : start + _AT_ONCE]
            things = (self.kept.detect if self.kept else _detect)(self.detector, shown, asked)
            seen += judged(self.detector, things, asked)
            if self.clip is not None:
                table, feature = self.clip.look(shown, asked)
                tables.append(table)
                features.append(feature)
        whole = average_precision(seen, self.detector)
        if others:
            whole["spread"] = spread(others)
        if self.clip is None:
            return Condition(images, seen, {}, whole)
        found = torch.cat(features)
        self._truth = found if self._truth is None else self._truth
        if (distance := kid(found, self._truth)) is not None and found is not self._truth:
            whole["kid_clip"] = distance
        joined = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
        return Condition(images, seen, {name: table for name, table in joined.items() if table[:, 1].any()}, whole)


def _detect(detector: Detector, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
    return detector.detect(images, layouts)


_Active = str | bool  # an adapter's name; or whether all are on


def _painted(
    pipe: LayoutPipeline, layouts: Sequence[Layout], each: Mapping[str, float] | None, ablations: bool
) -> Iterator[tuple[str, _Active, Sequence[Layout]]]:
    """Sides to paint, with which adapters, and what is asked for in each."""
    yield "base", False, layouts
    last: _Active = False
    if each is not None:
        for name, last in zip(ADAPTERS, each, strict=False):
            yield name, last, layouts
    elif getattr(pipe.transformer, "peft_config", None):
        last = True
        yield "adapter", last, layouts
    if ablations:
        yield "text_only", last, [Layout(layout.caption) for layout in layouts]
        yield "layout_only", last, [Layout("", layout.boxes) for layout in layouts]


def _in_memory(
    pipe: LayoutPipeline, layouts: Sequence[Layout], settings: SamplingConfig, *, side: str, **options: Any
) -> list[Image.Image]:
    del side
    return generate(pipe, layouts, settings, **options)


@contextmanager
def _only(pipe: LayoutPipeline, active: _Active, each: Mapping[str, float] | None) -> Iterator[None]:
    """Within it, these adapters are on; then all of them."""
    if active is True or not getattr(pipe.transformer, "peft_config", None):
        yield
        return
    if active is False:
        pipe.transformer.disable_lora()
    else:
        pipe.transformer.set_adapters([active], [(each or {})[active]])
    try:
        yield
    finally:
        if active is False:
            pipe.transformer.enable_lora()
        else:
            pipe.transformer.set_adapters(list(each or {}), list((each or {}).values()))


def _refuse_unreadable(records: Sequence[Record], detector: Detector) -> None:
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
def through_vae(pipe: LayoutPipeline, pixels: Sequence[torch.Tensor], *, batch_size: int) -> list[Image.Image]:
    """(3, H, W) images in [-1, 1], encoded and decoded: the best that this base could paint."""
    out: list[Image.Image] = []
    for start in range(0, len(pixels), batch_size):
        x = torch.stack(list(pixels[start : start + batch_size])).to(pipe.vae.device, pipe.vae.dtype)
        decoded = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
        out += pipe.image_processor.postprocess(decoded.float(), output_type="pil")
    return out


def _figures(images: Sequence[Judged]) -> dict[str, float]:
    return {name: value(table) for name, table in sums(images).items()} | {
        "boxes": sum(len(image.boxes) for image in images)
    }
