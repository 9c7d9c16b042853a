from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import TokenStream, check_ids, count_rows, pack_rows, to_batch
from data.shards import Shard, ShardWriter
from errors import InputError
from model.context import SequenceContext


def make_stream(folder: Path, lengths: list[int], per_shard: int = 3) -> TokenStream:
    """Documents of the given lengths whose tokens are all different: 0, 1, 2, ... over the whole stream."""
    shards, token = [], 0
    for start in range(0, len(lengths), per_shard):
        writer = ShardWriter(folder / f"s{start}", np.int32)
        for length in lengths[start : start + per_shard]:
            writer.add(np.arange(token, token + length))
            token += length
        writer.close()
        shards.append(Shard(folder / f"s{start}"))
    return TokenStream(shards)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=12), st.integers(2, 17))
def test_against_a_token_by_token_account(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    """Each (input, label) pair of neighbours inside a document is there exactly once, and nothing else is."""
    stream = make_stream(tmp_path_factory.mktemp("pack"), lengths)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    n_rows = count_rows(stream.n_tokens, sequence_length)
    tokens, labels, document_ids = pack_rows(stream, np.arange(n_rows), sequence_length)
    assert tokens.shape == labels.shape == document_ids.shape == (n_rows, sequence_length)
    pairs, position = [], 0
    for row in range(n_rows):
        known: dict[int, int] = {}
        for column in range(sequence_length):
            token, label, document = (int(a[row, column]) for a in (tokens, labels, document_ids))
            if position >= stream.n_tokens - 1:  # padding: only behind the whole stream
                assert (token, label, document) == (0, -100, -1)
                continue
            assert token == position
            # document ids of a row count its documents from 0
            assert document == known.setdefault(int(document_of[token]), len(known))
            if label == -100:
                assert document_of[token] != document_of[token + 1]
            else:
                assert label == token + 1 and document_of[token] == document_of[label]
                pairs.append(label)
            position += 1
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    assert pairs == [token for token in range(stream.n_tokens) if token not in starts]


def test_rows_in_any_order_are_the_same_rows(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [7, 3, 12, 2, 2, 9])
    whole = pack_rows(stream, np.arange(count_rows(stream.n_tokens, 4)), 4)
    order = np.array([5, 0, 8, 0])
    picked = pack_rows(stream, order, 4)
    for number in range(3):
        assert (np.asarray(picked[number]) == np.asarray(whole[number])[order]).all()


def test_the_context_sees_the_same_documents(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [5, 6, 4])
    batch = to_batch(*pack_rows(stream, np.arange(2), 8), np.arange(2))
    context = SequenceContext.from_document_ids(batch.document_ids)
    # row 0: 5 tokens of document 0 and 3 of document 1; row 1: 3 more of it, 3 of document 2 (the last label), padding
    assert batch.document_ids.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 3 + [-1] * 2]
    assert context.segment_ids.tolist() == [[0] * 5 + [1] * 3, [0] * 3 + [1] * 3 + [2] * 2]
    assert context.positions[1].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert batch.loss_tokens == 15 - 3
    assert batch.tokens.dtype.is_signed and str(batch.document_ids.dtype) == "torch.int32"


def test_a_single_short_document_makes_one_padded_row(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [3])
    assert count_rows(stream.n_tokens, 8) == 1
    tokens, labels, _ = pack_rows(stream, np.array([0]), 8)
    assert tokens.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0]]
    assert labels.tolist() == [[1, 2] + [-100] * 6]


def test_ids_of_another_tokenizer_are_refused() -> None:
    good = np.array([[1, 2, 3]])
    check_ids(good, good, 4, "corpus")
    for bad in (np.array([[1, 4, 3]]), np.array([[1, -1, 3]])):
        with pytest.raises(InputError, match=r"corpus: token id (4|-1), but the tokenizer has 4"):
            check_ids(bad, good, 4, "corpus")
    with pytest.raises(InputError, match="token id 9"):
        check_ids(good, np.array([[9]]), 4, "corpus")
