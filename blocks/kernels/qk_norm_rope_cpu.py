"""Numba kernels of qk_norm_rope. Flat arrays of float32 or bfloat16 bits; sums and rotation in float32.

qkv (N, (H + 2 G) d + R), q (N, H d), k and v (N, G d), rest (N, R), positions (N,) rows of cos and sin (P, d / 2),
which are empty where nothing is rotated.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import numpy as np
from numba import njit, prange

from blocks.kernels.numba_math import FASTMATH, read, write

TOKENS_PER_TASK = 64  # also the granularity of the weight gradients' sums: fixed, so threads cannot change them


@njit(cache=True, fastmath=FASTMATH)
def _normalise(x, source, eps):
    """x (d,) = source / rms(source); returns 1 / rms."""
    square = np.float32(0)
    for e in range(x.size):
        x[e] = read(source, e)
        square += x[e] * x[e]
    scale = np.float32(1) / np.sqrt(square / np.float32(x.size) + eps)
    for e in range(x.size):
        x[e] *= scale
    return scale


@njit(cache=True, fastmath=FASTMATH)
def _head_forward(target, source, weight, cos, sin, x, eps):
    _normalise(x, source, eps)
    for e in range(x.size):
        x[e] *= weight[e]
    if cos.size == 0:
        for e in range(x.size):
            write(target, e, x[e])
    half = cos.size
    for e in range(half):
        write(target, e, x[e] * cos[e] - x[e + half] * sin[e])
        write(target, e + half, x[e + half] * cos[e] + x[e] * sin[e])


@njit(cache=True, fastmath=FASTMATH)
def _head_backward(target, grad, source, weight, grad_weight, cos, sin, x, g, eps):
    half = cos.size
    for e in range(half):
        g[e] = read(grad, e) * cos[e] + read(grad, e + half) * sin[e]
        g[e + half] = read(grad, e + half) * cos[e] - read(grad, e) * sin[e]
    if cos.size == 0:
        for e in range(g.size):
            g[e] = read(grad, e)
    scale = _normalise(x, source, eps)
    dot = np.float32(0)
    for e in range(x.size):
        grad_weight[e] += g[e] * x[e]
        g[e] *= weight[e]
        dot += g[e] * x[e]
    dot /= np.float32(x.size)
    for e in range(x.size):
        write(target, e, scale * (g[e] - x[e] * dot))


@njit(cache=True)
def _copy(target, source):
    for e in range(target.size):
        target[e] = source[e]


@njit(cache=True)
def _angles(table, positions, token):
    return table[positions[token]] if table.size else table[:0].reshape(-1)


@njit(cache=True)
def _forward_tokens(first, last, n_tokens, qkv, q_weight, k_weight, positions, cos, sin, q, k, v, rest, eps):
    d, width = q_weight.size, qkv.size // n_tokens
    inner, inner_kv, n_rest = q.size // n_tokens, k.size // n_tokens, rest.size // n_tokens
    x = np.empty(d, np.float32)
    for t in range(first, last):
        row = qkv[t * width : (t + 1) * width]
        c, s = _angles(cos, positions, t), _angles(sin, positions, t)
        for at in range(0, inner, d):
            _head_forward(q[t * inner + at : t * inner + at + d], row[at : at + d], q_weight, c, s, x, eps)
        row = row[inner:]
        for at in range(0, inner_kv, d):
            _head_forward(k[t * inner_kv + at : t * inner_kv + at + d], row[at : at + d], k_weight, c, s, x, eps)
        _copy(v[t * inner_kv : (t + 1) * inner_kv], row[inner_kv:])
        _copy(rest[t * n_rest : (t + 1) * n_rest], row[2 * inner_kv :])


@njit(cache=True, parallel=True)
def forward(n_tokens, qkv, q_weight, k_weight, positions, cos, sin, q, k, v, rest, eps):
    """Fills q, k, v and rest."""
    for task in prange((n_tokens + TOKENS_PER_TASK - 1) // TOKENS_PER_TASK):
        first = task * TOKENS_PER_TASK
        last = min(n_tokens, first + TOKENS_PER_TASK)
        _forward_tokens(first, last, n_tokens, qkv, q_weight, k_weight, positions, cos, sin, q, k, v, rest, eps)


@njit(cache=True)
def _backward_tokens(
    first, last, n_tokens, dq, dk, dv, drest, qkv, q_weight, k_weight, positions, cos, sin, dqkv, dweights, eps
):
    d, width = q_weight.size, qkv.size // n_tokens
    inner, inner_kv, n_rest = dq.size // n_tokens, dk.size // n_tokens, drest.size // n_tokens
    x, g = np.empty(d, np.float32), np.empty(d, np.float32)
    q_share, k_share = dweights[:d], dweights[d:]
    for e in range(2 * d):
        dweights[e] = 0
    for t in range(first, last):
        row, drow = qkv[t * width : (t + 1) * width], dqkv[t * width : (t + 1) * width]
        c, s = _angles(cos, positions, t), _angles(sin, positions, t)
        for at in range(0, inner, d):
            grad = dq[t * inner + at : t * inner + at + d]
            _head_backward(drow[at : at + d], grad, row[at : at + d], q_weight, q_share, c, s, x, g, eps)
        row, drow = row[inner:], drow[inner:]
        for at in range(0, inner_kv, d):
            grad = dk[t * inner_kv + at : t * inner_kv + at + d]
            _head_backward(drow[at : at + d], grad, row[at : at + d], k_weight, k_share, c, s, x, g, eps)
        _copy(drow[inner_kv : 2 * inner_kv], dv[t * inner_kv : (t + 1) * inner_kv])
        _copy(drow[2 * inner_kv :], drest[t * n_rest : (t + 1) * n_rest])


@njit(cache=True, parallel=True)
def backward(n_tokens, dq, dk, dv, drest, qkv, q_weight, k_weight, positions, cos, sin, dqkv, dweights, eps):
    """Fills dqkv and dweights (tasks, 2 d): each task's share of the gradients of q_weight and k_weight."""
    for task in prange(dweights.shape[0]):
        first = task * TOKENS_PER_TASK
        last = min(n_tokens, first + TOKENS_PER_TASK)
        _backward_tokens(
            first, last, n_tokens, dq, dk, dv, drest, qkv, q_weight, k_weight, positions, cos, sin, dqkv,
            dweights[task], eps,
        )  # fmt: skip
