"""Numba kernels of the expert MLPs: gather, both products and activation without leaving the cache.

Arrays and names as in expert_rows_cpu.py. Elements are float32 or bfloat16 bits, operands of products float32 or
pairs of bfloat16 (numba_operands.py; `step` = 1 or 2 elements per operand); the weights and their gradients are
float32. The rows of an expert go in blocks of 64. Every sum is float32 in a fixed order, whatever the threads.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import numpy as np
from numba import njit, prange

from blocks.kernels.expert_rows_cpu import activate, activate_backward
from blocks.kernels.numba_math import write
from blocks.kernels.numba_matmul import matmul
from blocks.kernels.numba_operands import PANEL, copy, matmul_packed, pack_transposed, pair_rows, transpose

BLOCK = 64  # rows per block


@njit(cache=True)
def row_blocks(rows):
    """(blocks, 3): expert, first row, end row."""
    n_blocks = 0
    for count in rows:
        n_blocks += (count + BLOCK - 1) // BLOCK
    blocks = np.empty((n_blocks, 3), np.int64)
    block = start = 0
    for expert in range(rows.size):
        for first in range(0, rows[expert], BLOCK):
            blocks[block, 0] = expert
            blocks[block, 1] = start + first
            blocks[block, 2] = start + min(first + BLOCK, rows[expert])
            block += 1
        start += rows[expert]
    return blocks


@njit(cache=True, parallel=True)
def pack_for_forward(packed, weights, n_experts, n, k, step):
    """weights (E, n, k) -> per expert the packed panels of its transpose, operands along k."""
    panels = (n + PANEL - 1) // PANEL
    for task in prange(n_experts * panels):
        expert = task // panels
        pack_transposed(packed, expert * n * k // step, weights, expert * n * k, n, k, step, task % panels)


@njit(cache=True, parallel=True)
def pack_for_backward(packed, weights, rows, width):
    """weights (rows, width) of all experts -> (rows / 2, width) pairs along the rows."""
    for row in prange(rows // 2):
        low, high = weights[2 * row * width :], weights[(2 * row + 1) * width :]
        pair_rows(packed[row * width : (row + 1) * width], low, high)


@njit(cache=True)
def _gather(target, source, width, order, top_k, start, stop, padded):
    """target (padded, width) = the source rows of the tokens of rows [start, stop), then zeros."""
    for row in range(start, stop):
        copy(target, (row - start) * width, source, order[row] // top_k * width, width)
    target[(stop - start) * width : padded * width] = 0


@njit(cache=True)
def _store(target, target_at, values, size):
    own = target[target_at : target_at + size]
    for e in range(size):
        write(own, e, values[e])


@njit(cache=True)
def _forward_blocks(worker, n_workers, x, order, weights, top_k, blocks, up, down, h, out, d, inner, swiglu):
    wide, step = 2 * inner if swiglu else inner, 4 // out.itemsize
    operands = x.view(up.dtype)
    xs = np.empty(BLOCK * d // step, up.dtype)
    hs, ys = np.empty(BLOCK * wide, np.float32), np.empty(BLOCK * d, np.float32)
    a = np.empty(BLOCK * inner, out.dtype)
    for block in range(worker, blocks.shape[0], n_workers):
        expert, start, stop = blocks[block]
        rows = stop - start
        padded = (rows + 3) // 4 * 4
        _gather(xs, operands, d // step, order, top_k, start, stop, padded)
        matmul_packed(hs, wide, xs, d // step, up, expert * wide * d // step, padded, wide, d // step)
        for r in range(rows):
            own = hs[r * wide : (r + 1) * wide]
            activate(a[r * inner : (r + 1) * inner], own, weights[order[start + r]], swiglu)
        a[rows * inner : padded * inner] = 0
        if h.size:
            _store(h, start * wide, hs, rows * wide)
        a_operands, depth = a.view(up.dtype), inner // step
        matmul_packed(ys, d, a_operands, depth, down, expert * d * depth, padded, d, depth)
        _store(out, start * d, ys, rows * d)


@njit(cache=True, parallel=True)
def forward(n_workers, x, order, weights, top_k, blocks, up, down, h, out, d, inner, swiglu):
    """Fills out (M, D) and, unless it is empty, h (M, H); up and down come from pack_for_forward."""
    for worker in prange(n_workers):
        _forward_blocks(worker, n_workers, x, order, weights, top_k, blocks, up, down, h, out, d, inner, swiglu)


@njit(cache=True)
def _backward_blocks(
    worker, n_workers, grad, order, weights, top_k, blocks, up, down, h, grad_h, a, grad_x, grad_weights,
    d, inner, swiglu,
):  # fmt: skip
    wide, step = 2 * inner if swiglu else inner, 4 // h.itemsize
    operands = grad.view(up.dtype)
    dys = np.empty(BLOCK * d // step, up.dtype)
    das, dxs = np.empty(BLOCK * inner, np.float32), np.empty(BLOCK * d, np.float32)
    dhs = np.empty(BLOCK * wide, h.dtype)
    for block in range(worker, blocks.shape[0], n_workers):
        expert, start, stop = blocks[block]
        rows = stop - start
        padded = (rows + 3) // 4 * 4
        _gather(dys, operands, d // step, order, top_k, start, stop, padded)
        depth = d // step
        matmul(das, 0, inner, dys, 0, depth, 1, down, expert * depth * inner, inner, padded, inner, depth, False)
        for r in range(rows):
            row = start + r
            grad_weights[order[row]] = activate_backward(
                dhs[r * wide : (r + 1) * wide],
                a[row * inner : (row + 1) * inner],
                das[r * inner : (r + 1) * inner],
                h[row * wide : (row + 1) * wide],
                weights[order[row]],
                swiglu,
            )
        dhs[rows * wide : padded * wide] = 0
        copy(grad_h, start * wide, dhs, 0, rows * wide)
        dh_operands, depth = dhs.view(up.dtype), wide // step
        matmul(dxs, 0, d, dh_operands, 0, depth, 1, up, expert * depth * d, d, padded, d, depth, False)
        _store(grad_x, start * d, dxs, rows * d)


@njit(cache=True, parallel=True)
def backward(
    n_workers, grad, order, weights, top_k, blocks, up, down, h, grad_h, a, grad_x, grad_weights, d, inner, swiglu
):
    """Fills grad_h (M, H), the weighted activations a (M, F), grad_x (M, D) per row and grad_weights (N, K).

    up and down are the float32 weights themselves, or their pairs from pack_for_backward.
    """
    for worker in prange(n_workers):
        _backward_blocks(
            worker, n_workers, grad, order, weights, top_k, blocks, up, down, h, grad_h, a, grad_x, grad_weights,
            d, inner, swiglu,
        )  # fmt: skip


def column_split(n_workers, n_experts, d):
    """Model columns per task of weight_gradients: all of them where there are enough experts, else down to 64."""
    split = d
    while split > PANEL and n_experts * (d // split) < 4 * n_workers:
        split //= 2
    return (split + 15) // 16 * 16


@njit(cache=True)
def _operands_along_rows(target, source, starts, width, step, zeros):
    """target (rows / step, width) = the source rows at offsets `starts`, in operands along the rows; zeros complete."""
    for r in range(0, starts.size, step):
        low = source[starts[r] : starts[r] + width]
        paired = r + step <= starts.size
        high = source[starts[r + step - 1] : starts[r + step - 1] + width] if paired else zeros[:width]
        pair_rows(target[r // step * width : (r // step + 1) * width], low, high)


@njit(cache=True)
def _weight_gradients(
    worker, n_workers, split, first_row, x, grad, order, top_k, grad_h, a, grad_up, grad_down, d, inner, operand
):
    n_experts, step = first_row.size - 1, 4 // x.itemsize
    wide, splits = grad_up.size // (n_experts * d), (d + split - 1) // split
    zeros = np.zeros(max(wide, d), x.dtype)
    xs, dys = np.empty(BLOCK * split, operand.dtype), np.empty(BLOCK * split, operand.dtype)
    dhs, acts = np.empty(BLOCK * wide, operand.dtype), np.empty(BLOCK * inner, operand.dtype)
    dys_t, dhs_t = np.empty(split * BLOCK, operand.dtype), np.empty(wide * BLOCK, operand.dtype)
    for task in range(worker, n_experts * splits, n_workers):
        expert, column = task // splits, task % splits * split
        width = min(split, d - column)
        up_at, down_at = expert * wide * d + column, (expert * d + column) * inner
        if first_row[expert] == first_row[expert + 1]:
            for row in range(wide):
                grad_up[up_at + row * d : up_at + row * d + width] = 0
            grad_down[down_at : down_at + width * inner] = 0
        for start in range(first_row[expert], first_row[expert + 1], BLOCK):
            stop, keep = min(start + BLOCK, first_row[expert + 1]), start > first_row[expert]
            tokens = order[start:stop] // top_k * d + column
            _operands_along_rows(xs, x, tokens, width, step, zeros)
            _operands_along_rows(dys, grad, tokens, width, step, zeros)
            _operands_along_rows(dhs, grad_h, np.arange(start, stop) * wide, wide, step, zeros)
            _operands_along_rows(acts, a, np.arange(start, stop) * inner, inner, step, zeros)
            depth = (stop - start + step - 1) // step
            transpose(dhs_t, BLOCK, dhs, depth, wide)
            transpose(dys_t, BLOCK, dys, depth, width)
            matmul(grad_up, up_at, d, dhs_t, 0, BLOCK, 1, xs, 0, width, wide, width, depth, keep)
            matmul(grad_down, down_at, inner, dys_t, 0, BLOCK, 1, acts, 0, inner, width, inner, depth, keep)


@njit(cache=True, parallel=True)
def weight_gradients(
    n_workers, split, first_row, x, grad, order, top_k, grad_h, a, grad_up, grad_down, d, inner, operand
):
    """Fills grad_up (E, H, D) and grad_down (E, D, F); tasks are experts times slices of `split` model columns.

    first_row (E + 1,): where each expert's rows begin; operand: an array of the operands' type, not read.
    """
    for worker in prange(n_workers):
        _weight_gradients(
            worker, n_workers, split, first_row, x, grad, order, top_k, grad_h, a, grad_up, grad_down, d, inner, operand
        )
