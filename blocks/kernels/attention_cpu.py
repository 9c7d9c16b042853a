"""Numba kernels of document attention: one task per document and key head, all of its operands in cache.

Flat arrays of float32 or bfloat16 bits: q, out (N, H d), k, v (N, G d), lse (N, H) float32, N = B * T tokens, document
i at tokens bounds[i] .. bounds[i + 1]. Queries go in blocks of 16 against the keys that any of them may read, so no
work is spent on the future or, with a window, on the far past. Sums are float32; a task writes only its own
ranges in a fixed order, so the result does not depend on the number of threads.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import heapq

import numpy as np
from numba import njit, prange

from blocks.kernels.numba_math import FASTMATH, exp, read, write
from blocks.kernels.numba_matmul import matmul

BLOCK = 16  # queries per block


@njit(inline="always")
def _padded(n):
    return (n + 15) // 16 * 16


def assign(bounds, n_heads, n_workers):
    """Tasks (document * n_heads + head) and the first task of every worker: longest first, to the least loaded."""
    lengths = np.diff(bounds)
    owned: list[list[int]] = [[] for _ in range(n_workers)]
    heap = [(0, worker) for worker in range(n_workers)]
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        for head in range(n_heads):
            cost, worker = heapq.heappop(heap)
            owned[worker].append(document * n_heads + head)
            heapq.heappush(heap, (cost + length * (length + 64), worker))
    first_task = np.cumsum([0, *(len(tasks) for tasks in owned)])
    return np.array([task for tasks in owned for task in tasks]), first_task


# Inner loops run over slices: from index 0 Numba knows that no index is negative, and only then do they vectorise.
@njit(cache=True, fastmath=FASTMATH)
def _load_rows(target, source, first, rows, row_width, column, width, padded_rows, padded_width, factor):
    """target (padded_rows, padded_width) = source rows [first, first + rows), columns [column, column + width)."""
    for i in range(rows):
        at = (first + i) * row_width + column
        own, source_row = target[i * padded_width : (i + 1) * padded_width], source[at : at + width]
        for e in range(width):
            own[e] = read(source_row, e) * factor
        own[width:] = 0
    target[rows * padded_width : padded_rows * padded_width] = 0


@njit(cache=True, fastmath=FASTMATH)
def _load_columns(target, source, first, rows, row_width, column, width, padded_rows, padded_width):
    """The transpose: target (padded_width, padded_rows)."""
    for j in range(0, padded_rows, 16):
        stop = min(j + 16, rows)
        for e in range(width):
            own, source_column = target[e * padded_rows + j :], source[(first + j) * row_width + column + e :]
            for i in range(stop - j):
                own[i] = read(source_column, i * row_width)
            for i in range(stop - j, 16):
                own[i] = np.float32(0)
    target[width * padded_rows : padded_width * padded_rows] = 0


@njit(cache=True, fastmath=FASTMATH)
def _store_row(target, values, factor):
    for e in range(target.size):
        write(target, e, values[e] * factor)


# The largest value of a range can only be vectorised where NaN may be ignored; one here still reaches exp itself.
@njit(fastmath={"nnan", "nsz"}, cache=True)
def largest(values):
    """The largest element of a float32 array, -inf if it is empty."""
    top = np.float32(-np.inf)
    for j in range(values.size):
        top = max(top, values[j])
    return top


@njit(cache=True, fastmath=FASTMATH)
def _forward_tasks(q, k, v, out, lse, bounds, tasks, n_heads, n_kv_heads, head_dim, window, scale):
    group = n_heads // n_kv_heads
    width = _padded(head_dim)
    longest = _padded(np.max(bounds[1:] - bounds[:-1]))
    one = np.float32(1)
    kt, vv = np.empty(width * longest, np.float32), np.empty(longest * width, np.float32)
    qq, mixed = np.empty(BLOCK * width, np.float32), np.empty(BLOCK * width, np.float32)
    s = np.empty(BLOCK * longest, np.float32)
    for task in tasks:
        start, kv_head = bounds[task // n_kv_heads], task % n_kv_heads
        length = bounds[task // n_kv_heads + 1] - start
        keys = _padded(length)
        column = kv_head * head_dim
        _load_columns(kt, k, start, length, n_kv_heads * head_dim, column, head_dim, keys, width)
        _load_rows(vv, v, start, length, n_kv_heads * head_dim, column, head_dim, keys, width, one)
        for block in range(group * (keys // BLOCK)):
            head = kv_head * group + block // (keys // BLOCK)
            i0 = block % (keys // BLOCK) * BLOCK
            rows = min(BLOCK, length - i0)
            low = max(0, i0 - window + 1) // 16 * 16 if window > 0 else 0
            n = i0 + BLOCK - low
            _load_rows(qq, q, start + i0, rows, n_heads * head_dim, head * head_dim, head_dim, BLOCK, width, scale)
            matmul(s, 0, n, qq, 0, width, 1, kt, low, keys, BLOCK, n, width, False)
            for r in range(rows):
                stop = r * n + i0 + r + 1 - low
                begin = r * n + (max(0, i0 + r - window + 1) - low if window > 0 else 0)
                row = s[begin:stop]
                top = largest(row)
                total = np.float32(0)
                for j in range(row.size):
                    row[j] = exp(row[j] - top)
                    total += row[j]
                s[r * n : begin] = 0
                s[stop : (r + 1) * n] = 0
                lse[(start + i0 + r) * n_heads + head] = top + np.log(total)
                factor = one / total
                for j in range(row.size):
                    row[j] *= factor
            s[rows * n : BLOCK * n] = 0
            matmul(mixed, 0, width, s, 0, n, 1, vv, low * width, width, BLOCK, width, n, False)
            for r in range(rows):
                at = (start + i0 + r) * n_heads * head_dim + head * head_dim
                _store_row(out[at : at + head_dim], mixed[r * width :], one)


@njit(cache=True, parallel=True)
def forward(q, k, v, out, lse, bounds, tasks, first_task, n_heads, n_kv_heads, head_dim, window, scale):
    """Fills out and lse (log of the softmax denominator). window 0 = none."""
    for worker in prange(first_task.size - 1):
        own = tasks[first_task[worker] : first_task[worker + 1]]
        _forward_tasks(q, k, v, out, lse, bounds, own, n_heads, n_kv_heads, head_dim, window, scale)


@njit(cache=True, fastmath=FASTMATH)
def _backward_tasks(
    grad, q, k, v, out, lse, grad_q, grad_k, grad_v, bounds, tasks, n_heads, n_kv_heads, head_dim, window, scale
):
    group = n_heads // n_kv_heads
    width = _padded(head_dim)
    longest = _padded(np.max(bounds[1:] - bounds[:-1]))
    one = np.float32(1)
    kt, vt = np.empty(width * longest, np.float32), np.empty(width * longest, np.float32)
    kk = np.empty(longest * width, np.float32)
    dk, dv = np.empty(longest * width, np.float32), np.empty(longest * width, np.float32)
    qq, go = np.empty(BLOCK * width, np.float32), np.empty(BLOCK * width, np.float32)
    dq = np.empty(BLOCK * width, np.float32)
    p, ds = np.empty(BLOCK * longest, np.float32), np.empty(BLOCK * longest, np.float32)
    for task in tasks:
        start, kv_head = bounds[task // n_kv_heads], task % n_kv_heads
        length = bounds[task // n_kv_heads + 1] - start
        keys = _padded(length)
        column, row_width = kv_head * head_dim, n_kv_heads * head_dim
        _load_columns(kt, k, start, length, row_width, column, head_dim, keys, width)
        _load_columns(vt, v, start, length, row_width, column, head_dim, keys, width)
        _load_rows(kk, k, start, length, row_width, column, head_dim, keys, width, one)
        dk[: keys * width] = 0
        dv[: keys * width] = 0
        for block in range(group * (keys // BLOCK)):
            head = kv_head * group + block // (keys // BLOCK)
            i0 = block % (keys // BLOCK) * BLOCK
            rows = min(BLOCK, length - i0)
            low = max(0, i0 - window + 1) // 16 * 16 if window > 0 else 0
            n = i0 + BLOCK - low
            at_head = head * head_dim
            _load_rows(qq, q, start + i0, rows, n_heads * head_dim, at_head, head_dim, BLOCK, width, scale)
            _load_rows(go, grad, start + i0, rows, n_heads * head_dim, at_head, head_dim, BLOCK, width, one)
            matmul(p, 0, n, qq, 0, width, 1, kt, low, keys, BLOCK, n, width, False)
            matmul(ds, 0, n, go, 0, width, 1, vt, low, keys, BLOCK, n, width, False)
            for r in range(rows):
                at = (start + i0 + r) * n_heads * head_dim + at_head
                delta = np.float32(0)
                own_grad, own_out = go[r * width :], out[at : at + head_dim]
                for e in range(head_dim):
                    delta += own_grad[e] * read(own_out, e)
                own_lse = lse[(start + i0 + r) * n_heads + head]
                stop = r * n + i0 + r + 1 - low
                begin = r * n + (max(0, i0 + r - window + 1) - low if window > 0 else 0)
                p[r * n : begin] = 0
                ds[r * n : begin] = 0
                p_row, ds_row = p[begin:stop], ds[begin:stop]
                for j in range(p_row.size):
                    p_row[j] = exp(p_row[j] - own_lse)
                    ds_row[j] = p_row[j] * (ds_row[j] - delta)
                p[stop : (r + 1) * n] = 0
                ds[stop : (r + 1) * n] = 0
            p[rows * n : BLOCK * n] = 0
            ds[rows * n : BLOCK * n] = 0
            matmul(dv, low * width, width, p, 0, 1, n, go, 0, width, n, width, BLOCK, True)
            matmul(dk, low * width, width, ds, 0, 1, n, qq, 0, width, n, width, BLOCK, True)
            matmul(dq, 0, width, ds, 0, n, 1, kk, low * width, width, BLOCK, width, n, False)
            for r in range(rows):
                at = (start + i0 + r) * n_heads * head_dim + at_head
                _store_row(grad_q[at : at + head_dim], dq[r * width :], scale)
        for i in range(length):
            at = (start + i) * row_width + column
            _store_row(grad_k[at : at + head_dim], dk[i * width :], one)
            _store_row(grad_v[at : at + head_dim], dv[i * width :], one)


@njit(cache=True, parallel=True)
def backward(
    grad, q, k, v, out, lse, grad_q, grad_k, grad_v,
    bounds, tasks, first_task, n_heads, n_kv_heads, head_dim, window, scale,
):  # fmt: skip
    """Fills grad_q, grad_k and grad_v; probabilities are computed again from lse."""
    for worker in prange(first_task.size - 1):
        own = tasks[first_task[worker] : first_task[worker + 1]]
        _backward_tasks(
            grad, q, k, v, out, lse, grad_q, grad_k, grad_v,
            bounds, own, n_heads, n_kv_heads, head_dim, window, scale,
        )  # fmt: skip
