"""What every M2RNN kernel is given (tensors of one dtype, checked shapes, nothing optional), and the layer's sizes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """q (B, T, Nq, K); k (B, T, Nk, K); v (B, T, N, V); weight (N, V, V); forget (B, T, N); skip (N, V);
    starts (B, T) bool; initial_state (B, N, K, V). All but starts in one dtype, float32 or float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    forget: Tensor
    skip: Tensor
    starts: Tensor
    initial_state: Tensor

    @property
    def n_heads(self) -> int:
        return self.v.shape[2]


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    forget: Tensor,
    skip: Tensor | None,
    starts: Tensor | None,
    initial_state: Tensor | None,
) -> Inputs:
    """Fills in what is None and widens to float32 (float64 stays). Raises ValueError on a shape that does not fit."""
    batch, length, n_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    wide = torch.promote_types(v.dtype, torch.float32)
    skip = v.new_zeros(n_heads, value_dim) if skip is None else skip
    starts = torch.zeros(batch, length, dtype=torch.bool, device=v.device) if starts is None else starts
    if initial_state is None:
        initial_state = v.new_zeros(batch, n_heads, key_dim, value_dim, dtype=wide)
    for name, tensor, shape in (
        ("q", q, (batch, length, q.shape[2], key_dim)),
        ("k", k, (batch, length, k.shape[2], key_dim)),
        ("weight", weight, (n_heads, value_dim, value_dim)),
        ("forget", forget, (batch, length, n_heads)),
        ("skip", skip, (n_heads, value_dim)),
        ("starts", starts, (batch, length)),
        ("initial_state", initial_state, (batch, n_heads, key_dim, value_dim)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"m2rnn: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if n_heads % q.shape[2] or n_heads % k.shape[2]:
        raise ValueError(f"m2rnn: {q.shape[2]} query and {k.shape[2]} key heads must divide {n_heads} value heads")
    if starts.dtype != torch.bool:
        raise ValueError(f"m2rnn: starts is {starts.dtype}, expected bool")
    q, k, v, weight = (t.detach().to(wide) for t in (q, k, v, weight))
    forget, skip, initial_state = (t.detach().to(wide) for t in (forget, skip, initial_state))
    return Inputs(q, k, v, weight, forget, skip, starts, initial_state)


@dataclass(frozen=True)
class M2RNNShape:
    """Sizes that the tensors alone do not tell, and two numbers."""

    key_dim: int
    value_dim: int
    n_q_heads: int
    n_k_heads: int
    eps: float
    gradient_clip: float | None

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (..., C) -> q (..., Nq, K), k (..., Nk, K), v (..., N, V): views."""
        widths = [self.n_q_heads * self.key_dim, self.n_k_heads * self.key_dim]
        q, k, v = qkv.split([*widths, qkv.shape[-1] - sum(widths)], dim=-1)
        return (
            q.unflatten(-1, (-1, self.key_dim)),
            k.unflatten(-1, (-1, self.key_dim)),
            v.unflatten(-1, (-1, self.value_dim)),
        )


def forget_gate(logits: Tensor, dt_bias: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """logits (..., N) -> exp(-exp(A_log) dt) and dt = softplus(logits + dt_bias), at least float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    dt = F.softplus(logits.to(wide) + dt_bias.to(wide))
    return torch.exp(-A_log.to(wide).exp() * dt), dt
