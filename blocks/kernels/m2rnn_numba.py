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
from blocks.kernels.numba_math import as_numpy, launch_threads
from blocks.kernels.numba_vector import LANES


def forward(inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, N, V), the last state (B, N, K, V) and the states that chunks start from (B, N, T / chunk, K, V)."""
    key_dim, value_dim = inputs.initial_state.shape[2:]
    padded = _pad(inputs)
    sizes = _sizes(padded, chunk)
    n_chunks = -(-sizes[1] // chunk)
    y, last = padded.v.new_empty(padded.v.shape), padded.initial_state.new_empty(padded.initial_state.shape)
    checkpoints = last.new_empty(*last.shape[:2], n_chunks, *last.shape[2:])
    launch_threads()
    arrays = (padded.weight, padded.forget, padded.skip, padded.starts, padded.initial_state)
    columns, rows = _columns(padded)
    m2rnn_loops.forward(*columns, *map(_flat, arrays), sizes, rows, *map(_flat, (y, checkpoints, last)))
    return _trim(y, value_dim), _trim(last, key_dim, value_dim), _trim(checkpoints, key_dim, value_dim)


def backward(
    inputs: Inputs,
    checkpoints: Tensor,
    dy: Tensor,
    dlast: Tensor,
    limit: float,
    chunk: int,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight, forget, skip and initial_state; limit bounds every element of dL/dh_t.

    The first three are written into `into` where it is given: float32, shaped as q, k and v, columns of one array.
    """
    key_dim, value_dim = inputs.initial_state.shape[2:]
    padded = _pad(inputs)
    sizes = _sizes(padded, chunk)
    batch, length, n_heads = padded.forget.shape
    dq, dk, dv = (t.new_empty(t.shape) for t in (inputs.q, inputs.k, inputs.v)) if into is None else into
    padded_dv = dv if value_dim == padded.v.shape[3] else padded.v.new_empty(padded.v.shape)
    dq_heads, dk_heads = (padded.q.new_empty(batch, length, n_heads, padded.q.shape[3]) for _ in range(2))
    dforget, dinitial = torch.empty_like(padded.forget), torch.empty_like(padded.initial_state)
    dweight, dskip = (t.new_empty(batch, *t.shape) for t in (padded.weight, padded.skip))
    columns, rows = _columns(padded)
    dv_array, dv_row = _token_rows(padded_dv)
    arrays = (padded.weight, padded.forget, padded.skip, padded.starts)
    given = (_pad_matrix(checkpoints, ROWS), _pad_last(dy, LANES), _pad_matrix(dlast, ROWS))
    launch_threads()
    m2rnn_loops.backward(
        *columns, *map(_flat, (*arrays, *given)), np.float32(limit), sizes, rows, dv_row,
        _flat(dq_heads), _flat(dk_heads), dv_array, *map(_flat, (dweight, dforget, dskip, dinitial)),
    )  # fmt: skip
    if padded_dv is not dv:
        dv.copy_(padded_dv[..., :value_dim])
    _sum_groups(dq_heads, dq)
    _sum_groups(dk_heads, dk)
    return (
        dq,
        dk,
        dv,
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
    return as_numpy(tensor.view(-1))


def _token_stride(tensor: Tensor) -> int | None:
    """(B, T, G, K): elements between two tokens if they are evenly spaced and each contiguous, else None."""
    batch, length, groups, width = tensor.shape
    strides = tensor.stride()  # those of dimensions of size one mean nothing
    row = strides[1] if length > 1 else strides[0] if batch > 1 else groups * width
    even = batch == 1 or length == 1 or strides[0] == length * row
    whole = (width == 1 or strides[3] == 1) and (groups == 1 or strides[2] == width)
    return row if even and whole and row >= groups * width else None


def _token_rows(tensor: Tensor) -> tuple[np.ndarray, int]:
    """The memory of such a tensor from its first element to its last, never a copy, and the stride of its tokens."""
    batch, length, groups, width = tensor.shape
    row = _token_stride(tensor)
    if row is None:
        raise ValueError(f"m2rnn: tokens of a {tuple(tensor.shape)} with strides {tensor.stride()} are not rows")
    return tensor.as_strided(((batch * length - 1) * row + groups * width,), (1,)).numpy(), row


def _columns(padded: Inputs) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """q, k and v as flat arrays, and the elements between two tokens of each."""
    arrays, rows = zip(*(_token_rows(t) for t in (padded.q, padded.k, padded.v)), strict=True)
    return list(arrays), rows


def _sum_groups(per_head: Tensor, total: Tensor) -> None:
    """per_head (B, T, N, K) into total (B, T, G, K): the sum over the value heads that share one head."""
    batch, length, groups, key_dim = total.shape
    members, padded_dim = per_head.shape[2] // groups, per_head.shape[3]
    array, row = _token_rows(total)
    m2rnn_loops.sum_groups(_flat(per_head), array, batch * length, groups, members, padded_dim, key_dim, row)


def _pad_last(tensor: Tensor, multiple: int) -> Tensor:
    """Zeros behind the last dimension up to a multiple; contiguous, or evenly spaced tokens as they came."""
    missing = -tensor.shape[-1] % multiple
    if missing:
        return F.pad(tensor, (0, missing)).contiguous()
    return tensor if tensor.dim() == 4 and _token_stride(tensor) is not None else tensor.contiguous()


def _pad_matrix(matrix: Tensor, rows: int) -> Tensor:
    """(..., rows, V): the first of the two to a multiple of `rows`, the second to one of the lanes; contiguous."""
    return _pad_last(_pad_last(matrix.mT, rows).mT, LANES)


def _pad(inputs: Inputs) -> Inputs:
    weight, state = _pad_matrix(inputs.weight, LANES), _pad_matrix(inputs.initial_state, ROWS)
    q, k, v = (_pad_last(t, m) for t, m in ((inputs.q, ROWS), (inputs.k, ROWS), (inputs.v, LANES)))
    skip = _pad_last(inputs.skip, LANES)
    return Inputs(q, k, v, weight, inputs.forget.contiguous(), skip, inputs.starts.contiguous(), state)


def _trim(tensor: Tensor, *last: int) -> Tensor:
    """The leading part of the last dimensions, contiguous."""
    for dim, size in zip(range(-len(last), 0), last, strict=True):
        tensor = tensor.narrow(dim, 0, size)
    return tensor.contiguous()
