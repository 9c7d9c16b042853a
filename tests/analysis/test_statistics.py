"""Statistics of paired runs against published values, brute force and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import statistics as s

# Student's sleep data (1908), differences of the paired drugs: t = -4.0621, p = 0.002833, interval -2.4599 .. -0.7001
SLEEP = np.array([-1.2, -2.4, -1.3, -1.3, 0.0, -1.0, -1.8, -0.8, -4.6, -1.4])


def test_students_own_data():
    result = s.summarise(SLEEP)
    assert result.mean == pytest.approx(-1.58)
    assert result.p_t == pytest.approx(0.002833, abs=1e-6)
    assert (result.low, result.high) == pytest.approx((-2.4598858, -0.7001142), abs=1e-6)
    assert result.p_sign == pytest.approx(2 / 2**9)  # nine below, none above, one zero left out
    assert result.wins == pytest.approx(0.05)
    assert result.low < result.bootstrap_low < -1.58 < result.bootstrap_high < result.high


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_sign_flips_equal_enumeration(values):
    d = np.array(values, dtype=float)
    flipped = [abs(np.dot(signs, d)) for signs in product((-1, 1), repeat=len(d))]
    expected = float(np.mean([f >= abs(d.sum()) - 1e-9 for f in flipped]))
    assert s.sign_flip_test(d) == pytest.approx(expected)


def test_few_pairs_cannot_reach_five_percent():
    assert s.sign_flip_test(np.array([1.0, 2, 3, 4, 5])) == pytest.approx(s.smallest_sign_flip_p(5)) == 0.0625
    assert s.smallest_sign_flip_p(6) < 0.05


def test_holm_by_hand():
    # Holm (1979): sorted .005 .01 .03 .04 times 4, 3, 2, 1, never falling
    assert s.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = s.holm([0.02, math.nan, 0.9])
    assert adjusted[0] == pytest.approx(0.04) and math.isnan(adjusted[1]) and adjusted[2] == pytest.approx(0.9)
    assert s.holm([0.6, 0.7]) == [1.0, 1.0]


def test_power_against_tables_and_simulation():
    # Cohen (1988): one-sample t, d = 0.5, n = 34 has power 0.807 (two-sided 5%)
    assert s.power(0.5, 1.0, 34) == pytest.approx(0.8078, abs=1e-3)
    assert s.power(0.0, 1.0, 5) == pytest.approx(0.05, abs=1e-5)
    effect = s.minimum_detectable_effect(2.0, 5)
    draws = np.random.default_rng(0).normal(effect, 2.0, (20_000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    assert np.mean(np.abs(t) > 2.776445) == pytest.approx(0.8, abs=0.01)
    assert s.minimum_detectable_effect(1.0, 2) > 5 * s.minimum_detectable_effect(1.0, 5)


def test_student_interval_covers_at_the_stated_rate_where_the_bootstrap_does_not():
    draws = np.random.default_rng(1).normal(0.3, 1.0, (400, 5))
    student = np.mean([low <= 0.3 <= high for low, high in map(s.student_interval, draws)])
    assert student == pytest.approx(0.95, abs=0.03)
    boot = np.mean([low <= 0.3 <= high for low, high in map(s.bootstrap_interval, draws[:100])])
    assert boot < 0.93


def test_edges():
    one = s.summarise([0.5])
    assert one.n == 1 and one.p_flip == 1.0 and all(map(math.isnan, (one.low, one.p_t, one.detectable)))
    same = s.summarise([0.0, 0.0, 0.0])
    assert (same.p_t, same.p_flip, same.p_sign, same.wins) == (1.0, 1.0, 1.0, 0.5)
    # exact match 0 in every run says nothing about how exactly it was measured
    assert all(map(math.isnan, (same.low, same.high, same.detectable)))
    # two shares of 1,001 answers that happen to be equal prove nothing
    chance = s.summarise([0.5105 - 0.5215, 0.6105 - 0.6215])
    assert all(map(math.isnan, (chance.low, chance.p_t, chance.detectable))) and chance.p_flip == 0.5
    for bad in ([], [math.nan], [[1.0]]):
        with pytest.raises(ValueError, match="paired differences"):
            s.summarise(bad)


def test_pairs_are_matched_by_key_and_not_by_place():
    result = s.paired({0: 1.0, 2: 5.0, 1: 2.0}, {1: 1.0, 0: 0.5, 3: 9.0, 2: 4.0})
    assert result.n == 3 and result.mean == pytest.approx((0.5 + 1 + 1) / 3)
    with pytest.raises(ValueError, match="common"):
        s.paired({0: 1.0}, {1: 1.0})
