"""Sums of 1 - cos of two displacements, read straight out of the states, and their gradient: Numba, float32 on CPU.

One pass over the few rows that STP reads, in place of some forty small tensor operations. float32 differences, sums in
float64, each state by one thread, so that the result does not depend on their number. What is left is mostly waiting:
for rows that are long out of the cache, and for the interpreter.
Everything else (other devices and dtypes, mean squared error, normalised states, a predictor) takes the plain form
in losses/stp.py, which is the reference that the tests hold this against.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic
from torch import Tensor

from blocks.kernels.numba_math import FASTMATH, launch_threads
from losses.joined import GradientJoin

TRIPLE, PATCH = 0, 1
INPUTS = 7  # addresses in front of those of the states
LARGEST = np.finfo(np.float64).max


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """Which form a training step uses for cosine STP without normalisation."""
    return "numba" if device.type == "cpu" and dtype == torch.float32 else "torch"


def _pointer_to(kind: Any) -> Any:
    """An intrinsic: an address as a pointer to `kind`."""

    @intrinsic
    def pointer(typing_context, address):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_data_type(kind).as_pointer())

        return types.CPointer(kind)(address), codegen

    return pointer


_floats, _doubles = _pointer_to(types.float32), _pointer_to(types.float64)
_integers, _bytes = _pointer_to(types.int64), _pointer_to(types.uint8)


@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _touch(states, length, points):
    """Reads every cache line that is about to be used. The rows lie in as many memory pages, long out of the cache, and
    independent reads wait for memory together where the sums would wait for one row after the other."""
    total = np.float32(0.0)
    for p in range(points.shape[0]):
        for row in range(points.shape[1]):
            for k in range(points.shape[2]):
                x = states[row * length + points[p, row, k]]
                for e in range(0, len(x), 16):
                    total += x[e]
    return total


# Inner loops run over slices: from index 0 Numba knows that no index is negative, and only then do they vectorise.
@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _one_state(states, length, points, valid, weights, kind, tolerance, displacements, factors):
    """The work of `_forward` on one state (B * T, D): its sum and the number of degenerate triples."""
    total, n_degenerate = 0.0, 0
    for row in range(points.shape[1]):
        first_token = row * length
        for k in range(points.shape[2]):
            factors[row, k, 0] = factors[row, k, 1] = factors[row, k, 2] = 0.0
            if not valid[row, k]:
                continue
            s = states[first_token + points[0, row, k]]
            r = states[first_token + points[1, row, k]]
            t = states[first_token + points[2, row, k]]
            last = states[first_token + points[points.shape[0] - 1, row, k]]
            a, b = displacements[0, row, k], displacements[1, row, k]
            aa = bb = ab = norm_s = norm_r = norm_t = norm_last = 0.0
            if kind == TRIPLE:
                for e in range(len(s)):
                    a[e], b[e] = t[e] - r[e], r[e] - s[e]
                    x, y = np.float64(a[e]), np.float64(b[e])
                    aa += x * x
                    bb += y * y
                    ab += x * y
                    u, v, w = np.float64(s[e]), np.float64(r[e]), np.float64(t[e])
                    norm_s += u * u
                    norm_r += v * v
                    norm_t += w * w
            else:  # s, r, t are the start and the end of the patch and the first token of the document
                for e in range(len(s)):
                    patch = r[e] - s[e]
                    a[e], b[e] = patch, (last[e] - t[e]) - patch
                    x, y = np.float64(a[e]), np.float64(b[e])
                    aa += x * x
                    bb += y * y
                    ab += x * y
                    u, v, w, z = np.float64(s[e]), np.float64(r[e]), np.float64(t[e]), np.float64(last[e])
                    norm_s += u * u
                    norm_r += v * v
                    norm_t += w * w
                    norm_last += z * z
            largest = max(max(norm_s, norm_r), max(norm_t, norm_last))
            # Not finite states must reach the loss as such, so they are never degenerate. (Not by np.isfinite: LLVM
            # takes its x - x for 0 where sums may be reordered.)
            finite = norm_s + norm_r + norm_t + norm_last <= LARGEST
            if finite and min(aa, bb) <= tolerance * tolerance * largest:
                n_degenerate += 1
                total += weights[row, k]
                continue
            inverse = 1.0 / (np.sqrt(aa) * np.sqrt(bb))
            cosine = ab * inverse
            total += weights[row, k] * (1.0 - cosine)
            factors[row, k, 0] = weights[row, k] * inverse
            factors[row, k, 1] = weights[row, k] * cosine / aa
            factors[row, k, 2] = weights[row, k] * cosine / bb
    return total, n_degenerate


# Results are arguments: what a parallel loop writes into arrays made beside it counts as dead and is left out.
@njit(cache=True, parallel=True, fastmath=FASTMATH, error_model="numpy")
def _all_states(
    addresses, B, T, D, points, valid, weights, kind, tolerance, sums, counts, displacements, factors, touched
):
    for i in prange(len(sums)):
        states = carray(_floats(addresses[i]), (B * T, D))
        touched[i] = _touch(states, T, points)
        sums[i], counts[i] = _one_state(
            states, T, points, valid, weights, kind, tolerance, displacements[i], factors[i]
        )


@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward(addresses, B, T, D, P, n, kind, tolerance):
    """addresses: of points (P, B, n) int64 token indices, valid (B, n) bool, weights (B, n) float32, then of the
    results, then of the states (B, T, D) float32. All contiguous. (Addresses, since making arrays of tensors takes
    longer than the work.)

    Results per state: sums (n_states,) float64, the weighted sum of the losses; counts (n_states,) int64 of the
    degenerate triples; and what the gradient is made of: displacements (n_states, 2, B, n, D) float32 and factors
    (n_states, B, n, 3) float64: weight x 1 / (|a| |b|), cos / |a|^2 and cos / |b|^2, 0 where there is no gradient.
    Returns what keeps `_touch` from being left out.
    """
    n_states = len(addresses) - INPUTS
    touched = np.empty(n_states, dtype=np.float32)
    _all_states(
        addresses[INPUTS:],
        B,
        T,
        D,
        carray(_integers(addresses[0]), (P, B, n)),
        carray(_bytes(addresses[1]), (B, n)),
        carray(_floats(addresses[2]), (B, n)),
        kind,
        tolerance,
        carray(_doubles(addresses[3]), (n_states,)),
        carray(_integers(addresses[4]), (n_states,)),
        carray(_floats(addresses[5]), (n_states, 2, B, n, D)),
        carray(_doubles(addresses[6]), (n_states, B, n, 3)),
        touched,
    )
    return touched[0]


@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _scatter(address, points_address, kept_address, factors_address, B, T, D, P, n, kind, i, scale):
    """The (B, T, D) gradient at `address` += scale x the gradient of the sum of state i. Triple by triple in order:
    always the same sum."""
    gradient, points = carray(_floats(address), (B * T, D)), carray(_integers(points_address), (P, B, n))
    displacements = carray(_floats(kept_address), (i + 1, 2, B, n, D))[i]
    factors = carray(_doubles(factors_address), (i + 1, B, n, 3))[i]
    for row in range(B):
        first_token = row * T
        for k in range(n):
            if factors[row, k, 0] == 0.0:
                continue
            cross = np.float32(-scale * factors[row, k, 0])
            own_a, own_b = np.float32(scale * factors[row, k, 1]), np.float32(scale * factors[row, k, 2])
            a, b = displacements[0, row, k], displacements[1, row, k]
            s = gradient[first_token + points[0, row, k]]
            r = gradient[first_token + points[1, row, k]]
            t = gradient[first_token + points[2, row, k]]
            if kind == TRIPLE:
                for e in range(len(a)):
                    grad_a, grad_b = cross * b[e] + own_a * a[e], cross * a[e] + own_b * b[e]
                    s[e] -= grad_b
                    r[e] += grad_b - grad_a
                    t[e] += grad_a
            else:
                last = gradient[first_token + points[3, row, k]]
                for e in range(len(a)):
                    grad_b = cross * a[e] + own_b * b[e]
                    grad_a = cross * b[e] + own_a * a[e] - grad_b
                    # One after the other: an end of the patch may be an end of the document.
                    s[e] -= grad_a
                    r[e] += grad_a
                    t[e] -= grad_b
                    last[e] += grad_b


class CosineSums(torch.autograd.Function):
    """(n_states,) weighted sums of the losses and numbers of degenerate triples, of (B, T, D) float32 CPU states.

    points (P, B, n): token indices s, r, t, or start, end, first, last of a patch. valid, weights (B, n).
    """

    @staticmethod
    def forward(
        ctx: Any,
        join: GradientJoin,
        sentinel: Tensor,
        points: Tensor,
        valid: Tensor,
        weights: Tensor,
        tolerance: float,
        *states: Tensor,
    ) -> tuple[Tensor, Tensor]:
        states = tuple(state.contiguous() for state in states)
        points, valid, weights = points.contiguous(), valid.contiguous(), weights.contiguous()
        (B, T, D), (P, _, n) = states[0].shape, points.shape
        kind = TRIPLE if P == 3 else PATCH
        displacements = torch.empty(len(states), 2, B, n, D)
        factors = torch.empty(len(states), B, n, 3, dtype=torch.float64)
        sums = torch.empty(len(states), dtype=torch.float64)
        counts = torch.empty(len(states), dtype=torch.int64)
        addresses = [
            tensor.data_ptr() for tensor in (points, valid, weights, sums, counts, displacements, factors, *states)
        ]
        launch_threads()
        _forward(np.array(addresses, dtype=np.uint64), B, T, D, P, n, kind, tolerance)
        ctx.join, ctx.shape = join, (B, T, D)
        ctx.kept = (points, displacements, factors), (B, T, D, P, n, kind)
        ctx.mark_non_differentiable(counts)
        return sums.float(), counts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fast STP has no second derivative; losses.stp.compute_stp_loss has")
        kept, sizes = ctx.kept
        results: list[Tensor | None] = [None] * 6
        for i, scale in enumerate(gradients[0].tolist()):
            add = functools.partial(_add, kept, sizes, i, scale)
            if not ctx.needs_input_grad[6 + i] or ctx.join.give(i, add):
                results.append(None)
            else:
                dense = torch.zeros(ctx.shape)
                add(dense)
                results.append(dense)
        return tuple(results)


def _add(kept: tuple[Tensor, ...], sizes: tuple[int, ...], i: int, scale: float, gradient: Tensor) -> None:
    """gradient (B, T, D) float32, contiguous, in place."""
    points, displacements, factors = kept
    _scatter(gradient.data_ptr(), points.data_ptr(), displacements.data_ptr(), factors.data_ptr(), *sizes, i, scale)
