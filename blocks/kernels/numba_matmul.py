"""Small matrix products inside Numba kernels: register tiles written as vector instructions.

A loop nest in plain Numba keeps its partial sums in memory; a tile of 4 rows x 4 vectors keeps them in registers
and runs near the machine's multiply-add peak on operands that lie in cache. Larger products belong to torch.

Operands are float32, or bfloat16 in pairs: a uint32 holds elements 2 i (low half) and 2 i + 1 of the summed index,
so that a matrix (m, k) is an array of (m, k / 2) pairs. Sums are float32.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

import blocks.kernels.numba_setup  # noqa: F401  before anything is compiled

LANES = 16  # columns are processed in vectors of 16 float32; LLVM splits them where registers are narrower
TILE_ROWS = 4
_FEATURES = llvmlite.binding.get_host_cpu_features()
WIDE = 4 if _FEATURES.get("avx512f", False) else 1  # vectors per tile
PAIR_PRODUCTS = bool(_FEATURES.get("avx512bf16", False))  # an instruction for products of bfloat16 pairs


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


_INT = ir.IntType(32)
_VECTOR, _INT_VECTOR = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_INT, LANES)
_BFLOAT_VECTOR = ir.VectorType(_BFloat(), 2 * LANES)


def _spread(builder: Any, scalar: Any, vector: Any) -> Any:
    """A vector with the scalar in every lane."""
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_INT, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INT_VECTOR, [0] * LANES))


def _fused_multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    shape = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, shape, f"llvm.fma.v{LANES}f32"), [a, b, total])


def _pair_multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    """total + a_low b_low + a_high b_high for vectors of bfloat16 pairs."""
    if PAIR_PRODUCTS:
        shape = ir.FunctionType(_VECTOR, [_VECTOR, _BFLOAT_VECTOR, _BFLOAT_VECTOR])
        product = cgutils.get_or_insert_function(builder.module, shape, "llvm.x86.avx512bf16.dpbf16ps.512")
        return builder.call(product, [total, builder.bitcast(a, _BFLOAT_VECTOR), builder.bitcast(b, _BFLOAT_VECTOR)])
    shift, mask = ir.Constant(_INT_VECTOR, [16] * LANES), ir.Constant(_INT_VECTOR, [0xFFFF0000] * LANES)
    low = [builder.bitcast(builder.shl(pairs, shift), _VECTOR) for pairs in (a, b)]
    high = [builder.bitcast(builder.and_(pairs, mask), _VECTOR) for pairs in (a, b)]
    return _fused_multiply_add(builder, *high, _fused_multiply_add(builder, *low, total))


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, array: int, offset: Any) -> Any:
    data = context.make_array(signature.args[array])(context, builder, arguments[array]).data
    return builder.gep(data, [offset])


def _vector_at(builder: Any, pointer: Any, offset: Any, vector: Any) -> Any:
    return builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())


def _tile(vectors: int) -> Any:
    """An intrinsic: C (4, 16 * vectors) (+)= A (4, k) B (k, 16 * vectors), each an array, an offset and its strides."""

    @intrinsic
    def tile(typing_context, c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, k, keep):
        pairs = b.dtype == types.uint32
        operand = _INT_VECTOR if pairs else _VECTOR
        multiply_add = _pair_multiply_add if pairs else _fused_multiply_add

        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            c_ptr, a_ptr, b_ptr = (
                _pointer(context, builder, signature, arguments, array, arguments[array + 1]) for array in (0, 3, 7)
            )
            c_row, a_row, a_column, b_row, k, keep = (arguments[i] for i in (2, 5, 6, 9, 10, 11))

            def times(value: Any, constant: int) -> Any:
                return builder.mul(value, ir.Constant(k.type, constant))

            def plus(value: Any, constant: int) -> Any:
                return builder.add(value, ir.Constant(k.type, constant))

            targets = [
                _vector_at(builder, c_ptr, plus(times(c_row, i), LANES * j), _VECTOR)
                for i in range(TILE_ROWS)
                for j in range(vectors)
            ]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in targets]
            with builder.if_then(keep):
                for total, target in zip(sums, targets, strict=True):
                    builder.store(builder.load(target, align=4), total)
            with cgutils.for_range(builder, k) as loop:
                row, column = builder.mul(loop.index, b_row), builder.mul(loop.index, a_column)
                b_vectors = [
                    builder.load(_vector_at(builder, b_ptr, plus(row, LANES * j), operand), align=4)
                    for j in range(vectors)
                ]
                for i in range(TILE_ROWS):
                    scalar = builder.load(builder.gep(a_ptr, [builder.add(times(a_row, i), column)]))
                    spread = _spread(builder, scalar, operand)
                    for total, b_vector in zip(sums[i * vectors : (i + 1) * vectors], b_vectors, strict=True):
                        builder.store(multiply_add(builder, spread, b_vector, builder.load(total)), total)
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        n = types.intp
        fits = c.dtype == types.float32 and a.dtype == b.dtype and (pairs or b.dtype == types.float32)
        return (types.void(c, n, n, a, n, n, n, b, n, n, n, types.boolean), codegen) if fits else None

    return tile


_wide_tile, _tile_of_3, _tile_of_2, _tile_of_1 = _tile(WIDE), _tile(3), _tile(2), _tile(1)


@njit(cache=True)
def matmul(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, m, n, k, keep):
    """C (m, n) = A (m, k) B (k, n), or += with keep; arrays with offsets and strides, of pairs: k counts pairs.

    m must be a multiple of 4 and n of 16 (pad the scratch). The columns of C and B are contiguous; A has any strides,
    so a transposed A is read in place. Columns go in panels of one tile's width, so 4 * 64 * k bytes of B should
    fit the second-level cache. Sums run over k in order: the result depends on nothing else.
    """
    j = 0
    while j + WIDE * LANES <= n:
        for i in range(0, m, TILE_ROWS):
            at, own = c_at + i * c_row + j, a_at + i * a_row
            _wide_tile(c, at, c_row, a, own, a_row, a_column, b, b_at + j, b_row, k, keep)
        j += WIDE * LANES
    for i in range(0, m if j < n else 0, TILE_ROWS):
        at, own = c_at + i * c_row + j, a_at + i * a_row
        if n - j == 3 * LANES:
            _tile_of_3(c, at, c_row, a, own, a_row, a_column, b, b_at + j, b_row, k, keep)
        elif n - j == 2 * LANES:
            _tile_of_2(c, at, c_row, a, own, a_row, a_column, b, b_at + j, b_row, k, keep)
        else:
            _tile_of_1(c, at, c_row, a, own, a_row, a_column, b, b_at + j, b_row, k, keep)


@intrinsic
def transpose_tile(typing_context, target, target_at, target_row, source, source_at, source_row):
    """target (16, 16) = the transpose of source (16, 16): float32 or pairs, with offsets and row strides."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target_ptr, source_ptr = (
            _pointer(context, builder, signature, arguments, array, arguments[array + 1]) for array in (0, 3)
        )

        def row(pointer: Any, stride: Any, index: int) -> Any:
            return _vector_at(builder, pointer, builder.mul(stride, ir.Constant(stride.type, index)), _VECTOR)

        # Four perfect shuffles: row pairs (i, i + 8) are interleaved, low half then high half.
        half = LANES // 2
        halves = [[n for i in range(first, first + half) for n in (i, i + LANES)] for first in (0, half)]
        masks = [ir.Constant(_INT_VECTOR, lanes) for lanes in halves]
        rows = [builder.load(row(source_ptr, arguments[5], i), align=4) for i in range(LANES)]
        for _ in range(4):
            rows = [builder.shuffle_vector(rows[i], rows[i + half], mask) for i in range(half) for mask in masks]
        for i in range(LANES):
            builder.store(rows[i], row(target_ptr, arguments[2], i), align=4)
        return context.get_dummy_value()

    n = types.intp
    return types.void(target, n, n, source, n, n), codegen
