"""Samplers: distributions by enumeration and chi-square, documents, keyed draws."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from errors import InputError
from losses.keyed import GAMMA, keyed_bits, mix
from losses.triples import (
    SAMPLERS,
    Triples,
    content_of,
    documents_from_positions,
    draw,
    draw_with_generator,
    sample,
    spans_per_row,
    whole_rows,
)


def counts(drawn, names=("s", "r", "t")):
    points = torch.stack([getattr(drawn, name)[drawn.valid] for name in names], -1)
    return Counter(tuple(p) for p in points.tolist())


def chi_square(observed, expected):
    """p value; expected: {outcome: probability}."""
    total = sum(observed.values())
    assert set(observed) <= set(expected), set(observed) - set(expected)
    keys = list(expected)
    return stats.chisquare([observed[k] for k in keys], [expected[k] * total for k in keys]).pvalue


def every_draw(*ranges):
    """All combinations of three bits in the given ranges, as one row of draws (1, n, 3)."""
    return torch.tensor(list(itertools.product(*(range(k) for k in ranges))))[None]


def one_row(ids):
    return torch.tensor([ids])


# --- distributions by enumeration ---------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_sorted_offset_reaches_every_triple_6_3_1(length):
    n = length - 2
    drawn = sample("sorted_offset", every_draw(n, n, n), whole_rows(1, length, "cpu"))
    expected = {}
    for s, r, t in itertools.combinations(range(length), 3):
        expected[s, r, t] = {0: 6, 1: 3, 2: 1}[(r == s + 1) + (t == r + 1)]
    assert counts(drawn) == expected and drawn.valid.all()


@pytest.mark.parametrize("length", [3, 4, 5, 8])
def test_uniform_reaches_every_triple_equally(length):
    drawn = sample("uniform", every_draw(length, length - 1, length - 2), whole_rows(1, length, "cpu"))
    assert counts(drawn) == {triple: 6 for triple in itertools.combinations(range(length), 3)}


@pytest.mark.parametrize("window", [None, 1, 2, 5])
def test_anchor_by_enumeration(window):
    """r uniform over tokens with room on both sides, each gap uniform over its room, capped by the window."""
    ids = [0] * 5 + [1] * 2 + [2] * 4 + [3] + [-1] * 2
    interior = [1, 2, 3, 8, 9]
    drawn = sample("anchor", every_draw(len(interior), 12, 12), content_of(one_row(ids)), window)
    expected = Counter()
    for r in interior:
        first = ids.index(ids[r])
        last = len(ids) - 1 - ids[::-1].index(ids[r])
        left, right = min(window or 99, r - first), min(window or 99, last - r)
        for i, j in itertools.product(range(1, left + 1), range(1, right + 1)):
            expected[r - i, r, r + j] += 144 // (left * right)
    assert counts(drawn) == expected


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_patch_is_the_released_draw_by_enumeration(steps):
    """a uniform on 0 .. L-1, b uniform on a+1 .. L, the whole content rejected."""
    factorial = math.lcm(*range(1, steps + 1))
    interior = steps - 1  # anchor: which interior token (here: of the only document)
    drawn = sample("patch", every_draw(interior, steps * steps - 1, factorial), whole_rows(1, steps + 1, "cpu"))
    weights = {(a, b): 1 / steps / (steps - a) for a in range(steps) for b in range(a + 1, steps + 1)}
    del weights[0, steps]
    total = sum(weights.values())
    seen = counts(drawn, ("s", "t"))
    assert set(seen) == set(weights)
    for patch, count in seen.items():
        assert count / sum(seen.values()) == pytest.approx(weights[patch] / total, rel=1e-12)


# --- and by chi-square on real draws ------------------------------------------------------------------------------


def expected_distribution(sampler, length):
    triples = list(itertools.combinations(range(length), 3))
    if sampler == "uniform":
        return {triple: 1 / len(triples) for triple in triples}
    if sampler == "sorted_offset":
        weights = {(s, r, t): {0: 6, 1: 3, 2: 1}[(r == s + 1) + (t == r + 1)] for s, r, t in triples}
        return {triple: weight / (length - 2) ** 3 for triple, weight in weights.items()}
    return {(s, r, t): 1 / (length - 2) / r / (length - 1 - r) for s, r, t in triples}


@pytest.mark.parametrize("sampler", ["uniform", "sorted_offset", "anchor"])
@pytest.mark.parametrize("source", ["generator", "keyed"])
def test_chi_square(sampler, source):
    length, rows, spans = 9, 500, 100
    if source == "generator":
        drawn = draw_with_generator(sampler, (rows, length), spans, generator=torch.Generator().manual_seed(1))
    else:
        ids = torch.zeros(rows, length, dtype=torch.int32)
        drawn = draw(sampler, ids, spans, seed=1, step=7, row_ids=torch.arange(rows))
    assert chi_square(counts(drawn), expected_distribution(sampler, length)) > 1e-3


def test_keyed_bits_are_uniform_and_independent():
    bits = keyed_bits(3, 11, torch.arange(4096), 4)
    assert bits.shape == (4096, 4, 3) and (bits >= 0).all()
    for modulus in (2, 7, 256, 1000):
        observed = torch.bincount((bits % modulus).flatten(), minlength=modulus)
        assert stats.chisquare(observed.tolist()).pvalue > 1e-4
    high = bits >> 55
    assert stats.chisquare(torch.bincount(high.flatten(), minlength=256).tolist()).pvalue > 1e-4
    unit = bits.double() / 2**63
    for a, b in (
        (unit[:-1], unit[1:]),  # neighbouring rows
        (unit[:, :-1], unit[:, 1:]),  # neighbouring spans
        (unit[..., 0], unit[..., 1]),
        (unit, keyed_bits(3, 12, torch.arange(4096), 4).double() / 2**63),  # neighbouring steps
        (unit, keyed_bits(4, 11, torch.arange(4096), 4).double() / 2**63),  # neighbouring seeds
    ):
        correlation = float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_keys_do_not_collide():
    """Equal, swapped or neighbouring seeds, steps and rows give different streams."""
    small = torch.arange(20)
    seen = torch.cat([keyed_bits(seed, step, small, 1)[:, 0, 0] for seed in range(20) for step in range(20)])
    assert seen.unique().numel() == 8000


# --- documents ----------------------------------------------------------------------------------------------------


documents = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(0, 6), st.sampled_from(SAMPLERS), st.sampled_from([None, 1, 3]), st.integers(0, 99))
def test_triples_stay_inside_documents(lengths, padding, sampler, window, step):
    # Every second document has the same id: runs of equal ids are documents, not ids.
    ids = one_row([i % 2 for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding)
    drawn = draw(sampler, ids, 16, seed=0, step=step, row_ids=torch.zeros(1, dtype=torch.int64), window=window)
    assert int(drawn.violations(ids)) == 0
    has_room = any(n >= 3 for n in lengths)
    if sampler in ("anchor", "patch"):
        assert drawn.valid.all() if has_room else not drawn.valid.any()
    if window and sampler == "anchor":
        assert (drawn.t - drawn.r)[drawn.valid].le(window).all() and (drawn.r - drawn.s)[drawn.valid].le(window).all()
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    ends = starts + torch.tensor(lengths) - 1
    for first, r, last in zip(drawn.first[drawn.valid], drawn.r[drawn.valid], drawn.last[drawn.valid], strict=True):
        document = int((starts <= r).sum()) - 1
        assert (int(first), int(last)) == (int(starts[document]), int(ends[document]))
    for name in ("s", "r", "t", "first", "last"):
        index = getattr(drawn, name)
        assert index.dtype == torch.int64 and (index >= 0).all() and (index < ids.shape[1]).all()


def test_violations_counts_each_fault():
    ids = one_row([0, 0, 0, 0, 1, 1, 1, 0, 0, 0, -1, -1])

    def one(s, r, t, valid=True):
        s, r, t = (torch.tensor([[k]]) for k in (s, r, t))
        return Triples(s, r, t, torch.tensor([[valid]]), torch.zeros_like(s), torch.full_like(s, 11))

    assert int(one(0, 1, 3).violations(ids)) == 0
    for bad in ((0, 0, 1), (2, 1, 3), (1, 3, 3), (2, 3, 4), (4, 5, 7), (9, 10, 11), (0, 2, 8), (8, 9, 10)):
        assert int(one(*bad).violations(ids)) == 1, bad
        assert int(one(*bad, valid=False).violations(ids)) == 0


def test_rows_shorter_than_three():
    for length in (1, 2):
        ids = torch.zeros(2, length, dtype=torch.int64)
        for sampler in SAMPLERS:
            assert not draw(sampler, ids, 3, seed=0, step=0, row_ids=torch.arange(2)).valid.any()


def test_padding_shortens_the_range_of_the_row_samplers():
    ids = one_row([0] * 6 + [-1] * 30)
    for sampler in ("sorted_offset", "uniform"):
        drawn = draw(sampler, ids, 500, seed=0, step=0, row_ids=torch.zeros(1, dtype=torch.int64))
        assert drawn.valid.all()  # every draw lands in the 6 tokens
        assert chi_square(counts(drawn), expected_distribution(sampler, 6)) > 1e-3


def test_mask_closes_up_the_content():
    ids = one_row([0, 0, 0, 0, 0, 0, 1, 1, 1, 1])
    mask = one_row([True, False, True, True, False, True, True, True, False, True])
    drawn = draw("anchor", ids, 400, seed=0, step=0, row_ids=torch.zeros(1, dtype=torch.int64), mask=mask)
    assert int(drawn.violations(ids)) == 0 and drawn.valid.all()
    content = [[0, 2, 3, 5], [6, 7, 9]]
    expected = {triple for part in content for triple in itertools.combinations(part, 3)}
    assert set(counts(drawn)) == expected
    for first, s, last in zip(drawn.first[0], drawn.s[0], drawn.last[0], strict=True):
        part = content[int(s) >= 6]
        assert (int(first), int(last)) == (part[0], part[-1])


def test_neighbours():
    ids = one_row([0] * 6 + [1] * 3 + [-1])
    drawn = draw("anchor", ids, 50, seed=0, step=0, row_ids=torch.zeros(1, dtype=torch.int64))
    near = drawn.neighbours()
    assert int(near.violations(ids)) == 0
    assert torch.equal(near.t - near.s, torch.full_like(near.t, 2)) and torch.equal(near.r, drawn.r)


def test_documents_from_positions():
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 0, 0]])
    assert documents_from_positions(positions).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 2]]


# --- keyed draws --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_keyed_draws_do_not_depend_on_the_split(sampler):
    ids = torch.tensor([[0] * 20 + [1] * 10 + [-1] * 2] * 8)
    rows = torch.arange(100, 108)

    def drawn(part, n_spans=5, step=3):
        return draw(sampler, ids[part], n_spans, seed=9, step=step, row_ids=rows[part], window=6)

    whole = drawn(slice(None))
    for parts in ([slice(0, 4), slice(4, 8)], [slice(k, k + 1) for k in range(8)], [slice(0, 8, 2), slice(1, 8, 2)]):
        for part in parts:
            expected, got = whole.select(part), drawn(part)
            for name in ("s", "r", "t", "valid", "first", "last"):
                assert torch.equal(getattr(expected, name), getattr(got, name))
    # Another step draws others; more spans keep the first ones; hidden generator state plays no part.
    assert not torch.equal(whole.s, drawn(slice(None), step=4).s)
    assert torch.equal(drawn(slice(None), n_spans=9).s[:, :5], whole.s)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert torch.equal(drawn(slice(None)).s, whole.s)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(drawn(slice(None), step=torch.tensor(3)).s, whole.s)


def test_keyed_draw_is_pinned():
    """A change of the hash would silently change what a resumed run sees."""
    drawn = draw("anchor", torch.zeros(1, 100, dtype=torch.int64), 3, seed=1, step=2, row_ids=torch.tensor([3]))
    points = torch.stack([drawn.s, drawn.r, drawn.t], -1).tolist()
    assert points == [[[1, 26, 80], [11, 27, 77], [52, 54, 86]]]


def test_hash_is_splitmix64():
    """Published first outputs of splitmix64 for the state 1234567."""
    state = torch.tensor(1234567) + torch.arange(1, 4) * GAMMA
    outputs = [value % 2**64 for value in mix(state).tolist()]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_spans_per_row():
    assert spans_per_row(4, None, 256) == 4
    assert [spans_per_row(4, 8.0, length) for length in (64, 256, 1024, 4096)] == [1, 2, 8, 32]


def test_unknown_sampler_names_the_nearest():
    with pytest.raises(InputError, match="anchor"):
        sample("ancor", torch.zeros(1, 1, 3, dtype=torch.int64), whole_rows(1, 8, "cpu"))
