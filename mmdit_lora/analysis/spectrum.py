"""Spectra of weight updates, and what the LoRA paper (arXiv 2106.09685, section 7) measured on them.

Shape letters: m outputs and n inputs of a linear, r the rank, k directions. W is (m, n); an update is B A with B (m, r) and
A (r, n). Everything is computed in fp64 from the factors; the (m, n) product is never made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

DENSE = 512  # up to this smaller side the whole spectrum of a matrix is computed, above it the top alone, by Lanczos
NEGLIGIBLE = 1e-6  # singular values below this share of the largest are rounding: of a low rank stored at a higher one


@dataclass(frozen=True)
class Directions:
    """The largest singular values with their directions: `left` (m, k), `values` (k,) falling, `right` (n, k)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def first(self, count: int) -> Directions:
        """The `count` largest."""
        return Directions(self.left[:, :count], self.values[:count], self.right[:, :count])

    @property
    def rank(self) -> int:
        """How many values are more than rounding; 0 of a zero update."""
        return int((self.values > NEGLIGIBLE * self.values[:1]).sum()) if len(self.values) else 0


def of_product(up: Tensor, down: Tensor) -> Directions:
    """The whole SVD of `up @ down`, (m, r) and (r, n), through QR of both factors: r values."""
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T)
    count = len(values)  # min(m, n, r)
    return Directions(q_up @ left[:, :count], values, q_down @ right[:count].T)


def top(matrix: Tensor, count: int) -> Directions:
    """The `count` largest singular values of an (m, n) matrix and their directions.

    Exact up to a smaller side of 512; beyond it ARPACK's (scipy's `svds`), to the precision of fp32, from a fixed start.
    """
    matrix = matrix.detach().cpu()
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= DENSE or count == min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return Directions(left[:, :count], values[:count], right[:count].T)
    array = matrix.float().numpy()
    if not array.any():  # Lanczos has nothing to start from
        zero = [torch.zeros(side, count, dtype=torch.float64) for side in array.shape]
        return Directions(zero[0], torch.zeros(count, dtype=torch.float64), zero[1])
    start = np.random.default_rng(0).standard_normal(min(array.shape)).astype(array.dtype)
    left, values, right = (torch.from_numpy(part.copy()).double() for part in svds(array, k=count, v0=start))
    order = values.argsort(descending=True)
    return Directions(left[:, order], values[order], right[order].T)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values taken as shares (Roy and Vetterli, "The effective rank", EUSIPCO 2007).

    Between 1 and the number of values; 0 where all are 0.
    """
    if not values.any():
        return 0.0
    shares = values.double() / values.double().sum()
    return math.exp(torch.special.entr(shares).sum().item())


def stable_rank(values: Tensor) -> float:
    """||.||_F^2 / ||.||_2^2: at most the rank, and insensitive to small values; 0 where all are 0."""
    return (values.double() / values.max()).square().sum().item() if values.any() else 0.0


def rank_holding(values: Tensor, share: float) -> int:
    """The smallest number of the largest values that hold `share`, in (0, 1], of the energy (the sum of squares); 0 where
    all are 0. A share of 1 is met by leaving out rounding alone.
    """
    energy = values.double().sort(descending=True).values.square().cumsum(0)
    if not len(energy) or energy[-1] == 0:
        return 0
    wanted = min(share, 1 - NEGLIGIBLE**2) * energy[-1]
    return min(int((energy < wanted).sum()) + 1, len(energy))


def projected_norm(matrix: Tensor, left: Tensor, right: Tensor) -> float:
    """||U^T W V||_F of W (m, n), U (m, k), V (n, k): how much of W lies in these directions."""
    return torch.linalg.matrix_norm(left.double().T @ (matrix.to(left.device).double() @ right.double())).item()


def random_norm(matrix: Tensor, count: int) -> float:
    """||U^T W V||_F for random orthonormal U (m, k) and V (n, k), the root of the mean square over all of them.

    E ||U^T W V||_F^2 = k^2 ||W||_F^2 / (m n), since E U U^T = k / m I and E V V^T = k / n I.
    """
    rows, columns = matrix.shape
    return count * frobenius(matrix) / math.sqrt(rows * columns)


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """phi(A_1, A_2, i, j) = ||U_1^(i)T U_2^(j)||_F^2 / min(i, j), equation 4 of the LoRA paper.

    Args:
        first, second: (r_1, n) and (r_2, n): the matrices A of two adapters; U_1, U_2 hold their right singular directions.

    Returns:
        (k_1, k_2) in [0, 1], the ranks without those that are rounding; entry [i - 1, j - 1] compares the top i directions of
        the one with the top j of the other. Random directions give max(i, j) / n.
    """
    own = []
    for matrix in (first, second):
        _, values, rows = torch.linalg.svd(matrix.double(), full_matrices=False)
        own.append(rows[values > NEGLIGIBLE * values[:1]])
    return phi(*own)


def phi(one: Tensor, other: Tensor) -> Tensor:
    """The same of orthonormal rows, the strongest first: (k_1, n), (k_2, n) -> (k_1, k_2). 1 = one subspace holds the other,
    0 = they are orthogonal."""
    i, j = (torch.arange(1, len(rows) + 1) for rows in (one, other))
    return (one @ other.T).square().cumsum(0).cumsum(1) / torch.minimum(i[:, None], j[None, :])


def frobenius(matrix: Tensor) -> float:
    """||.||_F, summed in fp64."""
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
