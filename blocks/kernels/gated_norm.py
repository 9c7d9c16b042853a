"""RMSNorm(y * silu(z)) over groups of channels: the output gate of Mamba-2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE = "plain torch"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `gated_norm` runs for this device and dtype. (On a CPU the blocks run it inside their Numba kernels.)"""
    return REFERENCE


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    """y and z (..., C); weight (C,); the mean square is taken over each of n_groups slices of C -> (..., C)."""
    return gated_norm_reference(y, z, weight, n_groups, eps)


def gated_norm_reference(y: Tensor, z: Tensor, weight: Tensor, n_groups: int, eps: float) -> Tensor:
    """The same in plain torch: any device; float32 inside, float64 for float64."""
    wide = torch.promote_types(y.dtype, torch.float32)
    gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (n_groups, -1))
    scale = torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + eps)
    return ((gated * scale).flatten(-2) * weight.to(wide)).to(y.dtype)
