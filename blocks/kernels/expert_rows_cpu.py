"""Numba pieces of the expert MLPs that work row by row, on float32 or bfloat16 bits; sums in float32.

Flat arrays. N tokens of K assignments; assignments sorted by expert are "rows", M = N * K of them. Widths: D model,
H rows of an up matrix (2 F for swiglu: gate then up; F for relu2), F inner. Every sum runs in a fixed order, whatever
the number of threads.
"""

# mypy: disable-error-code="call-arg, var-annotated"
from __future__ import annotations

import numpy as np
from numba import njit, prange

from blocks.kernels.numba_math import FASTMATH, read, sigmoid, write

CHUNK = 64  # rows or tokens per task


@njit(cache=True)
def sort(expert_ids, rows, order, position):
    """Stable counting sort: rows (E,) per expert, order (M,) row -> flat assignment, position (M,) its inverse."""
    for expert in range(rows.size):
        rows[expert] = 0
    for i in range(expert_ids.size):
        rows[expert_ids[i]] += 1
    cursor = np.cumsum(rows) - rows
    for i in range(expert_ids.size):
        row = cursor[expert_ids[i]]
        cursor[expert_ids[i]] += 1
        order[row] = i
        position[i] = row


@njit(cache=True, fastmath=FASTMATH)
def activate(a, h, weight, swiglu):
    """a (F,) = weight * act(h (H,))."""
    inner = a.size
    if swiglu:
        for e in range(inner):
            gate = read(h, e)
            write(a, e, weight * gate * sigmoid(gate) * read(h, e + inner))
    else:
        for e in range(inner):
            positive = max(read(h, e), np.float32(0))
            write(a, e, weight * positive * positive)


@njit(cache=True, fastmath=FASTMATH)
def activate_backward(grad_h, a, grad_a, h, weight, swiglu):
    """Fills grad_h (H,) and the weighted activation a (F,); returns the gradient of weight."""
    inner = a.size
    total = np.float32(0)
    if swiglu:
        for e in range(inner):
            gate, up, grad = read(h, e), read(h, e + inner), read(grad_a, e)
            s = sigmoid(gate)
            silu = gate * s
            total += grad * silu * up
            write(a, e, weight * silu * up)
            write(grad_h, e, weight * grad * up * s * (np.float32(1) + gate - silu))
            write(grad_h, e + inner, weight * grad * silu)
    else:
        for e in range(inner):
            positive, grad = max(read(h, e), np.float32(0)), read(grad_a, e)
            total += grad * positive * positive
            write(a, e, weight * positive * positive)
            write(grad_h, e, np.float32(2) * weight * grad * positive)
    return total


@njit(cache=True, fastmath=FASTMATH)
def _combine_chunk(chunk, y, out, position, top_k, d):
    total = np.empty(d, np.float32)
    for token in range(chunk * CHUNK, min(y.size // d, (chunk + 1) * CHUNK)):
        own = y[token * d : (token + 1) * d]
        for k in range(top_k):
            at = position[token * top_k + k] * d
            values = out[at : at + d]
            for e in range(d):
                total[e] = read(values, e) + (total[e] if k else np.float32(0))
        for e in range(d):
            write(own, e, total[e])


@njit(cache=True, parallel=True)
def combine(y, out, position, top_k, d):
    """y (N, D) = the sum of each token's rows of out (M, D), in the order of its assignments."""
    for chunk in prange((y.size // d + CHUNK - 1) // CHUNK):
        _combine_chunk(chunk, y, out, position, top_k, d)
