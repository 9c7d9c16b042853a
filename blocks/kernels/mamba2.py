"""What stands between the two projections of Mamba-2: convolution, SSD, output gate and norm.

Forms, picked by `mamba2_inner` from device and dtype:
- CPU, float32 and bfloat16: `amer::mamba2_inner` (mamba2_cpu.py), Numba, one pass for the scan with its convolution and
  one for the gated norm, each way.
- elsewhere: `causal_conv`, `ssd` and `gated_norm` one after another, each of which picks its own kernel: those of
  causal-conv1d and mamba-ssm on CUDA where they import (unmeasured here: no GPU has run them yet), else plain torch.
- float64 on a CPU: plain torch, `mamba2_inner_reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from blocks.kernels import causal_conv, mamba2_cpu, ssd
from blocks.kernels.gated_norm import gated_norm
from errors import PreflightError

CPU_KERNEL = "fused Mamba-2 scan (Numba CPU)"
CPU_DTYPES = (torch.float32, torch.bfloat16)
# Relative error of the start-up check. float32: GPUs may multiply in TF32 (10 bits).
CHECK_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Mamba2Shape:
    """Sizes that the tensors alone do not tell."""

    head_dim: int  # P
    d_state: int  # N
    n_groups: int  # G
    chunk_size: int
    eps: float


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `mamba2_inner` runs for this device and dtype."""
    if device.type == "cpu" and dtype in CPU_DTYPES:
        return CPU_KERNEL
    return f"{ssd.kernel_name(device, dtype)}; convolution: {causal_conv.kernel_name(device, dtype)}"


def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    shape: Mamba2Shape,
) -> Tensor:
    """zxbcdt (B, T, 2 H P + 2 G N + H), the input projection: gate z, then x, B, C, then dt -> (B, T, H P).

    conv_weight (H P + 2 G N, K), K <= 4; conv_bias; dt_bias, A_log and D (H,); norm_weight (H P,); segment_ids (B, T).
    The result has the dtype of zxbcdt; decays, dt, the state and the norm are at least float32.
    """
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    if kernel_name(zxbcdt.device, zxbcdt.dtype) != CPU_KERNEL:
        return _one_after_another(zxbcdt, *parameters, segment_ids, shape, causal_conv.causal_conv, ssd.ssd)
    wide = [t.float() for t in parameters]
    sizes = (shape.head_dim, shape.d_state, shape.n_groups, shape.chunk_size, shape.eps)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (zxbcdt, *wide))
    return mamba2_cpu.mamba2_inner(zxbcdt, *wide, segment_ids, *sizes, save)[0]


def mamba2_inner_reference(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    shape: Mamba2Shape,
) -> Tensor:
    """The same in plain torch: any device; at least float32 inside."""
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, norm_weight)
    forms = (causal_conv.causal_conv_reference, ssd.ssd_reference)
    return _one_after_another(zxbcdt, *parameters, segment_ids, shape, *forms)


def check_against_reference(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Runs the kernel that would be used and plain torch on two tiny packed rows, forward and backward.

    Returns the relative error of the output and of every gradient; raises PreflightError when one is beyond
    CHECK_TOLERANCE. Meant for the start of a run on a GPU, whose kernels this project has not been able to test.
    """
    generator = torch.Generator().manual_seed(0)
    shape, n_heads = Mamba2Shape(head_dim=16, d_state=16, n_groups=1, chunk_size=16, eps=1e-5), 2
    inner, channels = n_heads * shape.head_dim, n_heads * shape.head_dim + 2 * shape.d_state
    sizes = [
        (2, 37, inner + channels + n_heads),
        (channels, 4),
        (channels,),
        (n_heads,),
        (n_heads,),
        (n_heads,),
        (inner,),
    ]
    tensors = [torch.randn(size, generator=generator).to(device) for size in sizes]
    segment_ids = torch.tensor([[0] * 16 + [1] * 20 + [2], [0] * 5 + [1] * 32], dtype=torch.int32, device=device)
    results = []
    forms: list[Callable[..., Tensor]] = [mamba2_inner, mamba2_inner_reference]
    for form in forms:
        leaves = [t.to(dtype if i == 0 else torch.float32).requires_grad_() for i, t in enumerate(tensors)]
        y = form(*leaves, segment_ids, shape)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    names = ("output", "zxbcdt", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
    pairs = zip(names, *results, strict=True)
    errors = {name: float((a.float() - b.float()).norm() / b.float().norm()) for name, a, b in pairs}
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[worst] <= CHECK_TOLERANCE[dtype]:
        raise PreflightError(
            f"M kernel {kernel_name(device, dtype)!r} disagrees with plain torch on {device} in {dtype}: {worst} is off"
            f" by {errors[worst]:.1e} of its norm, at most {CHECK_TOLERANCE[dtype]:.0e} is expected"
        )
    return errors


def _one_after_another(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    shape: Mamba2Shape,
    convolution: Callable[..., Tensor],
    scan: Callable[..., Tensor],
) -> Tensor:
    wide = torch.promote_types(zxbcdt.dtype, torch.float32)
    inner, group = norm_weight.shape[0], shape.n_groups * shape.d_state
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * group, D.shape[0]], dim=-1)
    x, B, C = convolution(xBC, conv_weight, conv_bias, segment_ids).split([inner, group, group], dim=-1)
    y = scan(
        rearrange(x, "b t (h p) -> b t h p", p=shape.head_dim),
        F.softplus(dt.to(wide) + dt_bias.to(wide)),
        -A_log.to(wide).exp(),
        rearrange(B, "b t (g n) -> b t g n", n=shape.d_state),
        rearrange(C, "b t (g n) -> b t g n", n=shape.d_state),
        D.to(wide),
        segment_ids,
        shape.chunk_size,
    )
    return gated_norm(rearrange(y, "b t h p -> b t (h p)"), z, norm_weight, shape.n_groups, shape.eps)
