"""The order of rows as pure functions: which row comes at index i, without any state.

Everything is a function of integers, vectorised over numpy arrays, so that a run's data state is one number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

_MIXTURE_PERIOD = 10_000
_ROUNDS = 6


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood 2014): a bijection of 64-bit words that scatters every bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_key(*numbers: int) -> np.uint64:
    """One 64-bit key from several integers; order matters."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = mix64(key ^ mix64(np.array([number & 0xFFFFFFFFFFFFFFFF], np.uint64)))
    return key[0]


def permute(index: IntArray, size: int, keys: NDArray[np.uint64]) -> IntArray:
    """Image of each index under the pseudo-random permutation of range(size) that its key names.

    index, keys: (N,) -> (N,). A balanced Feistel network over the smallest even number of bits that holds `size`;
    values that fall outside walk on along their cycle until they are inside (Black and Rogaway 2002), which keeps it
    an exact permutation. O(1) memory whatever the size.
    """
    if size <= 1:
        return np.zeros_like(index)
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = index.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        left, right = result[pending] >> half, result[pending] & mask
        for number in range(_ROUNDS):
            scattered = mix64(right ^ mix64(keys[pending] + np.uint64(number)))
            left, right = right, left ^ (scattered & mask)
        result[pending] = (left << half) | right
        pending = pending[result[pending] >= np.uint64(size)]
    return result.astype(np.int64)


class Interleave:
    """Which corpus the row of a global index comes from, and how many rows of that corpus came before it.

    A fixed cycle of 10,000 rows holds each corpus by its share (largest remainder, at least one row each), spread as
    evenly as possible: the j-th of n rows stands at (j + 1/2) / n of the cycle. So every prefix has the right mixture
    to within a few rows, and any index is answered in O(1).
    """

    def __init__(self, weights: list[float]) -> None:
        counts = _apportion(np.asarray(weights, np.float64), _MIXTURE_PERIOD if len(weights) > 1 else 1)
        corpus = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(count) for count in counts])
        position = (rank + 0.5) / counts[corpus]
        order = np.lexsort((corpus, position))
        self.counts: IntArray = counts
        self._corpus: IntArray = corpus[order]
        self._rank: IntArray = rank[order]

    def __call__(self, index: IntArray) -> tuple[IntArray, IntArray]:
        """index: (N,) -> corpus (N,), index within that corpus's own endless stream of rows (N,)."""
        cycle, place = np.divmod(index, len(self._corpus))
        corpus = self._corpus[place]
        return corpus, cycle * self.counts[corpus] + self._rank[place]


def _apportion(weights: NDArray[np.float64], total: int) -> IntArray:
    """Integers that sum to total, in proportion to weights by largest remainder, none of them 0."""
    share = weights / weights.sum() * total
    counts = np.maximum(np.floor(share), 1).astype(np.int64)
    for place in np.argsort(-(share - np.floor(share)), kind="stable"):
        if counts.sum() >= total:
            break
        counts[place] += 1
    while counts.sum() > total:
        counts[np.argmax(counts)] -= 1
    return counts
