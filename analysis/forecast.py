"""Multi-step latent forecast: go on from x_k for m tokens as the last step went; how far off is that?

The forecast is x_k + m (x_k - x_{k-1}) (arXiv 2604.18464). Its plain error is small for free where all states share a
large mean; so the copy-last forecast and two errors that do not see the mean stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm

from analysis.paths import Path

HORIZONS = (1, 4, 16)
KINDS = ("plain", "copy_last", "centred", "transition")


def forecast_errors(path: Path, horizons: Sequence[int] = HORIZONS) -> dict[str, Tensor]:
    """Per document (a row must hold one): {kind_m: (N,) float64}, NaN where the document is too short.

    Ratios of sums over the tokens k of a document:
    plain      sum |x_k + m v_{k-1} - x_{k+m}|^2 / sum |x_{k+m}|^2
    copy_last  sum |x_k - x_{k+m}|^2 / sum |x_{k+m}|^2, the forecast "nothing moves"
    centred    the first numerator / sum |x_{k+m} - mean of the document|^2
    transition the first numerator / sum |x_{k+1} - x_k|^2: 0 a line, 2 a walk, 3 i.i.d. at m = 1

    Plain and copy_last change with a translation of all states; centred and transition do not.
    """
    states, valid = path.states, path.valid
    count = valid.sum(1).clamp_min(1)
    mean = torch.where(valid[..., None], states, 0.0).sum(1) / count[:, None]
    spread = vector_norm(states - mean[:, None], dim=-1)
    errors: dict[str, Tensor] = {}
    for m in horizons:
        T = states.shape[1]
        if m + 2 > T:
            nothing = torch.full((len(states),), torch.nan, dtype=torch.float64, device=states.device)
            errors |= {f"{kind}_{m}": nothing for kind in KINDS}
            continue
        counts = path.connected(m + 1)  # k - 1 .. k + m, at k - 1
        ahead = states[:, 1 + m :] - states[:, 1 : T - m]  # x_{k+m} - x_k
        copied = _sum_of_squares(vector_norm(ahead, dim=-1), counts)
        error = _sum_of_squares(vector_norm(ahead.sub_(path.steps[:, : T - 1 - m], alpha=m), dim=-1), counts)
        size = _sum_of_squares(path.state_norms[:, 1 + m :], counts)
        errors[f"plain_{m}"] = error / size
        errors[f"copy_last_{m}"] = copied / size
        errors[f"centred_{m}"] = error / _sum_of_squares(spread[:, 1 + m :], counts)
        errors[f"transition_{m}"] = error / _sum_of_squares(path.step_norms[:, 1 : T - m], counts)
    return errors


def _sum_of_squares(norms: Tensor, mask: Tensor) -> Tensor:
    """(N,) float64; 0 where nothing counts, so that a ratio becomes NaN there."""
    return torch.where(mask, norms.double().square(), 0.0).sum(1)
