"""Streaming means and their intervals."""

import numpy as np
import pytest

from analysis.accumulate import Curve, DocumentMeans, document_weights


def stream(values, index, batch, **more):
    means = DocumentMeans(values.shape[1:], **more)
    for start in range(0, len(values), batch):
        means.update(values[start : start + batch], index[start : start + batch])
    return means.means()


def test_any_split_gives_the_same_and_memory_does_not_grow():
    values = np.random.default_rng(0).normal(size=(200, 2, 3))
    index = list(range(200))
    np.testing.assert_allclose(stream(values, index, 7), stream(values, index, 200), rtol=1e-12)
    np.testing.assert_allclose(stream(values, index, 200)[0], values.mean(0), rtol=1e-12)
    means = DocumentMeans((2, 3))
    sizes = set()
    for n in (1, 50, 100):
        means.update(values[:n], index[:n])
        sizes.add(sum(vars(means)[name].nbytes for name in ("sums", "weights")))
    assert len(sizes) == 1


def test_missing_numbers_are_left_out_one_by_one():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, 5.0]])
    found = stream(values, [0, 1, 2], 3, replicates=50)
    assert found[0].tolist() == [2.0, 5.0]
    low, high = Curve(found, "bootstrap").interval()
    assert (low[1], high[1]) == (5.0, 5.0)  # one document has it: replicates without it do not count


def test_intervals_cover_the_truth():
    """95% intervals of the mean of 60 draws: 90 to 99 of 100 experiments cover (binomial: 3 sigma is 88.5)."""
    generator = np.random.default_rng(0)
    covered = 0
    for experiment in range(100):
        values = generator.exponential(size=(60, 1))
        index = [experiment * 1000 + i for i in range(60)]
        low, high = Curve(stream(values, index, 60), "bootstrap").interval()
        covered += bool(low[0] <= 1.0 <= high[0])
    assert 86 <= covered <= 100
    widths = (high[0] - low[0]) / (2 * 1.96 * values.std() / 60**0.5)
    assert 0.8 < widths < 1.25


def test_whole_documents_are_resampled():
    """Ten pieces of one document are one draw, not ten: the interval is as wide as that of documents."""
    generator = np.random.default_rng(1)
    per_document = generator.normal(size=40)
    pieces = np.repeat(per_document, 10)[:, None]
    document = np.repeat(np.arange(40), 10).tolist()
    low, high = Curve(stream(pieces, document, 50), "bootstrap").interval()
    naive_low, naive_high = Curve(stream(pieces, list(range(400)), 50), "bootstrap").interval()
    expected = 2 * 1.96 * per_document.std() / 40**0.5
    assert high[0] - low[0] == pytest.approx(expected, rel=0.2)
    assert naive_high[0] - naive_low[0] < 0.5 * expected


def test_differences_are_paired():
    """Two models that differ by a constant on very different documents: the interval of the difference is a point."""
    level = np.random.default_rng(2).normal(scale=100, size=(50, 1))
    index = list(range(50))
    one, other = (Curve(stream(level + shift, index, 50), "bootstrap") for shift in (0.0, 0.25))
    low, high = (other - one).interval()
    assert low[0] == pytest.approx(0.25) and high[0] == pytest.approx(0.25)
    assert one.interval()[1][0] - one.interval()[0][0] > 30
    assert (other - Curve(one.samples[:5], "bootstrap")).method == "none"  # not resampled together: no interval


def test_weights_are_poisson_and_belong_to_the_document():
    weights = document_weights(range(400), 300, seed=0)
    assert (weights[0] == 1).all()
    assert weights[1:].mean() == pytest.approx(1, abs=0.02) and weights[1:].var() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(document_weights([17], 300, 0)[:, 0], weights[:, 17])
    assert (document_weights([17], 300, 1) != document_weights([17], 300, 0)).any()


def test_jackknife_equals_the_standard_error_of_a_mean():
    values = np.random.default_rng(3).normal(size=30)
    leave_one_out = (values.sum() - values) / 29
    curve = Curve(np.concatenate([[values.mean()], leave_one_out])[:, None], "jackknife")
    low, high = curve.interval()
    from scipy.stats import t

    expected = t.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    assert high[0] - low[0] == pytest.approx(2 * expected)
