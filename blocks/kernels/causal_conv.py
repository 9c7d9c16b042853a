"""Depthwise causal convolution with SiLU that never reads across a document boundary.

On CUDA `causal_conv1d_fn` of causal-conv1d where it imports (unmeasured: no GPU has run it here yet), as one operator
that torch.compile does not look into; else K shifted sums in plain torch. On a CPU the M and R blocks run it inside
their fused Numba kernels (causal_conv_cpu.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

REFERENCE = "shifted sums in plain torch"
CUDA_KERNEL = "causal_conv1d"
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_STRIDE = 8  # the kernel wants rows of a multiple of so many channels


@functools.cache
def cuda_kernel() -> tuple[tuple[Callable[..., Tensor], Callable[..., tuple[Any, ...]]] | None, str]:
    """Forward and backward pass of causal-conv1d, or None and why they do not import. Tried once, only when asked."""
    try:
        from causal_conv1d import causal_conv1d_fn
        from causal_conv1d.cpp_functions import causal_conv1d_bwd_function
    except Exception as reason:  # a build for another torch or CUDA raises whatever it likes
        return None, f"{type(reason).__name__}: {reason}"
    return (causal_conv1d_fn, causal_conv1d_bwd_function), "imported"


@torch.compiler.assume_constant_result  # else dynamo would trace the import: it does not see functools.cache
def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `causal_conv` runs for this device and dtype."""
    if device.type != "cuda" or dtype not in CUDA_DTYPES:
        return REFERENCE
    kernel, reason = cuda_kernel()
    return CUDA_KERNEL if kernel is not None else f"{REFERENCE} (causal_conv1d: {reason})"


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    """silu(bias + sum_k weight[:, k] x[t - K + 1 + k]) over the tokens of t's own segment.

    x (B, T, C); weight (C, K), K from 2 to 4 on CUDA; bias (C,); segment_ids (B, T) int32 -> (B, T, C) in x's dtype.
    """
    if kernel_name(x.device, x.dtype) != CUDA_KERNEL:
        return causal_conv_reference(x, weight, bias, segment_ids)
    channels = x.shape[-1]
    pad = -channels % CUDA_STRIDE
    weight, bias = F.pad(weight, (0, 0, 0, pad)).contiguous(), F.pad(bias, (0, pad))
    y = torch.ops.amer.causal_conv1d(F.pad(x, (0, pad)).contiguous(), weight, bias, segment_ids.contiguous())
    return y[..., :channels]


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


def _rows(x: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, T), which the kernel wants, channels still the fastest axis."""
    return rearrange(x.contiguous(), "b t c -> b c t")


@torch.library.custom_op("amer::causal_conv1d", mutates_args=())
def _convolution(x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    kernel, reason = cuda_kernel()
    assert kernel is not None, reason
    with torch.no_grad():
        y = kernel[0](_rows(x), weight, bias, seq_idx=segment_ids, activation="silu")
    return rearrange(y, "b c t -> b t c").contiguous()


@_convolution.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("amer::causal_conv1d_backward", mutates_args=())
def _convolution_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    kernel, reason = cuda_kernel()
    assert kernel is not None, reason
    # initial states, gradient of final states, room for dx and a gradient of initial states: none; SiLU: yes
    dx, dweight, dbias, _ = kernel[1](_rows(x), weight, bias, _rows(dy), segment_ids, None, None, None, False, True)
    return rearrange(dx, "b c t -> b t c").contiguous(), dweight.to(weight.dtype), dbias.to(bias.dtype)


@_convolution_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.amer.causal_conv1d_backward(dy, *ctx.saved_tensors), None


_convolution.register_autograd(_backward, setup_context=_save)
