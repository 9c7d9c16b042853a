"""Sums of 1 - cos of two displacements, read straight out of the states, and their gradient: Numba, float32 on CPU.

One pass over the few rows that STP reads, in place of some forty small tensor operations. float32 differences,
sums in float64; one thread, so the result never depends on the number of threads. Everything else (other devices and
dtypes, mean squared error, normalised states, a predictor) takes the plain form in losses/stp.py, which is the
reference that the tests hold this against.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from blocks.kernels.numba_math import FASTMATH, as_numpy
from losses.joined import GradientJoin

TRIPLE, PATCH = 0, 1


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """Which form a training step uses for cosine STP without normalisation."""
    return "numba" if device.type == "cpu" and dtype == torch.float32 else "torch"


# Inner loops run over slices: from index 0 Numba knows that no index is negative, and only then do they vectorise.
@njit(inline="always")
def _square(x):
    total = 0.0
    for e in range(len(x)):
        total += np.float64(x[e]) * np.float64(x[e])
    return total


@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _forward(states, length, points, valid, weights, kind, tolerance, factors):
    """states (B * T, D); points (P, B, n) token indices; valid, weights (B, n).

    Returns the weighted sum of the losses and the number of degenerate triples. Fills factors (B, n, 3): weight x
    1 / (|a| |b|), cos / |a|^2 and cos / |b|^2, which the gradient is made of, 0 where there is none.
    """
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
            norm_s, norm_r, norm_t = _square(s), _square(r), _square(t)
            largest, finite = max(norm_s, norm_r, norm_t), norm_s + norm_r + norm_t
            aa = bb = ab = 0.0
            if kind == TRIPLE:
                for e in range(len(s)):
                    a, b = np.float64(t[e] - r[e]), np.float64(r[e] - s[e])
                    aa += a * a
                    bb += b * b
                    ab += a * b
            else:  # s, r, t are the start and the end of the patch and the first token of the document
                last = states[first_token + points[3, row, k]]
                norm_last = _square(last)
                largest, finite = max(largest, norm_last), finite + norm_last
                for e in range(len(s)):
                    patch = r[e] - s[e]
                    a, b = np.float64(patch), np.float64((last[e] - t[e]) - patch)
                    aa += a * a
                    bb += b * b
                    ab += a * b
            # Not finite states must reach the loss as such, so they are never degenerate.
            if np.isfinite(finite) and min(aa, bb) <= tolerance * tolerance * largest:
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


@njit(cache=True, fastmath=FASTMATH, error_model="numpy")
def _scatter(gradient, states, length, points, kind, factors, scale):
    """gradient (B * T, D) += scale x the gradient of the sum. Triple by triple in order: always the same sum."""
    for row in range(points.shape[1]):
        first_token = row * length
        for k in range(points.shape[2]):
            if factors[row, k, 0] == 0.0:
                continue
            cross = np.float32(-scale * factors[row, k, 0])
            own_a, own_b = np.float32(scale * factors[row, k, 1]), np.float32(scale * factors[row, k, 2])
            p, q = first_token + points[0, row, k], first_token + points[1, row, k]
            u = first_token + points[2, row, k]
            s, r, t = states[p], states[q], states[u]
            grad_s, grad_r, grad_t = gradient[p], gradient[q], gradient[u]
            if kind == TRIPLE:
                for e in range(len(s)):
                    a, b = t[e] - r[e], r[e] - s[e]
                    grad_a, grad_b = cross * b + own_a * a, cross * a + own_b * b
                    grad_s[e] -= grad_b
                    grad_r[e] += grad_b - grad_a
                    grad_t[e] += grad_a
            else:
                v = first_token + points[3, row, k]
                last, grad_last = states[v], gradient[v]
                for e in range(len(s)):
                    a = r[e] - s[e]
                    b = (last[e] - t[e]) - a
                    grad_b = cross * a + own_b * b
                    grad_a = cross * b + own_a * a - grad_b
                    # One after the other: an end of the patch may be an end of the document.
                    grad_s[e] -= grad_a
                    grad_r[e] += grad_a
                    grad_t[e] -= grad_b
                    grad_last[e] += grad_b


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
        length, width = states[0].shape[1:]
        ctx.kind = TRIPLE if points.shape[0] == 3 else PATCH
        ctx.points, is_valid, weight = as_numpy(points), as_numpy(valid), as_numpy(weights)
        ctx.factors = np.empty((len(states), *is_valid.shape, 3))
        sums, counts = [], []
        for state, factors in zip(states, ctx.factors, strict=True):
            rows = as_numpy(state).reshape(-1, width)
            total, n_degenerate = _forward(rows, length, ctx.points, is_valid, weight, ctx.kind, tolerance, factors)
            sums.append(total)
            counts.append(n_degenerate)
        ctx.join = join
        ctx.save_for_backward(*states)
        n_degenerate = torch.tensor(counts)
        ctx.mark_non_differentiable(n_degenerate)
        return torch.tensor(sums, dtype=torch.float32), n_degenerate

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fast STP has no second derivative; losses.stp.compute_stp_loss has")
        results: list[Tensor | None] = [None] * 6
        for i, (state, scale) in enumerate(zip(ctx.saved_tensors, gradients[0].tolist(), strict=True)):
            add = functools.partial(_add, as_numpy(state), ctx.points, ctx.kind, ctx.factors[i], scale)
            if not ctx.needs_input_grad[6 + i] or ctx.join.give(i, add):
                results.append(None)
            else:
                dense = torch.zeros_like(state, memory_format=torch.contiguous_format)
                add(dense)
                results.append(dense)
        return tuple(results)


def _add(state: Any, points: Any, kind: int, factors: Any, scale: float, gradient: Tensor) -> None:
    """gradient (B, T, D) contiguous, in place."""
    _, length, width = state.shape
    rows = gradient.detach().numpy().reshape(-1, width)
    _scatter(rows, state.reshape(-1, width), length, points, kind, factors, scale)
