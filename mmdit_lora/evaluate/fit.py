"""Shapes fitted to ink: which shape, in which box to a fraction of a pixel, covers the pixels in the way that is seen.

Every shape is drawn as the generator draws it, and the four sides of its box are moved by Gauss-Newton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from mmdit_lora.data.shapes import SHAPES, shape_coverage

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]

_CELLS = 32  # a side of a shape's drawing
_BLURS = (0.0, 0.5, 0.9)  # px, standard deviation: pictures from a VAE are not as sharp as drawn ones
_FIRST_BLUR = 1  # the index of the one that all shapes are tried under
_WEAK = 0.1  # weight of "no ink here" where another object's ink may hide ours


@dataclass(frozen=True)
class Patch:
    """Per object (n, P, Q): its coverage, the coverage by others, whether the pixel exists and is its own ground."""

    own: Floats
    others: Floats
    exists: Bools
    ground: Bools


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


def fit_patches(patch: Patch) -> tuple[Floats, Ints, Floats]:
    """Boxes (n, 4) in px of the patch, indices of shapes (n,), scores (n,)."""
    number = len(patch.own)
    # All shapes get a few steps; the best two are tried under every blur; those go on under the blur that fits.
    trial = _Trial(_first_boxes(patch), *np.broadcast_arrays(np.arange(len(SHAPES)), np.full((number, 1), _FIRST_BLUR)))
    trial, error = _adjust(patch, trial, steps=3)
    trial = trial.take(np.repeat(error.argsort(1)[:, :2], len(_BLURS), axis=1))
    trial, error = _adjust(patch, trial.under(np.tile(np.arange(len(_BLURS)), (number, 2))), steps=1)
    blur = error.argmin(1) % len(_BLURS)
    trial, error = _adjust(patch, trial.take(blur[:, None] + [0, len(_BLURS)]), steps=4)
    best = trial.take(error.argmin(1)[:, None])
    drawn = _draw(*best.flat(), patch.own.shape[1:])[0]
    seen = np.clip(drawn, patch.own, patch.own + patch.others)
    seen = np.where(seen < 0.12, 0, np.where(seen > 0.88, 1, seen))  # noise is no misfit
    both = (np.minimum(drawn, seen) * patch.exists).sum((1, 2))
    either = (np.maximum(drawn, seen) * patch.exists).sum((1, 2))
    return best.boxes[:, 0], best.shapes[:, 0].astype(np.int32), both / np.maximum(either, 1e-6)


def _adjust(patch: Patch, trial: _Trial, *, steps: int) -> tuple[_Trial, Floats]:
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


def _first_boxes(patch: Patch) -> Floats:
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
    """Per shape: its drawing's second differences (S, T+1, T+1), and mean and standard deviation (S, 2) of x and y in [0, 1]."""
    cells = _CELLS
    drawn = np.stack([shape_coverage(shape, (0, 0, cells, cells), cells) for shape in SHAPES])
    corners = np.diff(np.diff(np.pad(drawn, ((0, 0), (1, 1), (1, 1))), axis=1), axis=2)
    middle = (np.arange(cells) + 0.5) / cells
    weight = np.stack([drawn.sum(1), drawn.sum(2)], axis=1) / drawn.sum((1, 2))[:, None, None]  # (S, 2, T)
    mean = weight @ middle
    deviation = np.sqrt((weight * (middle - mean[..., None]) ** 2).sum(-1))
    return corners.astype(np.float32), mean.astype(np.float32), deviation.astype(np.float32)
