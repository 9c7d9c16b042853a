"""The cheap subset, for a cadence inside training: a few rows of the step's own states, no extra forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.curvature import tangent_correlation, turning_angles
from analysis.paths import Path, row_mean

# Rows that are read, and tokens among them of the rank: enough for a trend, not for a claim.
MAX_ROWS = 4
RANK_TOKENS = 128


@torch.no_grad()
def cheap_metrics(
    hidden_states: Sequence[Tensor],
    final: Tensor,
    document_ids: Tensor,
    letters: Sequence[str],
    max_rows: int = MAX_ROWS,
) -> dict[str, float]:
    """Means over the boundaries that each family writes: {"curvature/<metric>/<family>": number}, ready to be logged.

    hidden_states: depth + 1 tensors (B, T, D); final (B, T, D); document_ids (B, T), -1 on padding; letters: one per
    block. Families: embedding, the letters, final. Nothing is kept, and no gradient is touched.

    degrees: mean turning angle. stp_consecutive: 1 - C(1). state_norm, step_norm: mean |x|, |v|. effective_rank: of
    128 tokens, so it is at most 128 and comparable with itself only. NaN where the rows hold no turn.
    """
    families = ["embedding", *letters, "final"]
    rows = slice(0, max_rows)
    ids = document_ids[rows]
    boundaries = [states[rows] for states in (*hidden_states, final)]
    ranks = _ranks(boundaries, ids)
    found: dict[str, list[float]] = {}
    for family, states, rank in zip(families, boundaries, ranks, strict=True):
        path = Path.of(states, ids)
        angles, mask = turning_angles(path)
        values: dict[str, Tensor | float] = {
            "degrees": row_mean(torch.rad2deg(angles), mask).nanmean(),
            "stp_consecutive": 1 - tangent_correlation(path, 1).nanmean(),
            "state_norm": row_mean(path.state_norms, path.valid).nanmean(),
            "step_norm": row_mean(path.step_norms, path.step_valid).nanmean(),
            "effective_rank": rank,
        }
        for name, value in values.items():
            found.setdefault(f"curvature/{name}/{family}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def _ranks(boundaries: Sequence[Tensor], document_ids: Tensor) -> list[float]:
    """Effective rank of the same evenly spaced tokens at every boundary."""
    places = (document_ids.flatten() >= 0).nonzero().flatten()
    if len(places) < 2:
        return [float("nan")] * len(boundaries)
    n = min(RANK_TOKENS, len(places))
    chosen = places[torch.linspace(0, len(places) - 1, n, device=places.device).long()]
    states = torch.stack([states.flatten(0, 1)[chosen] for states in boundaries])
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    centred = states - states.mean(1, keepdim=True)
    wide = centred.shape[2] >= centred.shape[1]  # the smaller product: the other one has only zeros more, not exact
    products = centred @ centred.mT if wide else centred.mT @ centred
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp().tolist()
