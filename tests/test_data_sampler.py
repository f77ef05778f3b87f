"""The order of training blocks is a permutation that only a seed and an epoch determine."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from train.data.sampler import PermutationSampler, permute, round_keys


@pytest.mark.parametrize("num_blocks", [*range(1, 51), 1023, 1024, 1025, 65_536, 65_537, 100_003])
def test_every_block_comes_once(num_blocks: int) -> None:
    assert sorted(PermutationSampler(num_blocks, seed=7)) == list(range(num_blocks))


def test_a_position_beyond_32_bits_stays_in_range_and_apart() -> None:
    num_blocks = 3 * 2**40 + 1
    positions = np.arange(num_blocks - 1000, num_blocks)
    blocks = permute(positions, num_blocks, round_keys(0, 0))
    assert blocks.max() < num_blocks
    assert len(set(blocks.tolist())) == 1000


def test_seed_and_epoch_each_give_another_order() -> None:
    orders = {tuple(PermutationSampler(100, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


def test_set_epoch_gives_that_epochs_order() -> None:
    sampler = PermutationSampler(100, seed=3)
    sampler.set_epoch(2)
    assert list(sampler) == list(PermutationSampler(100, seed=3, epoch=2))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert list(PermutationSampler(10, seed=0)) == [0, 9, 7, 1, 2, 3, 8, 4, 6, 5]


def test_start_leaves_out_the_front_of_one_epoch_only() -> None:
    whole = list(PermutationSampler(200_000, seed=5, epoch=1))
    resumed = PermutationSampler(200_000, seed=5, epoch=1, start=70_001)
    resumed.set_epoch(1)
    assert list(resumed) == whole[70_001:]
    assert len(resumed) == 200_000 - 70_001
    resumed.set_epoch(2)
    assert len(resumed) == 200_000


def test_a_single_position_agrees_with_the_iteration() -> None:
    sampler = PermutationSampler(1000, seed=1)
    assert [sampler.permute(position) for position in range(1000)] == list(sampler)


def test_no_global_generator_is_moved() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(PermutationSampler(1000))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


def test_neighbours_are_spread_over_the_data() -> None:
    order = np.array(list(PermutationSampler(100_000, seed=0)))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_a_million_positions_take_less_than_a_few_seconds() -> None:
    started = time.perf_counter()
    assert sum(1 for _ in PermutationSampler(1_000_000)) == 1_000_000
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(("num_blocks", "start"), [(0, 0), (10, 11), (10, -1)])
def test_an_impossible_size_or_start_is_refused(num_blocks: int, start: int) -> None:
    with pytest.raises(ValueError, match=r"must be at least 1|is outside"):
        PermutationSampler(num_blocks, start=start)
