"""Guards: ways in which a path can get straighter without the model understanding anything, and whether one was used.

Each compares curvature with a number that the cheat cannot move the same way. A guard can say "look here"; it cannot
say that a model is good.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.accumulate import FloatArray
from analysis.measure import Measured
from analysis.rounding import FLAG_ABOVE

# A guard speaks up beyond these. They are conventions, far from what healthy models read (see docs/curvature.md).
DRIFT_SHARE = 0.2  # position-explained share
HIDDEN_DEGREES = 10.0  # curvature that subtracting positions, or norms, gives back
RANK_RATIO = 0.5  # effective rank against the reference model's
MEAN_ENERGY = 0.5
ANISOTROPY = 0.5
DROPPED = 0.01


@dataclass(frozen=True)
class Guard:
    """name: the cheat. state: ok, look (it is possible here) or none (could not be judged). reads: what is measured;
    value, shown: at the worst boundary, as a number and for people; limit: beyond which it speaks up."""

    name: str
    state: str
    reads: str
    value: float
    shown: str
    limit: str
    boundary: int | str | None


def guards(model: Measured, *references: Measured) -> list[Guard]:
    """references: the same stack without what is judged (the untrained twin, another run), on the same documents; the
    one that the model looks worst beside counts."""
    gap = model.get("curvature_centred").value - model.get("curvature").value
    normed = model.get("curvature", "rms").value - model.get("curvature").value
    degrees = f"> {HIDDEN_DEGREES:g}\u00b0"
    found = [
        _worst(
            model,
            "shared drift",
            "variance that position alone explains",
            np.maximum(model.get("position_explained_share").value, 0.0),  # adjusted: noise may be below 0
            DRIFT_SHARE,
            "{:.1%}",
            f"> {DRIFT_SHARE:.0%}",
        ),
        _worst(
            model,
            "shared drift",
            "curvature that subtracting each position's mean gives back",
            gap,
            HIDDEN_DEGREES,
            "{:+.1f}\u00b0",
            degrees,
        ),
        _worst(
            model,
            "norm growth",
            "curvature that states of equal norm give back",
            normed,
            HIDDEN_DEGREES,
            "{:+.1f}\u00b0",
            degrees,
        ),
        _worst(
            model,
            "shared mean",
            "energy in one direction that all tokens share",
            model.get("mean_direction_energy").value,
            MEAN_ENERGY,
            "{:.1%}",
            f"> {MEAN_ENERGY:.0%}",
        ),
        _worst(
            model,
            "anisotropy",
            "cosine of two unrelated tokens",
            model.get("anisotropy").value,
            ANISOTROPY,
            "{:.2f}",
            f"> {ANISOTROPY:g}",
        ),
        _worst(
            model,
            "standing still",
            "steps without a direction, left out",
            _behind_the_embedding(model, model.get("dropped_steps").value),
            DROPPED,
            "{:.2%}",
            f"> {DROPPED:.0%}",
        ),
    ]
    if references:
        found[3:3] = [
            min((_rank(model, other, metric, what) for other in references), key=_badness)
            for metric, what in (("effective_rank", "states"), ("effective_rank_steps", "steps"))
        ]
    return [*found, _rounding(model)]


def _worst(model: Measured, name: str, reads: str, values: FloatArray, limit: float, shown: str, says: str) -> Guard:
    """The largest value over all boundaries against a limit."""
    if np.isnan(values).all():
        return Guard(name, "none", reads, float("nan"), "not measured", says, None)
    worst = int(np.nanargmax(values))
    value = float(values[worst])
    state = "look" if value > limit else "ok"
    return Guard(name, state, reads, value, shown.format(value), says, model.boundaries[worst])


def _behind_the_embedding(model: Measured, values: FloatArray) -> FloatArray:
    """Without boundary 0, where the same word twice is no step by construction; all values where there is no other."""
    later = np.array([boundary != 0 for boundary in model.boundaries])
    return np.where(later, values, np.nan) if later.any() else values


def _badness(guard: Guard) -> float:
    return np.inf if np.isnan(guard.value) else guard.value


def _rank(model: Measured, reference: Measured, metric: str, what: str) -> Guard:
    name, reads = "collapse", f"effective rank of {what} against the reference"
    limit = f"< {RANK_RATIO:.0%}"
    mine, theirs = model.get(metric).value, reference.get(metric).value
    if mine.shape != theirs.shape or np.isnan(mine / theirs).all():
        return Guard(name, "none", reads, float("nan"), "not measured", limit, None)
    ratio = mine / theirs
    worst = int(np.nanargmin(ratio))
    state = "look" if ratio[worst] < RANK_RATIO else "ok"
    shown = f"{ratio[worst]:.0%} ({mine[worst]:.0f} of {theirs[worst]:.0f})"
    return Guard(name, state, reads, float(ratio[worst]), shown, limit, model.boundaries[worst])


def _rounding(model: Measured) -> Guard:
    """The bias that rounded states give a straight path, in 1 - cos."""
    reads = f"1 - cos that {' and '.join(sorted(set(model.precision)))} states give a straight path"
    return _worst(model, "rounding", reads, np.array(model.rounding()), FLAG_ABOVE, "{:.1g}", f"> {FLAG_ABOVE:g}")
