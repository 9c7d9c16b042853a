"""Scalar float32 helpers that LLVM vectorises inside Numba loops, where libm calls would not.

Each takes and gives np.float32 (or raw bfloat16 bits as np.uint16), keeps NaN, and is inlined: call them in the
innermost loop. bfloat16 tensors enter through `as_numpy(tensor)`. FASTMATH never assumes NaN or inf away, so the
finite checks of a training loop still see them.
"""

# mypy: disable-error-code="var-annotated"
from __future__ import annotations

from typing import Any

import numba
import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from torch import Tensor

import blocks.kernels.numba_setup  # noqa: F401  before anything is compiled

intrinsic: Any = numba.extending.intrinsic  # whose stubs do not know that the typing context is not an argument

# Everything that `fastmath=True` means, except nnan and ninf.
FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}

# Decorators: `helper` for functions that only other Numba functions call, `kernel` for the parallel ones that Python
# calls. A kernel should be a loop over tasks around one call: what stands inside it compiles several times over.
helper: Any = njit(**{"cache": True, "fastmath": FASTMATH, "no_cpython_wrapper": True, "no_cfunc_wrapper": True})  # type: ignore[call-overload]
kernel: Any = njit(**{"cache": True, "parallel": True, "no_cfunc_wrapper": True})  # type: ignore[call-overload]

NUMPY_KINDS = {
    torch.float32: "<f4",
    torch.float64: "<f8",
    torch.bfloat16: "<u2",
    torch.int64: "<i8",
    torch.int32: "<i4",
    torch.bool: "|b1",
}


def launch_threads() -> None:
    """Sets Numba's threads to torch's, clipped to what Numba was launched with. Call before each kernel."""
    launched: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(max(1, min(torch.get_num_threads(), launched)))


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The same memory as a NumPy array, bfloat16 as uint16 bit patterns. Copies only what is not contiguous.

    Not by `Tensor.numpy`, which forbids the storage to be resized from then on: FSDP2 frees gathered weights so.
    """
    tensor = tensor.detach().contiguous()
    kind = NUMPY_KINDS[tensor.dtype]
    return np.asarray(_Memory(tensor, kind)) if tensor.numel() else np.empty(tuple(tensor.shape), kind)


class _Memory:
    """What NumPy asks for to look at a contiguous CPU tensor, which it then keeps alive."""

    def __init__(self, tensor: Tensor, kind: str) -> None:
        self.tensor = tensor
        memory = (tensor.data_ptr(), False)
        self.__array_interface__ = {"version": 3, "typestr": kind, "shape": tuple(tensor.shape), "data": memory}


def _reinterpret(source: Any, target: Any, llvm_type: ir.Type) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], llvm_type)

    return target(source), codegen


@intrinsic
def never_inline(typing_context):
    """Keeps LLVM from inlining the Numba function that calls this: large bodies then compile once, not per caller."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def float_to_bits(typing_context, value):
    """float32 -> the same 32 bits as uint32."""
    return _reinterpret(types.float32, types.uint32, ir.IntType(32)) if value == types.float32 else None


@intrinsic
def bits_to_float(typing_context, bits):
    """uint32 -> the same 32 bits as float32."""
    return _reinterpret(types.uint32, types.float32, ir.FloatType()) if bits == types.uint32 else None


@intrinsic
def divide(typing_context, numerator, denominator):
    """float32 a / b without Numba's test for a zero divisor, which would stop a loop from vectorising."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fdiv(*arguments)

    is_float = numerator == types.float32 and denominator == types.float32
    return (types.float32(types.float32, types.float32), codegen) if is_float else None


def _element(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    return builder.gep(context.make_array(signature.args[0])(context, builder, arguments[0]).data, [arguments[1]])


@intrinsic
def read(typing_context, array, at):
    """float32 value of flat element `at` of a contiguous float32 or bfloat16 (uint16 bits) array.

    Unlike array[at] it never wraps a negative index, whose test would stop the loop from vectorising (10x slower).
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(_element(context, builder, signature, arguments))
        if array.dtype != types.uint16:
            return value
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.zext(value, word), ir.Constant(word, 16)), ir.FloatType())

    return (types.float32 if array.dtype == types.uint16 else array.dtype)(array, types.intp), codegen


@intrinsic
def write(typing_context, array, at, value):
    """Flat element `at` = value (any float), rounded to nearest even where the array holds bfloat16 bits."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[2]
        if array.dtype == types.uint16:
            value = _round_to_bfloat16(builder, value)
        builder.store(value, _element(context, builder, signature, arguments))
        return context.get_dummy_value()

    held = types.float32 if array.dtype == types.uint16 else array.dtype
    return types.void(array, types.intp, held), codegen


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    word = ir.IntType(32)
    bits = builder.bitcast(value, word)
    odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(word, 0x7FFF)), odd)
    magnitude = builder.and_(bits, ir.Constant(word, 0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, ir.Constant(word, 0x7F800000))
    result = builder.select(is_nan, ir.Constant(word, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(result, ir.Constant(word, 16)), ir.IntType(16))


@njit(fastmath=FASTMATH)
def to_bfloat16(value):
    """float32 -> uint16 bfloat16 bits, round to nearest even; NaN stays NaN."""
    bits = float_to_bits(np.float32(value))
    rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    is_nan = np.uint32(bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.uint16((np.uint32(0x7FC00000) if is_nan else rounded) >> np.uint32(16))


# Degree 6 minimax polynomial of exp on [-ln2 / 2, ln2 / 2]: powers of two come from the exponent bits.
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds to an integer that sits in the low bits
_ROUND_BITS = np.uint32(0x4B400000)
_E2, _E3, _E4, _E5, _E6 = (
    np.float32(1 / 2),
    np.float32(1 / 6),
    np.float32(1 / 24),
    np.float32(1 / 120),
    np.float32(1 / 720),
)


@njit(fastmath=FASTMATH)
def exp(x):
    """float32 exp, relative error below 5e-7; x is clamped to [-87, 88], so it never gives inf or 0."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    shifted = float_to_bits(np.float32(x * _LOG2E + _ROUND))
    power = np.int32(shifted - _ROUND_BITS)
    n = np.float32(power)
    r = np.float32(np.float32(x - n * _LN2_HIGH) - n * _LN2_LOW)
    tail = ((((_E6 * r + _E5) * r + _E4) * r + _E3) * r + _E2) * (r * r)
    scale = bits_to_float(np.uint32((power + np.int32(127)) << np.int32(23)))
    return np.float32((np.float32(1.0) + r + tail) * scale)


@njit(fastmath=FASTMATH)
def sigmoid(x):
    """float32 1 / (1 + exp(-x)), relative error below 5e-7."""
    return divide(np.float32(1.0), np.float32(np.float32(1.0) + exp(np.float32(-x))))


# tanh(x) = x P(x^2) / Q(x^2): own minimax fit on [0, 8] by reweighted least squares, relative error 6.4e-9 before
# rounding to float32, about 3e-7 after; beyond 8 the value at 8 is 1 to 2.3e-7.
_P0, _P1, _P2 = np.float32(0.999999994), np.float32(0.134444971), np.float32(0.00357159697)
_P3, _P4 = np.float32(2.18946441e-05), np.float32(1.52303921e-08)
_Q1, _Q2, _Q3, _Q4 = (
    np.float32(0.467778244),
    np.float32(0.026164439),
    np.float32(0.000341129027),
    np.float32(8.52243633e-07),
)


@njit(fastmath=FASTMATH)
def tanh(x):
    """float32 tanh by one rational function, error below 4e-7; never beyond 1 in magnitude."""
    x = np.float32(-8.0) if x < np.float32(-8.0) else x
    x = np.float32(8.0) if x > np.float32(8.0) else x
    u = np.float32(x * x)
    p = (((_P4 * u + _P3) * u + _P2) * u + _P1) * u + _P0
    q = (((_Q4 * u + _Q3) * u + _Q2) * u + _Q1) * u + np.float32(1.0)
    return divide(np.float32(x * p), np.float32(q))
