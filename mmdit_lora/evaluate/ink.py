"""Coloured ink on grey: which pixels are one object, of which colour; shapes and boxes come from `fit`.

The backgrounds are grey, so a pixel's chroma (its colour less the grey in it) is the ink's chroma times the share of the
pixel that the ink covers: the direction names the colour, the length gives the coverage, whatever the background.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mmdit_lora.data.shapes import COLORS
from mmdit_lora.evaluate.fit import Bools, Floats, Ints, Patch, fit_patches

# An orthonormal basis of the plane across the grey axis.
_CHROMA = np.array([[1, -1, 0], [1, 1, -2]], np.float32).T / np.sqrt(np.array([2, 6], np.float32))
_PALETTE = np.array(list(COLORS.values()), np.float32) @ _CHROMA  # (C, 2)
_LONGEST = 128  # larger pictures are averaged down to at most this: the fit is finer than a pixel, so little is lost
_TINT = 40.0  # chroma below this may be a tinted background
_INK = 0.5  # coverage from which a pixel belongs to an object
_SPECK = 12.0  # px of ink; less is no object
_REACH = 3  # px around an object where its ink may still be found
_GOOD = 0.88  # a fit below this may be several objects of one colour that touch
_GAIN = 0.05  # by which the fits of the parts must beat that of the whole
_PART = 0.8  # the least fit of a part
_CORE = 5  # px of a worn part; less is a bump of the outline
_NECK = 0.75  # longest cut, as a share of the side of a square of the smallest part's area
_SHAPED = 0.6  # below this the ink has none of the shapes


@dataclass(frozen=True)
class Thing:
    """One object: the picture's index, its box relative to the picture, indices of its colour and its shape (None: no
    shape fits), and its ink in px."""

    picture: int
    xyxy: tuple[float, float, float, float]
    color: int
    shape: int | None
    ink: float


def read(pictures: NDArray[np.uint8]) -> list[Thing]:
    """The objects of pictures of one size, (B, H, W, 3), largest first."""
    height, width = pictures.shape[1:3]
    step = max(1, min(-(-max(height, width) // _LONGEST), height, width))
    chroma = _chroma(pictures, step)
    labels, colors = _segment(chroma)
    fits = _fit(chroma, labels, colors, np.arange(1, len(colors)))
    colors, fits = _part(chroma, labels, colors, fits)
    scale = np.array([width, height, width, height]) / step
    things = []
    for label, fit in fits.items():
        left, top, right, bottom = np.clip(np.array(fit.box) / scale, 0, 1).tolist()
        if right > left and bottom > top:
            shape = fit.shape if fit.score >= _SHAPED else None
            things.append(Thing(fit.picture, (left, top, right, bottom), int(colors[label]), shape, fit.ink))
    return sorted(things, key=lambda thing: -thing.ink)


def _chroma(pictures: NDArray[np.uint8], step: int) -> Floats:
    """(B, H, W, 3) uint8 -> (B, H // step, W // step, 2): mean chroma less the background's tint."""
    chroma: Floats = (pictures.astype(np.float32) @ _CHROMA).astype(np.float32)
    if step > 1:
        height, width = chroma.shape[1] // step, chroma.shape[2] // step
        chroma = chroma[:, : height * step, : width * step]
        chroma = chroma.reshape(-1, height, step, width, step, 2).mean(axis=(2, 4))
    for picture in chroma:
        plain = picture[(picture**2).sum(-1) < _TINT**2]
        if len(plain) > picture[..., 0].size // 8:
            picture -= np.median(plain, axis=0)
    return chroma


def _segment(chroma: Floats) -> tuple[Ints, Ints]:
    """Components of one colour: (B, H, W) labels, 0 = none, and (K + 1,) indices of colours."""
    length = np.linalg.norm(_PALETTE, axis=1)
    along = chroma @ (_PALETTE / length[:, None]).T  # (B, H, W, C)
    nearest = along.argmax(-1)
    ink = np.take_along_axis(along, nearest[..., None], -1)[..., 0] / length[nearest]
    # Noise and mixed edges name single pixels wrongly; neighbours outvote them.
    solid = np.where(ink >= _INK, np.minimum(ink, 1), 0)
    votes = (nearest[..., None] == np.arange(len(_PALETTE))) * solid[..., None]
    votes = ndimage.uniform_filter1d(ndimage.uniform_filter1d(votes, 3, axis=1), 3, axis=2)
    named = np.where(solid > 0, votes.argmax(-1), -1)
    labels, colors = np.zeros(named.shape, np.int32), [0]
    for color in range(len(_PALETTE)):
        found, number = ndimage.label(named == color, _FLAT)
        labels += np.where(found > 0, found + (len(colors) - 1), 0).astype(np.int32)
        colors += [color] * number
    return _drop_specks(labels, np.array(colors, np.int32), solid)


_FLAT = np.zeros((3, 3, 3), bool)  # neighbours within one picture, by sides
_FLAT[1] = ndimage.generate_binary_structure(2, 1)
_AROUND = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]
_BESIDE = [(dy, dx) for dy, dx in _AROUND if not (dy and dx)]


def _shifted(array: NDArray, dy: int, dx: int) -> NDArray:
    """(B, H, W) whose [b, y, x] is array[b, y + dy, x + dx], 0 outside."""
    out = np.zeros_like(array)
    height, width = array.shape[1:]
    out[:, max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)] = array[
        :, max(dy, 0) : height - max(-dy, 0), max(dx, 0) : width - max(-dx, 0)
    ]
    return out


def _drop_specks(labels: Ints, colors: Ints, ink: Floats) -> tuple[Ints, Ints]:
    """Without components that are specks, or the mixed seam between two objects (thin, and with other ink around it)."""
    count = len(colors)
    beside = [_shifted(labels, *step) for step in _BESIDE]
    core = np.bincount(labels[np.all([near == labels for near in beside], axis=0)], minlength=count)
    foreign = sum(np.bincount(labels[(near != labels) & (near > 0)], minlength=count) for near in beside)
    edges = sum(np.bincount(labels[near != labels], minlength=count) for near in beside)
    weight = np.bincount(labels.ravel(), ink.ravel(), minlength=count)
    keep = (weight >= _SPECK) & ((core > 2) | (foreign < 0.4 * edges))
    keep[0] = False
    names = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    return names[labels], np.concatenate([[0], colors[keep]]).astype(np.int32)


@dataclass(frozen=True)
class _Fit:
    picture: int
    box: tuple[float, ...]  # px
    shape: int
    score: float
    ink: float


def _inks(chroma: Floats, labels: Ints, colors: Ints) -> Floats:
    """(K + 1, 2) chroma of full ink of every object: what its inner pixels show, so that a faded colour is measured as
    what it is; thin objects keep the palette's."""
    inner = (labels > 0) & np.all([_shifted(labels, *step) == labels for step in _BESIDE], axis=0)
    count = np.bincount(labels[inner], minlength=len(colors))
    total = np.stack([np.bincount(labels[inner], chroma[inner][:, i], minlength=len(colors)) for i in (0, 1)], axis=1)
    vectors = np.where((count >= 6)[:, None], total / np.maximum(count, 1)[:, None], _PALETTE[colors])
    return vectors.astype(np.float32)


def _territories(labels: Ints) -> tuple[Ints, Ints]:
    """The label whose object is nearest, within `_REACH` px, and another label that meets it at this pixel (0 = none)."""
    near = labels
    for _ in range(_REACH):
        spread = near
        for step in _BESIDE:
            spread = np.where(spread == 0, _shifted(near, *step), spread)
        near = spread
    other = np.zeros_like(near)
    for step in _AROUND:
        neighbour = _shifted(near, *step)
        other = np.where((neighbour != near) & (neighbour > 0), neighbour, other)
    return near, other


def _fit(chroma: Floats, labels: Ints, colors: Ints, which: NDArray[np.integer]) -> dict[int, _Fit]:
    """The best shape and box of each label of `which`."""
    if not len(which):
        return {}
    vectors = _inks(chroma, labels, colors)
    near, other = _territories(labels)
    slices = ndimage.find_objects(labels, max_label=len(colors) - 1)
    spans = np.array([[(s.start, s.stop) for s in slices[label - 1]] for label in which])  # (n, 3, 2): picture, y, x
    sides = spans[:, 1:, 1] - spans[:, 1:, 0]
    # Thin tips lie outside of the component, further out the longer the object is.
    extents = -(-(sides + 2 * (_REACH + sides // 6)) // 8) * 8
    out: dict[int, _Fit] = {}
    for size in np.unique(extents, axis=0):
        group = np.flatnonzero((extents == size).all(1))
        for part in np.array_split(group, -(-len(group) * int(size.prod()) // 15_000)):  # what the CPU's caches hold
            pictures, corner = spans[part, 0, 0], spans[part, 1:].sum(2) // 2 - size // 2
            patch = _patch(chroma, near, other, vectors, which[part], pictures, corner, size)
            boxes, shapes, scores = fit_patches(patch)
            mask = spans[part][:, [2, 1, 2, 1], [0, 0, 1, 1]].astype(np.float32)
            boxes = np.where((scores >= _SHAPED)[:, None], boxes + np.tile(corner[:, ::-1], 2), mask)
            ink = np.where(patch.ground, np.clip(patch.own, 0, 1), 0).sum((1, 2))
            for i, label in enumerate(which[part]):
                box = tuple(boxes[i].tolist())
                out[int(label)] = _Fit(int(pictures[i]), box, int(shapes[i]), float(scores[i]), float(ink[i]))
    return {label: out[label] for label in map(int, which)}


def _patch(
    chroma: Floats,
    near: Ints,
    other: Ints,
    vectors: Floats,
    which: NDArray,
    pictures: NDArray,
    corner: NDArray,
    size: NDArray,
) -> Patch:
    """Cut out patches of `size` (P, Q) px at `corner` (n, 2: y, x) and separate the object's ink from its neighbours'."""
    height, width = near.shape[1:]
    y, x = (corner[:, i, None] + np.arange(size[i]) for i in (0, 1))
    exists = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    at = pictures[:, None, None], y.clip(0, height - 1)[:, :, None], x.clip(0, width - 1)[:, None, :]
    pixel, me = chroma[at], which[:, None, None]
    nearest, second = near[at], other[at]
    rival = np.where((nearest == me) | (nearest == 0), second, nearest)
    rival = np.where(rival == me, 0, rival)
    mine, theirs = vectors[which][:, None, None, :], vectors[rival]
    own = (pixel * mine).sum(-1) / (mine**2).sum(-1)
    # Two inks in one pixel: their two coverages are two unknowns in two equations, unless the colours are alike or opposite.
    cross = mine[..., 0] * theirs[..., 1] - mine[..., 1] * theirs[..., 0]
    plain = np.abs(cross) > 0.35 * np.linalg.norm(mine, axis=-1) * np.linalg.norm(theirs, axis=-1)
    safe = np.where(plain, cross, 1)
    mixed = (pixel[..., 0] * theirs[..., 1] - pixel[..., 1] * theirs[..., 0]) / safe
    share = (mine[..., 0] * pixel[..., 1] - mine[..., 1] * pixel[..., 0]) / safe
    foreign = (nearest != me) & (nearest > 0)
    blurred = np.where(foreign, 0, own.clip(0, 1)), np.where(foreign, 1, 0.5)
    meets = rival > 0
    own = np.where(meets, np.where(plain, mixed, blurred[0]), own)
    others = np.where(meets, np.where(plain, share, blurred[1]), 0)
    own, others = own.clip(-0.3, 1.3).astype(np.float32), others.clip(0, 1).astype(np.float32)
    return Patch(own, others, exists, (nearest == me) & exists)


def _part(chroma: Floats, labels: Ints, colors: Ints, fits: dict[int, _Fit]) -> tuple[Ints, dict[int, _Fit]]:
    """Objects of one colour that touch are one component, which no shape fits: cut it at its necks, and keep the parts
    where they fit much better. Returns the colours with those of the parts, and the fits of what remains.

    A single malformed object is also fitted better in parts, so the cut must be short and every part have a shape.
    """
    trial, trial_colors, cuts = labels.copy(), list(colors), {}
    for label, fit in fits.items():
        seen = labels[fit.picture] == label
        if fit.score < _GOOD and (parts := _cut(seen)) is not None:
            names = np.arange(parts.max()) + len(trial_colors)
            trial[fit.picture][seen] = names[parts[seen] - 1]
            trial_colors += [colors[label]] * len(names)
            cuts[label] = names
    if not cuts:
        return colors, fits
    new = np.array(trial_colors, np.int32)
    parted = _fit(chroma, trial, new, np.concatenate(list(cuts.values())))
    kept = dict(fits)
    for label, names in cuts.items():
        pieces = {int(name): parted[name] for name in names}
        total = sum(piece.ink for piece in pieces.values())
        together = sum(piece.score * piece.ink for piece in pieces.values()) / total
        if min(piece.score for piece in pieces.values()) >= _PART and together > fits[label].score + _GAIN:
            del kept[label]
            kept |= pieces
    return new, kept


def _cut(seen: Bools) -> Ints | None:
    """A component (H, W) cut into parts 1, 2, ... at its necks (0 elsewhere); None where it has none.

    It is worn from its sides until it falls apart; each pixel goes to the nearest of the pieces that are left.
    """
    depth = ndimage.distance_transform_edt(np.pad(seen, 1))[1:-1, 1:-1]
    for worn in np.arange(1, depth.max(), 0.5):
        cores, _ = ndimage.label(depth > worn)
        large = np.bincount(cores.ravel()) >= _CORE
        large[0] = False
        cores, number = (np.cumsum(large) * large)[cores], int(large.sum())
        if number > 1:
            break
    else:
        return None
    nearest = ndimage.distance_transform_edt(cores == 0, return_distances=False, return_indices=True)
    parts = np.where(seen, cores[tuple(nearest)], 0).astype(np.int32)
    smallest = np.bincount(parts[seen])[1:].min()
    beside = (parts[1:], parts[:-1]), (parts[:, 1:], parts[:, :-1])
    seam = sum(((a != b) & (a > 0) & (b > 0)).sum() for a, b in beside)
    return parts if smallest >= _SPECK and seam <= _NECK * (number - 1) * np.sqrt(smallest) else None
