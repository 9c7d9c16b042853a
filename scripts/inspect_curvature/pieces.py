"""Pieces: documents cut into windows of at most N tokens, which the models are measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.documents import find_files, read_file
from data.packing import TokenStream
from data.prepared import Prepared, open_prepared
from data.tokenizer import Tokenizer
from errors import InputError

# Fewer tokens have no pair of neighbouring turns, and no span.
MIN_TOKENS = 4
SPLITS = ("validation", "train")
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Piece:
    """tokens (n,); document: number of the document it was cut from, which is resampled as a whole; offset in it."""

    tokens: IntArray
    document: int
    offset: int

    @property
    def identity(self) -> int:
        """Decides its triples, spans and shuffle."""
        return (self.document << 24) + self.offset


@dataclass(frozen=True)
class PieceBatch:
    """tokens (N, T) padded with 0, lengths (N,), documents (N,), identities (N,), all int64."""

    tokens: Tensor
    lengths: Tensor
    documents: Tensor
    identities: Tensor


@dataclass(frozen=True)
class Pieces:
    """What is measured. source: one line for people. decode: text of ids. notes: lines that must be seen."""

    items: list[Piece]
    source: str
    decode: Callable[[list[int]], str] | None
    vocab_size: int
    tokenizer_sha256: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def n_documents(self) -> int:
        return len({piece.document for piece in self.items})

    @property
    def n_tokens(self) -> int:
        return sum(len(piece.tokens) for piece in self.items)

    @property
    def longest(self) -> int:
        return max(len(piece.tokens) for piece in self.items)

    def at_least(self, n_tokens: int) -> Pieces:
        """Those with so many tokens. Raises InputError if there is none."""
        items = [piece for piece in self.items if len(piece.tokens) >= n_tokens]
        if not items:
            raise InputError(f"--skip-first: {self.source}: no piece has {n_tokens} tokens")
        return replace(self, items=items)

    def spread(self, n: int) -> Pieces:
        """n of them, evenly spaced; identities stay."""
        return replace(self, items=evenly(self.items, n))

    def batches(self, max_tokens: int) -> Iterator[PieceBatch]:
        """In order; N x T is at most max_tokens (or one piece)."""
        start = 0
        while start < len(self.items):
            stop, longest = start, 0
            while stop < len(self.items):
                longest = max(longest, len(self.items[stop].tokens))
                if stop > start and longest * (stop + 1 - start) > max_tokens:
                    break
                stop += 1
            part = self.items[start:stop]
            lengths = torch.tensor([len(piece.tokens) for piece in part])
            tokens = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64)
            for row, piece in enumerate(part):
                tokens[row, : len(piece.tokens)] = torch.from_numpy(piece.tokens)
            documents = torch.tensor([piece.document for piece in part])
            yield PieceBatch(tokens, lengths, documents, torch.tensor([piece.identity for piece in part]))
            start = stop


def evenly(items: list[Piece], n: int) -> list[Piece]:
    """n of a list, evenly spaced; all if there are no more."""
    return items if n >= len(items) else [items[i * len(items) // n] for i in range(n)]


def from_prepared(prepared: Prepared, split: str, max_tokens: int, n_pieces: int) -> Pieces:
    """Pieces of a split of a prepared corpus. Raises InputError if it has no document of MIN_TOKENS."""
    documents: list[tuple[TokenStream, int, int]] = []
    for corpus in prepared.corpora:
        stream: TokenStream = getattr(corpus, split)
        if stream.n_tokens:
            starts = [*stream.document_starts(0, stream.n_tokens).tolist(), stream.n_tokens]
            documents += [(stream, begin, end) for begin, end in pairwise(starts)]
    places = [
        (number, begin, offset, min(begin + offset + max_tokens, end))
        for number, (_, begin, end) in enumerate(documents)
        for offset in range(0, end - begin, max_tokens)
    ]
    what = f"{'held-out' if split == 'validation' else 'training'} documents of {prepared.name}"
    chosen = _choose([end - begin - offset for _, begin, offset, end in places], len(documents), n_pieces, what)
    items = []
    for number, begin, offset, end in (places[i] for i in chosen):
        items.append(Piece(documents[number][0].tokens(begin + offset, end), number, offset))
    tokenizer = prepared.tokenizer
    return Pieces(items, what, tokenizer.decode, tokenizer.vocab_size, tokenizer.sha256)


def from_files(names: list[str], tokenizer: Tokenizer, text_field: str, max_tokens: int, n_pieces: int) -> Pieces:
    """Pieces of text files (txt, jsonl, parquet, folders, globs), tokenised as in training: begin, text, end."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    documents = (
        document.text for path in find_files(tuple(names), "--data") for document in read_file(path, text_field)
    )
    encoded = [np.array([*begin, *tokenizer.encode(text), tokenizer.eos_id], np.int64) for text in documents]
    return from_tokens(
        encoded,
        f"documents of {', '.join(names)}",
        tokenizer.decode,
        tokenizer.vocab_size,
        max_tokens,
        n_pieces,
        tokenizer.sha256,
    )


def from_tokens(
    documents: list[IntArray],
    source: str,
    decode: Callable[[list[int]], str] | None,
    vocab_size: int,
    max_tokens: int,
    n_pieces: int,
    tokenizer_sha256: str | None = None,
) -> Pieces:
    """Cuts tokenised documents into pieces."""
    windows = [
        Piece(tokens[offset : offset + max_tokens], number, offset)
        for number, tokens in enumerate(documents)
        for offset in range(0, len(tokens), max_tokens)
    ]
    chosen = _choose([len(piece.tokens) for piece in windows], len(documents), n_pieces, source)
    return Pieces([windows[i] for i in chosen], source, decode, vocab_size, tokenizer_sha256)


def choose_data(
    names: list[str],
    trained_on: Callable[[], Prepared],
    prepared: Callable[[], Prepared],
    tokenizer_sha256: str | None,
    max_tokens: int,
    n_pieces: int,
) -> Pieces:
    """--data: validation (default) or train, a prepared folder, or text files. trained_on: the run's own corpus, whose
    splits are those of its training; prepared: what its config gives today, for the tokenizer.

    Raises InputError: a prepared corpus of another tokenizer than the model's, nothing to read, nothing long enough,
    something beside a split.
    """
    if names and names[0] in SPLITS and len(names) > 1:
        raise InputError(f"--data: {names[0]} is the run's own corpus, {names[1]} would not be read; give one of them")
    if not names or names[0] in SPLITS:
        corpus, split = trained_on(), names[0] if names else "validation"
    elif len(names) == 1 and (Path(names[0]) / "manifest.json").is_file():
        corpus, split = open_prepared(names[0]), "validation"
    else:
        corpus = prepared()
        _check_tokenizer(corpus.tokenizer, tokenizer_sha256, corpus.name)
        text_field = corpus.manifest["config"].get("text_field", "text")
        return from_files(names, corpus.tokenizer, text_field, max_tokens, n_pieces)
    _check_tokenizer(corpus.tokenizer, tokenizer_sha256, corpus.name)
    return from_prepared(corpus, split, max_tokens, n_pieces)


def _check_tokenizer(tokenizer: Tokenizer, expected: str | None, name: str) -> None:
    if expected is not None and tokenizer.sha256 != expected:
        raise InputError(
            f"--data: {name} is of tokenizer {tokenizer.sha256[:12]}, the model of {expected[:12]}; "
            "give text files, or a corpus of the model's tokenizer"
        )


def _choose(lengths: list[int], n_documents: int, n_pieces: int, source: str) -> list[int]:
    if n_documents == 0:
        raise InputError(f"--data: {source}: no documents")
    usable = [index for index, length in enumerate(lengths) if length >= MIN_TOKENS]
    if not usable:
        raise InputError(f"--data: {source}: every document is shorter than {MIN_TOKENS} tokens")
    return usable if n_pieces >= len(usable) else [usable[i * len(usable) // n_pieces] for i in range(n_pieces)]
