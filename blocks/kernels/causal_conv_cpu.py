"""Numba kernels of the causal convolution with SiLU. Arrays are flat, float32 or bfloat16 bits; sums are float32.

Taps are stored tap-major and always four: weight[k * channels + c] multiplies token t - 3 + k (`four_taps` pads).
`taps[t]` says how many of the three tokens before t belong to its document.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from blocks.kernels.numba_math import helper, kernel, never_inline, read, sigmoid, write

TAPS = 4
BLOCK = 64  # tokens per task


def four_taps(weight: Tensor) -> Tensor:
    """weight (C, K), K <= 4 -> (4, C) contiguous, float32, zeros for the taps that are not there."""
    padded = weight.new_zeros(TAPS, weight.shape[0], dtype=torch.float32)
    padded[TAPS - weight.shape[1] :] = weight.detach().T
    return padded


@helper
def taps_before(segments, row_at, t):
    """How many of the three tokens before t in its row belong to t's document."""
    count = 0
    while count < TAPS - 1 and count < t and segments[row_at + t - count - 1] == segments[row_at + t]:
        count += 1
    return count


@helper
def taps_after(segments, row_at, t, length):
    """How many of the three tokens after t in its row belong to t's document."""
    count = 0
    while count < TAPS - 1 and t + count + 1 < length and segments[row_at + t + count + 1] == segments[row_at + t]:
        count += 1
    return count


@helper
def convolve_token(out, out_at, x, x_at, x_row, weight, bias, channels, first, count, taps):
    """out[c] = bias + the convolution at the token whose channel `first` is x[x_at], for `count` channels."""
    never_inline()
    w0, w1, w2, w3 = first, channels + first, 2 * channels + first, 3 * channels + first
    if taps == TAPS - 1:
        for c in range(count):
            total = read(bias, first + c) + read(weight, w3 + c) * read(x, x_at + c)
            total += read(weight, w2 + c) * read(x, x_at - x_row + c)
            total += read(weight, w1 + c) * read(x, x_at - 2 * x_row + c)
            total += read(weight, w0 + c) * read(x, x_at - 3 * x_row + c)
            write(out, out_at + c, total)
    else:
        for c in range(count):
            write(out, out_at + c, read(bias, first + c) + read(weight, w3 + c) * read(x, x_at + c))
        for shift in range(1, taps + 1):
            at = (3 - shift) * channels + first
            for c in range(count):
                tap = read(weight, at + c) * read(x, x_at - shift * x_row + c)
                write(out, out_at + c, read(out, out_at + c) + tap)


@helper
def convolve_tile(out, out_row, x, x_at, x_row, weight, bias, channels, first, count, taps, n):
    """silu of the convolution at n tokens into float32 scratch; rows up to the next multiple of 16 become zero."""
    never_inline()
    w0, w1, w2, w3 = first, channels + first, 2 * channels + first, 3 * channels + first
    for i in range(n):
        at, to = x_at + i * x_row, i * out_row
        if taps[i] == TAPS - 1:
            for c in range(count):
                total = read(bias, first + c) + read(weight, w3 + c) * read(x, at + c)
                total += read(weight, w2 + c) * read(x, at - x_row + c)
                total += read(weight, w1 + c) * read(x, at - 2 * x_row + c)
                total += read(weight, w0 + c) * read(x, at - 3 * x_row + c)
                write(out, to + c, total * sigmoid(total))
        else:
            convolve_token(out, to, x, at, x_row, weight, bias, channels, first, count, taps[i])
            for c in range(count):
                write(out, to + c, read(out, to + c) * sigmoid(read(out, to + c)))
    out[n * out_row : (n + 15) // 16 * 16 * out_row] = 0


@helper
def _pull_back(pre, at, gradient, gradient_at, channels, slabs, slab_stride):
    """pre[c] = the pre-activation at `at` becomes its gradient, from that of silu's output summed over slabs."""
    never_inline()
    for c in range(channels):
        value = read(pre, at + c)
        s = sigmoid(value)
        total = read(gradient, gradient_at + c)
        for slab in range(1, slabs):
            total += read(gradient, gradient_at + slab * slab_stride + c)
        write(pre, at + c, total * (s * (np.float32(1.0) + value * (np.float32(1.0) - s))))


@kernel
def convolve_backward(
    grad_x, grad_taps, x, x_first, x_row, first, count, gradient, slabs, weight, bias, segments, batch, length, channels
):
    """Gradients of `count` channels from `first` on, where x holds them in columns x_first .. of rows of x_row.

    gradient (slabs, batch, length, count) of silu's output, to be summed over slabs. Writes grad_x, laid out as x, and
    grad_taps (batch, blocks, 5, count): sums over a block of 64 tokens for the four taps and the bias.
    """
    blocks = (length + BLOCK - 1) // BLOCK
    for task in prange(batch * blocks):
        _convolve_backward_block(
            np.int64(task),
            grad_x,
            grad_taps,
            x,
            x_first,
            x_row,
            first,
            count,
            gradient,
            slabs,
            weight,
            bias,
            segments,
            batch,
            length,
            channels,
        )


@helper
def _convolve_backward_block(
    task,
    grad_x,
    grad_taps,
    x,
    x_first,
    x_row,
    first,
    count,
    gradient,
    slabs,
    weight,
    bias,
    segments,
    batch,
    length,
    channels,
):
    blocks = (length + BLOCK - 1) // BLOCK
    slab_stride = batch * length * count
    row_at, start = task // blocks * length, task % blocks * BLOCK
    n = min(BLOCK, length - start)
    reach = min(n + TAPS - 1, length - start)  # the block's inputs are also read by the three tokens after it
    pre = np.empty(reach * count, np.float32)
    sums = np.zeros((TAPS + 1) * count, np.float32)
    for i in range(reach):
        t = start + i
        at = (row_at + t) * x_row + x_first
        before = taps_before(segments, row_at, t)
        convolve_token(pre, i * count, x, at, x_row, weight, bias, channels, first, count, before)
        _pull_back(pre, i * count, gradient, (row_at + t) * count, count, slabs, slab_stride)
        if i < n:
            _add_taps(sums, pre, i * count, x, at, x_row, count, before)
    for i in range(n):
        after = taps_after(segments, row_at, start + i, length)
        at = (row_at + start + i) * x_row + x_first
        _push_back(grad_x, at, pre, i * count, weight, channels, first, count, after)
    for c in range((TAPS + 1) * count):
        write(grad_taps, task * (TAPS + 1) * count + c, read(sums, c))


@helper
def _add_taps(sums, pre, at, x, x_at, x_row, count, before):
    """sums (5, count) += gradient of the pre-activation times the inputs that it read, and itself for the bias."""
    never_inline()
    if before == TAPS - 1:
        for c in range(count):
            g = read(pre, at + c)
            write(sums, c, read(sums, c) + g * read(x, x_at - 3 * x_row + c))
            write(sums, count + c, read(sums, count + c) + g * read(x, x_at - 2 * x_row + c))
            write(sums, 2 * count + c, read(sums, 2 * count + c) + g * read(x, x_at - x_row + c))
            write(sums, 3 * count + c, read(sums, 3 * count + c) + g * read(x, x_at + c))
            write(sums, 4 * count + c, read(sums, 4 * count + c) + g)
    else:
        for shift in range(before + 1):
            tap = (3 - shift) * count
            for c in range(count):
                write(sums, tap + c, read(sums, tap + c) + read(pre, at + c) * read(x, x_at - shift * x_row + c))
        for c in range(count):
            write(sums, 4 * count + c, read(sums, 4 * count + c) + read(pre, at + c))


@helper
def _push_back(grad_x, x_at, pre, at, weight, channels, first, count, after):
    """grad_x at one token from the pre-activations that read it: its own and those of `after` later tokens."""
    never_inline()
    w0, w1, w2, w3 = first, channels + first, 2 * channels + first, 3 * channels + first
    if after == TAPS - 1:
        for c in range(count):
            total = read(weight, w3 + c) * read(pre, at + c) + read(weight, w2 + c) * read(pre, at + count + c)
            total += read(weight, w1 + c) * read(pre, at + 2 * count + c)
            write(grad_x, x_at + c, total + read(weight, w0 + c) * read(pre, at + 3 * count + c))
    else:
        for c in range(count):
            total = read(weight, w3 + c) * read(pre, at + c)
            for shift in range(1, after + 1):
                total += read(weight, (3 - shift) * channels + first + c) * read(pre, at + shift * count + c)
            write(grad_x, x_at + c, total)
