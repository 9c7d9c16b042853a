"""What position alone explains: a drift that every document shares straightens paths without any content.

Means per position come from a first pass over some documents; the second pass reads curvature around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from analysis.curvature import turning_angles
from analysis.paths import Path, row_mean

# A position that fewer documents reach has no mean worth subtracting.
MIN_DOCUMENTS = 8


class PositionMeans:
    """Streams sums per token position of one boundary. Rows hold one document each, so columns are positions."""

    def __init__(self, length: int, d_model: int) -> None:
        self.sums = torch.zeros(length, d_model, dtype=torch.float64)
        self.count = torch.zeros(length, dtype=torch.float64)
        self.squares = 0.0

    def update(self, path: Path) -> None:
        T = path.states.shape[1]
        states = torch.where(path.valid[..., None], path.states, 0.0)
        self.sums[:T] += states.sum(0).double().cpu()
        self.count[:T] += path.valid.sum(0).cpu()
        self.squares += float(torch.where(path.valid, path.state_norms.double().square(), 0.0).sum())

    def means(self) -> tuple[Tensor, Tensor]:
        """(length, D) float32 mean state per position, and (length,) bool: enough documents reach it."""
        return (self.sums / self.count.clamp_min(1)[:, None]).float(), self.count >= MIN_DOCUMENTS

    def explained_share(self) -> float:
        """R^2 of the states on their position (as a category), adjusted for the number of positions: 0 = nothing.

        1 - (1 - R^2) (N - 1) / (N - P) with N tokens and P positions. NaN where no position occurs twice.
        """
        n, used = self.count.sum(), self.count > 0
        n_positions = int(used.sum())
        if n <= n_positions:
            return float("nan")
        mean = self.sums.sum(0) / n
        centred = self.squares - n * mean.square().sum()
        between = (self.sums[used].square().sum(-1) / self.count[used]).sum() - n * mean.square().sum()
        residual = (centred - between) / centred
        return float(1 - residual * (n - 1) / (n - n_positions))


def centred_curvature(path: Path, means: tuple[Tensor, Tensor]) -> Tensor:
    """Mean turning angle in degrees around the mean state of each position, (N,) float64; one document a row.

    means: of `PositionMeans.means`. Positions without a mean are left out. Steps of position-explained motion are
    gone, so a shared drift reads as what is left without it. (A document's own share in the mean only scales its
    states, so it does not bias the angle.)
    """
    mean, enough = means
    T = path.states.shape[1]
    known = enough[:T].to(path.runs.device)
    runs = torch.where(known, path.runs, -1)
    angles, mask = turning_angles(Path(path.states - mean[:T].to(path.states), runs))
    return row_mean(torch.rad2deg(angles), mask)
