"""M2RNN: a recurrence with a matrix state and a nonlinear, learned transition (arXiv 2603.14360).

Per head, with state h (K, V), forget gate f in (0, 1) and a learned weight W (V, V):

    c_t = tanh(h_{t-1} W + k_t v_t^T)
    h_t = f_t h_{t-1} + (1 - f_t) c_t
    y_t = q_t^T h_t + skip * v_t

Queries and keys have fewer heads than values: value head n reads query head n // (N / Nq), keys likewise.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from blocks.kernels import m2rnn_numba, m2rnn_torch
from blocks.kernels.m2rnn_layout import prepare

NUMBA = "Numba, explicit SIMD"
TRITON = "Triton"
CHUNKED = "chunked time loop (torch)"
CHUNK_SIZE = 32  # steps between the states that are kept for the backward pass: changes memory, not the result


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `m2rnn` runs for this device and dtype: float64 and devices without a kernel of their own take CHUNKED."""
    if dtype == torch.float64:
        return CHUNKED
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return TRITON
    return NUMBA if device.type == "cpu" else CHUNKED


def _kernel(v: Tensor) -> Any:
    name = kernel_name(v.device, v.dtype)
    if name == TRITON:
        from blocks.kernels import m2rnn_triton  # needs triton: only where it will be used

        return m2rnn_triton
    return m2rnn_numba if name == NUMBA else m2rnn_torch


def m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    skip: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    gradient_clip: float | None = None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a batch of rows.

    q (B, T, Nq, K); k (B, T, Nk, K); v (B, T, N, V); weight (N, V, V); forget (B, T, N), already in (0, 1);
    skip (N, V); starts (B, T) bool, True where a document begins: the state there is zero, whatever came before;
    initial_state (B, N, K, V), what the first token of a row finds unless it starts a document (default zero).
    gradient_clip bounds every element of dL/dh_t, at every step of the backward pass.

    Returns y (B, T, N, V) in v's dtype and the state after the last token (B, N, K, V). The state is float32,
    float64 for float64 inputs. Raises ValueError on a shape that does not fit.
    """
    limit = math.inf if gradient_clip is None else gradient_clip
    y, last, _ = _m2rnn(q, k, v, weight, forget, skip, starts, initial_state, limit, chunk_size)
    return y, last


@torch.library.custom_op("amer::m2rnn", mutates_args=())
def _m2rnn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    skip: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
    limit: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = prepare(q, k, v, weight, forget, skip, starts, initial_state)
    y, last, checkpoints = _kernel(v).forward(inputs, chunk_size)
    return y.to(v.dtype).contiguous(), last, checkpoints


@_m2rnn.register_fake
def _(q, k, v, weight, forget, skip, starts, initial_state, limit, chunk_size):
    (batch, length, n_heads, value_dim), key_dim = v.shape, q.shape[-1]
    wide = torch.promote_types(v.dtype, torch.float32)
    n_chunks = (length + chunk_size - 1) // chunk_size
    last = v.new_empty(batch, n_heads, key_dim, value_dim, dtype=wide)
    return v.new_empty(v.shape), last, v.new_empty(batch, n_heads, n_chunks, key_dim, value_dim, dtype=wide)


@torch.library.custom_op("amer::m2rnn_backward", mutates_args=())
def _m2rnn_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    skip: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
    dy: Tensor,
    dlast: Tensor,
    limit: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = prepare(q, k, v, weight, forget, skip, starts, None)
    wide = inputs.v.dtype
    grads = _kernel(v).backward(inputs, checkpoints, dy.detach().to(wide), dlast.detach().to(wide), limit, chunk_size)
    like = (q, k, v, weight, forget, v if skip is None else skip, checkpoints)
    return tuple(grad.to(tensor.dtype).contiguous() for grad, tensor in zip(grads, like, strict=True))


@_m2rnn_backward.register_fake
def _(q, k, v, weight, forget, skip, starts, checkpoints, dy, dlast, limit, chunk_size):
    shaped = tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v, weight, forget))
    skip_like = v if skip is None else skip
    return (*shaped, skip_like.new_empty(weight.shape[:2]), checkpoints.new_empty(dlast.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, forget, skip, starts, initial_state, limit, chunk_size = inputs
    ctx.save_for_backward(q, k, v, weight, forget, skip, starts, output[2])
    ctx.set_materialize_grads(False)
    ctx.limit, ctx.chunk_size = limit, chunk_size
    ctx.has_skip, ctx.initial_dtype = skip is not None, None if initial_state is None else initial_state.dtype


def _derive(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors  # read once: activation recomputation gives them out only once
    v, checkpoints = saved[2], saved[7]
    dy = torch.zeros_like(v) if dy is None else dy
    dlast = torch.zeros_like(checkpoints[:, :, 0]) if dlast is None else dlast
    *grads, dskip, dinitial = _m2rnn_backward(*saved, dy, dlast, ctx.limit, ctx.chunk_size)
    dskip = dskip if ctx.has_skip else None
    dinitial = None if ctx.initial_dtype is None else dinitial.to(ctx.initial_dtype)
    return (*grads, dskip, None, dinitial, None, None)


_m2rnn.register_autograd(_derive, setup_context=_setup_context)


def m2rnn_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    skip: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    gradient_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The same as a literal loop over time under autograd: any device and dtype, keeps every step's tensors."""
    batch, length, n_heads, value_dim = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (repeat(t.to(wide), "b t g k -> b t (g m) k", m=n_heads // t.shape[2]) for t in (q, k))
    values, weight, forget = v.to(wide), weight.to(wide), forget.to(wide)[..., None, None]
    state = values.new_zeros(batch, n_heads, q.shape[-1], value_dim)
    state = state if initial_state is None else initial_state.to(wide)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = torch.where(starts[:, t, None, None, None], 0.0, state)
        candidate = torch.tanh(state @ weight + k[:, t, :, :, None] * values[:, t, :, None, :])
        state = forget[:, t] * state + (1 - forget[:, t]) * candidate
        if gradient_clip is not None:
            state = ClipGradient.apply(state, gradient_clip)
        outputs.append((q[:, t, :, :, None] * state).sum(dim=-2))
    y = torch.stack(outputs, dim=1)
    y = y if skip is None else y + skip.to(wide) * values
    return y.to(v.dtype), state


class ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped element by element to [-limit, limit]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].clamp(-ctx.limit, ctx.limit), None
