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
from numba import njit, prange
from torch import Tensor

from blocks.kernels.numba_math import FASTMATH, as_numpy, launch_threads
from blocks.kernels.numba_matmul import load, store

CPU_KERNEL = "fused QK-norm and rotation (Numba)"
REFERENCE = "QK-norm and rotation in plain torch"
_TOKENS_PER_TASK = 64  # also the granularity of the weight gradients' sums: fixed, so threads cannot change them


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
    cos, sin = (q_weight.new_empty(0), q_weight.new_empty(0)) if table is None else table
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


@njit(cache=True, parallel=True, fastmath=FASTMATH)
def _forward(qkv, q_weight, k_weight, positions, cos, sin, q, k, v, rest, eps):
    n_tokens, head_dim = positions.size, q_weight.size
    inner, inner_kv, width = q.size // n_tokens, k.size // n_tokens, qkv.size // n_tokens
    half = head_dim // 2
    for task in prange((n_tokens + _TOKENS_PER_TASK - 1) // _TOKENS_PER_TASK):
        x, y = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        for token in range(task * _TOKENS_PER_TASK, min(n_tokens, (task + 1) * _TOKENS_PER_TASK)):
            row = qkv[token * width : (token + 1) * width]
            for at in range(0, inner + inner_kv, head_dim):
                source = row[at : at + head_dim]
                square = np.float32(0)
                for e in range(head_dim):
                    x[e] = load(source, e)
                    square += x[e] * x[e]
                scale = np.float32(1) / np.sqrt(square / np.float32(head_dim) + eps)
                weight = q_weight if at < inner else k_weight
                for e in range(head_dim):
                    y[e] = x[e] * scale * weight[e]
                if at < inner:
                    target = q[token * inner + at : token * inner + at + head_dim]
                else:
                    at_k = token * inner_kv + at - inner
                    target = k[at_k : at_k + head_dim]
                if cos.size == 0:
                    for e in range(head_dim):
                        store(target, e, y[e])
                else:
                    c, s = cos[positions[token]], sin[positions[token]]
                    high, target_high = y[half:], target[half:]
                    for e in range(half):
                        store(target, e, y[e] * c[e] - high[e] * s[e])
                        store(target_high, e, high[e] * c[e] + y[e] * s[e])
            v[token * inner_kv : (token + 1) * inner_kv] = row[inner + inner_kv : inner + 2 * inner_kv]
            n_rest = width - inner - 2 * inner_kv
            rest[token * n_rest : (token + 1) * n_rest] = row[inner + 2 * inner_kv :]


@njit(cache=True, parallel=True, fastmath=FASTMATH)
def _backward(
    grad_q, grad_k, grad_v, grad_rest, qkv, q_weight, k_weight, positions, cos, sin, grad_qkv, grad_weights, eps
):
    """grad_weights (tasks, 2, d) gets each task's share of the gradients of q_weight and k_weight."""
    n_tokens, head_dim = positions.size, q_weight.size
    inner, inner_kv, width = grad_q.size // n_tokens, grad_k.size // n_tokens, qkv.size // n_tokens
    half = head_dim // 2
    for task in prange((n_tokens + _TOKENS_PER_TASK - 1) // _TOKENS_PER_TASK):
        x, g, out = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
        high = g[half:]
        grad_weights[task] = 0
        for token in range(task * _TOKENS_PER_TASK, min(n_tokens, (task + 1) * _TOKENS_PER_TASK)):
            row, grad_row = qkv[token * width : (token + 1) * width], grad_qkv[token * width : (token + 1) * width]
            for at in range(0, inner + inner_kv, head_dim):
                if at < inner:
                    source = grad_q[token * inner + at : token * inner + at + head_dim]
                else:
                    at_k = token * inner_kv + at - inner
                    source = grad_k[at_k : at_k + head_dim]
                if cos.size == 0:
                    for e in range(head_dim):
                        g[e] = load(source, e)
                else:
                    c, s = cos[positions[token]], sin[positions[token]]
                    source_high = source[half:]
                    for e in range(half):
                        g[e] = load(source, e) * c[e] + load(source_high, e) * s[e]
                        high[e] = load(source_high, e) * c[e] - load(source, e) * s[e]
                own = row[at : at + head_dim]
                square = np.float32(0)
                for e in range(head_dim):
                    x[e] = load(own, e)
                    square += x[e] * x[e]
                scale = np.float32(1) / np.sqrt(square / np.float32(head_dim) + eps)
                weight = q_weight if at < inner else k_weight
                grad_weight = grad_weights[task, 0 if at < inner else 1]
                dot = np.float32(0)
                for e in range(head_dim):
                    x[e] *= scale
                    grad_weight[e] += g[e] * x[e]
                for e in range(head_dim):
                    out[e] = g[e] * weight[e]
                    dot += out[e] * x[e]
                dot /= np.float32(head_dim)
                target = grad_row[at : at + head_dim]
                for e in range(head_dim):
                    store(target, e, scale * (out[e] - x[e] * dot))
            grad_row[inner + inner_kv : inner + 2 * inner_kv] = grad_v[token * inner_kv : (token + 1) * inner_kv]
            n_rest = width - inner - 2 * inner_kv
            grad_row[inner + 2 * inner_kv :] = grad_rest[token * n_rest : (token + 1) * n_rest]


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
    tables = as_numpy(cos), as_numpy(sin)
    if cos.numel() == 0:
        tables = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    launch_threads()
    _forward(*_flat(qkv, q_weight, k_weight, positions), *tables, *_flat(*outputs), np.float32(eps))
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
    n_tasks = -(-positions.numel() // _TOKENS_PER_TASK)
    shares = torch.empty(n_tasks, 2, q_weight.shape[0])
    tables = as_numpy(cos), as_numpy(sin)
    if cos.numel() == 0:
        tables = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    launch_threads()
    _backward(
        *_flat(*grads, qkv, q_weight, k_weight, positions),
        *tables,
        *_flat(grad_qkv),
        as_numpy(shares),
        np.float32(eps),
    )
    grad_q_weight, grad_k_weight = shares.sum(0).unbind(0)
    return grad_qkv, grad_q_weight.clone(), grad_k_weight.clone()


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
