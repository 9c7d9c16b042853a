"""One document's path, projected on the plane that shows most of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trajectory:
    """points[b] (T, 2) of boundary b in its own plane, as lists; share[b]: of its variance in that plane. texts: one
    per token. boundaries: names."""

    boundaries: list[int | str]
    points: list[list[list[float]]]
    share: list[float]
    texts: list[str]


def project(hidden_states: Sequence[Tensor], boundaries: Sequence[int | str], texts: Sequence[str]) -> Trajectory:
    """hidden_states: one (T, D) per boundary. Principal components of each boundary's own states, in float64.

    The sign of each component is chosen so that boundaries look alike: the first token lies to the left and below.
    """
    points, shares = [], []
    for states in hidden_states:
        centred = states.detach().double().cpu()
        centred = centred - centred.mean(0)
        left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
        plane = left[:, :2] * singular[:2]
        if plane.shape[1] < 2:
            plane = torch.nn.functional.pad(plane, (0, 2 - plane.shape[1]))
        plane = plane * torch.where(plane[0] > 0, -1.0, 1.0)
        variance = singular.square()
        points.append(plane.tolist())
        shares.append(float(variance[:2].sum() / variance.sum().clamp_min(1e-300)))
    return Trajectory(list(boundaries), points, shares, list(texts))
