"""Documents -> rows: the stream of all documents, cut into windows of T + 1 tokens that overlap by one.

Row r holds the tokens [r T, r T + T] of the stream: its first T are inputs, its last T labels. So every token but the
very first is the label of exactly one position; those that begin a document are masked, as nothing in another document
predicts them. The last row is filled up with padding. Nothing is held in memory but the mapped shards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from data.batch import IGNORE_LABEL, PADDING_DOCUMENT, Batch
from data.shards import Shard
from errors import InputError

IntArray = NDArray[np.int64]


class TokenStream:
    """Shards one after another as one array of tokens, or a range [begin, end) of it, read in pieces."""

    def __init__(self, shards: Sequence[Shard], begin: int = 0, end: int | None = None) -> None:
        self.shards = list(shards)
        self._offsets = [0, *accumulate(shard.n_tokens for shard in self.shards)]
        self.begin = begin
        self.end = self._offsets[-1] if end is None else end

    @property
    def n_tokens(self) -> int:
        return self.end - self.begin

    def tokens(self, begin: int, end: int) -> IntArray:
        """(end - begin,) tokens of the stream."""
        parts = [shard.tokens[low:high] for shard, low, high, _ in self._pieces(begin, end)]
        return np.concatenate(parts).astype(np.int64)

    def document_starts(self, begin: int, end: int) -> IntArray:
        """Positions in [begin, end) at which a document begins, ascending, relative to the stream."""
        parts = [shard.document_starts(low, high) + shift for shard, low, high, shift in self._pieces(begin, end)]
        return np.concatenate(parts)

    def document_boundary(self, token: int) -> int:
        """The document start at or before a position of the stream."""
        token += self.begin
        number = bisect_right(self._offsets, token) - 1
        shard = self.shards[number]
        offset = self._offsets[number]
        return shard.document_start(shard.document_at(token - offset)) + offset - self.begin

    def _pieces(self, begin: int, end: int) -> list[tuple[Shard, int, int, int]]:
        """(shard, from, to, what to add to a position of that shard) for a range of the stream."""
        begin, end = begin + self.begin, end + self.begin
        pieces = []
        number = bisect_right(self._offsets, begin) - 1
        while begin < end:
            offset, limit = self._offsets[number], self._offsets[number + 1]
            stop = min(end, limit)
            if begin < stop:
                pieces.append((self.shards[number], begin - offset, stop - offset, offset - self.begin))
                begin = stop
            number += 1
        return pieces


def count_rows(n_tokens: int, sequence_length: int) -> int:
    """Rows of a stream: enough for each token but the first to be a label once."""
    return max(0, -(-(n_tokens - 1) // sequence_length))


def pack_rows(
    stream: TokenStream, rows: IntArray, sequence_length: int
) -> tuple[IntArray, IntArray, NDArray[np.int32]]:
    """Tokens, labels and document ids, each (N, T), of the given rows (N,) of a stream."""
    T = sequence_length
    window = np.zeros((len(rows), T + 1), np.int64)
    is_start = np.zeros((len(rows), T + 1), bool)
    length = np.zeros((len(rows), 1), np.int64)
    for place, row in enumerate(rows.tolist()):
        begin, end = row * T, min(row * T + T + 1, stream.n_tokens)
        length[place] = end - begin
        window[place, : end - begin] = stream.tokens(begin, end)
        is_start[place, stream.document_starts(begin, end) - begin] = True
    padding = np.arange(T) >= length - 1
    labels = np.where(is_start[:, 1:] | padding, IGNORE_LABEL, window[:, 1:])
    is_start[:, 0] = False  # the first document of a row is 0, whether it begins here or goes on
    document_ids = is_start[:, :T].cumsum(axis=1, dtype=np.int32)
    document_ids[padding] = PADDING_DOCUMENT
    tokens = np.where(padding, 0, window[:, :T])
    return tokens, labels, document_ids


def to_batch(tokens: IntArray, labels: IntArray, document_ids: NDArray[np.int32], row_ids: IntArray) -> Batch:
    return Batch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in (tokens, labels, document_ids, row_ids)))


def check_ids(tokens: IntArray, labels: IntArray, vocab_size: int, name: str) -> None:
    """Raises InputError if a row holds an id that the tokenizer does not have (a shard of another tokenizer)."""
    largest, smallest = max(int(tokens.max()), int(labels.max())), int(tokens.min())
    if largest >= vocab_size or smallest < 0:
        found = largest if largest >= vocab_size else smallest
        raise InputError(f"{name}: token id {found}, but the tokenizer has {vocab_size} (another tokenizer's shards?)")
