"""Every metric against the slow reference of tests/oracles, document by document and over the corpus."""

import numpy as np
import pytest
import torch
from analysis_cases import LENGTHS, documents, measure, pad

from analysis.accumulate import DocumentMeans
from analysis.collapse import Moments, sample_tokens
from analysis.forms import draw_triples
from analysis.measure import Measurement, MeasureSettings
from analysis.tube import SPAN_BINS, draw_spans
from tests.oracles import curvature_oracle as oracle

SETTINGS = MeasureSettings(trained_length=50, n_triples=5, n_spans=3, window=16)


@pytest.fixture(scope="module")
def rows():
    return documents()


@pytest.fixture(scope="module")
def found(rows):
    return measure([rows], trained_length=50, n_triples=5, n_spans=3, window=16)


def expected(rows, function):
    """Mean over the documents that have the number."""
    values = np.array([function(i, x) for i, x in enumerate(rows)])
    return np.nanmean(values)


@pytest.mark.parametrize("variant", ["raw", "rms"])
def test_numbers_per_document(rows, found, variant):
    exact = [row.double().numpy() for row in rows]
    if variant == "rms":
        exact = [oracle.rms(x) for x in exact]
    T = max(LENGTHS)
    lengths = torch.tensor(LENGTHS)
    index = torch.arange(len(LENGTHS))
    triples = draw_triples(lengths, T, index, 5, 0, 16)
    spans = draw_spans(lengths, index, 3, 0)

    def of_triples(i, x):
        anchor = triples.anchor
        points = [p for p, ok in zip(zip(anchor.s[i], anchor.r[i], anchor.t[i]), anchor.valid[i]) if ok]
        return oracle.stp(x, [tuple(map(int, point)) for point in points])

    def of_patches(i, x):
        patch = triples.patch
        return oracle.stp(x, [(int(a), int(b)) for a, b, ok in zip(patch.s[i], patch.t[i], patch.valid[i]) if ok])

    want = {
        "curvature": lambda i, x: oracle.curvature(x),
        "curvature_within": lambda i, x: oracle.curvature(x, high=50),
        "curvature_beyond": lambda i, x: oracle.curvature(x, low=50),
        "stp_consecutive": lambda i, x: 1 - oracle.tangent_correlation(x, 1),
        "stp_triple": of_triples,
        "stp_patch_complement": of_patches,
        "state_norm": lambda i, x: oracle.norms(x)[0],
        "step_norm": lambda i, x: oracle.norms(x)[1],
        "dropped_steps": lambda i, x: oracle.norms(x)[2],
    }
    for lag in SETTINGS.lags:
        want[f"tangent_correlation_{lag}"] = lambda i, x, lag=lag: oracle.tangent_correlation(x, lag)
    for number, (low, high) in enumerate(SPAN_BINS):

        def of_tube(i, x, number=number):
            if not spans.valid[i, number]:
                return (np.nan,) * 3
            s, length = spans.start[i, number].tolist(), spans.length[i, number].tolist()
            return oracle.tube(x, [(a, a + n) for a, n in zip(s, length)])

        want[f"tube_radius_mean_{low}-{high}"] = lambda i, x, f=of_tube: f(i, x)[0]
        want[f"tube_radius_max_{low}-{high}"] = lambda i, x, f=of_tube: f(i, x)[1]
        want[f"path_efficiency_{low}-{high}"] = lambda i, x, f=of_tube: f(i, x)[2]
    for m in SETTINGS.horizons:
        for kind in ("plain", "copy_last", "centred", "transition"):
            want[f"forecast_{kind}_{m}"] = lambda i, x, m=m, kind=kind: oracle.forecast(x, m)[kind]

    assert set(want) | {"curvature_centred"} == {
        name for name, curve in found.curves["raw"].items() if curve.method == "bootstrap"
    }
    for name, function in want.items():
        value = float(found.get(name, variant).value[0])
        assert value == pytest.approx(expected(exact, function), rel=3e-5, abs=1e-7), (name, variant)


@pytest.mark.parametrize("variant", ["raw", "rms"])
def test_numbers_of_the_corpus(rows, found, variant):
    exact = [row.double().numpy() for row in rows]
    if variant == "rms":
        exact = [oracle.rms(x) for x in exact]
    sample = sample_tokens(torch.tensor(LENGTHS))
    chosen = [index[ok].tolist() for index, ok in zip(sample.index, sample.valid)]
    for places, n in zip(chosen, LENGTHS):
        assert len(set(places)) == len(places) == min(32, n - 1) and max(places) <= n - 2
    states = [x[places] for x, places in zip(exact, chosen)]
    steps = np.concatenate([x[[p + 1 for p in places]] - x[places] for x, places in zip(exact, chosen)])
    together = np.concatenate(states)
    want = {
        "effective_rank": oracle.effective_rank(together),
        "participation_ratio": oracle.participation_ratio(together),
        "effective_rank_steps": oracle.effective_rank(steps),
        "participation_ratio_steps": oracle.participation_ratio(steps),
        "anisotropy": oracle.anisotropy(states),
        "mean_direction_energy": oracle.mean_direction_energy(together),
    }
    for name, value in want.items():
        assert float(found.get(name, variant).value[0]) == pytest.approx(value, rel=2e-5), (name, variant)


def test_pieces_of_one_document_are_no_pairs_and_count_as_one(rows):
    """Documents cut into pieces of 40 tokens, read in batches that cut them anywhere."""
    pieces = [(number, x[at : at + 40]) for number, x in enumerate(rows) for at in range(0, len(x), 40)]
    pieces = [(number, x) for number, x in pieces if len(x) > 1]
    states: dict[int, list] = {}
    for number, x in pieces:
        sample = sample_tokens(torch.tensor([len(x)]), 16)
        states.setdefault(number, []).append(x.double().numpy()[sample.index[sample.valid].tolist()])
    whole = [np.concatenate(parts) for parts in states.values()]
    rest = [x for number, x in zip(states, whole) if number % 8 != 3]  # the jackknife's groups are of whole documents
    want = [oracle.anisotropy(whole), oracle.anisotropy(rest)]
    for batch in (1, 2, 3, 100):
        moments, means = Moments(12, 8), DocumentMeans((1,), replicates=5)
        for start in range(0, len(pieces), batch):
            padded, lengths = pad([x for _, x in pieces[start : start + batch]])
            index = torch.tensor([number for number, _ in pieces[start : start + batch]])
            moments.update(padded, sample_tokens(lengths, 16), index)
            means.update(np.zeros((len(index), 1)), index.tolist())
        assert means.n_documents == len(whole) == len(rows) < len(pieces)
        assert moments.metrics()["anisotropy"][[0, 4]].tolist() == pytest.approx(want, rel=2e-5), batch


def test_position_means_and_what_they_explain(rows, found):
    exact = [row.double().numpy() for row in rows]
    share = float(found.get("position_explained_share").value[0])
    assert share == pytest.approx(oracle.position_explained_share(exact), abs=1e-6)
    means = oracle.position_means(exact, max(LENGTHS))
    known = [number for number, (_, count) in enumerate(means) if count >= 8]
    centred = [np.stack([x[p] - means[p][0] for p in known if p < len(x)]) for x in exact]
    want = np.nanmean([oracle.curvature(x) for x in centred])
    assert float(found.get("curvature_centred").value[0]) == pytest.approx(want, rel=1e-5)


def test_the_jackknife_leaves_one_group_out(rows, found):
    curve = found.get("effective_rank")
    assert curve.method == "jackknife" and len(curve.samples) == 9  # 12 documents in 8 groups
    rest = [x for i, x in enumerate(rows) if i % 8 != 3]
    sample = sample_tokens(torch.tensor([len(x) for x in rest]))
    states = np.concatenate([x[i[ok]].double().numpy() for x, i, ok in zip(rest, sample.index, sample.valid)])
    assert curve.samples[4, 0] == pytest.approx(oracle.effective_rank(states), rel=2e-5)


def test_batches_and_packing_do_not_matter(rows):
    """One document at a time, all together, or packed into two rows and unpacked: the same numbers."""
    from analysis.measure import Measurement
    from analysis.paths import one_document_per_row

    def run(batches):
        measurement = Measurement([0], 12, max(LENGTHS), MeasureSettings(replicates=20))
        for hidden, lengths, index in batches:
            measurement.update([hidden], lengths, index)
        return measurement.result()

    padded, lengths = pad(rows)
    index = torch.arange(len(rows))
    together = run([(padded, lengths, index)])
    alone = run([(row[None], torch.tensor([len(row)]), index[i : i + 1]) for i, row in enumerate(rows)])

    half = len(rows) // 2
    packed, sizes = pad([torch.cat(rows[:half]), torch.cat(rows[half:])])
    ids = torch.full(packed.shape[:2], -1)
    for row, part in enumerate((LENGTHS[:half], LENGTHS[half:])):
        ids[row, : sum(part)] = torch.repeat_interleave(torch.arange(half), torch.tensor(part))
    (unpacked,), found_lengths, origin = one_document_per_row([packed], ids)
    assert found_lengths.tolist() == list(LENGTHS) and origin.tolist() == [0] * half + [1] * half
    assert sizes.tolist() == [sum(LENGTHS[:half]), sum(LENGTHS[half:])]
    from_packed = run([(unpacked, found_lengths, index)])
    for other in (alone, from_packed):
        for name, curve in together.curves["raw"].items():
            np.testing.assert_allclose(other.get(name).samples, curve.samples, rtol=1e-4, atol=1e-6, err_msg=name)


def test_side_by_side_is_the_same_to_the_last_bit():
    lengths = torch.tensor([40, 17, 33, 40, 8])
    states = [torch.randn(5, 40, 12, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    curves = []
    for workers in (1, 3):
        measurement = Measurement([0, 1, 2, "final"], 12, 40, MeasureSettings(replicates=20), None, workers)
        for document in (0, 5):
            measurement.update(states, lengths, torch.arange(document, document + 5))
        curves.append(measurement.result().curves)
    for variant, metrics in curves[0].items():
        for name, curve in metrics.items():
            np.testing.assert_array_equal(curve.samples, curves[1][variant][name].samples, err_msg=name)
