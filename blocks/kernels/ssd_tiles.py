"""Numba pieces of the Mamba-2 scan on one chunk of one head, all operands in cache.

Scratch matrices are flat float32, rows padded to 16. Suffix T: tokens run along the row (B_T[n, k]). Token `q` reads
token `k`: y_q = sum_k W_T[k, q] x_k with W_T[k, q] = G_T[k, q] L_T[k, q] dt_k, G = C B^T, L the decay from k to q.
"""

from __future__ import annotations

import numpy as np

from blocks.kernels.causal_conv_cpu import taps_before
from blocks.kernels.numba_math import exp, helper, never_inline, read, write
from blocks.kernels.numba_matmul import matmul


@helper
def padded(n):
    """n rounded up to the vector length."""
    return (n + 15) // 16 * 16


@helper
def scratch(rows, columns):
    """A zeroed flat (rows, columns) matrix."""
    return np.zeros(rows * columns, np.float32)


@helper
def product(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, m, n, k, keep):
    """C (m, n) = A (m, k) B (k, n), or += with keep; m a multiple of 4, n of 16."""
    never_inline()
    matmul(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, m, n, k, keep)


@helper
def pair_product(c, size, a, a_row, b, ends, n, depth):
    """C[k, q] = sum_i A[k, i] B[i, q] for the q that read k, in tiles rounded outwards to 4 x 16."""
    never_inline()
    for k in range(0, n, 4):
        q = k // 16 * 16
        columns = padded(ends[min(k + 3, n - 1)]) - q
        matmul(c, k * size + q, size, a, k * a_row, a_row, 1, b, q, size, 4, columns, depth, False)


@helper
def apply_weights(y, W_T, x, size, width, n, ends, carried):
    """y[q] = sum_k W_T[k, q] x[k], added to what is there in the tiles that hold a q < carried."""
    never_inline()
    first = 0
    for q in range(0, n, 4):
        while ends[first] <= q:
            first = ends[first]
        at, depth = first * size + q, min(q + 4, n) - first
        matmul(y, q * width, width, W_T, at, 1, size, x, first * width, width, 4, width, depth, q < carried)


@helper
def apply_weights_backward(grad_x, W_T, grad_y, size, width, n, ends, keep):
    """grad_x[k] = sum_q W_T[k, q] grad_y[q], or += with keep."""
    never_inline()
    for k in range(0, n, 4):
        at, depth = k * size + k, ends[min(k + 3, n - 1)] - k
        matmul(grad_x, k * width, width, W_T, at, size, 1, grad_y, k * width, width, 4, width, depth, keep)


@helper
def transpose(target, target_row, source, source_row, rows, columns):
    """target[j, i] = source[i, j]; rows and columns are multiples of 16."""
    never_inline()
    for i in range(0, rows, 16):
        for j in range(columns):
            for ii in range(16):
                write(target, j * target_row + i + ii, read(source, (i + ii) * source_row + j))


@helper
def scale_rows(target, source, row, scale, rows):
    """target[i] = scale[i] * source[i]; target may be source."""
    never_inline()
    for i in range(rows):
        factor = read(scale, i)
        for j in range(row):
            write(target, i * row + j, factor * read(source, i * row + j))


@helper
def load_rows(target, row, source, at, source_row, rows, columns):
    """Rows of an array into scratch; rows up to the next multiple of 16 become zero."""
    never_inline()
    for i in range(rows):
        for j in range(columns):
            write(target, i * row + j, read(source, at + i * source_row + j))
    target[rows * row : padded(rows) * row] = 0


@helper
def store_rows(target, at, target_row, source, row, rows, columns):
    """Rows of scratch into an array."""
    never_inline()
    for i in range(rows):
        for j in range(columns):
            write(target, at + i * target_row + j, read(source, i * row + j))


@helper
def chunk_layout(segments, row_at, start, n, ends, taps):
    """Documents among tokens start .. start + n of a row: fills ends[k], where k's document ends, and the conv's taps.

    Returns how many tokens belong to the document carried in, and where the last token's document begins.
    """
    never_inline()
    end, last_start = n, 0
    for i in range(n - 1, -1, -1):
        ends[i] = end
        if i > 0 and segments[row_at + start + i] != segments[row_at + start + i - 1]:
            last_start = max(last_start, i)
            end = i
    for i in range(n):
        taps[i] = taps_before(segments, row_at, start + i)
    carried = ends[0] if start > 0 and segments[row_at + start] == segments[row_at + start - 1] else 0
    return carried, last_start


@helper
def decays(dt, dt_at, dt_row, A, n, ends, carried, last_start, step, log_sum, from_start, to_end):
    """Per token: dt; the log decays summed since its document or the chunk began; the decays from the chunk's start
    (zero where the carried document has ended) and to its end (zero in documents before the last)."""
    never_inline()
    total = np.float32(0.0)
    for i in range(n):
        if i > 0 and ends[i] != ends[i - 1]:
            total = np.float32(0.0)
        step[i] = read(dt, dt_at + i * dt_row)
        total += step[i] * A
        log_sum[i] = total
    step[n:] = 0
    log_sum[n:] = 0
    for i in range(padded(n)):
        from_start[i] = exp(read(log_sum, i)) if i < carried else np.float32(0.0)
        to_end[i] = exp(total - read(log_sum, i)) if i >= last_start and i < n else np.float32(0.0)


@helper
def pair_weights(W_T, L_T, G_T, size, log_sum, step, D, n, ends):
    """L_T and W_T (with D on the diagonal), zero where q does not read k."""
    never_inline()
    for k in range(n):
        base, dt, end, at = log_sum[k], step[k], ends[k], k * size
        W_T[at : at + size] = 0
        for q in range(k // 16 * 16, end, 16):
            for i in range(16):
                seen = q + i >= k and q + i < end
                decay = exp(read(log_sum, q + i) - base) if seen else np.float32(0.0)
                write(L_T, at + q + i, decay)
                write(W_T, at + q + i, read(G_T, at + q + i) * decay * dt)
        W_T[at + k] += D
    W_T[n * size : padded(n) * size] = 0


@helper
def pair_weights_backward(grad_G_T, grad_W_T, L_T, G_T, size, step, n, ends, grad_step, grad_log):
    """From grad_W_T: adds to grad_G_T, to grad_step (dt) and to grad_log (the summed log decays); returns grad D."""
    never_inline()
    grad_D = np.float32(0.0)
    for k in range(n):
        dt, at, total = step[k], k * size, np.float32(0.0)
        grad_D += grad_W_T[at + k]
        for q in range(k // 16 * 16, ends[k], 16):
            for i in range(16):
                through = read(grad_W_T, at + q + i) * read(L_T, at + q + i)
                write(grad_G_T, at + q + i, read(grad_G_T, at + q + i) + through * dt)
                weight = through * read(G_T, at + q + i)
                write(grad_log, q + i, read(grad_log, q + i) + weight * dt)
                total += weight
        grad_step[k] += total
        grad_log[k] -= total * dt
    return grad_D


@helper
def weighted_columns(total, target, weight, values, factors, size, first, last, rows):
    """total[k] = sum_n values[n, k] factors[n, k] and target[n, k] += weight[k] values[n, k], k from first to last."""
    never_inline()
    total[first:last] = 0
    for row in range(rows):
        at = row * size
        for k in range(first, last):
            value = read(values, at + k)
            write(total, k, read(total, k) + value * read(factors, at + k))
            write(target, at + k, read(target, at + k) + read(weight, k) * value)


@helper
def scale_in_place(matrix, at, count, factor):
    """matrix[at : at + count] *= factor; zero for a zero factor, whatever was there."""
    for i in range(count):
        write(matrix, at + i, read(matrix, at + i) * factor if factor != 0 else np.float32(0.0))


@helper
def dot(a, at, b, count):
    """sum_i a[at + i] b[i]."""
    total = np.float32(0.0)
    for i in range(count):
        total += read(a, at + i) * read(b, i)
    return total
