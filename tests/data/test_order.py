from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.order import Interleave, hash_key, permute


def keys(key: int, count: int) -> np.ndarray:
    return np.full(count, hash_key(key), np.uint64)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**70))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    image = permute(np.arange(size), size, keys(key, size))
    assert sorted(image.tolist()) == list(range(size))


def test_permute_works_on_any_slice_and_beyond_32_bits() -> None:
    size = 10**15
    index = np.array([0, 1, 2, size - 1, 12345678901234])
    image = permute(index, size, keys(3, 5))
    assert len(set(image.tolist())) == 5 and image.min() >= 0 and image.max() < size
    for place in range(5):
        assert permute(index[place : place + 1], size, keys(3, 1)).tolist() == [image[place]]


@pytest.mark.parametrize("size", [5, 16, 37])
def test_every_place_is_equally_likely(size: int) -> None:
    """Over 4,000 keys the image of a fixed index, and the image of its neighbour given it, are uniform (chi-square)."""
    n = 4000
    key = np.array([hash_key(7, epoch) for epoch in range(n)], np.uint64)
    first = permute(np.full(n, 0), size, key)
    second = permute(np.full(n, 1), size, key)
    assert stats.chisquare(np.bincount(first, minlength=size)).pvalue > 1e-4
    step = (second - first) % size
    assert (step > 0).all()
    assert stats.chisquare(np.bincount(step, minlength=size)[1:]).pvalue > 1e-4


def test_epochs_and_seeds_are_different_orders() -> None:
    size = 1000
    orders = [permute(np.arange(size), size, keys(key, size)).tolist() for key in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    # a random permutation keeps about one place; ten would be a fault
    assert sum(a == b for a, b in zip(orders[0], orders[1])) < 10
    assert sum(b - a == 1 for a, b in zip(orders[0], orders[0][1:])) < 10


def test_hash_key_depends_on_every_number_and_their_order() -> None:
    assert len({int(hash_key(*numbers)) for numbers in [(0,), (1,), (0, 1), (1, 0), (0, 0), (0, 1, 0)]}) == 6


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=5), st.integers(0, 10**12))
def test_interleave_has_no_gaps_and_every_prefix_has_the_mixture(weights: list[float], start: int) -> None:
    interleave = Interleave(weights)
    corpus, within = interleave(np.arange(start, start + 2000))
    share = interleave.counts / interleave.counts.sum()
    assert np.abs(share - np.asarray(weights) / sum(weights)).max() <= 2e-4 * len(weights)
    for number in range(len(weights)):
        mine = within[corpus == number]
        assert (np.diff(mine) == 1).all()  # each row of a corpus's stream exactly once, in order
        if len(mine):  # as many before as the share says, to within the number of corpora
            first = start + int(np.flatnonzero(corpus == number)[0])
            assert abs(int(mine[0]) - first * share[number]) <= len(weights) + 1
        counts = np.cumsum(corpus == number)
        assert np.abs(counts - np.arange(1, 2001) * share[number]).max() <= 2 * (len(weights) + 1)


def test_interleave_is_exact_over_a_cycle_and_starts_at_zero() -> None:
    interleave = Interleave([0.7, 0.3])
    corpus, within = interleave(np.arange(10_000))
    assert np.bincount(corpus).tolist() == [7000, 3000]
    for number in (0, 1):
        assert within[corpus == number].tolist() == list(range([7000, 3000][number]))
    corpus, within = Interleave([1.0])(np.arange(5, 9))
    assert corpus.tolist() == [0] * 4 and within.tolist() == [5, 6, 7, 8]


def test_a_tiny_weight_is_not_lost() -> None:
    interleave = Interleave([1.0, 1e-7])
    assert interleave.counts.tolist() == [9999, 1]
