"""The mathematics of `inspect` and `resize`, on matrices whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from mmdit_lora.analysis import spectrum


def orthonormal(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def test_the_svd_of_a_product_is_that_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator)
    found = spectrum.of_product(up, down)
    whole = up.double() @ down.double()
    assert torch.allclose((found.left * found.values) @ found.right.T, whole, atol=1e-12)
    assert torch.allclose(found.values, torch.linalg.svdvals(whole)[:6], atol=1e-12)
    assert found.rank == 6
    assert spectrum.of_product(up, torch.zeros_like(down)).rank == 0
    narrow = spectrum.of_product(up[:4], down)  # fewer outputs than ranks
    assert torch.allclose((narrow.left * narrow.values) @ narrow.right.T, whole[:4], atol=1e-12)


def test_large_matrices_are_not_decomposed_whole_and_give_the_same() -> None:
    side = spectrum.DENSE + 20
    matrix = torch.randn(side, side + 9, generator=torch.Generator().manual_seed(1))
    found, again = spectrum.top(matrix, 5), spectrum.top(matrix, 5)
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert torch.allclose(found.values, values[:5], rtol=1e-5)
    assert torch.allclose((found.left * left[:, :5]).sum(0).abs(), torch.ones(5, dtype=torch.float64), atol=1e-3)
    assert torch.allclose((found.right * right[:5].T).sum(0).abs(), torch.ones(5, dtype=torch.float64), atol=1e-3)
    assert torch.equal(found.values, again.values)
    assert spectrum.top(torch.zeros(side, side), 3).values.tolist() == [0, 0, 0]


def test_effective_and_stable_rank_by_hand() -> None:
    assert spectrum.effective_rank(torch.ones(7)) == pytest.approx(7)
    assert spectrum.effective_rank(torch.tensor([5.0, 0, 0])) == pytest.approx(1)
    # Shares 3/4 and 1/4.
    assert spectrum.effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    )
    assert spectrum.stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(6 / 4)
    assert spectrum.effective_rank(torch.zeros(3)) == spectrum.stable_rank(torch.zeros(3)) == 0


@pytest.mark.parametrize(
    ("share", "rank"), [(0.5, 1), (0.54, 2), (25 / 30, 2), (0.84, 3), (0.95, 3), (0.99, 4), (1.0, 4)]
)
def test_the_rank_that_holds_a_share(share: float, rank: int) -> None:
    values = torch.tensor([2.0, 4.0, 1.0, 3.0, 1e-9])  # squares 16, 9, 4, 1, in any order, and rounding
    assert spectrum.rank_holding(values, share) == rank
    assert spectrum.rank_holding(torch.zeros(4), share) == 0


def test_the_norm_in_random_directions_is_that_of_many_draws() -> None:
    matrix = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    drawn = [
        spectrum.projected_norm(matrix, orthonormal(20, 3, n), orthonormal(12, 3, 1000 + n)) ** 2 for n in range(400)
    ]
    assert math.sqrt(sum(drawn) / len(drawn)) == pytest.approx(spectrum.random_norm(matrix, 3), rel=0.05)
    own = spectrum.top(matrix, 3)
    assert spectrum.projected_norm(matrix, own.left, own.right) == pytest.approx(
        own.values.square().sum().sqrt().item()
    )


def test_similarity_of_the_same_of_apart_and_of_random_directions() -> None:
    rows = orthonormal(50, 8, 3).T
    scales = torch.arange(8, 0, -1, dtype=torch.float64)[:, None]
    one = spectrum.similarity(rows[:4] * scales[:4], orthonormal(4, 4, 4) @ (rows[:4] * scales[:4]))
    assert torch.allclose(one.diagonal(), torch.ones(4, dtype=torch.float64))  # a basis of its own changes nothing
    assert torch.allclose(one, torch.ones_like(one))
    assert spectrum.similarity(rows[:4], rows[4:]).abs().max() < 1e-12
    half = spectrum.similarity(rows[:4], rows[2:6])
    assert half[-1, -1].item() == pytest.approx(0.5)  # two of four directions are shared
    stored_too_high = torch.cat([rows[:4], 1e-9 * rows[4:]])
    assert spectrum.similarity(stored_too_high, rows).shape == (4, 8)
    random = [spectrum.similarity(orthonormal(50, 5, n).T, orthonormal(50, 3, 500 + n).T) for n in range(200)]
    expected = torch.maximum(torch.arange(1, 6)[:, None], torch.arange(1, 4)[None, :]) / 50
    assert torch.allclose(torch.stack(random).mean(0), expected.double(), rtol=0.25)
