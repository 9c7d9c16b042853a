"""Paired comparisons of few runs: intervals, tests, correction for many of them, and what could have been seen at all.

A difference is always treated minus baseline of the same pair (seed, and axes), so what they share cancels. Built on
scipy.stats; never a bare mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

FloatArray = NDArray[np.float64]
RESAMPLES = 9_999
NAN = float("nan")


@dataclass(frozen=True)
class PairedResult:
    """n pairs; mean, sd of the differences; wins: share of pairs with a difference above 0, ties counting half.

    low, high: Student's interval (exact for normal differences, honest for few pairs). bootstrap_low, bootstrap_high:
    percentile bootstrap of the mean (too narrow below ten pairs or so; given for comparison). p_t: paired t test.
    p_flip: sign-flip permutation test, exact up to 13 pairs; it cannot be smaller than 2 / 2^n. p_sign: sign test.
    detectable: the true mean difference that a two-sided t test at 5% would find with 80% probability, one that stands
    alone (see analysis/ablation.py for one of many). NaN where n is too small to say, and low, high and detectable also
    where all differences are one number, 0 or another.
    """

    n: int
    mean: float
    sd: float
    wins: float
    low: float
    high: float
    bootstrap_low: float
    bootstrap_high: float
    p_t: float
    p_flip: float
    p_sign: float
    detectable: float


def paired(treated: Mapping[Any, float], baseline: Mapping[Any, float], seed: int = 0) -> PairedResult:
    """Of the keys that both have. Raises ValueError where there is none."""
    return summarise(differences(treated, baseline), seed)


def differences(treated: Mapping[Any, float], baseline: Mapping[Any, float]) -> FloatArray:
    """(n,) treated minus baseline, in the order of `treated`. Raises ValueError: no common key."""
    keys = [key for key in treated if key in baseline]
    if not keys:
        raise ValueError("paired differences: expected at least one common key")
    return np.array([treated[key] - baseline[key] for key in keys], dtype=np.float64)


def summarise(values: Sequence[float] | FloatArray, seed: int = 0) -> PairedResult:
    """values: (n,) paired differences, finite. Raises ValueError for none, or one that is not finite."""
    d = np.asarray(values, dtype=np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d).all():
        raise ValueError(f"paired differences: expected at least one finite number, got {values!r}")
    n, mean = len(d), float(d.mean())
    sd = float(d.std(ddof=1)) if n > 1 else NAN
    detectable = NAN if _without_spread(d) else minimum_detectable_effect(sd, n)
    low, high = student_interval(d)
    bootstrap_low, bootstrap_high = bootstrap_interval(d, seed=seed)
    wins = float((d > 0).mean() + (d == 0).mean() / 2)
    return PairedResult(
        n, mean, sd, wins, low, high, bootstrap_low, bootstrap_high, t_test(d), sign_flip_test(d, seed), sign_test(d),
        detectable,
    )  # fmt: skip


def student_interval(d: FloatArray, confidence: float = 0.95) -> tuple[float, float]:
    """Of the mean. NaN below two values, or where they do not differ: of a spread that is 0 by chance of few digits
    (shares of 1,000 answers) it would be a point."""
    if len(d) < 2 or _without_spread(d):
        return NAN, NAN
    half = float(stats.t.ppf((1 + confidence) / 2, len(d) - 1)) * float(d.std(ddof=1)) / math.sqrt(len(d))
    return float(d.mean()) - half, float(d.mean()) + half


def bootstrap_interval(d: FloatArray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean. NaN below two values."""
    if len(d) < 2:
        return NAN, NAN
    if np.ptp(d) == 0:
        return float(d[0]), float(d[0])
    result = stats.bootstrap(
        (d,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def t_test(d: FloatArray) -> float:
    """Two-sided p of a paired t test: NaN below two values, or where all are one number other than 0; 1 for zeros."""
    if len(d) > 1 and not d.any():
        return 1.0
    if len(d) < 2 or _without_spread(d):
        return NAN
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def _without_spread(d: FloatArray) -> bool:
    """All values one number (but for rounding): a t test would call that certain, and an interval exact, be it of
    answers that no run got right."""
    return float(np.ptp(d)) <= 1e-9 * float(np.abs(d).max())


def sign_flip_test(d: FloatArray, seed: int = 0) -> float:
    """Two-sided p of the mean under random signs (each pair could as well have come out the other way round).

    Exact while 2^n signs are at most 9,999, else by as many random draws.
    """
    if not d.any():
        return 1.0
    if len(d) < 2:  # scipy wants two; of the two signs both are as far from 0
        return 1.0
    result = stats.permutation_test(
        (d,),
        lambda x, axis: np.abs(np.mean(x, axis=axis)),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        alternative="greater",
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue)


def sign_test(d: FloatArray) -> float:
    """Two-sided binomial p of how many differences are above 0; zeros are left out."""
    nonzero = int((d != 0).sum())
    return float(stats.binomtest(int((d > 0).sum()), nonzero).pvalue) if nonzero else 1.0


def smallest_sign_flip_p(n: int) -> float:
    """What n pairs can reach at best."""
    return min(1.0, 2.0 / 2.0**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (family-wise error), in the given order; NaN stay NaN and are not counted."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [NAN] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(200)


def power(effect: float, sd: float, n: int, alpha: float = 0.05) -> float:
    """Probability that a two-sided paired t test finds a true mean difference, for normal differences.

    The noncentral t distribution as a mean over the sample variance: scipy's own is NaN for few degrees of freedom and
    a large shift, which is where few seeds live.
    """
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))
    shift = effect / (sd / math.sqrt(n))
    nodes, weights = _quadrature()
    relative_sd = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, n - 1) / (n - 1))
    found = stats.norm.cdf(shift - critical * relative_sd) + stats.norm.cdf(-shift - critical * relative_sd)
    return float(found @ weights / 2)


def minimum_detectable_effect(sd: float, n: int, alpha: float = 0.05, wanted: float = 0.8) -> float:
    """The smallest true mean difference that is found with probability `wanted`. NaN below two pairs or without a
    spread."""
    if n < 2 or math.isnan(sd) or sd == 0:
        return NAN
    top = (float(stats.t.ppf(1 - alpha / 2, n - 1)) * 4 + 4) / math.sqrt(n)  # in units of sd: power is 1 there
    return sd * float(optimize.brentq(lambda effect: power(effect, 1.0, n, alpha) - wanted, 0.0, top, xtol=1e-9))
