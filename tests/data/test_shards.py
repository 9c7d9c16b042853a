from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import TokenStream
from data.shards import Shard, ShardWriter, dtype_for
from errors import InputError

NUMPY = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


def read_independently(prefix: Path) -> tuple[list[list[int]], list[int]]:
    """Sequences and document index, byte by byte after Megatron-LM's description of the format."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", raw, 9) == (1,)
    (code,) = struct.unpack_from("<B", raw, 17)
    n_sequences, n_index = struct.unpack_from("<QQ", raw, 18)
    at = 34
    sizes = struct.unpack_from(f"<{n_sequences}i", raw, at)
    at += 4 * n_sequences
    pointers = struct.unpack_from(f"<{n_sequences}q", raw, at)
    at += 8 * n_sequences
    index = struct.unpack_from(f"<{n_index}q", raw, at)
    assert len(raw) == at + 8 * n_index
    tokens = Path(f"{prefix}.bin").read_bytes()
    width = np.dtype(NUMPY[code]).itemsize
    sequences = [
        np.frombuffer(tokens[start : start + size * width], NUMPY[code]).tolist()
        for start, size in zip(pointers, sizes)
    ]
    return sequences, list(index)


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 4, modes: bool = False, version: int = 1
) -> None:
    """Documents of sequences, written independently of the code under test."""
    sequences = [sequence for document in documents for sequence in document]
    dtype = np.dtype(NUMPY[code])
    sizes = [len(sequence) for sequence in sequences]
    pointers = [sum(sizes[:i]) * dtype.itemsize for i in range(len(sizes))]
    index = [sum(len(document) for document in documents[:i]) for i in range(len(documents) + 1)]
    Path(f"{prefix}.bin").write_bytes(b"".join(np.asarray(s, dtype).tobytes() for s in sequences))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", version, code, len(sizes), len(index))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(pointers)}q", *pointers)
        + struct.pack(f"<{len(index)}q", *index)
        + (bytes(len(sizes)) if modes else b"")
    )


def write(prefix: Path, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> Shard:
    writer = ShardWriter(prefix, dtype)
    for document in documents:
        writer.add(np.asarray(document, np.int32))
    writer.close()
    return Shard(prefix)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60000), min_size=1, max_size=9), min_size=1, max_size=9), st.booleans())
def test_written_shards_are_megatrons_format(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], wide: bool
) -> None:
    prefix = tmp_path_factory.mktemp("shard") / "a.b"  # a dot in the name is part of it
    shard = write(prefix, documents, np.int32 if wide else np.uint16)
    sequences, index = read_independently(prefix)
    assert sequences == documents
    assert index == list(range(len(documents) + 1))
    assert shard.tokens.tolist() == [token for document in documents for token in document]
    assert shard.n_documents == len(documents)
    starts = np.cumsum([0, *map(len, documents)])
    assert [shard.document_start(i) for i in range(len(documents) + 1)] == starts.tolist()


def test_two_bytes_per_token_while_they_suffice() -> None:
    assert dtype_for(4096) is np.uint16 and dtype_for(65499) is np.uint16 and dtype_for(65500) is np.int32


@pytest.mark.parametrize("code", sorted(NUMPY))
@pytest.mark.parametrize("modes", [False, True])
def test_foreign_shards_of_every_integer_type(tmp_path: Path, code: int, modes: bool) -> None:
    # several sequences per document, an empty sequence and an empty document among them
    documents: list[list[list[int]]] = [[[1, 2, 3], [4]], [[5, 6]], [[]], [], [[7], [], [8, 9]]]
    write_megatron(tmp_path / "x", documents, code, modes)
    shard = Shard(tmp_path / "x")
    assert shard.tokens.tolist() == list(range(1, 10))
    assert shard.document_starts(0, 9).tolist() == [0, 4, 6]
    assert shard.document_starts(1, 6).tolist() == [4]
    assert shard.document_starts(6, 9).tolist() == [6]
    assert [shard.document_start(shard.document_at(token)) for token in range(9)] == [0] * 4 + [4] * 2 + [6] * 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_stream_over_shards_is_one_array(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    counter, flat, starts, shards = 0, [], [], []
    for number, shard_lengths in enumerate(lengths):
        documents = []
        for length in shard_lengths:
            starts.append(counter)
            documents.append(list(range(counter, counter + length)))
            counter += length
        flat += [token for document in documents for token in document]
        shards.append(write(folder / str(number), documents))
    low = data.draw(st.sampled_from(starts))
    stream = TokenStream(shards, low)
    begin = data.draw(st.integers(low, counter - 1))
    end = data.draw(st.integers(begin + 1, counter))
    assert stream.n_tokens == counter - low
    assert stream.tokens(begin - low, end - low).tolist() == flat[begin:end]
    expected = [start - low for start in starts if begin <= start < end]
    assert stream.document_starts(begin - low, end - low).tolist() == expected
    assert stream.document_boundary(begin - low) == max(start for start in starts if start <= begin) - low


def test_damage_is_noticed_by_size(tmp_path: Path) -> None:
    documents = [[1, 2, 3], [4, 5]]
    prefix = tmp_path / "x"

    def damaged(kind: str, change: Callable[[bytes], bytes]) -> str:
        write(prefix, documents)
        path = tmp_path / f"x.{kind}"
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(InputError) as error:
            Shard(prefix)
        assert str(path) in str(error.value)
        return str(error.value)

    assert "10 bytes" not in damaged("bin", lambda raw: raw[:-1])
    assert "damaged: 12 bytes, but its index ends at 10" in damaged("bin", lambda raw: raw + b"xx")
    assert "damaged" in damaged("bin", lambda raw: b"")
    assert "not a Megatron token index" in damaged("idx", lambda raw: b"")
    assert "not a Megatron token index" in damaged("idx", lambda raw: b"X" + raw[1:])
    assert "damaged" in damaged("idx", lambda raw: raw[:-3])
    assert "version 2" in damaged("idx", lambda raw: raw[:9] + b"\x02" + raw[10:])
    assert "dtype code 7" in damaged("idx", lambda raw: raw[:17] + b"\x07" + raw[18:])
    for kind in ("bin", "idx"):
        write(prefix, documents)
        (tmp_path / f"x.{kind}").unlink()
        with pytest.raises(InputError, match="no such token shard"):
            Shard(prefix)


def test_opening_reads_only_the_header(tmp_path: Path) -> None:
    """A sparse 4 TB .bin with a 20 GB index opens and answers at once, in a few pages of memory."""
    import resource

    n, per = 10**9, 1000  # 10^9 sequences of 1,000 int32 tokens: 4 TB
    prefix = tmp_path / "huge"
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, n, n + 1)
    pointers_at, index_at = 34 + 4 * n, 34 + 12 * n
    with Path(f"{prefix}.idx").open("wb") as file, Path(f"{prefix}.bin").open("wb") as tokens:
        try:
            file.truncate(index_at + 8 * (n + 1))
            tokens.truncate(4 * per * n)
        except OSError:
            pytest.skip("the file system holds no sparse files of 4 TB")
        file.write(header)
        file.seek(34 + 4 * (n - 1))
        file.write(struct.pack("<i", per))
        file.seek(pointers_at + 8 * (n - 1))
        file.write(struct.pack("<q", 4 * per * (n - 1)))
        file.seek(index_at + 8 * n)
        file.write(struct.pack("<q", n))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard = Shard(prefix)
    assert shard.n_tokens == n * per
    assert shard.document_at(n * per - 1) >= 0
    assert TokenStream([shard]).tokens(n * per - 5, n * per).tolist() == [0] * 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
