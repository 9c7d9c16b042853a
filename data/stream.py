"""The rows that a run sees: training rows as a pure function of their index, validation rows always the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data.batch import Batch
from data.order import IntArray, Interleave, hash_key, permute
from data.packing import check_ids, row_maker, to_batch
from data.prepared import Prepared


class TrainStream:
    """Endless training rows. Row i of step s has the global index s * batch_rows + i; which text it holds is a pure
    function of (seed, global index): the same at any number of ranks and micro-batches, and after any resume.

    Every corpus is gone through once per epoch, each epoch in a new order; a mixture takes its rows in the exact
    proportion of the weights.
    """

    def __init__(self, prepared: Prepared, sequence_length: int, batch_rows: int, seed: int = 0) -> None:
        self.corpora = prepared.corpora
        self.sequence_length = sequence_length
        self.batch_rows = batch_rows
        self.vocab_size = prepared.tokenizer.vocab_size
        self._makers = [row_maker(corpus.train, sequence_length, corpus.label) for corpus in self.corpora]
        self.rows_per_epoch = [maker.n_rows for maker in self._makers]
        self._interleave = Interleave([corpus.weight for corpus in self.corpora])
        self._seed = seed

    def batch(self, step: int) -> Batch:
        """All rows of a step; each rank and micro-batch then works on its own."""
        first = step * self.batch_rows
        return self.rows(np.arange(first, first + self.batch_rows, dtype=np.int64))

    def rows(self, row_ids: IntArray) -> Batch:
        """The rows of given global indices (N,)."""
        corpus_of, row_of = self.locate(row_ids)
        T = self.sequence_length
        tokens, labels = np.empty((len(row_ids), T), np.int64), np.empty((len(row_ids), T), np.int64)
        document_ids = np.empty((len(row_ids), T), np.int32)
        for number in np.unique(corpus_of).tolist():
            place = np.flatnonzero(corpus_of == number)
            packed = self._makers[number](row_of[place])
            check_ids(packed[0], packed[1], self.vocab_size, self.corpora[number].label)
            tokens[place], labels[place], document_ids[place] = packed
        return to_batch(tokens, labels, document_ids, row_ids)

    def locate(self, row_ids: IntArray) -> tuple[IntArray, IntArray]:
        """Global indices (N,) -> corpus (N,), row of that corpus (N,)."""
        corpus_of, within = self._interleave(row_ids)
        row_of = np.empty_like(within)
        for number, n_rows in enumerate(self.rows_per_epoch):
            place = np.flatnonzero(corpus_of == number)
            epoch, position = np.divmod(within[place], n_rows)
            epochs, inverse = np.unique(epoch, return_inverse=True)
            keys = np.array([hash_key(self._seed, number, int(e)) for e in epochs], np.uint64)
            row_of[place] = permute(position, n_rows, keys[inverse])
        return corpus_of, row_of


def validation_batches(
    prepared: Prepared, sequence_length: int, batch_rows: int, max_rows: int | None = None
) -> Iterator[Batch]:
    """Held-out rows in a fixed order, the last batch smaller where they do not divide.

    max_rows takes that many, evenly spaced over all held-out text, from the corpora of a mixture by their weights.
    """
    makers = [row_maker(corpus.validation, sequence_length, corpus.label) for corpus in prepared.corpora]
    chosen = _choose_rows([maker.n_rows for maker in makers], [corpus.weight for corpus in prepared.corpora], max_rows)
    places = [(number, row) for number, rows in enumerate(chosen) for row in rows.tolist()]
    for start in range(0, len(places), batch_rows):
        part = places[start : start + batch_rows]
        packed = []
        for number, row in part:
            packed.append(makers[number](np.array([row])))
            check_ids(packed[-1][0], packed[-1][1], prepared.tokenizer.vocab_size, prepared.corpora[number].label)
        tokens, labels, document_ids = (np.concatenate(arrays) for arrays in zip(*packed))
        yield to_batch(tokens, labels, document_ids, np.arange(start, start + len(part), dtype=np.int64))


def _choose_rows(n_rows: list[int], weights: list[float], max_rows: int | None) -> list[IntArray]:
    total = sum(n_rows)
    if max_rows is None or max_rows >= total:
        return [np.arange(n, dtype=np.int64) for n in n_rows]
    chosen = []
    for n, weight in zip(n_rows, weights):
        wanted = min(n, max(1, int(max_rows * weight)))
        chosen.append(np.arange(wanted, dtype=np.int64) * n // wanted)
    return chosen
