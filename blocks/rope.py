"""Rotary position embedding, half-split form (Su et al. 2021, as in Llama). Positions restart per document."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (...) integers -> cos and sin (..., head_dim / 2) in dtype.

    Angles are taken in float64, so a decoding step and a whole row get the same table.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[..., None].to(torch.float64) * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., n_heads, head_dim), cos and sin (..., head_dim / 2): rotates the pairs (i, i + head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
