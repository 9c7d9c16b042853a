"""Documents -> rows.

Text (`pack_rows`): the stream of all documents, cut into windows of T + 1 tokens that overlap by one. Row r holds the
tokens [r T, r T + T] of the stream: its first T are inputs, its last T labels. So every token but the very first is the
label of exactly one position; those that begin a document are masked, as nothing in another document predicts them.
The last row is filled up with padding. Nothing is held in memory but the mapped shards.

Prompts and answers (`WholeDocuments`): as many documents as fit, none of them cut, since an answer without its prompt
teaches the wrong thing. A document of n tokens takes n - 1 positions, as its end token is only ever a label.
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

    def __init__(
        self, shards: Sequence[Shard], begin: int = 0, end: int | None = None, masks: Sequence[Shard] = ()
    ) -> None:
        """masks: shards of the same shape that hold 1 where a token is learned; none = all tokens are."""
        self.shards = list(shards)
        self.masks = list(masks)
        self._offsets = [0, *accumulate(shard.n_tokens for shard in self.shards)]
        self.begin = begin
        self.end = self._offsets[-1] if end is None else end

    @property
    def n_tokens(self) -> int:
        return self.end - self.begin

    @property
    def has_answers(self) -> bool:
        """Whether some tokens are only read: documents are prompts and answers."""
        return bool(self.masks)

    def tokens(self, begin: int, end: int) -> IntArray:
        """(end - begin,) tokens of the stream."""
        parts = [self.shards[number].tokens[low:high] for number, low, high, _ in self._pieces(begin, end)]
        return np.concatenate(parts).astype(np.int64)

    def loss_mask(self, begin: int, end: int) -> NDArray[np.bool_]:
        """(end - begin,) whether a token is learned."""
        if not self.masks:
            return np.ones(end - begin, bool)
        parts = [self.masks[number].tokens[low:high] for number, low, high, _ in self._pieces(begin, end)]
        return np.concatenate(parts) > 0

    def document_starts(self, begin: int, end: int) -> IntArray:
        """Positions in [begin, end) at which a document begins, ascending, relative to the stream."""
        pieces = self._pieces(begin, end)
        return np.concatenate([self.shards[number].document_starts(low, high) + by for number, low, high, by in pieces])

    def document_bounds(self) -> tuple[IntArray, IntArray]:
        """Where each document begins and ends (exclusive), relative to the stream."""
        starts = self.document_starts(0, self.n_tokens)
        return starts, np.append(starts[1:], self.n_tokens)

    def document_boundary(self, token: int) -> int:
        """The document start at or before a position of the stream."""
        token += self.begin
        number = bisect_right(self._offsets, token) - 1
        shard = self.shards[number]
        offset = self._offsets[number]
        return shard.document_start(shard.document_at(token - offset)) + offset - self.begin

    def _pieces(self, begin: int, end: int) -> list[tuple[int, int, int, int]]:
        """(number of a shard, from, to, what to add to a position of it) for a range of the stream."""
        begin, end = begin + self.begin, end + self.begin
        pieces = []
        number = bisect_right(self._offsets, begin) - 1
        while begin < end:
            offset, limit = self._offsets[number], self._offsets[number + 1]
            stop = min(end, limit)
            if begin < stop:
                pieces.append((number, begin - offset, stop - offset, offset - self.begin))
                begin = stop
            number += 1
        return pieces


Packed = tuple[IntArray, IntArray, NDArray[np.int32]]


class Windows:
    """Rows of text: windows of the stream."""

    def __init__(self, stream: TokenStream, sequence_length: int) -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.n_rows = count_rows(stream.n_tokens, sequence_length)

    def __call__(self, rows: IntArray) -> Packed:
        """Tokens, labels and document ids, each (N, T), of the given rows (N,)."""
        return pack_rows(self.stream, rows, self.sequence_length)


class WholeDocuments:
    """Rows of whole documents: each row takes the next ones while they fit, in the order of the stream.

    Raises InputError if one is longer than a row.
    """

    def __init__(self, stream: TokenStream, sequence_length: int, name: str = "data") -> None:
        self.stream, self.sequence_length = stream, sequence_length
        self.begins, self.ends = stream.document_bounds()
        sizes = self.ends - self.begins - 1
        if len(sizes) and sizes.max() > sequence_length:
            raise InputError(
                f"data.sequence_length: expected at least {sizes.max()}, got {sequence_length}: {name} holds a "
                "document of that many tokens, and a prompt is never cut from its answer"
            )
        firsts: list[int] = []
        room = 0
        for number, size in enumerate(sizes.tolist()):
            if size > room or not firsts:
                firsts.append(number)
                room = sequence_length
            room -= size
        self._firsts = np.array([*firsts, len(sizes)], np.int64)
        self.n_rows = len(firsts)

    def __call__(self, rows: IntArray) -> Packed:
        """Tokens, labels and document ids, each (N, T), of the given rows (N,)."""
        shape = (len(rows), self.sequence_length)
        tokens, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE_LABEL, np.int64)
        document_ids = np.full(shape, PADDING_DOCUMENT, np.int32)
        for place, row in enumerate(rows.tolist()):
            column = 0
            for number, document in enumerate(range(self._firsts[row], self._firsts[row + 1])):
                begin, end = int(self.begins[document]), int(self.ends[document])
                ids, learned = self.stream.tokens(begin, end), self.stream.loss_mask(begin, end)
                positions = slice(column, column + len(ids) - 1)
                tokens[place, positions] = ids[:-1]
                labels[place, positions] = np.where(learned[1:], ids[1:], IGNORE_LABEL)
                document_ids[place, positions] = number
                column = positions.stop
        return tokens, labels, document_ids


def row_maker(stream: TokenStream, sequence_length: int, name: str) -> Windows | WholeDocuments:
    """The rows of a split: `n_rows`, and a function of their numbers."""
    if stream.has_answers:
        return WholeDocuments(stream, sequence_length, name)
    return Windows(stream, sequence_length)


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
