"""The order of windows is a pure function of (seed, index)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fundamentallm_text.sampling import (
    GOLDEN,
    EpochWindows,
    EvenWindows,
    RandomWindows,
    Sampling,
    hash_indices,
    mix_bits,
    permute,
    share,
)

SEEDS = st.integers(0, 2**63 - 1)
COUNTS = st.integers(1, 5_000)


def _permutation(count: int, key: int) -> list[int]:
    index = np.arange(count, dtype=np.uint64)
    return [int(i) for i in permute(index, count, np.full(count, key, dtype=np.uint64))]


@given(count=COUNTS, key=SEEDS)
def test_every_key_gives_a_permutation_of_any_count(count: int, key: int) -> None:
    assert sorted(_permutation(count, key)) == list(range(count))


def test_all_permutations_of_four_are_about_equally_frequent() -> None:
    found = Counter(tuple(_permutation(4, key)) for key in range(2_400))
    assert len(found) == 24
    assert all(60 < times < 140 for times in found.values())


def test_neighbours_in_a_large_permutation_are_mapped_far_apart() -> None:
    count = 1_000_003
    gaps = np.abs(np.diff(np.array(_permutation(count, 7))))
    # Two uniform places are count / 3 apart on average.
    assert abs(gaps.mean() / count - 1 / 3) < 0.01


def test_the_hash_is_splitmix64() -> None:
    states = (np.arange(3, dtype=np.uint64) + np.uint64(1)) * GOLDEN
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(word) for word in mix_bits(states)] == published


def test_the_order_of_a_seed_never_changes() -> None:
    """Checkpoints rely on it: other numbers here break the resuming of every older run."""
    assert RandomWindows(1000, 8, 42).starts(0, 6).tolist() == [393, 279, 373, 14, 71, 835]
    assert EpochWindows(100, 8, 42).starts(9, 6).tolist() == [91, 3, 67, 26, 82, 50]


@given(seed=SEEDS, first=st.integers(0, 2**40), split=st.integers(0, 50))
def test_samples_do_not_depend_on_how_many_are_requested_at_once(
    seed: int, first: int, split: int
) -> None:
    orders: list[Sampling] = [RandomWindows(999, 10, seed), EpochWindows(999, 10, seed)]
    for sampling in orders:
        whole = sampling.starts(first, 50).tolist()
        parts = [*sampling.starts(first, split), *sampling.starts(first + split, 50 - split)]
        assert parts == whole


@given(seed=SEEDS, tokens=st.integers(2, 400), length=st.integers(1, 40), epoch=st.integers(0, 99))
def test_an_epoch_reads_each_window_once(seed: int, tokens: int, length: int, epoch: int) -> None:
    length = min(length, tokens - 1)
    sampling = EpochWindows(tokens, length, seed)
    starts = np.sort(sampling.starts(epoch * sampling.epoch_samples, sampling.epoch_samples))
    assert (np.diff(starts) == length).all()
    assert starts[0] >= 0
    assert starts[-1] + length + 1 <= tokens
    # What an epoch leaves out is less than a window.
    assert tokens - 1 - length * sampling.epoch_samples < length


def test_epochs_differ_in_order_and_in_where_windows_begin() -> None:
    sampling = EpochWindows(1000, 30, 5)
    epochs = [
        sampling.starts(e * sampling.epoch_samples, sampling.epoch_samples) for e in range(20)
    ]
    assert len({tuple(epoch % 30) for epoch in epochs}) > 1
    assert len({tuple(epoch // 30) for epoch in epochs}) == 20


@given(seed=SEEDS, tokens=st.integers(2, 400), first=st.integers(0, 2**40))
def test_random_windows_are_inside_the_tokens(seed: int, tokens: int, first: int) -> None:
    length = tokens // 2
    starts = RandomWindows(tokens, length, seed).starts(first, 64)
    assert (starts >= 0).all()
    assert (starts + length + 1 <= tokens).all()


def test_random_windows_are_uniform_and_reach_both_ends() -> None:
    found = np.bincount(RandomWindows(110, 10, 3).starts(0, 100_000), minlength=100)
    assert len(found) == 100
    assert found.min() > 850
    assert found.max() < 1150


def test_seeds_give_unrelated_orders() -> None:
    first = [int(hash_indices(seed, np.arange(1, dtype=np.uint64))[0]) for seed in range(1000)]
    assert len(set(first)) == 1000
    assert RandomWindows(10**6, 8, 1).starts(0, 9).tolist() != (
        RandomWindows(10**6, 8, 2).starts(0, 9).tolist()
    )


@given(tokens=st.integers(2, 400), length=st.integers(1, 40), wanted=st.integers(1, 60))
def test_validation_windows_are_spread_and_never_overlap(
    tokens: int, length: int, wanted: int
) -> None:
    length = min(length, tokens - 1)
    every = EvenWindows(tokens, length)
    some = EvenWindows(tokens, length, wanted)
    all_starts = every.starts(0, every.epoch_samples).tolist()
    starts = some.starts(0, some.epoch_samples).tolist()
    assert all_starts == list(range(0, tokens - length, length))
    assert len(starts) == min(wanted, len(all_starts))
    assert set(starts) <= set(all_starts)
    gaps = np.diff(starts)
    assert not len(gaps) or gaps.max() - gaps.min() <= length


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@given(size=st.integers(0, 100))
def test_the_shares_of_all_processes_are_a_partition(world_size: int, size: int) -> None:
    parts = [share(size, rank, world_size) for rank in range(world_size)]
    assert [i for begin, end in parts for i in range(begin, end)] == list(range(size))
    sizes = [end - begin for begin, end in parts]
    assert max(sizes) - min(sizes) <= 1
