"""Curvature of hidden-state trajectories: by how many degrees the path turns from one token to the next.

c_k = angle(v_k, v_{k+1}) with v_k = x_{k+1} - x_k (Henaff et al. 2019, 2021; Hosseini and Fedorenko 2023,
arXiv 2311.04930). Reading the number (in high dimension): 0 a straight line, 90 a random walk, 120 states without any
coherence (i.i.d.), 180 there and back again.

Invariant to rotation, translation and scale of the states. Not invariant to a norm of each state of its own (such as
RMSNorm), which bends paths; so raw and RMS-normalised states are two different questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from analysis.paths import Path, row_mean

# Steps of one product of blocks: short enough to waste little beyond the largest lag.
BLOCK = 64


def curvature_degrees(hidden: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Mean turning angle per row in degrees.

    hidden (B, T, D): states of one boundary, best in float32 (bfloat16 states bend straight paths, see
    analysis.rounding). document_ids (B, T): equal within a document, negative on padding; an angle never spans two
    documents. None: every row is one document.

    Returns (B,) float64; NaN for a row without a turn (fewer than three tokens of a document, or no step with a
    direction: pairs with a step of length zero are left out).
    """
    angles, mask = turning_angles(Path.of(hidden, document_ids))
    return row_mean(torch.rad2deg(angles), mask)


def turning_angles(path: Path) -> tuple[Tensor, Tensor]:
    """Angles between neighbouring steps in radians, (N, T - 2), and which of them count.

    2 atan2(|a - b|, |a + b|) of the unit vectors: exact to rounding near 0 and 180 degrees, where arccos of a dot
    product loses half of the digits (Kahan 2006, "How futile are mindless assessments of roundoff", section 12).
    """
    directions = path.directions
    first, second = directions[:, :-1], directions[:, 1:]
    angles = 2 * torch.atan2(vector_norm(second - first, dim=-1), vector_norm(second + first, dim=-1))
    return angles, path.step_pairs(1)


def tangent_correlation(path: Path, lag: int) -> Tensor:
    """C(m) = mean cosine of steps v_k and v_{k+m}, per row: (N,), NaN where the row is too short.

    1 - C(1) is the consecutive form of the STP loss. C decays towards 0 where a path forgets its direction; negative
    values at lag 1 mean that steps undo each other.
    """
    return tangent_correlations(path, (lag,))[lag]


def tangent_correlations(path: Path, lags: Sequence[int]) -> dict[int, Tensor]:
    """{m: C(m)} of several lags at once, by products of blocks of steps with the steps up to the largest lag ahead."""
    directions = path.directions
    N, n, D = directions.shape
    fitting = [lag for lag in lags if lag < n]
    found = {m: torch.full((N,), torch.nan, dtype=torch.float64, device=directions.device) for m in lags}
    if not fitting:
        return found
    reach = max(fitting)
    n_blocks = -(-n // BLOCK)
    padded = torch.nn.functional.pad(directions, (0, 0, 0, n_blocks * BLOCK + reach - n))
    ahead = padded.unfold(1, BLOCK + reach, BLOCK)  # (N, blocks, D, BLOCK + reach)
    cosines = padded[:, : n_blocks * BLOCK].view(N, n_blocks, BLOCK, D) @ ahead
    for lag in fitting:
        of_lag = cosines.diagonal(lag, 2, 3)[..., :BLOCK].reshape(N, -1)[:, : n - lag]
        found[lag] = row_mean(of_lag, path.step_pairs(lag))
    return found


@dataclass(frozen=True)
class Straightening:
    """Curvature over depth against boundary 0. Degrees; negative change = straighter than the embedding.

    change: last boundary minus boundary 0. ratio: (first - last) / first. slope: least-squares degrees per stack, over
    depth / depth_max. minimum, minimum_boundary: the straightest boundary (later ones can bend again: a U shape).
    """

    change: float
    ratio: float
    slope: float
    minimum: float
    minimum_boundary: int


def straightening(curvature: Sequence[float]) -> Straightening:
    """curvature: degrees at boundaries 0 .. depth. Raises ValueError for fewer than two."""
    if len(curvature) < 2:
        raise ValueError(f"curvature: expected at least two boundaries, got {len(curvature)}")
    values = torch.tensor(curvature, dtype=torch.float64)
    depth = torch.linspace(0, 1, len(values), dtype=torch.float64)
    centred = depth - depth.mean()
    slope = float((centred * values).sum() / centred.square().sum())
    first, last = float(values[0]), float(values[-1])
    lowest = int(torch.where(values.isnan(), torch.inf, values).argmin())
    ratio = (first - last) / first if first else float("nan")
    return Straightening(last - first, ratio, slope, float(values[lowest]), lowest)
