"""M2RNN in plain torch without autograd inside: the state is kept every `chunk` steps, the rest recomputed in a
hand-written backward pass. Any device and dtype; float64 stays float64, everything else is computed in float32.

Inside, a state is (N, B K, V): one batched matrix product per step serves every row of every head.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from blocks.kernels.m2rnn_layout import Inputs


def forward(inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, N, V), the last state (B, N, K, V) and the states that chunks start from (B, N, T / chunk, K, V)."""
    batch, length = inputs.forget.shape[:2]
    state = rearrange(inputs.initial_state, "b n k v -> n (b k) v")
    checkpoints, outputs = [], []
    for first in range(0, length, chunk):
        piece = slice(first, min(first + chunk, length))
        states, candidates = _chunk_states(inputs, piece, state)
        checkpoints.append(states[0])
        after = _after(inputs, piece, states, candidates)
        state = after[-1]
        q = _per_row(inputs.q[:, piece], inputs.n_heads)
        outputs.append(_sum_keys(q * after, batch))
    y = torch.cat(outputs, dim=1) + inputs.skip * inputs.v
    return y, _to_batch(state, batch), torch.stack([_to_batch(state, batch) for state in checkpoints], dim=2)


def backward(
    inputs: Inputs, checkpoints: Tensor, dy: Tensor, dlast: Tensor, limit: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight, forget, skip and initial_state; limit bounds every element of dL/dh_t."""
    batch, length = inputs.forget.shape[:2]
    dh = rearrange(dlast, "b n k v -> n (b k) v")
    dweight = torch.zeros_like(inputs.weight)
    transposed = inputs.weight.mT
    pieces = []
    for index in range(checkpoints.shape[2] - 1, -1, -1):
        piece = slice(index * chunk, min((index + 1) * chunk, length))
        states, candidates = _chunk_states(inputs, piece, rearrange(checkpoints[:, :, index], "b n k v -> n (b k) v"))
        keep, forget = _keep(inputs, piece), _forget(inputs, piece)
        q, k = (_per_row(t[:, piece], inputs.n_heads) for t in (inputs.q, inputs.k))
        v, dy_rows = (_per_key(t[:, piece], checkpoints.shape[3]) for t in (inputs.v, dy))
        dstates = q * dy_rows  # what reaches each h_t from its own output, then all of dL/dh_t
        dinner = torch.empty_like(states)  # gradient of the argument of the tanh
        for s in range(states.shape[0] - 1, -1, -1):
            dstates[s].add_(dh).clamp_(-limit, limit)
            torch.mul(dstates[s] * (1 - forget[s]), 1 - candidates[s].square(), out=dinner[s])
            dh = torch.baddbmm(dstates[s] * forget[s], dinner[s], transposed).mul_(keep[s])
        dweight += torch.einsum("snrv,snrw->nvw", states, dinner)
        gradients = (
            (_after(inputs, piece, states, candidates) * dy_rows).sum(dim=-1, keepdim=True),
            (dinner * v).sum(dim=-1, keepdim=True),
            _sum_keys(k * dinner, batch),
            (dstates * (states - candidates)).sum(dim=-1),
        )
        pieces.append(gradients)
    key_gradients = [torch.cat([piece[i] for piece in reversed(pieces)]) for i in (0, 1)]  # (T, N, B K, 1)
    dq, dk = (rearrange(t, "t n (b k) 1 -> b t n k", b=batch) for t in key_gradients)
    dv = torch.cat([piece[2] for piece in reversed(pieces)], dim=1) + inputs.skip * dy
    dforget = torch.cat([piece[3] for piece in reversed(pieces)])
    dforget = rearrange(dforget, "t n (b k) -> b t n k", b=batch).sum(dim=-1)
    dskip = (inputs.v * dy).sum(dim=(0, 1))
    dq = reduce(dq, "b t (g m) k -> b t g k", "sum", g=inputs.q.shape[2])
    dk = reduce(dk, "b t (g m) k -> b t g k", "sum", g=inputs.k.shape[2])
    return dq, dk, dv, dweight, dforget, dskip, _to_batch(dh, batch)


def _chunk_states(inputs: Inputs, piece: slice, state: Tensor) -> tuple[Tensor, Tensor]:
    """What each step starts from and its candidate, both (S, N, B K, V)."""
    k = _per_row(inputs.k[:, piece], inputs.n_heads)
    candidates = k * _per_key(inputs.v[:, piece], inputs.k.shape[3])
    states = torch.empty_like(candidates)
    keep, forget = _keep(inputs, piece), _forget(inputs, piece)
    for s in range(states.shape[0]):
        torch.mul(state, keep[s], out=states[s])
        torch.tanh(torch.baddbmm(candidates[s], states[s], inputs.weight), out=candidates[s])
        state = torch.lerp(candidates[s], states[s], forget[s])
    return states, candidates


def _after(inputs: Inputs, piece: slice, states: Tensor, candidates: Tensor) -> Tensor:
    return torch.lerp(candidates, states, _forget(inputs, piece))


def _keep(inputs: Inputs, piece: slice) -> Tensor:
    """(S, B K, 1): 0 where a document starts, else 1."""
    keep = (~inputs.starts[:, piece]).to(inputs.v.dtype)
    return repeat(keep, "b s -> s (b k) 1", k=inputs.k.shape[3])


def _forget(inputs: Inputs, piece: slice) -> Tensor:
    return repeat(inputs.forget[:, piece], "b s n -> s n (b k) 1", k=inputs.k.shape[3])


def _per_row(keys: Tensor, n_heads: int) -> Tensor:
    """(B, S, G, K) -> (S, N, B K, 1)."""
    return repeat(keys, "b s g k -> s (g m) (b k) 1", m=n_heads // keys.shape[2])


def _per_key(values: Tensor, key_dim: int) -> Tensor:
    """(B, S, N, V) -> (S, N, B K, V)."""
    return repeat(values, "b s n v -> s n (b k) v", k=key_dim)


def _sum_keys(rows: Tensor, batch: int) -> Tensor:
    """(S, N, B K, V) -> (B, S, N, V)."""
    return rearrange(rows, "s n (b k) v -> b s n k v", b=batch).sum(dim=-2)


def _to_batch(state: Tensor, batch: int) -> Tensor:
    return rearrange(state, "n (b k) v -> b n k v", b=batch).contiguous()
