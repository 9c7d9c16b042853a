"""Depthwise causal convolution with SiLU that never reads across a document boundary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCE = "shifted sums (torch)"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `causal_conv` runs for this device and dtype."""
    return REFERENCE


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    """silu(bias + sum_k weight[:, k] x[t - K + 1 + k]) over the tokens of t's own segment.

    x (B, T, C); weight (C, K); bias (C,); segment_ids (B, T) int32 -> (B, T, C) in x's dtype.
    """
    return causal_conv_reference(x, weight, bias, segment_ids)


def causal_conv_reference(x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    """The same as K shifted, masked sums in plain torch: any device; float32 inside, float64 for float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values, width, length = x.to(wide), weight.shape[1], x.shape[1]
    total = bias.to(wide) + values * weight[:, -1].to(wide)
    for shift in range(1, min(width, length)):
        same = (segment_ids[:, shift:] == segment_ids[:, :-shift])[..., None]
        tap = torch.where(same, values[:, :-shift], 0) * weight[:, -1 - shift].to(wide)
        total = total + F.pad(tap, (0, 0, shift, 0))
    return F.silu(total).to(x.dtype)
