"""M2RNN on CUDA GPUs: one Triton program per (row, head), the state in registers, kept every `chunk` steps.

Import this module lazily: it needs triton. Unmeasured: no GPU has run it yet. What is checked, on a CPU, is that it
gives the reference's outputs and gradients in Triton's interpreter and that it compiles for compute capability 8.0
and 9.0 (tests/oracle_suites/kernels).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from einops import reduce
from torch import Tensor

from blocks.kernels.m2rnn_layout import Inputs


def forward(inputs: Inputs, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, N, V), the last state (B, N, K, V) and the states that chunks start from (B, N, T / chunk, K, V)."""
    batch, length, n_heads = inputs.forget.shape
    state = inputs.initial_state
    y, last = torch.empty_like(inputs.v, memory_format=torch.contiguous_format), state.new_empty(state.shape)
    checkpoints = state.new_empty(batch, n_heads, triton.cdiv(length, chunk), *state.shape[2:])
    arrays = (*_arrays(inputs), state.contiguous(), y, last, checkpoints)
    with torch.cuda.device_of(y):
        _forward_kernel[(batch * n_heads,)](*arrays, *_sizes(inputs), **_tile(inputs, chunk))
    return y, last, checkpoints


def backward(
    inputs: Inputs, checkpoints: Tensor, dy: Tensor, dlast: Tensor, limit: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, weight, forget, skip and initial_state; limit bounds every element of dL/dh_t."""
    batch, length, n_heads = inputs.forget.shape
    key_dim, value_dim = dlast.shape[2:]

    def empty(*shape: int) -> Tensor:
        return inputs.v.new_empty(batch, *shape)

    # What each step of the current chunk starts from, and its candidate: private to a program.
    scratch = empty(n_heads, 2, chunk, key_dim, value_dim)
    dq, dk = (empty(length, n_heads, key_dim) for _ in range(2))
    dv, dforget, dinitial = (
        empty(length, n_heads, value_dim),
        empty(length, n_heads),
        empty(n_heads, key_dim, value_dim),
    )
    dweight, dskip = empty(n_heads, value_dim, value_dim), empty(n_heads, value_dim)
    given = (*_arrays(inputs), checkpoints.contiguous(), dy.contiguous(), dlast.contiguous(), scratch)
    gradients = (dq, dk, dv, dweight, dforget, dskip, dinitial)
    with torch.cuda.device_of(dq):
        _backward_kernel[(batch * n_heads,)](*given, *gradients, limit, *_sizes(inputs), **_tile(inputs, chunk))
    dq = reduce(dq, "b t (g m) k -> b t g k", "sum", g=inputs.q.shape[2])
    dk = reduce(dk, "b t (g m) k -> b t g k", "sum", g=inputs.k.shape[2])
    return dq, dk, dv, dweight.sum(dim=0), dforget, dskip.sum(dim=0), dinitial


def _arrays(inputs: Inputs) -> tuple[Tensor, ...]:
    tensors = (inputs.q, inputs.k, inputs.v, inputs.weight, inputs.forget, inputs.skip)
    return (*(t.contiguous() for t in tensors), inputs.starts.contiguous().to(torch.int8))


def _sizes(inputs: Inputs) -> tuple[int, ...]:
    return inputs.forget.shape[1], inputs.n_heads, inputs.q.shape[2], inputs.k.shape[2]


def _tile(inputs: Inputs, chunk: int) -> dict[str, int]:
    """tl.dot needs powers of two of at least 16: what lies beyond K and V is loaded as zero and stays zero."""
    key_dim, value_dim = inputs.initial_state.shape[2:]
    key_tile, value_tile = (max(16, triton.next_power_of_2(size)) for size in (key_dim, value_dim))
    warps = 1 if key_tile * value_tile <= 256 else 4
    return {"K": key_dim, "V": value_dim, "KT": key_tile, "VT": value_tile, "CHUNK": chunk, "num_warps": warps}


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, forget_ptr, skip_ptr, starts_ptr, initial_ptr, y_ptr, last_ptr, checkpoints_ptr,
    length, n_heads, n_q, n_k,
    K: tl.constexpr, V: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    row, head = task // n_heads, task % n_heads
    keys, values = tl.arange(0, KT), tl.arange(0, VT)
    in_keys, in_values = keys < K, values < V
    square = values[:, None] * V + values[None, :]
    w = tl.load(weight_ptr + head * V * V + square, mask=in_values[:, None] & in_values[None, :], other=0.0)
    skip = tl.load(skip_ptr + head * V + values, mask=in_values, other=0.0)
    tile, in_tile = keys[:, None] * V + values[None, :], in_keys[:, None] & in_values[None, :]
    h = tl.load(initial_ptr + task * K * V + tile, mask=in_tile, other=0.0)
    n_chunks = (length + CHUNK - 1) // CHUNK
    for t in range(length):
        token = row * length + t
        h = tl.where(tl.load(starts_ptr + token) != 0, 0.0, h)
        if t % CHUNK == 0:
            tl.store(checkpoints_ptr + (task * n_chunks + t // CHUNK) * K * V + tile, h, mask=in_tile)
        q = tl.load(q_ptr + (token * n_q + head * n_q // n_heads) * K + keys, mask=in_keys, other=0.0)
        k = tl.load(k_ptr + (token * n_k + head * n_k // n_heads) * K + keys, mask=in_keys, other=0.0)
        v = tl.load(v_ptr + (token * n_heads + head) * V + values, mask=in_values, other=0.0)
        f = tl.load(forget_ptr + token * n_heads + head)
        c = _tanh(tl.dot(h, w, input_precision="ieee") + k[:, None] * v[None, :])
        h = c + f * (h - c)
        y = tl.sum(q[:, None] * h, axis=0) + skip * v
        tl.store(y_ptr + (token * n_heads + head) * V + values, y, mask=in_values)
    tl.store(last_ptr + task * K * V + tile, h, mask=in_tile)


@triton.jit
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, weight_ptr, forget_ptr, skip_ptr, starts_ptr, checkpoints_ptr, dy_ptr, dlast_ptr, scratch_ptr,
    dq_ptr, dk_ptr, dv_ptr, dweight_ptr, dforget_ptr, dskip_ptr, dinitial_ptr,
    limit, length, n_heads, n_q, n_k,
    K: tl.constexpr, V: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    task = tl.program_id(0).to(tl.int64)
    row, head = task // n_heads, task % n_heads
    keys, values = tl.arange(0, KT), tl.arange(0, VT)
    in_keys, in_values = keys < K, values < V
    square, in_square = values[:, None] * V + values[None, :], in_values[:, None] & in_values[None, :]
    w = tl.load(weight_ptr + head * V * V + square, mask=in_square, other=0.0)
    skip = tl.load(skip_ptr + head * V + values, mask=in_values, other=0.0)
    tile, in_tile = keys[:, None] * V + values[None, :], in_keys[:, None] & in_values[None, :]
    states_ptr = scratch_ptr + task * 2 * CHUNK * K * V
    candidates_ptr = states_ptr + CHUNK * K * V
    dh = tl.load(dlast_ptr + task * K * V + tile, mask=in_tile, other=0.0)
    dw, dskip = tl.zeros((VT, VT), dtype=tl.float32), tl.zeros((VT,), dtype=tl.float32)
    n_chunks = (length + CHUNK - 1) // CHUNK
    for piece_from_the_end in range(n_chunks):
        piece = n_chunks - 1 - piece_from_the_end
        steps = tl.minimum(CHUNK, length - piece * CHUNK)
        first = row * length + piece * CHUNK
        h = tl.load(checkpoints_ptr + (task * n_chunks + piece) * K * V + tile, mask=in_tile, other=0.0)
        for s in range(steps):
            token = first + s
            h = tl.where(tl.load(starts_ptr + token) != 0, 0.0, h)
            k = tl.load(k_ptr + (token * n_k + head * n_k // n_heads) * K + keys, mask=in_keys, other=0.0)
            v = tl.load(v_ptr + (token * n_heads + head) * V + values, mask=in_values, other=0.0)
            f = tl.load(forget_ptr + token * n_heads + head)
            c = _tanh(tl.dot(h, w, input_precision="ieee") + k[:, None] * v[None, :])
            tl.store(states_ptr + s * K * V + tile, h, mask=in_tile)
            tl.store(candidates_ptr + s * K * V + tile, c, mask=in_tile)
            h = c + f * (h - c)
        tl.debug_barrier()  # the scratch is read back, perhaps by other threads of the program
        for s_from_the_end in range(steps):
            s = steps - 1 - s_from_the_end
            token = first + s
            h = tl.load(states_ptr + s * K * V + tile, mask=in_tile, other=0.0)
            c = tl.load(candidates_ptr + s * K * V + tile, mask=in_tile, other=0.0)
            q = tl.load(q_ptr + (token * n_q + head * n_q // n_heads) * K + keys, mask=in_keys, other=0.0)
            k = tl.load(k_ptr + (token * n_k + head * n_k // n_heads) * K + keys, mask=in_keys, other=0.0)
            v = tl.load(v_ptr + (token * n_heads + head) * V + values, mask=in_values, other=0.0)
            f = tl.load(forget_ptr + token * n_heads + head)
            dy = tl.load(dy_ptr + (token * n_heads + head) * V + values, mask=in_values, other=0.0)
            d = dh + q[:, None] * dy[None, :]
            d = tl.where(d > limit, limit, tl.where(d < -limit, -limit, d))  # keeps NaN
            inner = (1.0 - f) * d * (1.0 - c * c)
            key_at, value_at = (token * n_heads + head) * K + keys, (token * n_heads + head) * V + values
            tl.store(dq_ptr + key_at, tl.sum((c + f * (h - c)) * dy[None, :], axis=1), mask=in_keys)
            tl.store(dk_ptr + key_at, tl.sum(inner * v[None, :], axis=1), mask=in_keys)
            tl.store(dv_ptr + value_at, tl.sum(k[:, None] * inner, axis=0) + skip * dy, mask=in_values)
            tl.store(dforget_ptr + token * n_heads + head, tl.sum(tl.sum(d * (h - c), axis=1), axis=0))
            dskip += dy * v
            dw += tl.dot(tl.trans(h), inner, input_precision="ieee")
            dh = f * d + tl.dot(inner, tl.trans(w), input_precision="ieee")
            dh = tl.where(tl.load(starts_ptr + token) != 0, 0.0, dh)
        tl.debug_barrier()  # before the next chunk writes over it
    tl.store(dinitial_ptr + task * K * V + tile, dh, mask=in_tile)
    tl.store(dweight_ptr + task * V * V + square, dw, mask=in_square)
    tl.store(dskip_ptr + task * V + values, dskip, mask=in_values)
