"""Numba kernels of the Mamba-2 scan together with its convolution, forward and backward; `mamba2.py` uses them.

One task per (row, slab of the heads of one group) walks the chunks in order and keeps what it needs in cache: the
convolved inputs, recomputed in the backward pass, the decays, the chunk's products and the states. Nothing of size
(chunk, chunk) reaches memory; scratch and sums are float32, also for bfloat16 arrays. Tasks write disjoint ranges in
a fixed order, so results do not depend on the number of threads. Notation: `ssd_tiles.py`.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from blocks.kernels.causal_conv_cpu import convolve_tile
from blocks.kernels.numba_math import helper, kernel, write
from blocks.kernels.ssd_tiles import (
    apply_weights,
    apply_weights_backward,
    chunk_layout,
    decays,
    dot,
    load_rows,
    padded,
    pair_product,
    pair_weights,
    pair_weights_backward,
    product,
    scale_in_place,
    scale_rows,
    scratch,
    store_rows,
    transpose,
    weighted_columns,
)

MIN_TASKS = 4  # heads are cut into slabs until there are so many tasks; every slab repeats the work on B and C, so few


def slabs_per_group(batch: int, n_groups: int, heads_per_group: int) -> int:
    """Into how many slabs the heads of a group are cut. Depends on shapes alone, so that results do."""
    divisors = [n for n in range(1, heads_per_group + 1) if heads_per_group % n == 0]
    return next((n for n in divisors if batch * n_groups * n >= MIN_TASKS), heads_per_group)


@kernel
def scan_forward(z, taps4, bias, dt, A, D, segments, y, states, sizes, slabs, keep_states):
    """Writes y (batch, length, heads * P) and, with keep_states, states (batch, chunks, heads, N * P): the state that
    enters a chunk, zero where none does. z (batch, length, z_row) holds the gate, x, B and C of a token.

    dt is (batch, length, heads). sizes: batch, length, z_row, heads, groups, P, N, chunk (a multiple of 16).
    """
    batch, n_groups = sizes[0], sizes[4]
    for task in prange(batch * n_groups * slabs):
        _forward_task(np.int64(task), z, taps4, bias, dt, A, D, segments, y, states, sizes, slabs, keep_states)


@helper
def _forward_task(task, z, taps4, bias, dt, A, D, segments, y, states, sizes, slabs, keep_states):
    _, length, z_row, n_heads, n_groups, P, N, chunk = sizes
    zero, one = np.int64(0), np.int64(1)  # typed: a literal argument would compile a copy of `product` of its own
    add, fresh = one > zero, zero > one
    inner, per_group, width, depth = n_heads * P, n_heads // n_groups, padded(P), padded(N)
    channels, heads, n_chunks = inner + 2 * n_groups * N, per_group // slabs, (length + chunk - 1) // chunk
    row, group = task // (n_groups * slabs), task // slabs % n_groups
    first_head = group * per_group + task % slabs * heads
    ends, taps = np.empty(chunk, np.int64), np.empty(chunk, np.int64)
    X, Y = scratch(chunk, width), scratch(chunk, width)
    B, C, C_T, B_out = scratch(chunk, depth), scratch(chunk, depth), scratch(depth, chunk), scratch(chunk, depth)
    G_T, L_T, W_T = scratch(chunk, chunk), scratch(chunk, chunk), scratch(chunk, chunk)
    step, log_sum, from_start, to_end = (
        scratch(1, chunk),
        scratch(1, chunk),
        scratch(1, chunk),
        scratch(1, chunk),
    )
    S = scratch(heads * depth, width)
    for index in range(n_chunks):
        start = index * chunk
        n = min(chunk, length - start)
        x_at = (row * length + start) * z_row + inner
        carried, last_start = chunk_layout(segments, row * length, start, n, ends, taps)
        at = inner + group * N
        convolve_tile(B, depth, z, x_at + at, z_row, taps4, bias, channels, at, N, taps, n)
        at += n_groups * N
        convolve_tile(C, depth, z, x_at + at, z_row, taps4, bias, channels, at, N, taps, n)
        transpose(C_T, chunk, C, depth, padded(n), N)
        pair_product(G_T, chunk, B, depth, C_T, ends, n, N)
        for i in range(heads):
            head = first_head + i
            convolve_tile(X, width, z, x_at + head * P, z_row, taps4, bias, channels, head * P, P, taps, n)
            dt_at = (row * length + start) * n_heads + head
            decays(dt, dt_at, n_heads, A[head], n, ends, carried, last_start, step, log_sum, from_start, to_end)
            pair_weights(W_T, L_T, G_T, chunk, log_sum, step, D[head], n, ends)
            S_at = i * depth * width
            states_at = ((row * n_chunks + index) * n_heads + head) * N * P
            if carried > 0:
                product(Y, zero, width, C, zero, depth, one, S, S_at, width, (carried + 3) // 4 * 4, width, N, fresh)
                scale_rows(Y, Y, width, from_start, (carried + 3) // 4 * 4)
                if keep_states:
                    store_rows(states, states_at, P, S[S_at:], width, N, P)
            elif keep_states:
                for k in range(N * P):
                    write(states, states_at + k, np.float32(0.0))
            apply_weights(Y, W_T, X, chunk, width, n, ends, carried)
            store_rows(y, (row * length + start) * inner + head * P, inner, Y, width, n, P)
            if index + 1 < n_chunks:
                for k in range(last_start, n):
                    to_end[k] *= step[k]
                scale_rows(B_out, B, depth, to_end, n)
                scale_in_place(S, S_at, depth * width, from_start[n - 1] if carried == n else np.float32(0.0))
                at = last_start * depth
                product(
                    S,
                    S_at,
                    width,
                    B_out,
                    at,
                    one,
                    depth,
                    X,
                    last_start * width,
                    width,
                    depth,
                    width,
                    n - last_start,
                    add,
                )


@kernel
def scan_backward(
    z, taps4, bias, dt, A, D, segments, states, grad_y, grad_x, grad_BC, grad_dt, grad_A, grad_D, sizes, slabs
):
    """Gradients from grad_y: grad_x (batch, length, heads * P) and grad_BC (slabs, batch, length, 2 * groups * N) of
    the convolved x, B and C; grad_dt (batch, length, heads); grad_A and grad_D (batch, heads). Rest: scan_forward.
    """
    batch, n_groups = sizes[0], sizes[4]
    for task in prange(batch * n_groups * slabs):
        _backward_task(
            np.int64(task),
            z,
            taps4,
            bias,
            dt,
            A,
            D,
            segments,
            states,
            grad_y,
            grad_x,
            grad_BC,
            grad_dt,
            grad_A,
            grad_D,
            sizes,
            slabs,
        )


@helper
def _backward_task(
    task, z, taps4, bias, dt, A, D, segments, states, grad_y, grad_x, grad_BC, grad_dt, grad_A, grad_D, sizes, slabs
):
    batch, length, z_row, n_heads, n_groups, P, N, chunk = sizes
    zero, one = np.int64(0), np.int64(1)  # typed: a literal argument would compile a copy of `product` of its own
    add, fresh = one > zero, zero > one
    inner, per_group, width, depth = n_heads * P, n_heads // n_groups, padded(P), padded(N)
    channels, heads, n_chunks = inner + 2 * n_groups * N, per_group // slabs, (length + chunk - 1) // chunk
    row, group, slab = task // (n_groups * slabs), task // slabs % n_groups, task % slabs
    first_head = group * per_group + slab * heads
    ends, taps = np.empty(chunk, np.int64), np.empty(chunk, np.int64)
    X, X_T, grad_X = scratch(chunk, width), scratch(width, chunk), scratch(chunk, width)
    dY, dY_T = scratch(chunk, width), scratch(width, chunk)
    B, B_T, B_out, dB = scratch(chunk, depth), scratch(depth, chunk), scratch(chunk, depth), scratch(chunk, depth)
    C, C_T, C_in = scratch(chunk, depth), scratch(depth, chunk), scratch(chunk, depth)
    dB_T, dC, dC_T, mix = scratch(depth, chunk), scratch(chunk, depth), scratch(depth, chunk), scratch(depth, chunk)
    G_T, L_T, W_T = scratch(chunk, chunk), scratch(chunk, chunk), scratch(chunk, chunk)
    dG_T, dW_T = scratch(chunk, chunk), scratch(chunk, chunk)
    step, log_sum, from_start, to_end = scratch(1, chunk), scratch(1, chunk), scratch(1, chunk), scratch(1, chunk)
    d_step, d_log, along, to_state = scratch(1, chunk), scratch(1, chunk), scratch(1, chunk), scratch(1, chunk)
    S, dS = scratch(depth, width), scratch(heads * depth, width)
    dA, dD = np.zeros(heads), np.zeros(heads)
    for index in range(n_chunks - 1, -1, -1):
        start = index * chunk
        n = min(chunk, length - start)
        x_at, y_at = (row * length + start) * z_row + inner, (row * length + start) * inner
        carried, last_start = chunk_layout(segments, row * length, start, n, ends, taps)
        B_at = inner + group * N
        C_at = B_at + n_groups * N
        convolve_tile(B, depth, z, x_at + B_at, z_row, taps4, bias, channels, B_at, N, taps, n)
        convolve_tile(C, depth, z, x_at + C_at, z_row, taps4, bias, channels, C_at, N, taps, n)
        transpose(B_T, chunk, B, depth, padded(n), N)
        transpose(C_T, chunk, C, depth, padded(n), N)
        pair_product(G_T, chunk, B, depth, C_T, ends, n, N)
        dG_T[:] = 0
        dB_T[:] = 0
        dC_T[:] = 0
        for i in range(heads):
            head, dS_at = first_head + i, i * depth * width
            convolve_tile(X, width, z, x_at + head * P, z_row, taps4, bias, channels, head * P, P, taps, n)
            load_rows(dY, width, grad_y, y_at + head * P, inner, n, P)
            transpose(dY_T, chunk, dY, width, padded(n), P)
            dt_at = (row * length + start) * n_heads + head
            decays(dt, dt_at, n_heads, A[head], n, ends, carried, last_start, step, log_sum, from_start, to_end)
            pair_weights(W_T, L_T, G_T, chunk, log_sum, step, D[head], n, ends)
            d_step[:] = 0
            d_log[:] = 0
            pair_product(dW_T, chunk, X, width, dY_T, ends, n, P)
            dD[i] += pair_weights_backward(dG_T, dW_T, L_T, G_T, chunk, step, n, ends, d_step, d_log)
            apply_weights_backward(grad_X, W_T, dY, chunk, width, n, ends, fresh)
            if index + 1 < n_chunks:  # what this chunk gave to the state after it
                begin = last_start // 16 * 16
                transpose(X_T, chunk, X, width, padded(n), P)
                product(mix, begin, chunk, dS, dS_at, width, one, X_T, begin, chunk, depth, padded(n) - begin, P, fresh)
                for k in range(begin, n):
                    to_state[k] = to_end[k] * step[k]
                scale_rows(B_out, B, depth, to_state, n)
                weighted_columns(along, dB_T, to_state, mix, B_T, chunk, begin, padded(n), N)
                for k in range(last_start, n):
                    d_step[k] += to_end[k] * along[k]
                    d_log[k] -= to_state[k] * along[k]
                    d_log[n - 1] += to_state[k] * along[k]
                k = last_start // 4 * 4
                rows = (n + 3) // 4 * 4 - k
                product(grad_X, k * width, width, B_out, k * depth, depth, one, dS, dS_at, width, rows, width, N, add)
            if carried > 0:  # what it took from the state before it
                load_rows(S, width, states, ((row * n_chunks + index) * n_heads + head) * N * P, P, N, P)
                product(mix, zero, chunk, S, zero, width, one, dY_T, zero, chunk, depth, padded(carried), P, fresh)
                weighted_columns(along, dC_T, from_start, mix, C_T, chunk, 0, padded(carried), N)
                for q in range(carried):
                    d_log[q] += from_start[q] * along[q]
                if carried == n:
                    d_log[n - 1] += from_start[n - 1] * dot(dS, dS_at, S, depth * width)
                scale_rows(C_in, C, depth, from_start, carried)
                scale_in_place(dS, dS_at, depth * width, from_start[n - 1] if carried == n else np.float32(0.0))
                product(dS, dS_at, width, C_in, zero, one, depth, dY, zero, width, depth, width, carried, add)
            else:
                dS[dS_at : dS_at + depth * width] = 0
            store_rows(grad_x, y_at + head * P, inner, grad_X, width, n, P)
            total = np.float32(0.0)
            for k in range(n - 1, -1, -1):
                total = d_log[k] + (total if k + 1 < n and ends[k] == ends[k + 1] else np.float32(0.0))
                dA[i] += total * step[k]
                grad_dt[dt_at + k * n_heads] = d_step[k] + total * A[head]
        transpose(dB, depth, dB_T, chunk, depth, padded(n))
        apply_weights_backward(dB, dG_T, C, chunk, depth, n, ends, add)
        transpose(dC, depth, dC_T, chunk, depth, padded(n))
        apply_weights(dC, dG_T, B, chunk, depth, n, ends, n)
        out_row = 2 * n_groups * N
        out_at = ((slab * batch + row) * length + start) * out_row + group * N
        store_rows(grad_BC, out_at, out_row, dB, depth, n, N)
        store_rows(grad_BC, out_at + n_groups * N, out_row, dC, depth, n, N)
    for i in range(heads):
        grad_A[row * n_heads + first_head + i] = dA[i]
        grad_D[row * n_heads + first_head + i] = dD[i]
