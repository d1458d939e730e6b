"""The exact detector of procedural scenes, which needs no learned network, and the fidelity metrics made with it.

Images are read without the layout; boxes are matched with detections afterwards. The backgrounds are grey, so a pixel's
chroma (its colour less the grey in it) is the object's chroma times its coverage, the share of the pixel that the object
covers: the direction gives the colour, the length the coverage. Components of one colour are segmented; every shape is then
rendered as the generator renders it, and the four sides of its box are fitted by Gauss-Newton to a fraction of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from mmdit_lora.data.shapes import COLORS, SHAPES, phrase_attributes, shape_coverage
from mmdit_lora.errors import InputError, listed
from mmdit_lora.evaluation.detectors.base import (
    Detection,
    Detector,
    Options,
    batches,
    digest,
    file_digests,
    require_same_number,
    unknown_phrases,
)
from mmdit_lora.evaluation.detectors.matching import BoxMatch, match
from mmdit_lora.layout import Layout

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]
Images = NDArray[np.uint8] | Sequence[Image.Image]

_KNOWN = f"phrases like 'a red circle' ({', '.join(COLORS)}; {', '.join(SHAPES)})"


class ShapesDetector(Detector):
    """Detects coloured shapes on grey without a learned network. Knows phrases like "a red circle"."""

    name = "shapes"
    by_label = False
    attributes = True
    options_type = Options

    def __init__(
        self, target: str | None, options: Options, *, spec: str = "shapes", device: str | None = None
    ) -> None:
        del options, device
        if target is not None:
            raise InputError(f"takes nothing, and {target!r} is given", location=spec, hint="write `shapes`")

    def detect(self, images: Sequence[Image.Image], layouts: Sequence[Layout]) -> list[list[Detection]]:
        """As `Detector.detect`, but the largest first: all scores are 1."""
        if unknown := unknown_phrases(self, images, layouts):
            what = f"the exact reader does not know {listed(map(repr, unknown))}"
            raise InputError(what, location=self.name, hint=f"it reads {_KNOWN}; for others take another detector")
        return detect_all(images)

    def knows(self, phrase: str) -> bool:
        return phrase_attributes(phrase) is not None

    def fingerprint(self) -> str:
        return digest(self.name, file_digests(Path(__file__)), np.__version__, scipy.__version__)


# -- fidelity ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fidelity:
    """Means over boxes: of the IoU, of IoU >= 0.5, of right colours, of right shapes; and the number of boxes."""

    miou: float
    iou50: float
    color_acc: float
    shape_acc: float
    boxes: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def readable(layouts: Iterable[Layout]) -> bool:
    """Whether the detector can measure these layouts: at least one box, and it knows every phrase."""
    phrases = [box.phrase for layout in layouts for box in layout.boxes]
    return bool(phrases) and all(phrase_attributes(phrase) is not None for phrase in phrases)


def measure(images: Images, layouts: Sequence[Layout]) -> Fidelity:
    """Fidelity of images to layouts, over all boxes of all images.

    Args:
        images: PIL images, or (B, H, W, 3) uint8.

    Raises:
        ValueError: the numbers of images and layouts differ.
        InputError: no boxes at all, or a phrase that the detector does not know.
    """
    return summarise([box for boxes in per_image(images, layouts) for box in boxes])


def summarise(boxes: Sequence[BoxMatch]) -> Fidelity:
    """The means over `boxes`. Raises InputError if there are none."""
    if not boxes:
        raise InputError("these layouts hold no boxes: there is nothing to measure", hint="give layouts with boxes")
    table = np.array([(box.iou, box.iou >= 0.5, bool(box.color), bool(box.shape)) for box in boxes], dtype=np.float64)
    miou, iou50, color_acc, shape_acc = table.mean(axis=0).tolist()
    return Fidelity(miou, iou50, color_acc, shape_acc, len(boxes))


def per_image(images: Images, layouts: Sequence[Layout]) -> list[list[BoxMatch]]:
    """The matches of each image's boxes, in the layout's order. Arguments and errors as in `measure` (no boxes are fine)."""
    require_same_number(images, layouts)
    for layout in layouts:
        for index, box in enumerate(layout.boxes):
            if phrase_attributes(box.phrase) is None:
                what = f"the reader does not know the phrase {box.phrase!r}"
                raise InputError(what, location=f"boxes[{index}]", hint=f"it reads {_KNOWN}")
    detections = detect_all(images)
    return [match(d, layout, by_label=False, attributes=True) for d, layout in zip(detections, layouts, strict=True)]


# -- detection -----------------------------------------------------------------------------------------------------------


def detect(image: Image.Image | NDArray[np.uint8]) -> list[Detection]:
    """The objects of one image (PIL, or (H, W, 3) uint8), largest first."""
    return detect_all([image] if isinstance(image, Image.Image) else np.asarray(image)[None])[0]


def detect_all(images: Images) -> list[list[Detection]]:
    """The objects of every image, largest first. Images of one size are read together, which is many times faster.

    Raises:
        ValueError: an array is not (B, H, W, 3) uint8.
    """
    if isinstance(images, np.ndarray):
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 (B, H, W, 3)")
        arrays = list(images)
    else:
        arrays = [np.asarray(image.convert("RGB")) for image in images]
    out: list[list[Detection]] = [[] for _ in arrays]
    for indices in batches([array.shape[:2] for array in arrays], 64):  # larger batches fall out of the CPU's caches
        for index, found in zip(indices, _detect_batch(np.stack([arrays[index] for index in indices])), strict=True):
            out[index] = found
    return out


# An orthonormal basis of the plane across the grey axis.
_CHROMA = np.array([[1, -1, 0], [1, 1, -2]], np.float32).T / np.sqrt(np.array([2, 6], np.float32))
_COLOR_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), np.float32) @ _CHROMA  # (C, 2)
_MAX_SIDE = 128  # larger images are averaged down to at most this: the fit is finer than a pixel, so little is lost
_TINT = 40.0  # chroma below this may be a tinted background
_SOLID = 0.5  # coverage from which a pixel belongs to an object
_MIN_AREA = 12.0  # px covered; less is no object
_MARGIN = 3  # px around an object where it may still cover a part of a pixel
_GOOD_FIT = 0.88  # a fit below this may be several objects of one colour that touch
_MIN_GAIN = 0.05  # by which the fits of the parts must beat that of the whole
_MIN_PART_FIT = 0.8
_MIN_CORE = 5  # px of an eroded part; less is a bump of the outline
_MAX_CUT = 0.75  # longest cut, as a share of the side of a square of the smallest part's area
_MIN_FIT = 0.6  # below this the object has none of the shapes


def _detect_batch(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """The objects of images of one size, (B, H, W, 3), largest first."""
    height, width = images.shape[1:3]
    step = max(1, min(-(-max(height, width) // _MAX_SIDE), height, width))
    chroma = _chroma(images, step)
    labels, colors = _segment(chroma)
    fits = _fit(chroma, labels, colors, np.arange(1, len(colors)))
    colors, fits = _split_touching(chroma, labels, colors, fits)
    scale = np.array([width, height, width, height]) / step
    out: list[list[Detection]] = [[] for _ in images]
    for label, fit in sorted(fits.items(), key=lambda item: -item[1].area):
        left, top, right, bottom = np.clip(np.array(fit.box) / scale, 0, 1).tolist()
        if right > left and bottom > top:
            color, shape = _COLOR_NAMES[colors[label]], SHAPES[fit.shape] if fit.score >= _MIN_FIT else None
            name = f"{color} {shape or 'thing'}"
            out[fit.image].append(Detection((left, top, right, bottom), name, color=color, shape=shape))
    return out


def _chroma(images: NDArray[np.uint8], step: int) -> Floats:
    """(B, H, W, 3) uint8 -> (B, H // step, W // step, 2): mean chroma less the background's tint."""
    chroma: Floats = (images.astype(np.float32) @ _CHROMA).astype(np.float32)
    if step > 1:
        height, width = chroma.shape[1] // step, chroma.shape[2] // step
        chroma = chroma[:, : height * step, : width * step]
        chroma = chroma.reshape(-1, height, step, width, step, 2).mean(axis=(2, 4))
    for image in chroma:
        plain = image[(image**2).sum(-1) < _TINT**2]
        if len(plain) > image[..., 0].size // 8:
            image -= np.median(plain, axis=0)
    return chroma


# -- segmentation --------------------------------------------------------------------------------------------------------

_IN_IMAGE = np.zeros((3, 3, 3), bool)  # neighbours within one image, by sides
_IN_IMAGE[1] = ndimage.generate_binary_structure(2, 1)
_NEIGHBOURS8 = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
_NEIGHBOURS4 = [(dy, dx) for dy, dx in _NEIGHBOURS8 if not (dy and dx)]


def _segment(chroma: Floats) -> tuple[Ints, Ints]:
    """Components of one colour: (B, H, W) labels, 0 = none, and (K + 1,) indices of colours."""
    length = np.linalg.norm(_PALETTE, axis=1)
    along = chroma @ (_PALETTE / length[:, None]).T  # (B, H, W, C)
    nearest = along.argmax(-1)
    coverage = np.take_along_axis(along, nearest[..., None], -1)[..., 0] / length[nearest]
    # Noise and mixed edges misname single pixels; neighbours outvote them.
    solid = np.where(coverage >= _SOLID, np.minimum(coverage, 1), 0)
    votes = (nearest[..., None] == np.arange(len(_PALETTE))) * solid[..., None]
    votes = ndimage.uniform_filter1d(ndimage.uniform_filter1d(votes, 3, axis=1), 3, axis=2)
    named = np.where(solid > 0, votes.argmax(-1), -1)
    labels, colors = np.zeros(named.shape, np.int32), [0]
    for color in range(len(_PALETTE)):
        found, number = ndimage.label(named == color, _IN_IMAGE)
        labels += np.where(found > 0, found + (len(colors) - 1), 0).astype(np.int32)
        colors += [color] * number
    return _drop_specks(labels, np.array(colors, np.int32), solid)


def _shifted(array: NDArray, dy: int, dx: int) -> NDArray:
    """(B, H, W) whose [b, y, x] is array[b, y + dy, x + dx], 0 outside."""
    height, width = array.shape[1:]
    padded = np.pad(array, ((0, 0), (1, 1), (1, 1)))
    return padded[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


def _drop_specks(labels: Ints, colors: Ints, coverage: Floats) -> tuple[Ints, Ints]:
    """Without specks, and without the mixed seam between two objects (thin, and with other objects around it)."""
    count = len(colors)
    beside = [_shifted(labels, *step) for step in _NEIGHBOURS4]
    core = np.bincount(labels[np.all([near == labels for near in beside], axis=0)], minlength=count)
    foreign = sum(np.bincount(labels[(near != labels) & (near > 0)], minlength=count) for near in beside)
    edges = sum(np.bincount(labels[near != labels], minlength=count) for near in beside)
    area = np.bincount(labels.ravel(), coverage.ravel(), minlength=count)
    keep = (area >= _MIN_AREA) & ((core > 2) | (foreign < 0.4 * edges))
    keep[0] = False
    names = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return names[labels], np.concatenate([[0], colors[keep]]).astype(np.int32)


def _object_chroma(chroma: Floats, labels: Ints, colors: Ints) -> Floats:
    """(K + 1, 2) chroma of full coverage by every object: that of its inner pixels, so that a faded colour is measured as
    it is; thin objects get the palette's."""
    inner = (labels > 0) & np.all([_shifted(labels, *step) == labels for step in _NEIGHBOURS4], axis=0)
    count = np.bincount(labels[inner], minlength=len(colors))
    total = np.stack([np.bincount(labels[inner], chroma[inner][:, i], minlength=len(colors)) for i in (0, 1)], axis=1)
    vectors = np.where((count >= 6)[:, None], total / np.maximum(count, 1)[:, None], _PALETTE[colors])
    return vectors.astype(np.float32)


def _territories(labels: Ints) -> tuple[Ints, Ints]:
    """The label of the nearest object within `_MARGIN` px, and another label that meets it at this pixel (0 = none)."""
    near = labels
    for _ in range(_MARGIN):
        spread = near
        for step in _NEIGHBOURS4:
            spread = np.where(spread == 0, _shifted(near, *step), spread)
        near = spread
    other = np.zeros_like(near)
    for step in _NEIGHBOURS8:
        neighbour = _shifted(near, *step)
        other = np.where((neighbour != near) & (neighbour > 0), neighbour, other)
    return near, other


# -- objects of one colour that touch ------------------------------------------------------------------------------------


def _split_touching(chroma: Floats, labels: Ints, colors: Ints, fits: dict[int, _Fit]) -> tuple[Ints, dict[int, _Fit]]:
    """Objects of one colour that touch are one component, which no shape fits: cut it at its necks, and keep the parts if
    they fit much better. Returns the colours with those of the parts, and the fits of what remains.

    A single malformed object is also fitted better in parts, so the cut must be short and every part have a shape.
    """
    trial, trial_colors, cuts = labels.copy(), list(colors), {}
    for label, fit in fits.items():
        mask = labels[fit.image] == label
        if fit.score < _GOOD_FIT and (parts := _cut(mask)) is not None:
            names = np.arange(parts.max()) + len(trial_colors)
            trial[fit.image][mask] = names[parts[mask] - 1]
            trial_colors += [colors[label]] * len(names)
            cuts[label] = names
    if not cuts:
        return colors, fits
    new = np.array(trial_colors, np.int32)
    part_fits = _fit(chroma, trial, new, np.concatenate(list(cuts.values())))
    kept = dict(fits)
    for label, names in cuts.items():
        pieces = {int(name): part_fits[name] for name in names}
        area = sum(piece.area for piece in pieces.values())
        score = sum(piece.score * piece.area for piece in pieces.values()) / area
        if min(piece.score for piece in pieces.values()) >= _MIN_PART_FIT and score > fits[label].score + _MIN_GAIN:
            del kept[label]
            kept |= pieces
    return new, kept


def _cut(mask: Bools) -> Ints | None:
    """A component (H, W) cut into parts 1, 2, ... at its necks (0 elsewhere); None if it has none.

    It is eroded until it falls apart; each pixel goes to the nearest of the cores that are left.
    """
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    for eroded in np.arange(1, depth.max(), 0.5):
        cores, _ = ndimage.label(depth > eroded)
        large = np.bincount(cores.ravel()) >= _MIN_CORE
        large[0] = False
        cores, number = (np.cumsum(large) * large)[cores], int(large.sum())
        if number > 1:
            break
    else:
        return None
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    parts = np.where(mask, cores[tuple(nearest)], 0).astype(np.int32)
    smallest = np.bincount(parts[mask])[1:].min()
    beside = (parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1])
    seam = sum(((a != b) & (a > 0) & (b > 0)).sum() for a, b in beside)
    return parts if smallest >= _MIN_AREA and seam <= _MAX_CUT * (number - 1) * np.sqrt(smallest) else None


# -- fit -----------------------------------------------------------------------------------------------------------------

_CELLS = 32  # a side of a shape's template
_BLURS = (0.0, 0.5, 0.9)  # px, standard deviation: images from a VAE are not as sharp as rendered ones
_FIRST_BLUR = 1  # the index of the one that all shapes are tried under
_WEAK = 0.1  # weight of "not covered here" where another object may hide ours


class _Fit(NamedTuple):
    """The best shape of one object: the image's index, its box in px, the shape's index, the fit in [0, 1], the area covered."""

    image: int
    box: tuple[float, ...]
    shape: int
    score: float
    area: float


class _Patches(NamedTuple):
    """Per object (n, P, Q): its coverage, the coverage by others, whether the pixel exists, whether it is nearest to it."""

    own: Floats
    others: Floats
    exists: Bools
    nearest: Bools


class _Trials(NamedTuple):
    """k trials for each of n objects: boxes (n, k, 4), indices of shapes (n, k) and of blurs (n, k)."""

    boxes: Floats
    shapes: NDArray
    blurs: NDArray

    def take(self, index: NDArray) -> _Trials:
        """The trials `index` (n, j) of each object."""
        row = np.arange(len(index))[:, None]
        return _Trials(*(values[row, index] for values in self))

    def flat(self) -> tuple[Floats, NDArray, NDArray]:
        return self.boxes.reshape(-1, 4), self.shapes.ravel(), self.blurs.ravel()


def _fit(chroma: Floats, labels: Ints, colors: Ints, which: NDArray[np.integer]) -> dict[int, _Fit]:
    """The best shape and box of each label of `which`."""
    if not len(which):
        return {}
    vectors = _object_chroma(chroma, labels, colors)
    near, other = _territories(labels)
    slices = ndimage.find_objects(labels, max_label=len(colors) - 1)
    spans = np.array([[(s.start, s.stop) for s in slices[label - 1]] for label in which])  # (n, 3, 2): image, y, x
    sides = spans[:, 1:, 1] - spans[:, 1:, 0]
    # Thin tips lie outside of the component, further out the longer the object is.
    extents = -(-(sides + 2 * (_MARGIN + sides // 6)) // 8) * 8
    out: dict[int, _Fit] = {}
    for size in np.unique(extents, axis=0):
        group = np.flatnonzero((extents == size).all(1))
        for part in np.array_split(group, -(-len(group) * int(size.prod()) // 15_000)):  # what the CPU's caches hold
            images, corner = spans[part, 0, 0], spans[part, 1:].sum(2) // 2 - size // 2
            patches = _cut_patches(chroma, near, other, vectors, which[part], images, corner, size)
            boxes, shapes, scores = _fit_patches(patches)
            mask = spans[part][:, [2, 1, 2, 1], [0, 0, 1, 1]].astype(np.float32)
            boxes = np.where((scores >= _MIN_FIT)[:, None], boxes + np.tile(corner[:, ::-1], 2), mask)
            area = np.where(patches.nearest, np.clip(patches.own, 0, 1), 0).sum((1, 2))
            for i, label in enumerate(which[part]):
                box = tuple(boxes[i].tolist())
                out[int(label)] = _Fit(int(images[i]), box, int(shapes[i]), float(scores[i]), float(area[i]))
    return {label: out[label] for label in map(int, which)}


def _cut_patches(
    chroma: Floats,
    near: Ints,
    other: Ints,
    vectors: Floats,
    which: NDArray,
    images: NDArray,
    corner: NDArray,
    size: NDArray,
) -> _Patches:
    """Cut out patches of `size` (P, Q) px at `corner` (n, 2: y, x) and separate each object's coverage from its neighbours'."""
    height, width = near.shape[1:]
    y, x = (corner[:, i, None] + np.arange(size[i]) for i in (0, 1))
    exists = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = images[:, None, None], y.clip(0, height - 1)[:, :, None], x.clip(0, width - 1)[:, None, :]
    pixel, me = chroma[at], which[:, None, None]
    nearest, second = near[at], other[at]
    rival = np.where((nearest == me) | (nearest == 0), second, nearest)
    rival = np.where(rival == me, 0, rival)
    mine, theirs = vectors[which][:, None, None, :], vectors[rival]
    own = (pixel * mine).sum(-1) / (mine**2).sum(-1)
    # Two objects in one pixel: two coverages, two equations, unless the colours are alike or opposite.
    cross = mine[..., 0] * theirs[..., 1] - mine[..., 1] * theirs[..., 0]
    solvable = np.abs(cross) > 0.35 * np.linalg.norm(mine, axis=-1) * np.linalg.norm(theirs, axis=-1)
    safe = np.where(solvable, cross, 1)
    my_part = (pixel[..., 0] * theirs[..., 1] - pixel[..., 1] * theirs[..., 0]) / safe
    their_part = (mine[..., 0] * pixel[..., 1] - mine[..., 1] * pixel[..., 0]) / safe
    foreign = (nearest != me) & (nearest > 0)
    meets = rival > 0
    others = np.where(meets, np.where(solvable, their_part, np.where(foreign, 1, 0.5)), 0)
    own = np.where(meets, np.where(solvable, my_part, np.where(foreign, 0, own.clip(0, 1))), own)
    own, others = own.clip(-0.3, 1.3).astype(np.float32), others.clip(0, 1).astype(np.float32)
    return _Patches(own, others, exists, (nearest == me) & exists)


def _fit_patches(patches: _Patches) -> tuple[Floats, Ints, Floats]:
    """Boxes (n, 4) in px of the patch, indices of shapes (n,), scores (n,)."""
    number = len(patches.own)
    # All shapes get a few steps; the best two are tried under every blur; those go on under the blur that fits.
    indices = np.broadcast_arrays(np.arange(len(SHAPES)), np.full((number, 1), _FIRST_BLUR))
    trials, error = _adjust(patches, _Trials(_first_boxes(patches), *indices), steps=3)
    trials = trials.take(np.repeat(error.argsort(1)[:, :2], len(_BLURS), axis=1))
    trials, error = _adjust(patches, trials._replace(blurs=np.tile(np.arange(len(_BLURS)), (number, 2))), steps=1)
    blur = error.argmin(1) % len(_BLURS)
    trials, error = _adjust(patches, trials.take(blur[:, None] + [0, len(_BLURS)]), steps=4)
    best = trials.take(error.argmin(1)[:, None])
    drawn = _render(*best.flat(), patches.own.shape[1:])[0]
    seen = np.clip(drawn, patches.own, patches.own + patches.others)
    seen = np.where(seen < 0.12, 0, np.where(seen > 0.88, 1, seen))  # noise is no misfit
    both = (np.minimum(drawn, seen) * patches.exists).sum((1, 2))
    either = (np.maximum(drawn, seen) * patches.exists).sum((1, 2))
    return best.boxes[:, 0], best.shapes[:, 0].astype(np.int32), both / np.maximum(either, 1e-6)


def _adjust(patches: _Patches, trials: _Trials, *, steps: int) -> tuple[_Trials, Floats]:
    """Gauss-Newton on the trials' boxes: the trials, and the squared errors (n, k) of the boxes before the last step."""
    boxes, shapes, blurs = trials.flat()
    rows = np.repeat(np.arange(len(trials.shapes)), trials.shapes.shape[1])
    own, others, exists = patches.own[rows], patches.others[rows], patches.exists[rows].astype(np.float32)
    hidden = others > 0
    weak = _WEAK * (1 - others) * hidden * exists
    for _ in range(steps):
        drawn, slopes = _render(boxes, shapes, blurs, own.shape[1:])
        # Under another object ours is unknown: anything from what is seen to what may be hidden fits, what is seen a little
        # better.
        misfit = (np.clip(drawn, own, own + others) - drawn) * exists
        weak_misfit = (own - drawn) * weak
        weights = exists * ~(hidden & (misfit == 0)) + weak
        flat = slopes.reshape(len(boxes), 4, -1)
        normal = (flat * weights.reshape(len(boxes), 1, -1)) @ flat.swapaxes(-1, -2)
        force = flat @ (misfit + weak_misfit).reshape(len(boxes), -1, 1)
        damping = 0.05 + 0.005 * np.trace(normal, axis1=-2, axis2=-1)
        normal += np.eye(4, dtype=np.float32) * damping[:, None, None]
        boxes = boxes + np.linalg.solve(normal, force)[..., 0].clip(-1.5, 1.5)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    error = (misfit**2).sum((1, 2)) + (weak_misfit * (own - drawn)).sum((1, 2))
    return trials._replace(boxes=boxes.reshape(trials.boxes.shape)), error.reshape(trials.shapes.shape)


def _first_boxes(patches: _Patches) -> Floats:
    """(n, S, 4): per shape the box whose coverage would have the mean and spread of the coverage that is seen."""
    _, mean, deviation = _templates()
    coverage = np.where(patches.nearest & (patches.own > 0.2), patches.own, 0)
    moments = []
    for profile in (coverage.sum(1), coverage.sum(2)):  # along x, along y
        place = np.arange(profile.shape[1]) + 0.5
        share = profile / np.maximum(profile.sum(1, keepdims=True), 1e-6)
        middle = share @ place
        moments.append((middle, (share * (place - middle[:, None]) ** 2).sum(1)))
    centre, variance = np.array(moments).swapaxes(0, 1).swapaxes(1, 2)  # (n, 2) each
    spread = np.sqrt(np.maximum(variance - 1 / 12, 0.25))  # less what a pixel's own width adds
    sides = spread[:, None] / deviation
    start = centre[:, None] - mean * sides
    return np.concatenate([start, start + sides], axis=-1).astype(np.float32)


def _render(boxes: Floats, shapes: NDArray, blurs: NDArray, size: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Shapes (m,) in boxes (m, 4): coverage (m, P, Q), exact for the template's cells, and its derivatives (m, 4, P, Q) by
    the box's sides.

    A pixel's coverage is the sum of the cells' overlaps with it; by parts, of the template's second differences times how
    far each cell edge reaches into the pixel, so both axes are matrix products.
    """
    corners, _, _ = _templates()
    (high, high_start, high_end), (wide, wide_start, wide_end) = (
        _reach(boxes[:, axis], boxes[:, axis + 2], blurs, size[1 - axis]) for axis in (1, 0)
    )
    rows = np.concatenate([high, high_start, high_end], axis=1) @ corners[shapes]  # (m, 3P, T+1)
    slopes = np.empty((len(boxes), 4, *size), np.float32)
    across = wide.swapaxes(1, 2)
    drawn = rows[:, : size[0]] @ across
    np.matmul(rows[:, : size[0]], wide_start.swapaxes(1, 2), out=slopes[:, 0])
    np.matmul(rows[:, size[0] : 2 * size[0]], across, out=slopes[:, 1])
    np.matmul(rows[:, : size[0]], wide_end.swapaxes(1, 2), out=slopes[:, 2])
    np.matmul(rows[:, 2 * size[0] :], across, out=slopes[:, 3])
    return drawn, slopes


def _reach(start: Floats, end: Floats, blurs: NDArray, pixels: int) -> tuple[Floats, Floats, Floats]:
    """How far each of a box's cell edges reaches into each pixel, (m, pixels, T+1) in [0, 1], and its derivatives by start
    and end."""
    place = np.linspace(0, 1, _CELLS + 1, dtype=np.float32)
    edges = start[:, None] + (end - start)[:, None] * place
    depth = edges[:, None] - np.arange(pixels, dtype=np.float32)[:, None]
    reach = depth.clip(0, 1)
    within = (depth == reach).astype(np.float32)
    by_end = within * place
    kernel = _kernels(pixels)[blurs]
    return kernel @ reach, kernel @ (within - by_end), kernel @ by_end


@cache
def _kernels(pixels: int) -> Floats:
    """(len(_BLURS), pixels, pixels): what a row of pixels becomes under each blur."""
    apart = np.subtract.outer(np.arange(pixels + 8), np.arange(pixels + 8))
    out = []
    for sigma in _BLURS:
        kernel = np.exp(-(apart**2) / (2 * max(sigma, 1e-2) ** 2))
        kernel[kernel < 1e-6] = 0  # denormal numbers would make the products many times slower
        out.append((kernel / kernel.sum(1, keepdims=True))[4:-4, 4:-4])
    return np.array(out, np.float32)


@cache
def _templates() -> tuple[Floats, Floats, Floats]:
    """Per shape: its template's second differences (S, T+1, T+1), and mean and standard deviation (S, 2) of x and y in [0, 1]."""
    cells = _CELLS
    drawn = np.stack([shape_coverage(shape, (0, 0, cells, cells), cells) for shape in SHAPES])
    corners = np.diff(np.diff(np.pad(drawn, ((0, 0), (1, 1), (1, 1))), axis=1), axis=2)
    middle = (np.arange(cells) + 0.5) / cells
    weight = np.stack([drawn.sum(1), drawn.sum(2)], axis=1) / drawn.sum((1, 2))[:, None, None]  # (S, 2, T)
    mean = weight @ middle
    deviation = np.sqrt((weight * (middle - mean[..., None]) ** 2).sum(-1))
    return corners.astype(np.float32), mean.astype(np.float32), deviation.astype(np.float32)
