"""Coloured ink on grey: which pixels are one object, and which shape in which box drew them.

The backgrounds are grey, so a pixel's chroma (its colour less the grey in it) is the ink's chroma times the share of the
pixel that the ink covers: the direction names the colour, the length gives the coverage, whatever the background. Each
component of one colour is fitted with every shape, drawn with the same antialiasing, by Gauss-Newton on the four sides
of its box; the best fit gives the shape, and a box to a fraction of a pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from mmdit_lora.data.shapes import COLORS, SHAPES, shape_coverage

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

# An orthonormal basis of the plane across the grey axis.
_CHROMA = np.array([[1, -1, 0], [1, 1, -2]], np.float32).T / np.sqrt(np.array([2, 6], np.float32))
_PALETTE = np.array(list(COLORS.values()), np.float32) @ _CHROMA  # (C, 2)
_LONGEST = 128  # larger pictures are averaged down to at most this: the fit is finer than a pixel, so little is lost
_TINT = 30.0  # chroma below this may be a tinted background
_INK = 0.5  # coverage from which a pixel belongs to an object
_SPECK = 12.0  # px of ink; less is no object
_REACH = 3  # px around an object where its ink may still be found
_BLURS = (0.0, 0.5, 0.9)  # px, standard deviation: pictures from a VAE are not as sharp as drawn ones
_MIDDLE = 1
_TEMPLATE = 32  # cells a side of a shape's drawing
_WEAK = 0.1  # weight of "no ink here" where another object's ink may hide ours
_GOOD = 0.88  # a fit below this may be several objects of one colour that touch
_GAIN = 0.05  # by which the fits of the parts must beat that of the whole
_SHAPED = 0.6  # below this the ink has none of the shapes


@dataclass(frozen=True)
class Thing:
    """One object: the picture's index, its box relative to the picture, indices of its colour and its shape (None: no
    shape fits), its ink in px, and the soft IoU of its ink with the shape drawn into the box."""

    picture: int
    xyxy: tuple[float, float, float, float]
    color: int
    shape: int | None
    ink: float
    fit: float


def read(pictures: NDArray[np.uint8]) -> list[Thing]:
    """The objects of pictures of one size, (B, H, W, 3), largest first."""
    chroma = _chroma(pictures)
    labels, colors = _segment(chroma)
    fits = _fit(chroma, labels, colors, np.arange(1, len(colors)))
    for _ in range(2):  # two rounds part up to four objects
        poor = [label for label, fit in fits.items() if fit.score < _GOOD]
        labels, colors, fits, changed = _part(chroma, labels, colors, fits, poor)
        if not changed:
            break
    height, width = labels.shape[1:]
    things = []
    for label, fit in fits.items():
        left, top, right, bottom = np.clip(np.array(fit.box) / [width, height, width, height], 0, 1).tolist()
        if right > left and bottom > top:
            shape = fit.shape if fit.score >= _SHAPED else None
            things.append(Thing(fit.picture, (left, top, right, bottom), int(colors[label]), shape, fit.ink, fit.score))
    return sorted(things, key=lambda thing: -thing.ink)


def _chroma(pictures: NDArray[np.uint8]) -> Floats:
    """(B, H, W, 3) uint8 -> (B, h, w, 2): chroma less the background's tint; large pictures are averaged down."""
    step = -(-max(pictures.shape[1:3]) // _LONGEST)
    chroma = pictures.astype(np.float32) @ _CHROMA
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
    keep = (np.bincount(labels.ravel(), ink.ravel(), minlength=count) >= _SPECK) & ((core > 2) | (foreign < 0.4 * edges))
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
            boxes, shapes, scores = _fit_patches(patch)
            mask = spans[part][:, [2, 1, 2, 1], [0, 0, 1, 1]].astype(np.float32)
            boxes = np.where((scores >= _SHAPED)[:, None], boxes + np.tile(corner[:, ::-1], 2), mask)
            ink = np.where(patch.ground, np.clip(patch.own, 0, 1), 0).sum((1, 2))
            for i, label in enumerate(which[part]):
                box = tuple(boxes[i].tolist())
                out[int(label)] = _Fit(int(pictures[i]), box, int(shapes[i]), float(scores[i]), float(ink[i]))
    return {label: out[label] for label in map(int, which)}


@dataclass(frozen=True)
class _Patch:
    """Per object (n, P, Q): its coverage, the coverage by others, whether the pixel exists and is its own ground."""

    own: Floats
    others: Floats
    exists: Bools
    ground: Bools


def _patch(
    chroma: Floats, near: Ints, other: Ints, vectors: Floats, which: NDArray, pictures: NDArray, corner: NDArray, size: NDArray
) -> _Patch:
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
    return _Patch(own, others, exists, (nearest == me) & exists)


@cache
def _templates() -> tuple[Floats, Floats, Floats]:
    """Per shape: its drawing's second differences (S, T+1, T+1), and mean and standard deviation (S, 2) of x and y in [0, 1]."""
    cells = _TEMPLATE
    drawn = np.stack([shape_coverage(shape, (0, 0, cells, cells), cells) for shape in SHAPES])
    corners = np.diff(np.diff(np.pad(drawn, ((0, 0), (1, 1), (1, 1))), axis=1), axis=2)
    middle = (np.arange(cells) + 0.5) / cells
    weight = np.stack([drawn.sum(1), drawn.sum(2)], axis=1) / drawn.sum((1, 2))[:, None, None]  # (S, 2, T)
    mean = weight @ middle
    deviation = np.sqrt((weight * (middle - mean[..., None]) ** 2).sum(-1))
    return corners.astype(np.float32), mean.astype(np.float32), deviation.astype(np.float32)


def _fit_patches(patch: _Patch) -> tuple[Floats, Ints, Floats]:
    """Boxes (n, 4) in px of the patch, indices of shapes (n,), scores (n,)."""
    number = len(patch.own)
    # All shapes get a few steps; the best two are tried under every blur; those go on under the blur that fits.
    trial = _Trial(_first_boxes(patch), *np.broadcast_arrays(np.arange(len(SHAPES)), np.full((number, 1), _MIDDLE)))
    trial, error = _adjust(patch, trial, steps=3)
    trial = trial.take(np.repeat(error.argsort(1)[:, :2], len(_BLURS), axis=1))
    trial, error = _adjust(patch, trial.under(np.tile(np.arange(len(_BLURS)), (number, 2))), steps=1)
    blur = error.argmin(1) % len(_BLURS)
    trial, error = _adjust(patch, trial.take(blur[:, None] + [0, len(_BLURS)]), steps=4)
    best = trial.take(error.argmin(1)[:, None])
    drawn = _draw(*best.flat(), patch.own.shape[1:])[0]
    seen = np.clip(drawn, patch.own, patch.own + patch.others)
    seen = np.where(seen < 0.12, 0, np.where(seen > 0.88, 1, seen))  # noise is no misfit
    both, either = (np.where(patch.exists, pair, 0).sum((1, 2)) for pair in (np.minimum(drawn, seen), np.maximum(drawn, seen)))
    return best.boxes[:, 0], best.shapes[:, 0].astype(np.int32), both / np.maximum(either, 1e-6)


@dataclass(frozen=True)
class _Trial:
    """k trials for each of n objects: boxes (n, k, 4), indices of shapes (n, k) and of blurs (n, k)."""

    boxes: Floats
    shapes: NDArray
    blurs: NDArray

    def take(self, index: NDArray) -> _Trial:
        """The trials `index` (n, j) of each object."""
        row = np.arange(len(index))[:, None]
        return _Trial(self.boxes[row, index], self.shapes[row, index], self.blurs[row, index])

    def under(self, blurs: NDArray) -> _Trial:
        return _Trial(self.boxes, self.shapes, blurs)

    def flat(self) -> tuple[Floats, NDArray, NDArray]:
        return self.boxes.reshape(-1, 4), self.shapes.ravel(), self.blurs.ravel()


def _adjust(patch: _Patch, trial: _Trial, *, steps: int) -> tuple[_Trial, Floats]:
    """Gauss-Newton on the boxes of the trials: the trials, and the squared errors (n, k) of the boxes before the last step."""
    boxes, shapes, blurs = trial.flat()
    things = np.repeat(np.arange(len(trial.shapes)), trial.shapes.shape[1])
    own, others, exists = patch.own[things], patch.others[things], patch.exists[things].astype(np.float32)
    hidden = others > 0
    weak = _WEAK * (1 - others) * hidden * exists
    for _ in range(steps):
        drawn, slopes = _draw(boxes, shapes, blurs, own.shape[1:])
        # Under other ink ours is unknown: all from what is seen to what may be hidden fits, what is seen a little better.
        misfit = (np.clip(drawn, own, own + others) - drawn) * exists
        shy = (own - drawn) * weak
        firm = exists * ~(hidden & (misfit == 0)) + weak
        flat = slopes.reshape(len(boxes), 4, -1)
        normal = (flat * firm.reshape(len(boxes), 1, -1)) @ flat.swapaxes(-1, -2)
        force = flat @ (misfit + shy).reshape(len(boxes), -1, 1)
        damping = 0.05 + 0.005 * np.trace(normal, axis1=-2, axis2=-1)
        normal += np.eye(4, dtype=np.float32) * damping[:, None, None]
        boxes = boxes + np.linalg.solve(normal, force)[..., 0].clip(-1.5, 1.5)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 2)
    error = (misfit**2).sum((1, 2)) + (shy * (own - drawn)).sum((1, 2))
    return _Trial(boxes.reshape(trial.boxes.shape), trial.shapes, trial.blurs), error.reshape(trial.shapes.shape)


def _first_boxes(patch: _Patch) -> Floats:
    """(n, S, 4): per shape the box whose ink would have the mean and spread of the ink that is seen."""
    _, mean, deviation = _templates()
    ink = np.where(patch.ground & (patch.own > 0.2), patch.own, 0)
    moments = []
    for profile in (ink.sum(1), ink.sum(2)):  # along x, along y
        place = np.arange(profile.shape[1]) + 0.5
        share = profile / np.maximum(profile.sum(1, keepdims=True), 1e-6)
        middle = share @ place
        moments.append((middle, (share * (place - middle[:, None]) ** 2).sum(1)))
    centre, variance = np.array(moments).swapaxes(0, 1).swapaxes(1, 2)  # (n, 2) each
    spread = np.sqrt(np.maximum(variance - 1 / 12, 0.25))  # less what a pixel's own width adds
    sides = spread[:, None] / deviation
    start = centre[:, None] - mean * sides
    return np.concatenate([start, start + sides], axis=-1).astype(np.float32)


def _draw(boxes: Floats, shapes: NDArray, blurs: NDArray, size: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Shapes (m,) in boxes (m, 4): coverage (m, P, Q), exact for the drawing's cells, and its slopes (m, 4, P, Q) by the
    box's sides.

    A pixel's coverage is the sum of the cells' overlaps with it; by parts, of the drawing's second differences times how
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
    """How far each of a box's cell edges reaches into each pixel, (m, pixels, T+1) in [0, 1], and its slopes by start, end."""
    place = np.linspace(0, 1, _TEMPLATE + 1, dtype=np.float32)
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


def _part(
    chroma: Floats, labels: Ints, colors: Ints, fits: dict[int, _Fit], poor: list[int]
) -> tuple[Ints, Ints, dict[int, _Fit], bool]:
    """Objects of one colour that touch are one component, which no shape fits: try it as two, keep what fits better."""
    trial, trial_colors, pairs = labels.copy(), list(colors), {}
    for label in poor:
        y, x = np.nonzero(labels[fits[label].picture] == label)
        second = _halves(y, x)
        if min(second.sum(), (~second).sum()) < _SPECK:
            continue
        pairs[label] = (len(trial_colors), len(trial_colors) + 1)
        trial[fits[label].picture, y, x] = np.where(second, *pairs[label])
        trial_colors += [colors[label]] * 2
    if not pairs:
        return labels, colors, fits, False
    new = np.array(trial_colors, np.int32)
    parts = _fit(chroma, trial, new, np.array([piece for pair in pairs.values() for piece in pair]))
    fits = dict(fits)
    changed = False
    for label, pair in pairs.items():
        first, second = (parts[piece] for piece in pair)
        together = (first.score * first.ink + second.score * second.ink) / (first.ink + second.ink)
        if together > fits[label].score + _GAIN:
            del fits[label]
            fits |= {pair[0]: first, pair[1]: second}
            changed = True
        else:
            trial[np.isin(trial, pair)] = label
    return trial, new, fits, changed


def _halves(y: NDArray[np.intp], x: NDArray[np.intp]) -> Bools:
    """Two-means of pixels, started along their longest direction: which of them are in the second half."""
    points = np.stack([y, x], axis=1).astype(np.float64)
    centred = points - points.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    second = centred @ axes[:, -1] > 0
    for _ in range(8):
        if second.all() or not second.any():
            break
        distance = [((points - points[half].mean(0)) ** 2).sum(1) for half in (~second, second)]
        second = distance[1] < distance[0]
    return second
