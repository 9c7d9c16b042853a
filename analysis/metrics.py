"""The catalogue of metrics: names, units and one-line definitions. Every table, plot and file takes them from here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.forecast import HORIZONS, KINDS
from analysis.tube import SPAN_BINS

LAGS = (1, 2, 3, 4, 8, 16, 32, 64)
VARIANTS = ("raw", "rms")


@dataclass(frozen=True)
class Metric:
    """lower: what a lower value means, in a word or two, for tables. per: piece (a document, or one of several that a
    long one is cut into: the mean over pieces) or corpus."""

    name: str
    label: str
    unit: str
    definition: str
    per: str = "piece"


def bin_name(bounds: tuple[int, int]) -> str:
    return f"{bounds[0]}-{bounds[1]}"


def document_metrics(
    lags: Sequence[int] = LAGS,
    bins: Sequence[tuple[int, int]] = SPAN_BINS,
    horizons: Sequence[int] = HORIZONS,
) -> list[Metric]:
    """Those that every piece of a document has for itself, in the order in which they are stored."""
    found = [
        Metric(
            "curvature", "curvature", "degrees", "mean angle between neighbouring steps; line 0, walk 90, i.i.d. 120"
        ),
        Metric(
            "curvature_centred",
            "position-centred curvature",
            "degrees",
            "the same after subtracting the mean state of each position: what a shared drift cannot straighten",
        ),
        Metric(
            "curvature_within",
            "curvature, trained positions",
            "degrees",
            "turns at positions inside the length of a training row",
        ),
        Metric(
            "curvature_beyond",
            "curvature, untrained positions",
            "degrees",
            "turns at positions that no training row is long enough to have",
        ),
        Metric("stp_triple", "STP, triple", "1 - cos", "shared triples s < r < t; line 0, walk 1.0, i.i.d. 1.5"),
        Metric("stp_consecutive", "STP, consecutive", "1 - cos", "1 - C(1): neighbouring steps"),
        Metric(
            "stp_patch_complement",
            "STP, patch against rest",
            "1 - cos",
            "shared spans against the rest of their piece; line 0, walk 1.0, i.i.d. 1.7",
        ),
        Metric("state_norm", "state norm", "", "mean |x|"),
        Metric("step_norm", "step norm", "", "mean |v|, v = x_{k+1} - x_k"),
        Metric("dropped_steps", "dropped steps", "share", "steps shorter than 1e-6 of their states: no direction"),
    ]
    found += [
        Metric(f"tangent_correlation_{m}", f"C({m})", "cos", f"mean cosine of steps {m} apart; i.i.d. C(1) = -0.5")
        for m in lags
    ]
    for name in map(bin_name, bins):
        chord = f"spans of {name} tokens; distance from the chord / its length"
        found += [
            Metric(
                f"tube_radius_mean_{name}", f"tube radius {name}", "chords", f"{chord}, mean over the tokens inside"
            ),
            Metric(f"tube_radius_max_{name}", f"tube radius {name}, largest", "chords", f"{chord}, largest inside"),
            Metric(
                f"path_efficiency_{name}",
                f"path efficiency {name}",
                "",
                f"spans of {name} tokens; chord / walked length",
            ),
        ]
    says = {
        "plain": "error^2 / size^2 of the state; small for free where states share a mean",
        "copy_last": "the same of the forecast that nothing moves",
        "centred": "error^2 / squared distance from the piece's mean state",
        "transition": "error^2 / squared step; line 0, walk 2, i.i.d. 3 at one token",
    }
    found += [
        Metric(f"forecast_{kind}_{m}", f"forecast {m} ahead, {kind.replace('_', '-')}", "ratio", says[kind])
        for m in horizons
        for kind in KINDS
    ]
    return found


CORPUS = (
    Metric("effective_rank", "effective rank", "dimensions", "exp entropy of the singular values of states", "corpus"),
    Metric(
        "participation_ratio",
        "participation ratio",
        "dimensions",
        "(sum of eigenvalues)^2 / sum of squares, states",
        "corpus",
    ),
    Metric("effective_rank_steps", "effective rank of steps", "dimensions", "the same of steps v", "corpus"),
    Metric("participation_ratio_steps", "participation ratio of steps", "dimensions", "the same of steps v", "corpus"),
    Metric("anisotropy", "anisotropy", "cos", "mean cosine of two tokens of different documents", "corpus"),
    Metric("mean_direction_energy", "mean-direction energy", "share", "|E x|^2 / E |x|^2", "corpus"),
    Metric(
        "position_explained_share",
        "position-explained share",
        "share",
        "adjusted R^2 of states on their position: a drift that all documents share",
        "corpus",
    ),
)
