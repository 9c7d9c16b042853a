from __future__ import annotations

import numpy as np
import pytest
import torch

from data.batch import Batch
from data.packing import count_rows
from data.prepared import Prepared
from data.stream import TrainStream, validation_batches

T = 16


def stack(batches: list[Batch]) -> list[torch.Tensor]:
    names = ("tokens", "labels", "document_ids", "row_ids")
    return [torch.cat([getattr(batch, name) for batch in batches]) for name in names]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("which", ["prepared", "prepared_mixture"])
def test_any_number_of_ranks_and_micro_batches_sees_the_same_rows(which: str, request: pytest.FixtureRequest) -> None:
    prepared = request.getfixturevalue(which)
    whole = TrainStream(prepared, T, 8, seed=5)
    for step in (0, 3, 977):
        expected = stack([whole.batch(step)])
        for parts in (2, 4, 8):  # ranks x micro-batches, each with a stream of its own
            shares = np.arange(step * 8, step * 8 + 8).reshape(parts, -1)
            assert equal(stack([TrainStream(prepared, T, 8, seed=5).rows(share) for share in shares]), expected)
        assert expected[3].tolist() == list(range(step * 8, step * 8 + 8))


def test_the_batch_size_changes_no_row(prepared: Prepared) -> None:
    by_eight = stack([TrainStream(prepared, T, 8).batch(step) for step in range(3)])
    by_two = stack([TrainStream(prepared, T, 2).batch(step) for step in range(12)])
    assert equal(by_eight, by_two)


def test_an_epoch_holds_every_label_once_and_epochs_differ(prepared: Prepared) -> None:
    stream = TrainStream(prepared, T, 1)
    (n_rows,) = stream.rows_per_epoch
    source = prepared.corpora[0].train
    everything = source.tokens(0, source.n_tokens)
    starts = source.document_starts(0, source.n_tokens)
    expected = np.sort(np.delete(everything, starts))
    orders = []
    for epoch in range(2):
        ids = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
        labels = stream.rows(ids).labels.numpy()
        assert (np.sort(labels[labels != -100]) == expected).all()
        rows = stream.locate(ids)[1]
        assert sorted(rows.tolist()) == list(range(n_rows))
        orders.append(rows.tolist())
    assert orders[0] != orders[1]


def test_seeds_are_different_orders_of_the_same_rows(prepared: Prepared) -> None:
    ids = np.arange(TrainStream(prepared, T, 1).rows_per_epoch[0])
    orders = [TrainStream(prepared, T, 1, seed).locate(ids)[1].tolist() for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_mixture_has_its_proportions_and_whole_epochs(prepared_mixture: Prepared) -> None:
    stream = TrainStream(prepared_mixture, T, 10)
    corpus, row = stream.locate(np.arange(10_000))
    assert np.bincount(corpus).tolist() == [7000, 3000]
    for start in range(0, 10_000, 10):
        assert 2 <= (corpus[start : start + 10] == 1).sum() <= 4
    for number, n_rows in enumerate(stream.rows_per_epoch):
        mine = row[corpus == number]
        for epoch in range(len(mine) // n_rows):
            assert sorted(mine[epoch * n_rows : (epoch + 1) * n_rows].tolist()) == list(range(n_rows))
    # both corpora really are there, each with its own text
    first, second = (stream.rows(np.flatnonzero(corpus == number)[:1]) for number in (0, 1))
    sources = [c.train for c in prepared_mixture.corpora]
    for batch, source, number in ((first, sources[0], 0), (second, sources[1], 1)):
        begin = int(row[np.flatnonzero(corpus == number)[0]]) * T
        assert batch.tokens[0].tolist() == source.tokens(begin, begin + T).tolist()


def test_validation_rows_are_fixed_and_complete(prepared: Prepared) -> None:
    source = prepared.corpora[0].validation
    n_rows = count_rows(source.n_tokens, T)
    batches = list(validation_batches(prepared, T, 4))
    assert [len(batch.row_ids) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    assert torch.cat([batch.row_ids for batch in batches]).tolist() == list(range(n_rows))
    n_documents = len(source.document_starts(0, source.n_tokens))
    assert sum(batch.loss_tokens for batch in batches) == source.n_tokens - n_documents
    assert equal(stack(batches), stack(list(validation_batches(prepared, T, 7))))


@pytest.mark.parametrize("which", ["prepared", "prepared_mixture"])
def test_fewer_validation_rows_are_spread_over_the_text(which: str, request: pytest.FixtureRequest) -> None:
    prepared = request.getfixturevalue(which)
    everything = stack(list(validation_batches(prepared, T, 8)))
    some = stack(list(validation_batches(prepared, T, 8, max_rows=10)))
    assert some[0].shape == (10, T)
    places = [int((everything[0] == row).all(dim=1).nonzero()[0]) for row in some[0]]
    assert places == sorted(set(places))
    n = len(everything[0])
    assert places[0] == 0 and places[-1] >= 0.7 * n
    assert equal(stack(list(validation_batches(prepared, T, 8, max_rows=10**9))), everything)


def test_no_held_out_document_is_trained_on(prepared: Prepared, prepared_mixture: Prepared) -> None:
    for data in (prepared, prepared_mixture):
        documents: list[set[tuple[int, ...]]] = []
        for split in ("train", "validation"):
            found = set()
            for corpus in data.corpora:
                stream = getattr(corpus, split)
                starts = stream.document_starts(0, stream.n_tokens).tolist()
                ids = stream.tokens(0, stream.n_tokens).tolist()
                found |= {tuple(ids[a:b]) for a, b in zip(starts, [*starts[1:], stream.n_tokens])}
            documents.append(found)
        assert documents[0] and documents[1] and not documents[0] & documents[1]
