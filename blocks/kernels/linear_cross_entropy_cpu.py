"""Numba kernels of the chunked linear cross-entropy. Flat arrays; elements and operands as in numba_operands.py.

N tokens in chunks, V words, D model width (a multiple of 16). One chunk: logits = hidden W^T into a buffer of row
length `stride` (V rounded up to 16), softmax and its gradient row by row, then hidden's gradient and the chunk's
share of W's. Every sum is float32 in a fixed order, whatever the number of threads.
"""

# mypy: disable-error-code="call-arg, var-annotated"
from __future__ import annotations

import numpy as np
from numba import njit, prange

from blocks.kernels.attention_cpu import largest
from blocks.kernels.numba_math import FASTMATH, exp, read, write
from blocks.kernels.numba_matmul import matmul
from blocks.kernels.numba_operands import PANEL, copy, pack_transposed, pair_rows, transpose

ROWS = 64  # tokens per task of the hidden gradient
DEPTH = 256  # operands summed over at a time there, so that a panel of W stays in cache


@njit(cache=True)
def _pack_panel(packed, weight, n_words, d, step, panel):
    first = panel * PANEL
    width = min(PANEL, n_words - first)
    if width % 16 == 0:
        pack_transposed(packed, first * d // step, weight, first * d, width, d, step, 0)
        return
    padded = np.zeros((width + 15) // 16 * 16 * d, np.float32)
    copy(padded, 0, weight, first * d, width * d)
    pack_transposed(packed, first * d // step, padded, 0, padded.size // d, d, step, 0)


@njit(cache=True, parallel=True)
def pack_words(packed, weight, n_words, d, step):
    """packed (stride * d / step): panels of 64 words of weight (V, D), transposed; words beyond V are zero."""
    for panel in prange((n_words + PANEL - 1) // PANEL):
        _pack_panel(packed, weight, n_words, d, step, panel)


@njit(cache=True)
def _pair_words(pairs, weight, n_words, d, row):
    low, high = weight[2 * row * d : (2 * row + 1) * d], weight[min(2 * row + 1, n_words - 1) * d :]
    own = pairs[row * d : (row + 1) * d]
    pair_rows(own, low, high if 2 * row + 1 < n_words else np.zeros(d, np.float32))


@njit(cache=True, parallel=True)
def pair_words(pairs, weight, n_words, d):
    """pairs (ceil(V / 2), D) of consecutive rows of weight (V, D)."""
    for row in prange((n_words + 1) // 2):
        _pair_words(pairs, weight, n_words, d, row)


@njit(cache=True, parallel=True)
def logits(out, stride, hidden, packed, rows, depth):
    """out (rows, stride) = hidden (rows, depth operands) W^T; rows a multiple of 4."""
    for panel in prange((stride + PANEL - 1) // PANEL):
        first = panel * PANEL
        width = min(PANEL, stride - first)
        matmul(out, first, stride, hidden, 0, depth, 1, packed, first * depth, width, rows, width, depth, False)


@njit(cache=True, fastmath=FASTMATH)
def _softmax_row(grad, row, label, need_gradient):
    """Returns -log softmax(row)[label]; with need_gradient, grad (which may be row) = softmax - one-hot, then zeros."""
    top, target = largest(row), read(row, label)
    total = np.float32(0)
    for e in range(row.size):
        value = exp(read(row, e) - top)
        write(row, e, value)
        total += value
    if need_gradient:
        factor = np.float32(1) / total
        correct = read(row, label) * factor - np.float32(1)
        for e in range(row.size):
            write(grad, e, read(row, e) * factor)
        write(grad, label, correct)
    return top + np.log(total) - target


@njit(cache=True, parallel=True)
def softmax(losses, grad, logits, stride, labels, n_words, need_gradient):
    """losses (rows,) and, with need_gradient, grad (rows, stride), which may be the logits; 0 where a label is < 0."""
    for r in prange(labels.size):
        row, own = logits[r * stride : r * stride + n_words], grad[r * stride : (r + 1) * stride]
        if labels[r] < 0:
            losses[r] = 0
            own[:] = 0
        else:
            losses[r] = _softmax_row(own, row, labels[r], need_gradient)
            own[n_words:] = 0


@njit(cache=True)
def _hidden_gradient(task, out, grad, stride, words, n_words, rows, d, step):
    columns = (d + PANEL - 1) // PANEL
    first, column = task // columns * ROWS, task % columns * PANEL
    count, width = min(ROWS, rows - first), min(PANEL, d - column)
    operands = grad.view(words.dtype)
    row_length, total = stride // step, (n_words + step - 1) // step
    for at in range(0, total, DEPTH):
        matmul(
            out, first * d + column, d, operands, first * row_length + at, row_length, 1,
            words, at * d + column, d, count, width, min(DEPTH, total - at), at > 0,
        )  # fmt: skip


@njit(cache=True, parallel=True)
def hidden_gradient(out, grad, stride, words, n_words, rows, d, step):
    """out (rows, D) float32 = grad (rows, stride) W; words: weight (V, D) or its pairs; rows a multiple of 4."""
    for task in prange((rows + ROWS - 1) // ROWS * ((d + PANEL - 1) // PANEL)):
        _hidden_gradient(task, out, grad, stride, words, n_words, rows, d, step)


@njit(cache=True)
def _weight_gradient(panel, out, grad, stride, hidden, n_words, rows, d, step, keep):
    first = panel * PANEL
    width = min(PANEL, n_words - first)
    padded, depth = (width + 15) // 16 * 16, (rows + step - 1) // step
    block = np.empty((depth + 15) // 16 * 16 * padded, hidden.dtype)
    zeros = np.zeros(padded, grad.dtype)
    for r in range(depth):
        low = grad[r * step * stride + first : r * step * stride + first + padded]
        last = (r + 1) * step - 1
        high = grad[last * stride + first : last * stride + first + padded] if last < rows else zeros
        pair_rows(block[r * padded : (r + 1) * padded], low, high)
    block_t = np.empty(block.size, hidden.dtype)
    row_length = block.size // padded
    transpose(block_t, row_length, block, depth, padded)
    if width == padded:
        matmul(out, first * d, d, block_t, 0, row_length, 1, hidden, 0, d, width, d, depth, keep)
        return
    edge = np.zeros(padded * d, np.float32)
    if keep:
        copy(edge, 0, out, first * d, width * d)
    matmul(edge, 0, d, block_t, 0, row_length, 1, hidden, 0, d, padded, d, depth, keep)
    copy(out, first * d, edge, 0, width * d)


@njit(cache=True, parallel=True)
def weight_gradient(out, grad, stride, hidden, n_words, rows, d, step, keep):
    """out (V, D) float32 = (or with keep +=) grad^T hidden; hidden in operands along the tokens."""
    for panel in prange((n_words + PANEL - 1) // PANEL):
        _weight_gradient(panel, out, grad, stride, hidden, n_words, rows, d, step, keep)


@njit(cache=True)
def pair_tokens(pairs, hidden, rows, d, step):
    """pairs (ceil(rows / step), D) operands along the tokens of hidden (rows, D)."""
    zeros = np.zeros(d, hidden.dtype)
    for r in range(0, rows, step):
        last = r + step - 1
        high = hidden[last * d : (last + 1) * d] if last < rows else zeros
        pair_rows(pairs[r // step * d : (r // step + 1) * d], hidden[r * d : (r + 1) * d], high)
