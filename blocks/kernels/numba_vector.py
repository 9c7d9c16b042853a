"""Vectors of 16 float32 as Numba values, for kernels that must be SIMD whatever the loop vectoriser makes of them.

A vector lives in registers (LLVM splits it where the machine's are narrower). `a + b`, `a - b` and `a * b` work lane by
lane; `load` and `store` read and write a flat, contiguous float32 array at an element offset, unchecked.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from blocks.kernels import numba_math

LANES = 16
_LLVM_VECTOR = ir.VectorType(ir.FloatType(), LANES)
_TANH_P = (numba_math._P0, numba_math._P1, numba_math._P2, numba_math._P3, numba_math._P4)
_TANH_Q = (np.float32(1.0), numba_math._Q1, numba_math._Q2, numba_math._Q3, numba_math._Q4)


class VectorType(types.Type):
    """Numba's type of one such vector."""

    def __init__(self) -> None:
        super().__init__(name="Float32Vector16")


VECTOR = VectorType()


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, front_end_type: Any) -> None:
        super().__init__(manager, front_end_type, _LLVM_VECTOR)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, target: ir.Type) -> Any:
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), target.as_pointer())


def _is_flat(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 1 and array.dtype == types.float32 and array.layout == "C"


@intrinsic
def load(typing_context, array, offset):
    """array[offset : offset + 16]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, _LLVM_VECTOR)
        return builder.load(pointer, align=4)

    return (VECTOR(array, types.intp), codegen) if _is_flat(array) else None


@intrinsic
def store(typing_context, array, offset, vector):
    """array[offset : offset + 16] = vector."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, signature, arguments, _LLVM_VECTOR)
        builder.store(arguments[2], pointer, align=4)
        return context.get_dummy_value()

    return (types.void(array, types.intp, VECTOR), codegen) if _is_flat(array) and vector == VECTOR else None


def _splat(builder: Any, value: Any) -> Any:
    first = builder.insert_element(ir.Constant(_LLVM_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(first, ir.Constant(_LLVM_VECTOR, ir.Undefined), zeros)


@intrinsic
def splat(typing_context, value):
    """The float32 in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, arguments[0])

    return (VECTOR(types.float32), codegen) if value == types.float32 else None


@intrinsic
def load_splat(typing_context, array, offset):
    """array[offset] in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _splat(builder, builder.load(_pointer(context, builder, signature, arguments, ir.FloatType()), align=4))

    return (VECTOR(array, types.intp), codegen) if _is_flat(array) else None


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    signature = ir.FunctionType(_LLVM_VECTOR, [_LLVM_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.fma.v{LANES}f32")
    return builder.call(function, [a, b, c])


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fma(builder, *arguments)

    return (VECTOR(VECTOR, VECTOR, VECTOR), codegen) if a == b == c == VECTOR else None


def _clamp(builder: Any, x: Any, limit: Any) -> Any:
    for order, bound in (("<", builder.fneg(limit)), (">", limit)):
        x = builder.select(builder.fcmp_ordered(order, x, bound), bound, x)  # ordered: a NaN stays
    return x


@intrinsic
def clamp(typing_context, x, limit):
    """x limited to [-limit, limit] lane by lane; a NaN stays."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _clamp(builder, *arguments)

    return (VECTOR(VECTOR, VECTOR), codegen) if x == limit == VECTOR else None


@intrinsic
def tanh(typing_context, x):
    """numba_math.tanh in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def constant(value: Any) -> Any:
            return ir.Constant(_LLVM_VECTOR, [float(np.float32(value))] * LANES)

        def polynomial(square: Any, coefficients: tuple[Any, ...]) -> Any:
            total = constant(coefficients[-1])
            for coefficient in coefficients[-2::-1]:
                total = _fma(builder, total, square, constant(coefficient))
            return total

        clamped = _clamp(builder, arguments[0], constant(8.0))
        square = builder.fmul(clamped, clamped)
        numerator = polynomial(square, _TANH_P)
        return builder.fdiv(builder.fmul(clamped, numerator), polynomial(square, _TANH_Q))

    return (VECTOR(VECTOR), codegen) if x == VECTOR else None


@intrinsic
def store_sums(typing_context, array, offset, a, b, c, d):
    """array[offset : offset + 4] = the sums over the lanes of a, b, c and d."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def pick(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))

        def halve(x: Any, width: int) -> Any:
            low, high = pick(x, x, list(range(width // 2))), pick(x, x, list(range(width // 2, width)))
            return builder.fadd(low, high)

        def pair(x: Any, y: Any, width: int) -> Any:
            """Lanes of x and y in turn; each step folds neighbouring lanes, so that the sums end side by side."""
            even = [lane for i in range(0, width, 2) for lane in (i, width + i)]
            odd = [lane for i in range(0, width, 2) for lane in (i + 1, width + i + 1)]
            return builder.fadd(pick(x, y, even), pick(x, y, odd))

        folded = [halve(halve(x, LANES), LANES // 2) for x in arguments[2:]]  # four vectors of four lanes
        # (a0+a1, b0+b1, a2+a3, b2+b3) and the same of c, d; then halves of each pair
        ab, cd = pair(folded[0], folded[1], 4), pair(folded[2], folded[3], 4)
        sums = builder.fadd(pick(ab, cd, [0, 1, 4, 5]), pick(ab, cd, [2, 3, 6, 7]))
        pointer = _pointer(context, builder, signature, arguments, ir.VectorType(ir.FloatType(), 4))
        builder.store(sums, pointer, align=4)
        return context.get_dummy_value()

    ok = _is_flat(array) and a == b == c == d == VECTOR
    return (types.void(array, types.intp, VECTOR, VECTOR, VECTOR, VECTOR), codegen) if ok else None


def _lanewise(instruction: str) -> Callable[..., Any]:
    @intrinsic
    def operation(typing_context, a, b):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return getattr(builder, instruction)(*arguments)

        return (VECTOR(VECTOR, VECTOR), codegen) if a == b == VECTOR else None

    def implementation(a, b):
        return (lambda a, b: operation(a, b)) if a == b == VECTOR else None

    return implementation


overload(operator.add)(_lanewise("fadd"))
overload(operator.sub)(_lanewise("fsub"))
overload(operator.mul)(_lanewise("fmul"))
