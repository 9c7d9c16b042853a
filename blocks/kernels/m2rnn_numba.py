"""M2RNN on the CPU in float32: padding, buffers and sums around the loops of m2rnn_loops.

What has to be summed over rows of the batch or over heads is written per (row, head) and summed afterwards, in an
order that does not depend on the number of threads.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.kernels import m2rnn_loops
from blocks.kernels.m2rnn_layout import Inputs
from blocks.kernels.m2rnn_loops import ROWS
from blocks.kernels.numba_math import launch_threads
from blocks.kernels.numba_vector import LANES


def forward(inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, N, V), the last state (B, N, K, V) and the states that chunks start from (B, N, T / chunk, K, V)."""
    key_dim, value_dim = inputs.initial_state.shape[2:]
    padded = _pad(inputs)
    sizes = _sizes(padded, chunk)
    n_chunks = -(-sizes[1] // chunk)
    y, last = torch.empty_like(padded.v), torch.empty_like(padded.initial_state)
    checkpoints = last.new_empty(*last.shape[:2], n_chunks, *last.shape[2:])
    launch_threads()
    arrays = (padded.q, padded.k, padded.v, padded.weight, padded.forget, padded.skip, padded.starts)
    m2rnn_loops.forward(*map(_flat, (*arrays, padded.initial_state)), sizes, *map(_flat, (y, checkpoints, last)))
    return _trim(y, value_dim), _trim(last, key_dim, value_dim), _trim(checkpoints, key_dim, value_dim)


def backward(
    inputs: Inputs, checkpoints: Tensor, dy: Tensor, dlast: Tensor, limit: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight, forget, skip and initial_state; limit bounds every element of dL/dh_t."""
    key_dim, value_dim = inputs.initial_state.shape[2:]
    padded = _pad(inputs)
    sizes = _sizes(padded, chunk)
    batch, length, n_heads = padded.forget.shape
    dq, dk = (padded.q.new_empty(batch, length, n_heads, padded.q.shape[3]) for _ in range(2))
    dv, dforget, dinitial = (torch.empty_like(t) for t in (padded.v, padded.forget, padded.initial_state))
    dweight, dskip = (t.new_empty(batch, *t.shape) for t in (padded.weight, padded.skip))
    arrays = (padded.q, padded.k, padded.v, padded.weight, padded.forget, padded.skip, padded.starts)
    given = (_pad_matrix(checkpoints, ROWS), _pad_last(dy, LANES), _pad_matrix(dlast, ROWS))
    gradients = (dq, dk, dv, dweight, dforget, dskip, dinitial)
    launch_threads()
    m2rnn_loops.backward(*map(_flat, (*arrays, *given)), np.float32(limit), sizes, *map(_flat, gradients))
    return (
        _trim(_grouped(dq, padded.q), key_dim),
        _trim(_grouped(dk, padded.k), key_dim),
        _trim(dv, value_dim),
        _trim(dweight.sum(dim=0), value_dim, value_dim),
        dforget,
        _trim(dskip.sum(dim=0), value_dim),
        _trim(dinitial, key_dim, value_dim),
    )


def _sizes(padded: Inputs, chunk: int) -> tuple[int, ...]:
    batch, length, n_heads = padded.forget.shape
    key_dim, value_dim = padded.initial_state.shape[2:]
    return batch, length, n_heads, padded.q.shape[2], padded.k.shape[2], key_dim, value_dim, chunk


def _flat(tensor: Tensor) -> np.ndarray:
    """The same memory, never a copy: a tensor that is not contiguous raises."""
    return tensor.view(-1).numpy()


def _pad_last(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dimension up to a multiple; contiguous."""
    missing = -tensor.shape[-1] % multiple
    return F.pad(tensor, (0, missing)) if missing else tensor.contiguous()


def _pad_matrix(matrix: Tensor, rows: int) -> Tensor:
    """(..., rows, V): the first of the two to a multiple of `rows`, the second to one of the lanes; contiguous."""
    return _pad_last(_pad_last(matrix.mT, rows).mT, LANES)


def _pad(inputs: Inputs) -> Inputs:
    weight, state = _pad_matrix(inputs.weight, LANES), _pad_matrix(inputs.initial_state, ROWS)
    q, k = _pad_last(inputs.q, ROWS), _pad_last(inputs.k, ROWS)
    v, skip = _pad_last(inputs.v, LANES), _pad_last(inputs.skip, LANES)
    return Inputs(q, k, v, weight, inputs.forget.contiguous(), skip, inputs.starts.contiguous(), state)


def _trim(tensor: Tensor, *last: int) -> Tensor:
    """The leading part of the last dimensions, contiguous."""
    for dim, size in zip(range(-len(last), 0), last, strict=True):
        tensor = tensor.narrow(dim, 0, size)
    return tensor.contiguous()


def _grouped(per_head: Tensor, like: Tensor) -> Tensor:
    """(B, T, N, K) -> (B, T, G, K) of like: each the sum over the value heads that share one head."""
    total = torch.empty_like(like)
    m2rnn_loops.sum_groups(_flat(per_head), _flat(total), per_head.shape[2] // like.shape[2], like.shape[3])
    return total
