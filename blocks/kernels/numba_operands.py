"""Arranging operands of numba_matmul in scratch: pairing, packing, transposing. For use inside Numba kernels.

Elements are float32 or bfloat16 (uint16 bits); operands are float32 or pairs of bfloat16 (uint32), so an operand
holds `step` = 1 or 2 elements of the summed index. All widths are multiples of 16 (of 32 where they are summed over
in pairs: rows of zeros are added where tokens are summed).
"""

# mypy: disable-error-code="call-arg, var-annotated"
from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import overload

from blocks.kernels.numba_math import read, to_bfloat16
from blocks.kernels.numba_matmul import LANES, matmul, transpose_tile

PANEL = 64  # columns of a packed panel


@njit(cache=True)
def copy(target, target_at, source, source_at, size):
    """target[target_at : + size] = source[source_at : + size], both of one type."""
    own, values = target[target_at : target_at + size], source[source_at : source_at + size]
    for e in range(size):
        own[e] = values[e]


@njit(inline="always")
def _bits(value):
    """uint16 bfloat16 bits of a float32, or the bits as they are."""
    return np.uint32(to_bfloat16(value))


def pair_rows(target, low, high):
    """target[e] = the operand of elements low[e], high[e]; for float32 operands low[e] alone. For Numba code only."""
    raise NotImplementedError


@overload(pair_rows)
def _pair_rows(target, low, high):
    if target.dtype == types.float32:

        def single(target, low, high):
            for e in range(target.size):
                target[e] = low[e]

        return single
    if low.dtype == types.uint16:

        def bits(target, low, high):
            for e in range(target.size):
                target[e] = np.uint32(low[e]) | (np.uint32(high[e]) << np.uint32(16))

        return bits

    def rounded(target, low, high):
        for e in range(target.size):
            target[e] = _bits(low[e]) | (_bits(high[e]) << np.uint32(16))

    return rounded


def pair_columns(target, source):
    """target[e] = the operand of elements source[2 e], source[2 e + 1]; for float32 operands source[e]."""
    raise NotImplementedError


@overload(pair_columns)
def _pair_columns(target, source):
    if target.dtype == types.float32:

        def single(target, source):
            for e in range(target.size):
                target[e] = source[e]

        return single

    def rounded(target, source):
        for e in range(target.size):
            target[e] = _bits(read(source, 2 * e)) | (_bits(read(source, 2 * e + 1)) << np.uint32(16))

    return rounded


@njit(cache=True)
def pack_transposed(target, target_at, source, source_at, n, k, step, panel):
    """One panel of a packed B (k, n) from its float32 transpose, source (n, k): columns [64 panel, 64 panel + 64)."""
    first = panel * PANEL
    width, depth = min(PANEL, n - first), k // step
    base = target_at + first * depth
    block = np.empty(LANES * depth, target.dtype)
    for j in range(0, width, LANES):
        for row in range(LANES):
            at = source_at + (first + j + row) * k
            pair_columns(block[row * depth : (row + 1) * depth], source[at : at + k])
        for row in range(0, depth // LANES * LANES, LANES):
            transpose_tile(target, base + row * width + j, width, block, row, depth)
        for row in range(depth // LANES * LANES, depth):
            for column in range(LANES):
                target[base + row * width + j + column] = block[column * depth + row]


@njit(cache=True)
def matmul_packed(c, c_row, a, a_row, b, b_at, m, n, depth):
    """C (m, n) = A (m, k) B with B packed in panels by pack_transposed; depth is k in operands."""
    for first in range(0, n, PANEL):
        width = min(PANEL, n - first)
        matmul(c, first, c_row, a, 0, a_row, 1, b, b_at + first * depth, width, m, width, depth, False)


@njit(cache=True)
def transpose(target, target_row, source, rows, width):
    """target (width, target_row) = the transpose of source (rows, width), rows rounded up to 16 (both hold those)."""
    for row in range(0, rows, LANES):
        for e in range(0, width, LANES):
            transpose_tile(target, e * target_row + row, target_row, source, row * width + e, width)
