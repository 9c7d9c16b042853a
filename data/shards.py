"""Token shards in Megatron's `.bin/.idx` format, memory-mapped: nothing is read until a row needs it.

The index, little-endian (Megatron-LM `IndexedDataset`, version 1):

    9 bytes   b"MMIDIDX\\0\\0"
    uint64    version, 1
    uint8     code of the tokens' dtype
    uint64    number of sequences S
    uint64    length of the document index, number of documents + 1
    int32[S]  tokens per sequence
    int64[S]  byte offset of each sequence in the .bin
    int64[.]  sequence at which each document begins, and S
    int8[S]   optional modes (multimodal), ignored

The `.bin` holds the tokens of all sequences, one after another.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}


def dtype_for(vocab_size: int) -> type[np.integer]:
    """Megatron's choice: two bytes per token while they suffice."""
    return np.uint16 if vocab_size < 65500 else np.int32


class ShardWriter:
    """Writes one shard, a document at a time, to `prefix`.bin and `prefix`.idx."""

    def __init__(self, prefix: Path, dtype: type[np.integer]) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.sizes: list[int] = []
        self.n_tokens = 0
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._file = bin_path(prefix).open("wb")

    def add(self, ids: NDArray[np.integer]) -> None:
        """ids: (N,) tokens of one document, begin and end included."""
        self._file.write(ids.astype(self.dtype, copy=False).tobytes())
        self.sizes.append(len(ids))
        self.n_tokens += len(ids)

    def close(self) -> None:
        """Writes the index; both files are on the disk when it returns."""
        _sync_close(self._file)
        code = next(code for code, dtype in _DTYPES.items() if np.dtype(dtype) == self.dtype)
        sizes = np.asarray(self.sizes, "<i4")
        pointers = np.zeros(len(sizes), "<i8")
        np.cumsum(sizes[:-1], out=pointers[1:])
        with idx_path(self.prefix).open("wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, code, len(sizes), len(sizes) + 1))
            file.write(sizes.tobytes())
            file.write((pointers * self.dtype.itemsize).tobytes())
            file.write(np.arange(len(sizes) + 1, dtype="<i8").tobytes())
            _sync_close(file)

    def abort(self) -> None:
        self._file.close()


class Shard:
    """A shard opened for reading. Opening maps the files and reads the header and three numbers, whatever the size.

    Raises InputError where sizes do not fit: missing, foreign, truncated or overlong files.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = Path(prefix)
        index, tokens = idx_path(self.prefix), bin_path(self.prefix)
        for path in (index, tokens):
            if not path.is_file():
                raise InputError(f"{path}: no such token shard (expected a pair {self.prefix.name}.bin/.idx)")
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise InputError(f"{index}: not a Megatron token index (it does not begin with MMIDIDX)")
        _, version, code, self.n_sequences, document_count = _HEADER.unpack(header)
        if version != 1:
            raise InputError(f"{index}: index version {version}, expected 1")
        if code not in _DTYPES:
            raise InputError(f"{index}: token dtype code {code}, expected one of {', '.join(map(str, _DTYPES))}")
        self.dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        self.n_documents = document_count - 1
        expected = _HEADER.size + 12 * self.n_sequences + 8 * document_count
        size = index.stat().st_size
        if size not in (expected, expected + self.n_sequences) or self.n_documents < 0:
            raise InputError(f"{index}: the index is damaged: {size:,} bytes, expected {expected:,}")
        if self.n_sequences == 0 or self.n_documents == 0:
            raise InputError(f"{index}: the shard holds no documents")
        # A plain array over the map: element access is cheap, and the operating system pages in what is touched.
        raw = np.memmap(index, np.uint8, "r").view(np.ndarray)
        start = _HEADER.size
        self._sizes = raw[start : start + 4 * self.n_sequences].view("<i4")
        start += 4 * self.n_sequences
        self._pointers = raw[start : start + 8 * self.n_sequences].view("<i8")
        start += 8 * self.n_sequences
        self._documents = raw[start : start + 8 * document_count].view("<i8")
        # Contiguous sequences end where the .bin ends: the one check that needs no reading.
        end = int(self._pointers[-1]) + int(self._sizes[-1]) * self.dtype.itemsize
        size = tokens.stat().st_size
        if size != end or int(self._pointers[0]) != 0 or int(self._documents[-1]) != self.n_sequences:
            raise InputError(f"{tokens}: the shard is damaged: {size:,} bytes, but its index ends at {end:,}")
        self.n_tokens = size // self.dtype.itemsize
        if self.n_tokens == 0:
            raise InputError(f"{tokens}: the shard holds no tokens")
        self.tokens = np.memmap(tokens, self.dtype, "r").view(np.ndarray)

    def document_start(self, document: int) -> int:
        """Token at which a document begins; n_tokens for document == n_documents."""
        sequence = int(self._documents[document])
        if sequence == self.n_sequences:
            return self.n_tokens
        return int(self._starts(np.array([sequence]))[0])

    def document_at(self, token: int) -> int:
        """The document that holds a token, in O(log n) touches (searchsorted would copy an unaligned map whole)."""
        sequence = bisect_right(self._pointers, token * self.dtype.itemsize) - 1
        return bisect_right(self._documents, sequence, hi=self.n_documents) - 1

    def document_starts(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens in [begin, end) at which a document begins, ascending."""
        first = self.document_at(begin)
        last = self.document_at(end - 1)
        starts = self._starts(self._documents[first : last + 1])
        return np.unique(starts[starts >= begin])

    def _starts(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens at which sequences begin. Raises InputError where a damaged index points outside of the shard."""
        inside = (sequences >= 0) & (sequences < self.n_sequences)
        starts = self._pointers[np.where(inside, sequences, 0)] // self.dtype.itemsize
        if not (inside & (starts >= 0) & (starts <= self.n_tokens)).all():
            raise InputError(f"{idx_path(self.prefix)}: the index is damaged: a document lies outside of the shard")
        return starts


def bin_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


def _sync_close(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
