"""Randomness as a pure function of a key: integers and directions hashed from (seed, step, row) and place of use.

No generator has a state here, so resumed, accumulated and distributed runs see the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood 2014) in wrapping int64 arithmetic.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
POSITIVE = (1 << 63) - 1


def mix(x: Tensor) -> Tensor:
    """int64 -> int64, a bijection that scatters neighbouring numbers."""
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        x = (x ^ _logical_shift(x, shift)) * factor
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, shift: int) -> Tensor:
    return (x >> shift) & ((1 << (64 - shift)) - 1)


def keyed_bits(seed: int, step: int | Tensor, row_ids: Tensor, n_spans: int) -> Tensor:
    """(B, n_spans, 3) int64, uniform on [0, 2^63): hashed from (seed, step, row, span, slot) and nothing else."""
    device = row_ids.device
    key = mix(torch.as_tensor(seed, dtype=torch.int64, device=device) + GAMMA)
    # Hashed before they are added, each under another constant, so that equal or neighbouring numbers do not cancel.
    key = mix(key + mix(torch.as_tensor(step, dtype=torch.int64, device=device) ^ MIX[0]))
    rows = mix(key + mix(row_ids.to(torch.int64) ^ MIX[1]))
    counter = torch.arange(1, 3 * n_spans + 1, device=device, dtype=torch.int64)
    bits = mix(rows[:, None] + counter[None, :] * GAMMA)
    return (bits & POSITIVE).view(row_ids.shape[0], n_spans, 3)


def keyed_directions(key: Tensor, places: Tensor, width: int) -> Tensor:
    """Unit vectors, uniform on the sphere: (..., width) float64 for key (...) and places (...) int64, which broadcast.

    Independent for every other key or place. By normal numbers (Box and Muller 1958), two halves of 63 bits each.
    """
    cell = mix(key + mix(places ^ MIX[0]))
    counter = torch.arange(1, width + 1, device=key.device, dtype=torch.int64)
    bits = mix(cell[..., None] + counter * GAMMA) & POSITIVE
    radius = (-2 * (((bits >> 31).double() + 1) / 2**32).log()).sqrt()
    normal = radius * (2 * math.pi * ((bits & (2**31 - 1)).double() / 2**31)).cos()
    return normal / normal.square().sum(-1, keepdim=True).sqrt()
