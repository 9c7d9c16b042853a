"""The Numba loops of M2RNN: one task per (row, head), the state kept every `chunk` steps and recomputed.

A row of the state is a recurrence of its own (row i of h W reads row i of h), so four rows go through a step
together, in registers, and hide the latency of each other's multiply-adds.

All arrays are flat float32; K is a multiple of 4 and V of 16 (callers pad with zeros, which stay zero: tanh(0) = 0).
`sizes` is (B, T, N, Nq, Nk, K, V, chunk); `rows` is how many elements lie between two tokens of q, k and v, which may
be columns of one array. Element offsets end in _at.
"""

# mypy: disable-error-code="call-arg, var-annotated"
from __future__ import annotations

import numpy as np
from numba import njit, prange

from blocks.kernels.numba_math import helper, kernel
from blocks.kernels.numba_vector import LANES, clamp, fma, load, load_splat, splat, store, store_sums, tanh

ROWS = 4


@kernel
def sum_groups(per_head, total, tokens, groups, members, width, kept, total_row):
    """per_head (tokens, groups, members, width), summed over members, its first `kept` columns into rows of total."""
    for token in prange(tokens):
        _sum_token(np.int64(token), per_head, total, groups, members, width, kept, total_row)


@helper
def _sum_token(token, per_head, total, groups, members, width, kept, total_row):
    for group in range(groups):
        at, to = (token * groups + group) * members * width, token * total_row + group * kept
        for i in range(kept):
            term = np.float32(0.0)
            for member in range(members):
                term += per_head[at + member * width + i]
            total[to + i] = term


@njit(inline="always")
def _copy(source, source_at, target, target_at, length):
    for i in range(0, length, LANES):
        store(target, target_at + i, load(source, source_at + i))


@njit(inline="always")
def _fill_zero(target, target_at, length):
    zero = splat(np.float32(0.0))
    for i in range(0, length, LANES):
        store(target, target_at + i, zero)


@njit(inline="always")
def _rows_times_matrix(rows, at, matrix, u, width, s0, s1, s2, s3):
    """s_i + row i @ matrix[:, u : u + 16] for the four rows of `width` elements from `at` on."""
    r1, r2, r3 = at + width, at + 2 * width, at + 3 * width
    for j in range(width):
        column = load(matrix, j * width + u)
        s0 = fma(load_splat(rows, at + j), column, s0)
        s1 = fma(load_splat(rows, r1 + j), column, s1)
        s2 = fma(load_splat(rows, r2 + j), column, s2)
        s3 = fma(load_splat(rows, r3 + j), column, s3)
    return s0, s1, s2, s3


@njit(inline="always")
def _transition(h, h_at, w, k, k_at, v, v_at, forget, out, out_at, candidates, c_at, key_dim, value_dim):
    """c = tanh(h W + k v^T) into candidates, f h + (1 - f) c into out."""
    f = splat(forget)
    for i in range(0, key_dim, ROWS):
        for u in range(0, value_dim, LANES):
            values = load(v, v_at + u)
            s0, s1, s2, s3 = _rows_times_matrix(
                h,
                h_at + i * value_dim,
                w,
                u,
                value_dim,
                load_splat(k, k_at + i) * values,
                load_splat(k, k_at + i + 1) * values,
                load_splat(k, k_at + i + 2) * values,
                load_splat(k, k_at + i + 3) * values,
            )
            for r, s in enumerate((s0, s1, s2, s3)):
                at = (i + r) * value_dim + u
                c = tanh(s)
                store(candidates, c_at + at, c)
                store(out, out_at + at, fma(f, load(h, h_at + at) - c, c))


@kernel
def forward(q, k, v, weight, forget, skip, starts, initial, sizes, rows, y, checkpoints, last):
    """y (B, T, N, V), the states that chunks start from (B, N, T / chunk, K, V) and the last one (B, N, K, V)."""
    for task in prange(sizes[0] * sizes[2]):
        _forward_task(
            np.int64(task), q, k, v, weight, forget, skip, starts, initial, sizes, rows, y, checkpoints, last
        )  # fmt: skip


@helper
def _forward_task(task, q, k, v, weight, forget, skip, starts, initial, sizes, rows, y, checkpoints, last):
    length, n_heads, n_q, n_k, key_dim, value_dim, chunk = sizes[1:]
    q_row, k_row, v_row = rows
    state_size, weight_size = key_dim * value_dim, value_dim * value_dim
    n_chunks = (length + chunk - 1) // chunk
    row, head = task // n_heads, task % n_heads
    h, candidates = np.empty(2 * state_size, np.float32), np.empty(state_size, np.float32)
    w = weight[head * weight_size : (head + 1) * weight_size]
    _copy(initial, task * state_size, h, 0, state_size)
    now, then = 0, state_size
    for t in range(length):
        token = row * length + t
        if starts[token]:
            _fill_zero(h, now, state_size)
        if t % chunk == 0:
            _copy(h, now, checkpoints, (task * n_chunks + t // chunk) * state_size, state_size)
        q_at = token * q_row + head * n_q // n_heads * key_dim
        k_at = token * k_row + head * n_k // n_heads * key_dim
        v_at, y_at = token * v_row + head * value_dim, (token * n_heads + head) * value_dim
        f = forget[token * n_heads + head]
        _transition(h, now, w, k, k_at, v, v_at, f, h, then, candidates, 0, key_dim, value_dim)
        now, then = then, now
        for u in range(0, value_dim, LANES):
            total = load(skip, head * value_dim + u) * load(v, v_at + u)
            for i in range(key_dim):
                total = fma(load_splat(q, q_at + i), load(h, now + i * value_dim + u), total)
            store(y, y_at + u, total)
    _copy(h, now, last, task * state_size, state_size)


@njit(inline="always")
def _row_backward(h, candidates, dh, x, at, q, k, f, dy, v, bound, dv, df):
    """Sixteen columns of one row of the state, at `x` in dh and at `at` in the chunk.

    dL/dh_t goes through the step: dh becomes its direct part f dL/dh_t, the candidate becomes the gradient of the
    argument of its tanh. Returns dv and df with this row added, and the terms of dq and dk.
    """
    one = splat(np.float32(1.0))
    c = load(candidates, at)
    change = load(h, at) - c
    d = clamp(fma(q, dy, load(dh, x)), bound)
    inner = (one - f) * d * (one - c * c)
    store(candidates, at, inner)
    store(dh, x, f * d)
    return fma(k, inner, dv), fma(d, change, df), fma(f, change, c) * dy, inner * v


@helper
def _step_backward(
    h, candidates, at, dh, w_t, q, q_at, k, k_at, v, v_at, dy, dy_at, forget, bound, dv, dq, dk, out_at, sizes
):  # fmt: skip
    """One step back: dh from dL/dh_t (without this step's own output) to dL/dh_{t-1}. Adds to dv; returns df."""
    key_dim, value_dim = sizes[5], sizes[6]
    f, zero = splat(forget), splat(np.float32(0.0))
    df = zero
    for i in range(0, key_dim, ROWS):
        q0, q1 = load_splat(q, q_at + i), load_splat(q, q_at + i + 1)
        q2, q3 = load_splat(q, q_at + i + 2), load_splat(q, q_at + i + 3)
        k0, k1 = load_splat(k, k_at + i), load_splat(k, k_at + i + 1)
        k2, k3 = load_splat(k, k_at + i + 2), load_splat(k, k_at + i + 3)
        dq0, dq1, dq2, dq3 = zero, zero, zero, zero
        dk0, dk1, dk2, dk3 = zero, zero, zero, zero
        x0 = i * value_dim
        x1, x2, x3 = x0 + value_dim, x0 + 2 * value_dim, x0 + 3 * value_dim
        for u in range(0, value_dim, LANES):
            a, b, g = load(dy, dy_at + u), load(v, v_at + u), load(dv, u)
            x, y = x0 + u, at + x0 + u
            g, df, q_term, k_term = _row_backward(h, candidates, dh, x, y, q0, k0, f, a, b, bound, g, df)
            dq0, dk0 = dq0 + q_term, dk0 + k_term
            x, y = x1 + u, at + x1 + u
            g, df, q_term, k_term = _row_backward(h, candidates, dh, x, y, q1, k1, f, a, b, bound, g, df)
            dq1, dk1 = dq1 + q_term, dk1 + k_term
            x, y = x2 + u, at + x2 + u
            g, df, q_term, k_term = _row_backward(h, candidates, dh, x, y, q2, k2, f, a, b, bound, g, df)
            dq2, dk2 = dq2 + q_term, dk2 + k_term
            x, y = x3 + u, at + x3 + u
            g, df, q_term, k_term = _row_backward(h, candidates, dh, x, y, q3, k3, f, a, b, bound, g, df)
            dq3, dk3 = dq3 + q_term, dk3 + k_term
            store(dv, u, g)
        store_sums(dq, out_at + i, dq0, dq1, dq2, dq3)
        store_sums(dk, out_at + i, dk0, dk1, dk2, dk3)
        for u in range(0, value_dim, LANES):
            d0, d1, d2, d3 = load(dh, x0 + u), load(dh, x1 + u), load(dh, x2 + u), load(dh, x3 + u)
            d0, d1, d2, d3 = _rows_times_matrix(candidates, at + x0, w_t, u, value_dim, d0, d1, d2, d3)
            store(dh, x0 + u, d0)
            store(dh, x1 + u, d1)
            store(dh, x2 + u, d2)
            store(dh, x3 + u, d3)
    return df


@helper
def _add_weight_gradient(h, inner, rows, value_dim, dw):
    """dw += sum over `rows` of h^T inner, four rows of dw at a time."""
    for j in range(0, value_dim, 4):
        for u in range(0, value_dim, LANES):
            x0 = j * value_dim + u
            x1, x2, x3 = x0 + value_dim, x0 + 2 * value_dim, x0 + 3 * value_dim
            w0, w1, w2, w3 = load(dw, x0), load(dw, x1), load(dw, x2), load(dw, x3)
            for r in range(rows):
                gradient, at = load(inner, r * value_dim + u), r * value_dim + j
                w0 = fma(load_splat(h, at), gradient, w0)
                w1 = fma(load_splat(h, at + 1), gradient, w1)
                w2 = fma(load_splat(h, at + 2), gradient, w2)
                w3 = fma(load_splat(h, at + 3), gradient, w3)
            store(dw, x0, w0)
            store(dw, x1, w1)
            store(dw, x2, w2)
            store(dw, x3, w3)


@kernel
def backward(
    q, k, v, weight, forget, skip, starts, checkpoints, dy, dlast, limit, sizes, rows, dv_row,
    dq, dk, dv, dweight, dforget, dskip, dinitial,
):  # fmt: skip
    """dq and dk: (B, T, N, K); dv: rows of dv_row elements; dweight: (B, N, V, V); dskip: (B, N, V)."""
    for task in prange(sizes[0] * sizes[2]):
        _backward_task(
            np.int64(task), q, k, v, weight, forget, skip, starts, checkpoints, dy, dlast, limit, sizes, rows, dv_row,
            dq, dk, dv, dweight, dforget, dskip, dinitial,
        )  # fmt: skip


@helper
def _backward_task(
    task, q, k, v, weight, forget, skip, starts, checkpoints, dy, dlast, limit, sizes, rows, dv_row,
    dq, dk, dv, dweight, dforget, dskip, dinitial,
):  # fmt: skip
    length, n_heads, n_q, n_k, key_dim, value_dim, chunk = sizes[1:]
    q_row, k_row, v_row = rows
    state_size, weight_size = key_dim * value_dim, value_dim * value_dim
    n_chunks = (length + chunk - 1) // chunk
    row, head = task // n_heads, task % n_heads
    h = np.empty((chunk + 1) * state_size, np.float32)  # what each step of the chunk starts from
    candidates = np.empty(chunk * state_size, np.float32)
    dh, dv_t, dskip_t = (
        np.empty(state_size, np.float32),
        np.empty(value_dim, np.float32),
        np.zeros(value_dim, np.float32),
    )
    w = weight[head * weight_size : (head + 1) * weight_size]
    w_t, dw, sums = np.empty(weight_size, np.float32), np.zeros(weight_size, np.float32), np.empty(4, np.float32)
    for i in range(value_dim):
        for j in range(value_dim):
            w_t[j * value_dim + i] = w[i * value_dim + j]
    zero, bound = splat(np.float32(0.0)), splat(limit)
    _copy(dlast, task * state_size, dh, 0, state_size)
    for piece in range(n_chunks - 1, -1, -1):
        first = row * length + piece * chunk
        steps = min(chunk, length - piece * chunk)
        _copy(checkpoints, (task * n_chunks + piece) * state_size, h, 0, state_size)
        for s in range(steps):
            token, at = first + s, s * state_size
            if s > 0 and starts[token]:
                _fill_zero(h, at, state_size)
            k_at = token * k_row + head * n_k // n_heads * key_dim
            v_at = token * v_row + head * value_dim
            f = forget[token * n_heads + head]
            _transition(h, at, w, k, k_at, v, v_at, f, h, at + state_size, candidates, at, key_dim, value_dim)
        for s in range(steps - 1, -1, -1):
            token = first + s
            q_at = token * q_row + head * n_q // n_heads * key_dim
            k_at = token * k_row + head * n_k // n_heads * key_dim
            value_head = token * n_heads + head
            v_at, y_at = token * v_row + head * value_dim, value_head * value_dim
            for u in range(0, value_dim, LANES):
                dy_u = load(dy, y_at + u)
                store(dv_t, u, load(skip, head * value_dim + u) * dy_u)
                store(dskip_t, u, fma(dy_u, load(v, v_at + u), load(dskip_t, u)))
            df = _step_backward(
                h, candidates, s * state_size, dh, w_t, q, q_at, k, k_at, v, v_at, dy, y_at, forget[value_head], bound,
                dv_t, dq, dk, value_head * key_dim, sizes,
            )  # fmt: skip
            store_sums(sums, 0, df, zero, zero, zero)
            dforget[value_head] = sums[0]
            _copy(dv_t, 0, dv, token * dv_row + head * value_dim, value_dim)
            if starts[token]:
                _fill_zero(dh, 0, state_size)
        _add_weight_gradient(h, candidates, steps * key_dim, value_dim, dw)
    _copy(dh, 0, dinitial, task * state_size, state_size)
    _copy(dw, 0, dweight, task * weight_size, weight_size)
    _copy(dskip_t, 0, dskip, task * value_dim, value_dim)
