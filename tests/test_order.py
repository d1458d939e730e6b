"""The order of an epoch: a permutation for every (seed, epoch), mixed in windows of blocks; and reading ahead in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdit_lora.data.sampler import epoch_order, seeded

blocks_of = st.lists(st.integers(0, 9), min_size=1, max_size=20).filter(lambda sizes: sum(sizes) > 0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 99), st.integers(1, 500))
@settings(max_examples=50, deadline=None)
def test_without_blocks_it_is_the_plain_permutation(seed: int, epoch: int, count: int) -> None:
    order = epoch_order(seed, epoch, count)
    assert order.tolist() == torch.randperm(count, generator=seeded("order", seed, epoch)).tolist()
    assert order.element_size() <= 8


@given(st.integers(0, 2**32 - 1), st.integers(0, 9), blocks_of, st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_every_record_comes_once_and_the_slices_of_ranks_are_everything(
    seed: int, epoch: int, blocks: list[int], window: int, ranks: int
) -> None:
    count = sum(blocks)
    order = epoch_order(seed, epoch, count, tuple(blocks), window).tolist()
    assert sorted(order) == list(range(count))
    slices = [order[rank::ranks] for rank in range(ranks)]
    assert sorted(index for part in slices for index in part) == list(range(count))
    epoch_order.cache_clear()
    assert epoch_order(seed, epoch, count, tuple(blocks), window).tolist() == order


@given(st.integers(0, 2**32 - 1), blocks_of, st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_not_more_than_a_window_of_blocks_is_open_at_once(seed: int, blocks: list[int], window: int) -> None:
    block_of = [number for number, size in enumerate(blocks) for _ in range(size)]
    visited = [block_of[index] for index in epoch_order(seed, 0, sum(blocks), tuple(blocks), window).tolist()]
    first = {block: visited.index(block) for block in set(visited)}
    last = {block: len(visited) - 1 - visited[::-1].index(block) for block in set(visited)}
    for place in range(len(visited)):
        assert sum(first[block] <= place <= last[block] for block in first) <= window


def test_blocks_are_mixed_and_epochs_and_seeds_differ() -> None:
    blocks = (50,) * 20
    one = epoch_order(0, 0, 1000, blocks, 4).tolist()
    assert one != epoch_order(0, 1, 1000, blocks, 4).tolist()
    assert one != epoch_order(1, 0, 1000, blocks, 4).tolist()
    opening = {index // 50 for index in one[:200]}
    assert len(opening) == 4
    assert opening != {0, 1, 2, 3}
    assert len({index // 50 for index in one[:20]}) > 1  # within the window, records of several blocks


def test_blocks_that_hold_another_number_of_records_are_refused() -> None:
    with pytest.raises(ValueError, match="for 11 records"):
        epoch_order(0, 0, 11, (5, 5))
