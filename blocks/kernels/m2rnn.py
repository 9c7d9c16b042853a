"""M2RNN: a recurrence with a matrix state and a nonlinear, learned transition (arXiv 2603.14360).

Per head, with state h (K, V), forget gate f in (0, 1) and a learned weight W (V, V):

    c_t = tanh(h_{t-1} W + k_t v_t^T)
    h_t = f_t h_{t-1} + (1 - f_t) c_t
    y_t = q_t^T h_t + skip * v_t

Queries and keys have fewer heads than values: value head n reads query head n // (N / Nq), keys likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import repeat
from torch import Tensor

REFERENCE = "time loop (torch)"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `m2rnn` runs for this device and dtype."""
    return REFERENCE


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
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a batch of rows.

    q (B, T, Nq, K); k (B, T, Nk, K); v (B, T, N, V); weight (N, V, V); forget (B, T, N), already in (0, 1);
    skip (N, V); starts (B, T) bool, True where a document begins: the state there is zero, whatever came before;
    initial_state (B, N, K, V), what the first token of a row finds unless it starts a document (default zero).
    gradient_clip bounds every element of dL/dh_t, at every step of the backward pass.

    Returns y (B, T, N, V) in v's dtype and the state after the last token (B, N, K, V). The state is float32,
    float64 for float64 inputs.
    """
    return m2rnn_reference(q, k, v, weight, forget, skip, starts, initial_state, gradient_clip)


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
    q, k = (repeat(t.to(wide), "b t g k -> b t (g n) k", n=n_heads // t.shape[2]) for t in (q, k))
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
