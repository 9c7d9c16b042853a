"""What stands between the two projections of an M2RNN layer: convolution, gates, recurrence, output gate and norm.

Forms, picked by `m2rnn_mixer` from device and dtype:
- CPU, float32 and bfloat16: `amer::m2rnn_mixer` (m2rnn_mixer_cpu.py), Numba, all in one.
- else `m2rnn_mixer_composed`: the operations one after another, each with the kernel that it has for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from blocks.kernels import causal_conv as convolutions
from blocks.kernels import m2rnn_mixer_cpu
from blocks.kernels.causal_conv import causal_conv, causal_conv_reference
from blocks.kernels.gated_norm import gated_norm
from blocks.kernels.m2rnn import kernel_name as recurrence_name
from blocks.kernels.m2rnn import m2rnn, m2rnn_reference
from blocks.kernels.m2rnn_layout import M2RNNShape, forget_gate
from errors import PreflightError

CPU_KERNEL = "fused M2RNN (Numba CPU)"
CPU_DTYPES = (torch.float32, torch.bfloat16)
# Relative error of the start-up check. bfloat16: the composed form also rounds between its parts.
CHECK_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 5e-2, torch.float16: 2e-2}


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `m2rnn_mixer` runs for this device and dtype."""
    if device.type == "cpu" and dtype in CPU_DTYPES:
        return CPU_KERNEL
    return f"{recurrence_name(device, dtype)}; convolution: {convolutions.kernel_name(device, dtype)}"


def m2rnn_mixer(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    shape: M2RNNShape,
) -> Tensor:
    """projected (B, T, N V + C + N), the input projection: output gate, q, k, v, forget logits -> (B, T, N V).

    conv_weight (C, d_conv), d_conv <= 4; conv_bias (C,); dt_bias and A_log (N,); D (N, V); state_weight (N, V, V);
    norm_weight (N V,); segment_ids (B, T) int32 and starts (B, T) bool as in SequenceContext. The result has the dtype
    of projected; gates, state and norm are at least float32.
    """
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, state_weight, norm_weight)
    if kernel_name(projected.device, projected.dtype) != CPU_KERNEL:
        return m2rnn_mixer_composed(projected, *parameters, segment_ids, starts, shape)
    limit = math.inf if shape.gradient_clip is None else shape.gradient_clip
    sizes = (shape.key_dim, shape.value_dim, shape.n_q_heads, shape.n_k_heads, shape.eps, limit)
    return m2rnn_mixer_cpu.m2rnn_mixer(projected, *(t.float() for t in parameters), segment_ids, starts, *sizes)[0]


def m2rnn_mixer_composed(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    shape: M2RNNShape,
) -> Tensor:
    """The same from its parts, each with the kernel that it has for the device and dtype."""
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, state_weight, norm_weight)
    return _compose(projected, *parameters, segment_ids, starts, shape, causal_conv, m2rnn)


def m2rnn_mixer_reference(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    shape: M2RNNShape,
) -> Tensor:
    """The same in plain torch under autograd, the recurrence as a literal loop: any device and dtype."""
    parameters = (conv_weight, conv_bias, dt_bias, A_log, D, state_weight, norm_weight)
    return _compose(projected, *parameters, segment_ids, starts, shape, causal_conv_reference, m2rnn_reference)


def _compose(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    shape: M2RNNShape,
    convolution: Callable[..., Tensor],
    recurrence: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    gate, qkv, logits = projected.split([norm_weight.shape[0], conv_weight.shape[0], A_log.shape[0]], dim=-1)
    q, k, v = shape.split(convolution(qkv, conv_weight, conv_bias, segment_ids))
    forget, _ = forget_gate(logits, dt_bias, A_log)
    y, _ = recurrence(q, k, v, state_weight, forget, D, starts, gradient_clip=shape.gradient_clip)
    return gated_norm(rearrange(y, "b t n v -> b t (n v)"), gate, norm_weight, 1, shape.eps)


def check_against_reference(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Runs the kernels that would be used and plain torch on two tiny packed rows, forward and backward.

    Returns the relative error of the output and of every gradient; raises PreflightError when one is beyond
    CHECK_TOLERANCE. Meant for the start of a run on a GPU, whose kernels this project has not been able to test.
    """
    generator = torch.Generator().manual_seed(0)
    shape, n_heads = M2RNNShape(16, 16, 1, 1, 1e-5, None), 2
    inner, channels = n_heads * shape.value_dim, 2 * shape.key_dim + n_heads * shape.value_dim
    sizes = {
        "projected": (2, 37, inner + channels + n_heads),
        "conv_weight": (channels, 4),
        "conv_bias": (channels,),
        "dt_bias": (n_heads,),
        "A_log": (n_heads,),
        "D": (n_heads, shape.value_dim),
        "state_weight": (n_heads, shape.value_dim, shape.value_dim),
        "norm_weight": (inner,),
    }
    tensors = {name: torch.randn(size, generator=generator).to(device) for name, size in sizes.items()}
    tensors["state_weight"] = torch.eye(shape.value_dim, device=device) + 0.1 * tensors["state_weight"]
    segment_ids = torch.tensor([[0] * 16 + [1] * 20 + [2], [0] * 5 + [1] * 32], dtype=torch.int32, device=device)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    results = []
    forms: list[Callable[..., Tensor]] = [m2rnn_mixer, m2rnn_mixer_reference]
    for form in forms:
        leaves = [t.to(dtype if n == "projected" else torch.float32).requires_grad_() for n, t in tensors.items()]
        y = form(*leaves, segment_ids, starts, shape)
        results.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
    pairs = zip(("output", *sizes), *results, strict=True)
    errors = {name: float((a.float() - b.float()).norm() / b.float().norm()) for name, a, b in pairs}
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[worst] <= CHECK_TOLERANCE[dtype]:
        raise PreflightError(
            f"R kernel {kernel_name(device, dtype)!r} disagrees with plain torch on {device} in {dtype}: {worst} is off"
            f" by {errors[worst]:.1e} of its norm, at most {CHECK_TOLERANCE[dtype]:.0e} is expected"
        )
    return errors
