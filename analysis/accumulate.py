"""Means over pieces of documents with bootstrap intervals over documents, in constant memory: the Poisson bootstrap.

Each document enters each of R replicates Poisson(1) times (Oza and Russell 2001; Chamandy et al. 2012), decided by
(seed, document) alone. So any two boundaries, families, models or runs that are measured on the same documents are
resampled together, and their differences have paired intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPLICATES = 400
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A number per boundary with its resampled twins.

    samples (1 + K, S): the estimate, then K replicates. method: bootstrap (percentiles), jackknife (one group of
    documents left out at a time, normal interval) or none.
    """

    samples: FloatArray
    method: str

    @property
    def value(self) -> FloatArray:
        """(S,)."""
        return self.samples[0]

    def interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Low and high ends, each (S,); NaN where there are no replicates."""
        n = len(self.samples) - 1
        if self.method == "none" or n < 2:
            nothing = np.full(self.value.shape, np.nan)
            return nothing, nothing
        if self.method == "bootstrap":
            with np.errstate(all="ignore"):
                low, high = _percentiles(self.samples[1:], [50 - 50 * level, 50 + 50 * level])
            return low, high
        from scipy.stats import t

        error = np.sqrt((n - 1) / n * ((self.samples[1:] - self.samples[1:].mean(0)) ** 2).sum(0))
        reach = float(t.ppf(0.5 + level / 2, n - 1)) * error
        return self.value - reach, self.value + reach

    def __sub__(self, other: Curve) -> Curve:
        """The paired difference: both must come from the same documents (the same number of replicates)."""
        if self.samples.shape[0] != other.samples.shape[0] or self.method != other.method:
            return Curve((self.samples[:1] - other.samples[:1]), "none")
        return Curve(self.samples - other.samples, self.method)

    def at(self, boundaries: Sequence[int]) -> Curve:
        """Some of its boundaries."""
        return Curve(self.samples[:, list(boundaries)], self.method)

    def mean(self) -> Curve:
        """The mean over its boundaries, as a curve of one."""
        return Curve(self.samples.mean(1, keepdims=True), self.method)

    def map(self, function: Callable[[FloatArray], FloatArray]) -> Curve:
        """function: (1 + K, S) -> (1 + K, S')."""
        return Curve(function(self.samples), self.method)


class DocumentMeans:
    """Streams numbers per piece into means over pieces. NaN: that piece has no such number.

    A document is one piece, or several where it was cut: each counts as much, and all of them are resampled together.
    shape: of one piece's numbers, such as (variants, boundaries, metrics).
    """

    def __init__(self, shape: Sequence[int], replicates: int = REPLICATES, seed: int = 0) -> None:
        self.replicates, self.seed = replicates, seed
        self.sums = np.zeros((1 + replicates, int(np.prod(shape))))
        self.weights = np.zeros_like(self.sums)
        self.shape = tuple(shape)
        self.n_documents = 0
        self._last: int | None = None

    def update(self, values: FloatArray, document_index: Sequence[int]) -> None:
        """values (N, *shape); document_index (N,): the identity of each piece's document. Pieces of one document are
        consecutive, over updates too."""
        flat = values.reshape(len(values), -1)
        weights = document_weights(document_index, self.replicates, self.seed)  # (1 + R, N)
        present = ~np.isnan(flat)
        self.sums += weights @ np.where(present, flat, 0.0)
        self.weights += weights @ present
        for document in document_index:
            self.n_documents += document != self._last
            self._last = document

    def means(self) -> FloatArray:
        """(1 + R, *shape): the estimate and its replicates; NaN where no piece had the number."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.weights > 0, self.sums / self.weights, np.nan).reshape(-1, *self.shape)


def document_weights(document_index: Sequence[int], replicates: int, seed: int) -> FloatArray:
    """(1 + R, N): ones, then how often each replicate holds each document. A pure function of (seed, document)."""
    columns = []
    for document in document_index:
        generator = np.random.Generator(np.random.Philox(key=[seed, int(document)]))
        columns.append(np.concatenate([[1.0], generator.poisson(1.0, replicates)]))
    return np.stack(columns, axis=1)


def _percentiles(samples: FloatArray, levels: list[float]) -> FloatArray:
    """Over axis 0; replicates that hold no document with the number (NaN) are left out."""
    missing = np.isnan(samples)
    if missing.all(0).any():
        some = ~missing.all(0)
        out = np.full((len(levels), *samples.shape[1:]), np.nan)
        out[:, some] = np.nanpercentile(samples[:, some], levels, axis=0)
        return out
    return np.nanpercentile(samples, levels, axis=0) if missing.any() else np.percentile(samples, levels, axis=0)
