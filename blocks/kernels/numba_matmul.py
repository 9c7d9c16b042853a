"""Small float32 matrix products inside Numba kernels: register tiles written as vector instructions.

A loop nest in plain Numba keeps its partial sums in memory; a tile of 4 rows x 4 vectors keeps them in registers
and runs near the machine's multiply-add peak on operands that lie in cache. Larger products belong to torch.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # columns are processed in vectors of 16 float32; LLVM splits them where registers are narrower
TILE_ROWS = 4
WIDE = 4 if llvmlite.binding.get_host_cpu_features().get("avx512f", False) else 1  # vectors per tile

_FLOAT, _VECTOR = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)


def _tile(vectors: int) -> Any:
    """An intrinsic: C (4, 16 * vectors) (+)= A (4, k) B (k, 16 * vectors), each an array, an offset and its strides."""

    @intrinsic
    def tile(typing_context, c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, k, keep):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = [context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 3, 7)]
            offsets = [arguments[i] for i in (1, 4, 8)]
            c_ptr, a_ptr, b_ptr = (builder.gep(p, [at]) for p, at in zip(arrays, offsets, strict=True))
            c_row, a_row, a_column, b_row, k, keep = (arguments[i] for i in (2, 5, 6, 9, 10, 11))
            index = k.type

            def vector_at(pointer: Any, offset: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [offset]), _VECTOR.as_pointer())

            def constant(value: int) -> Any:
                return ir.Constant(index, value)

            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{LANES}f32"
            )
            targets = [
                vector_at(c_ptr, builder.add(builder.mul(c_row, constant(i)), constant(LANES * j)))
                for i in range(TILE_ROWS)
                for j in range(vectors)
            ]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            sums = [cgutils.alloca_once_value(builder, zero) for _ in targets]
            with builder.if_then(keep):
                for total, target in zip(sums, targets, strict=True):
                    builder.store(builder.load(target, align=4), total)
            with cgutils.for_range(builder, k) as loop:
                row = builder.mul(loop.index, b_row)
                b_vectors = [
                    builder.load(vector_at(b_ptr, builder.add(row, constant(LANES * j))), align=4)
                    for j in range(vectors)
                ]
                column = builder.mul(loop.index, a_column)
                for i in range(TILE_ROWS):
                    scalar = builder.load(builder.gep(a_ptr, [builder.add(builder.mul(a_row, constant(i)), column)]))
                    spread = builder.insert_element(
                        ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0)
                    )
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                    spread = builder.shuffle_vector(spread, ir.Constant(_VECTOR, ir.Undefined), mask)
                    for j in range(vectors):
                        total = sums[i * vectors + j]
                        builder.store(builder.call(fma, [spread, b_vectors[j], builder.load(total)]), total)
            for total, target in zip(sums, targets, strict=True):
                builder.store(builder.load(total), target, align=4)
            return context.get_dummy_value()

        integers = (c_at, c_row, a_at, a_row, a_column, b_at, b_row, k)
        if not all(isinstance(n, types.Integer) for n in integers):
            return None
        n = types.intp
        return types.void(c, n, n, a, n, n, n, b, n, n, n, types.boolean), codegen

    return tile


_wide_tile, _narrow_tile = _tile(WIDE), _tile(1)


@njit(cache=True)
def matmul(c, c_at, c_row, a, a_at, a_row, a_column, b, b_at, b_row, m, n, k, keep):
    """C (m, n) = A (m, k) B (k, n), or += with keep; float32 arrays given as (array, offset, strides).

    m must be a multiple of 4 and n of 16 (pad the scratch). The columns of C and B are contiguous; A has any strides,
    so a transposed A is read in place. Sums run over k in order: the result depends on nothing else.
    """
    for i in range(0, m, TILE_ROWS):
        j = 0
        while j + WIDE * LANES <= n:
            _wide_tile(
                c, c_at + i * c_row + j, c_row, a, a_at + i * a_row, a_row, a_column, b, b_at + j, b_row, k, keep
            )
            j += WIDE * LANES
        while j < n:
            _narrow_tile(
                c, c_at + i * c_row + j, c_row, a, a_at + i * a_row, a_row, a_column, b, b_at + j, b_row, k, keep
            )
            j += LANES
