"""The fused form of an M2RNN layer on a CPU, float32 and bfloat16: `amer::m2rnn_mixer`, in Numba.

Between the operations everything is float32. The backward pass is given the projection, y before its gate and every
32nd state, and recomputes the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from blocks.kernels import m2rnn_numba
from blocks.kernels.causal_conv_cpu import BLOCK, convolve_backward, convolve_token, four_taps, taps_before
from blocks.kernels.gated_norm_cpu import gated_norm_backward, gated_norm_forward
from blocks.kernels.m2rnn import CHUNK_SIZE
from blocks.kernels.m2rnn_layout import Inputs, M2RNNShape, forget_gate
from blocks.kernels.numba_math import as_numpy, helper, kernel, launch_threads, read, sigmoid, write


@torch.library.custom_op("amer::m2rnn_mixer", mutates_args=(), device_types="cpu")
def m2rnn_mixer(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    key_dim: int,
    value_dim: int,
    n_q_heads: int,
    n_k_heads: int,
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, y before its gate (B, T, N V) in float32, and the states that chunks start from."""
    projected, shape = projected.contiguous(), M2RNNShape(key_dim, value_dim, n_q_heads, n_k_heads, eps, limit)
    batch, length, row = projected.shape
    inner = norm_weight.shape[0]
    qkv = _convolve(projected, inner, conv_weight, conv_bias, segment_ids)
    forget, _ = forget_gate(projected[..., -A_log.shape[0] :], dt_bias, A_log)
    inputs = _inputs(shape, qkv, state_weight, forget, D, starts)
    y, _, checkpoints = m2rnn_numba.forward(inputs, CHUNK_SIZE)
    y, result = y.view(batch, length, inner), projected.new_empty(batch, length, inner)
    launch_threads()
    gated_norm_forward(*_flat(result, y, projected), row, *_flat(norm_weight), batch * length, inner, 1, eps)
    return result, y, checkpoints


def _inputs(shape: M2RNNShape, qkv: Tensor, weight: Tensor, forget: Tensor, D: Tensor, starts: Tensor) -> Inputs:
    q, k, v = shape.split(qkv)
    state = qkv.new_zeros(qkv.shape[0], v.shape[2], shape.key_dim, shape.value_dim)
    return Inputs(q, k, v, weight, forget, D, starts, state)


def _flat(*tensors: Tensor) -> list[Any]:
    return [as_numpy(t).reshape(-1) for t in tensors]


def _convolve(projected: Tensor, first: int, weight: Tensor, bias: Tensor, segment_ids: Tensor) -> Tensor:
    """silu of the convolution over the columns from `first` on: (B, T, C) float32."""
    batch, length, row = projected.shape
    channels = weight.shape[0]
    out = projected.new_empty(batch, length, channels, dtype=torch.float32)
    launch_threads()
    arrays = _flat(out, projected, four_taps(weight), bias, segment_ids)
    _convolve_columns(*arrays, batch, length, channels, first, row)
    return out


@kernel
def _convolve_columns(out, x, weight, bias, segments, batch, length, channels, x_first, x_row):
    for task in prange(batch * ((length + BLOCK - 1) // BLOCK)):
        _convolve_block(np.int64(task), out, x, weight, bias, segments, length, channels, x_first, x_row)


@helper
def _convolve_block(task, out, x, weight, bias, segments, length, channels, x_first, x_row):
    blocks = (length + BLOCK - 1) // BLOCK
    row_at, start = task // blocks * length, task % blocks * BLOCK
    for t in range(start, min(start + BLOCK, length)):
        at, x_at = (row_at + t) * channels, (row_at + t) * x_row + x_first
        taps = taps_before(segments, row_at, t)
        convolve_token(out, at, x, x_at, x_row, weight, bias, channels, 0, channels, taps)
        for c in range(channels):
            value = read(out, at + c)
            write(out, at + c, value * sigmoid(value))


@m2rnn_mixer.register_fake
def _(projected, conv_weight, conv_bias, dt_bias, A_log, D, state_weight, norm_weight, *rest):
    (batch, length, _), (n_heads, value_dim), key_dim = projected.shape, D.shape, rest[2]
    result = projected.new_empty(batch, length, norm_weight.shape[0])
    chunks = D.new_empty(batch, n_heads, (length + CHUNK_SIZE - 1) // CHUNK_SIZE, key_dim, value_dim)
    return result, torch.empty_like(result, dtype=torch.float32), chunks


@torch.library.custom_op("amer::m2rnn_mixer_backward", mutates_args=(), device_types="cpu")
def _m2rnn_mixer_backward(
    gradient: Tensor,
    y: Tensor,
    checkpoints: Tensor,
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    state_weight: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    starts: Tensor,
    key_dim: int,
    value_dim: int,
    n_q_heads: int,
    n_k_heads: int,
    eps: float,
    limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected and of the seven parameters, in the order of the arguments."""
    projected, shape = projected.contiguous(), M2RNNShape(key_dim, value_dim, n_q_heads, n_k_heads, eps, limit)
    batch, length, row = projected.shape
    (inner,), (n_heads,), (channels, width) = norm_weight.shape, A_log.shape, conv_weight.shape
    grad_projected, grad_y = torch.empty_like(projected), torch.empty_like(y)
    blocks = -(-length // BLOCK)
    grad_norm = y.new_empty(-(-batch * length // BLOCK), inner)
    launch_threads()
    gated_norm_backward(
        *_flat(grad_y, grad_projected, grad_norm, gradient, y, projected), row, *_flat(norm_weight),
        batch * length, inner, 1, eps,
    )  # fmt: skip

    qkv = _convolve(projected, inner, conv_weight, conv_bias, segment_ids)
    logits = projected[..., -n_heads:]
    forget, dt = forget_gate(logits, dt_bias, A_log)
    inputs = _inputs(shape, qkv, state_weight, forget, D, starts)
    grad_qkv, zero = torch.empty_like(qkv), torch.zeros_like(inputs.initial_state)
    grad_y = grad_y.view(batch, length, n_heads, value_dim)
    *_, grad_weight, grad_forget, grad_D, _ = m2rnn_numba.backward(
        inputs, checkpoints, grad_y, zero, limit, CHUNK_SIZE, into=shape.split(grad_qkv)
    )

    grad_taps = y.new_empty(batch * blocks, 5, channels)
    launch_threads()
    convolve_backward(
        *_flat(grad_projected, grad_taps, projected), inner, row, 0, channels, *_flat(grad_qkv), 1,
        *_flat(four_taps(conv_weight), conv_bias, segment_ids), batch, length, channels,
    )  # fmt: skip
    grad_taps = grad_taps.sum(dim=0)
    grad_exponent = grad_forget * forget * -A_log.exp()  # of dt
    grad_logits = grad_exponent * torch.sigmoid(logits.float() + dt_bias)
    grad_projected[..., -n_heads:] = grad_logits
    return (
        grad_projected,
        grad_taps[4 - width : 4].T.contiguous(),
        grad_taps[4].clone(),
        grad_logits.sum(dim=(0, 1)),
        (grad_exponent * dt).sum(dim=(0, 1)),
        grad_D,
        grad_weight,
        grad_norm.sum(dim=0),
    )


@_m2rnn_mixer_backward.register_fake
def _(gradient, y, checkpoints, projected, *parameters):
    return tuple(torch.empty_like(t) for t in (projected, *parameters[:7]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:10])
    ctx.sizes = inputs[10:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 16
    return (*_m2rnn_mixer_backward(gradient, *ctx.saved_tensors, *ctx.sizes), *(None,) * 8)


m2rnn_mixer.register_autograd(_backward, setup_context=_setup_context)
