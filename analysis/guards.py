"""Guards: ways in which a path can get straighter without the model understanding anything, and whether one was used.

Each compares curvature with a number that the cheat cannot move the same way. A guard can say "look here"; it cannot
say that a model is good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.measure import Measured

# A guard speaks up beyond these. They are conventions, far from what healthy models read (see docs/curvature.md).
DRIFT_SHARE = 0.2  # position-explained share
HIDDEN_DEGREES = 10.0  # curvature that subtracting positions, or norms, gives back
RANK_RATIO = 0.5  # effective rank against the reference model's
MEAN_ENERGY = 0.5
ANISOTROPY = 0.5
DROPPED = 0.01


@dataclass(frozen=True)
class Guard:
    """state: ok, look (the cheat is possible here) or none (it could not be judged). value: at the worst boundary."""

    name: str
    state: str
    boundary: int | str | None
    value: float
    says: str


def guards(model: Measured, reference: Measured | None = None) -> list[Guard]:
    """reference: the same stack without what is judged (another run, or the untrained twin), on the same documents."""
    found = [_drift(model), _centred(model), _norms(model)]
    if reference is not None:
        found.append(_rank(model, reference, "effective_rank", "states"))
        found.append(_rank(model, reference, "effective_rank_steps", "steps"))
    found.append(
        _above(
            model,
            "mean_direction_energy",
            MEAN_ENERGY,
            "shared mean",
            "of the states' energy is one direction that all tokens share",
        )
    )
    found.append(_above(model, "anisotropy", ANISOTROPY, "anisotropy", "is the cosine of two unrelated tokens"))
    found.append(_above(model, "dropped_steps", DROPPED, "standing still", "of the steps have no direction at all"))
    found.append(_rounding(model))
    return found


def _above(model: Measured, metric: str, limit: float, name: str, says: str) -> Guard:
    values = model.get(metric).value
    if np.isnan(values).all():
        return Guard(name, "none", None, float("nan"), "could not be measured")
    worst = int(np.nanargmax(values))
    state = "look" if values[worst] > limit else "ok"
    text = f"at most {values[worst]:.2g} {says} (speaks up above {limit:g})"
    return Guard(name, state, model.boundaries[worst], float(values[worst]), text)


def _drift(model: Measured) -> Guard:
    return _above(
        model,
        "position_explained_share",
        DRIFT_SHARE,
        "shared drift",
        "of the variance is explained by position alone",
    )


def _centred(model: Measured) -> Guard:
    """A drift that all documents share straightens the path; around the mean of each position it is gone."""
    gap = model.get("curvature_centred").value - model.get("curvature").value
    return _gap(model, gap, "curvature without positions", "around the mean of each position")


def _norms(model: Measured) -> Guard:
    """A norm that grows along the document straightens the path; states of equal norm do not have it."""
    gap = model.get("curvature", "rms").value - model.get("curvature").value
    return _gap(model, gap, "norm growth", "with all states at the same norm")


def _gap(model: Measured, gap: np.ndarray, name: str, how: str) -> Guard:
    if np.isnan(gap).all():
        return Guard(name, "none", None, float("nan"), "could not be measured: too few documents reach a position")
    worst = int(np.nanargmax(gap))
    state = "look" if gap[worst] > HIDDEN_DEGREES else "ok"
    text = f"curvature is {gap[worst]:+.1f} degrees {how} (speaks up above {HIDDEN_DEGREES:g})"
    return Guard(name, state, model.boundaries[worst], float(gap[worst]), text)


def _rank(model: Measured, reference: Measured, metric: str, what: str) -> Guard:
    name = f"rank of {what}"
    mine, theirs = model.get(metric).value, reference.get(metric).value
    if mine.shape != theirs.shape:
        return Guard(name, "none", None, float("nan"), "the reference model has other boundaries")
    ratio = mine / theirs
    worst = int(np.nanargmin(ratio))
    state = "look" if ratio[worst] < RANK_RATIO else "ok"
    text = (
        f"effective rank of {what} is at least {ratio[worst]:.0%} of the reference's "
        f"({mine[worst]:.0f} of {theirs[worst]:.0f}; speaks up below {RANK_RATIO:.0%})"
    )
    return Guard(name, state, model.boundaries[worst], float(ratio[worst]), text)


def _rounding(model: Measured) -> Guard:
    bias, flags = model.rounding(), model.rounding_flags()
    worst = int(np.nanargmax(bias)) if not np.isnan(bias).all() else 0
    name = "rounding"
    if flags:
        text = f"{model.precision[worst]} states bend a straight path by 1 - cos = {bias[worst]:.2g} at this boundary"
        return Guard(name, "look", model.boundaries[worst], float(bias[worst]), text)
    return Guard(
        name, "ok", None, float(bias[worst]), f"states are exact enough ({', '.join(sorted(set(model.precision)))})"
    )
