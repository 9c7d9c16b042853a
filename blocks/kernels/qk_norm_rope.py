"""From one projection to attention's operands: per-head RMS norm on queries and keys, rotary positions, the split.

Rotation in the half-split form (Su et al. 2021, arXiv 2104.09864, as in Llama): the pairs are (i, i + head_dim / 2).
Norms and rotation are computed in float32 (float64 in a float64 model) whatever the projection's dtype.

Forms, picked by `qk_norm_rope` from device and dtype: Numba on the CPU for float32 and bfloat16 (one pass over memory
each way), plain torch elsewhere.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from blocks.kernels import qk_norm_rope_cpu
from blocks.kernels.numba_math import as_numpy, launch_threads

CPU_KERNEL = "fused QK-norm and rotation (Numba)"
REFERENCE = "QK-norm and rotation in plain torch"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `qk_norm_rope` runs for this device and dtype."""
    return CPU_KERNEL if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) else REFERENCE


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions (P,) integers -> cos and sin (P, head_dim / 2) in dtype.

    Angles are taken in float64, so a decoding step and a whole row get the same table.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
    angles = positions[:, None].to(torch.float64) * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    table: tuple[Tensor, Tensor] | None,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv (..., (H + 2 G) d + R), norm weights (d,), positions (...) rows of the table's cos and sin (P, d / 2).

    Returns q (..., H, d), k (..., G, d), v (..., G, d) and the remaining columns (..., R), all in qkv's dtype.
    """
    if kernel_name(qkv.device, qkv.dtype) == REFERENCE or q_weight.dtype != torch.float32:
        return qk_norm_rope_reference(qkv, q_weight, k_weight, positions, table, n_heads, n_kv_heads, eps)
    cos, sin = (q_weight.new_empty(0, 0), q_weight.new_empty(0, 0)) if table is None else table
    return torch.ops.amer.qk_norm_rope(qkv, q_weight, k_weight, positions, cos, sin, n_heads, n_kv_heads, eps)


def qk_norm_rope_reference(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    table: tuple[Tensor, Tensor] | None,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Plain torch, any dtype and device."""
    head_dim = q_weight.shape[0]
    widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim]
    q, k, v, rest = qkv.split([*widths, qkv.shape[-1] - sum(widths)], dim=-1)
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in (q, k, v))

    def norm_rotate(x: Tensor, weight: Tensor) -> Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        if table is not None:
            cos, sin = (t[positions].unsqueeze(-2) for t in table)
            first, second = x.chunk(2, dim=-1)
            x = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return x.to(qkv.dtype)

    return norm_rotate(q, q_weight), norm_rotate(k, k_weight), v, rest


def _flat(*tensors: Tensor) -> list[np.ndarray]:
    return [as_numpy(t).reshape(-1) for t in tensors]


@torch.library.custom_op("amer::qk_norm_rope", mutates_args=(), device_types="cpu")
def _qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(qkv, q_weight.shape[0], n_heads, n_kv_heads)
    inputs = [*_flat(qkv, q_weight, k_weight, positions), as_numpy(cos), as_numpy(sin)]
    launch_threads()
    qk_norm_rope_cpu.forward(positions.numel(), *inputs, *_flat(*outputs), np.float32(eps))
    return outputs


def _empty_outputs(qkv: Tensor, head_dim: int, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rest = qkv.shape[-1] - (n_heads + 2 * n_kv_heads) * head_dim
    q_shape, kv_shape = (*qkv.shape[:-1], n_heads, head_dim), (*qkv.shape[:-1], n_kv_heads, head_dim)
    rest_shape = (*qkv.shape[:-1], rest)
    return qkv.new_empty(q_shape), qkv.new_empty(kv_shape), qkv.new_empty(kv_shape), qkv.new_empty(rest_shape)


@_qk_norm_rope.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    n_heads: int,
    n_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(qkv, q_weight.shape[0], n_heads, n_kv_heads)


@torch.library.custom_op("amer::qk_norm_rope_backward", mutates_args=(), device_types="cpu")
def _qk_norm_rope_backward(
    grads: list[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    head_dim, n_tokens = q_weight.shape[0], positions.numel()
    shares = torch.empty(-(-n_tokens // qk_norm_rope_cpu.TOKENS_PER_TASK), 2 * head_dim)
    inputs = [*_flat(*grads, qkv, q_weight, k_weight, positions), as_numpy(cos), as_numpy(sin)]
    launch_threads()
    qk_norm_rope_cpu.backward(n_tokens, *inputs, *_flat(grad_qkv), as_numpy(shares), np.float32(eps))
    grad_weights = shares.sum(0)
    return grad_qkv, grad_weights[:head_dim].clone(), grad_weights[head_dim:].clone()


@_qk_norm_rope_backward.register_fake
def _(
    grads: list[Tensor],
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), torch.empty_like(q_weight), torch.empty_like(k_weight)


def _save(ctx, inputs, output) -> None:
    *tensors, _, _, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _grads(ctx, *grads: Tensor):
    grad_qkv, grad_q, grad_k = torch.ops.amer.qk_norm_rope_backward(list(grads), *ctx.saved_tensors, ctx.eps)
    return grad_qkv, grad_q, grad_k, *[None] * 6


_qk_norm_rope.register_autograd(_grads, setup_context=_save)
