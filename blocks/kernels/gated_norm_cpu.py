"""Numba kernels of RMSNorm(y * silu(z)), one pass over memory each way. Arrays are flat, float32 or bfloat16 bits.

y and out are (tokens, channels); z and its gradient lie in the first columns of rows of z_row elements.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from blocks.kernels.numba_math import helper, kernel, never_inline, read, sigmoid, write

BLOCK = 64  # tokens per task


@helper
def _gate(gated, y, y_at, z, z_at, width, eps):
    """gated = y * silu(z); returns 1 / rms."""
    never_inline()
    total = np.float32(0.0)
    for c in range(width):
        gate = read(z, z_at + c)
        value = read(y, y_at + c) * gate * sigmoid(gate)
        write(gated, c, value)
        total += value * value
    return np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(eps))


@kernel
def gated_norm_forward(out, y, z, z_row, weight, tokens, channels, groups, eps):
    """out = weight * y silu(z) / rms over each group of channels."""
    for task in prange((tokens + BLOCK - 1) // BLOCK):
        _forward_block(np.int64(task), out, y, z, z_row, weight, tokens, channels, groups, eps)


@helper
def _forward_block(task, out, y, z, z_row, weight, tokens, channels, groups, eps):
    width = channels // groups
    gated = np.empty(width, np.float32)
    for t in range(task * BLOCK, min((task + 1) * BLOCK, tokens)):
        for group in range(groups):
            first = group * width
            at = t * channels + first
            scale = _gate(gated, y, at, z, t * z_row + first, width, eps)
            for c in range(width):
                write(out, at + c, read(gated, c) * scale * read(weight, first + c))


@kernel
def gated_norm_backward(grad_y, grad_z, grad_weight, gradient, y, z, z_row, weight, tokens, channels, groups, eps):
    """grad_y as y, grad_z in rows of z_row, and grad_weight (tasks, channels): sums over blocks of 64 tokens."""
    for task in prange((tokens + BLOCK - 1) // BLOCK):
        _backward_block(
            np.int64(task), grad_y, grad_z, grad_weight, gradient, y, z, z_row, weight, tokens, channels, groups, eps
        )


@helper
def _backward_block(task, grad_y, grad_z, grad_weight, gradient, y, z, z_row, weight, tokens, channels, groups, eps):
    width = channels // groups
    gated = np.empty(width, np.float32)
    sums = np.zeros(channels, np.float32)
    for t in range(task * BLOCK, min((task + 1) * BLOCK, tokens)):
        for group in range(groups):
            first = group * width
            at, z_at = t * channels + first, t * z_row + first
            scale = _gate(gated, y, at, z, z_at, width, eps)
            along = np.float32(0.0)
            for c in range(width):
                along += read(gradient, at + c) * read(weight, first + c) * read(gated, c)
            along *= scale * scale / np.float32(width)
            for c in range(width):
                g, value = read(gradient, at + c), read(gated, c)
                write(sums, first + c, read(sums, first + c) + g * value * scale)
                through = scale * (g * read(weight, first + c) - value * along)
                gate = read(z, z_at + c)
                s = sigmoid(gate)
                write(
                    grad_z,
                    z_at + c,
                    through * read(y, at + c) * s * (np.float32(1.0) + gate * (np.float32(1.0) - s)),
                )
                write(grad_y, at + c, through * gate * s)
    for c in range(channels):
        write(grad_weight, task * channels + c, read(sums, c))
