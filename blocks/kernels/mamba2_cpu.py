"""`amer::mamba2_inner`: the Numba kernels of the M block as one operator with a hand-written backward.

float32 and bfloat16. Saved for the backward pass: the projection, y before its gate, and the states that enter the
chunks; the convolution, decays and products are recomputed, chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.kernels.causal_conv_cpu import convolve_backward, four_taps
from blocks.kernels.gated_norm_cpu import gated_norm_backward, gated_norm_forward
from blocks.kernels.numba_math import as_numpy, launch_threads
from blocks.kernels.ssd_cpu import scan_backward, scan_forward, slabs_per_group


def _sizes(zxbcdt: Tensor, D: Tensor, head_dim: int, d_state: int, n_groups: int, chunk: int) -> tuple[Any, int]:
    """What the scan kernels call `sizes`, and the number of slabs. Chunks longer than the row are cut to it."""
    batch, length, z_row = zxbcdt.shape
    chunk = min(-(-chunk // 16), -(-length // 16)) * 16
    slabs = slabs_per_group(batch, n_groups, D.shape[0] // n_groups)
    return (batch, length, z_row, D.shape[0], n_groups, head_dim, d_state, chunk), slabs


def _flat(*tensors: Tensor) -> list[Any]:
    return [as_numpy(t).reshape(-1) for t in tensors]


@torch.library.custom_op("amer::mamba2_inner", mutates_args=(), device_types="cpu")
def mamba2_inner(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    head_dim: int,
    d_state: int,
    n_groups: int,
    chunk_size: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, y before its gate, and the states that enter the chunks (empty unless saved)."""
    zxbcdt = zxbcdt.contiguous()
    sizes, slabs = _sizes(zxbcdt, D, head_dim, d_state, n_groups, chunk_size)
    batch, length, inner = *zxbcdt.shape[:2], norm_weight.shape[0]
    y = zxbcdt.new_empty(batch, length, inner)
    states = zxbcdt.new_empty(_states_shape(sizes) if save else (0,))
    result = torch.empty_like(y)
    dt = F.softplus(zxbcdt[..., -D.shape[0] :].float() + dt_bias)
    launch_threads()
    z, taps, bias, dt_, A, D_, weight, segments = _flat(
        zxbcdt, four_taps(conv_weight), conv_bias, dt, -A_log.exp(), D, norm_weight, segment_ids
    )
    scan_forward(z, taps, bias, dt_, A, D_, segments, *_flat(y, states), sizes, slabs, save)
    gated_norm_forward(*_flat(result, y), z, sizes[2], weight, batch * length, inner, n_groups, eps)
    return result, y, states


def _states_shape(sizes: Any) -> tuple[int, ...]:
    batch, length, _, n_heads, _, head_dim, d_state, chunk = sizes
    return batch, -(-length // chunk), n_heads, d_state, head_dim


@mamba2_inner.register_fake
def _(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    head_dim: int,
    d_state: int,
    n_groups: int,
    chunk_size: int,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, _ = _sizes(zxbcdt, D, head_dim, d_state, n_groups, chunk_size)
    y = zxbcdt.new_empty(*zxbcdt.shape[:2], norm_weight.shape[0])
    return y, torch.empty_like(y), zxbcdt.new_empty(_states_shape(sizes) if save else (0,))


@torch.library.custom_op("amer::mamba2_inner_backward", mutates_args=(), device_types="cpu")
def mamba2_inner_backward(
    gradient: Tensor,
    y: Tensor,
    states: Tensor,
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    segment_ids: Tensor,
    head_dim: int,
    d_state: int,
    n_groups: int,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of zxbcdt, conv_weight, conv_bias, dt_bias, A_log, D and norm_weight."""
    zxbcdt = zxbcdt.contiguous()
    sizes, slabs = _sizes(zxbcdt, D, head_dim, d_state, n_groups, chunk_size)
    batch, length, z_row = zxbcdt.shape
    inner, n_heads, group = norm_weight.shape[0], D.shape[0], 2 * n_groups * d_state
    tokens, blocks = batch * length, batch * -(-length // 64)
    grad_z, grad_y, grad_x = torch.empty_like(zxbcdt), torch.empty_like(y), torch.empty_like(y)
    grad_norm = D.new_empty(-(-tokens // 64), inner)
    grad_dt, grad_BC = D.new_empty(batch, length, n_heads), D.new_empty(slabs, batch, length, group)
    grad_A, grad_D = D.new_empty(batch, n_heads), D.new_empty(batch, n_heads)
    taps_x, taps_BC = D.new_empty(blocks, 5, inner), D.new_empty(blocks, 5, group)
    raw_dt = zxbcdt[..., -n_heads:].float() + dt_bias
    A = -A_log.exp()
    launch_threads()
    z, taps, bias, dt, A_, D_, weight, segments, grad_z_, grad_y_, grad_x_, y_ = _flat(
        zxbcdt,
        four_taps(conv_weight),
        conv_bias,
        F.softplus(raw_dt),
        A,
        D,
        norm_weight,
        segment_ids,
        grad_z,
        grad_y,
        grad_x,
        y,
    )
    gated_norm_backward(
        grad_y_, grad_z_, *_flat(grad_norm, gradient), y_, z, z_row, weight, tokens, inner, n_groups, eps
    )
    grad_BC_, taps_x_, taps_BC_ = _flat(grad_BC, taps_x, taps_BC)
    scan_backward(
        z,
        taps,
        bias,
        dt,
        A_,
        D_,
        segments,
        *_flat(states),
        grad_y_,
        grad_x_,
        grad_BC_,
        *_flat(grad_dt, grad_A, grad_D),
        sizes,
        slabs,
    )
    conv = (taps, bias, segments, batch, length, inner + group)
    convolve_backward(grad_z_, taps_x_, z, inner, z_row, 0, inner, grad_x_, 1, *conv)
    convolve_backward(grad_z_, taps_BC_, z, 2 * inner, z_row, inner, group, grad_BC_, slabs, *conv)
    grad_raw_dt = grad_dt * raw_dt.sigmoid()
    grad_z[..., -n_heads:] = grad_raw_dt
    grad_taps = torch.cat([taps_x.sum(dim=0), taps_BC.sum(dim=0)], dim=1)
    width = conv_weight.shape[1]
    return (
        grad_z,
        grad_taps[4 - width : 4].T.contiguous(),
        grad_taps[4].clone(),
        grad_raw_dt.sum(dim=(0, 1)),
        grad_A.sum(dim=0) * A,
        grad_D.sum(dim=0),
        grad_norm.sum(dim=0),
    )


@mamba2_inner_backward.register_fake
def _(
    gradient: Tensor,
    y: Tensor,
    states: Tensor,
    zxbcdt: Tensor,
    *parameters: Any,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (zxbcdt, *parameters[:6]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:8])
    ctx.sizes = inputs[8:13]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 14
    return (*mamba2_inner_backward(gradient, *ctx.saved_tensors, *ctx.sizes), *(None,) * 7)


mamba2_inner.register_autograd(_backward, setup_context=_setup_context)
