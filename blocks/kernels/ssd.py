"""State-space duality: the Mamba-2 recurrence as matrix products over chunks (Dao and Gu 2024, section 6).

Per head, with the state h (P, N) and its decay exp(dt A), starting from zero at every segment:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        y_t = h_t C_t + D x_t

On CUDA `mamba_chunk_scan_combined` of mamba-ssm where it imports (unmeasured: no GPU has run it here yet), as one
operator that torch.compile does not look into; else plain torch. On a CPU the M block runs it inside its fused Numba
kernel (ssd_cpu.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

REFERENCE = "chunked matmul in plain torch"
CUDA_KERNEL = "mamba_ssm.mamba_chunk_scan_combined"
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_CHUNK = 256  # what the Triton kernels are tuned for; the configured chunk is a CPU's


@functools.cache
def cuda_kernel() -> tuple[tuple[Callable[..., Tensor], Callable[..., tuple[Any, ...]]] | None, str]:
    """Forward and backward pass of mamba-ssm, or None and why they do not import. Tried once, only when asked."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd, mamba_chunk_scan_combined
    except Exception as reason:  # its imports raise more than ImportError: AttributeError, RuntimeError, ...
        return None, f"{type(reason).__name__}: {reason}"
    return (mamba_chunk_scan_combined, _mamba_chunk_scan_combined_bwd), "imported"


@torch.compiler.assume_constant_result  # else dynamo would trace the import: it does not see functools.cache
def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `ssd` runs for this device and dtype."""
    if device.type != "cuda" or dtype not in CUDA_DTYPES:
        return REFERENCE
    kernel, reason = cuda_kernel()
    return CUDA_KERNEL if kernel is not None else f"{REFERENCE} (mamba_ssm: {reason})"


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor, chunk_size: int
) -> Tensor:
    """x (B, T, H, P); dt (B, T, H) positive; A (H,) negative; B and C (B, T, G, N), head h reads group h // (H / G);

    D (H,); segment_ids (B, T) int32 -> y (B, T, H, P) in x's dtype. T need not be a multiple of chunk_size, which
    does not change the result (and is 256 on CUDA, whatever is given).
    """
    if kernel_name(x.device, x.dtype) != CUDA_KERNEL:
        return ssd_reference(x, dt, A, B, C, D, segment_ids, chunk_size)
    return torch.ops.amer.mamba_chunk_scan(x, dt, A, B, C, D, segment_ids.contiguous(), CUDA_CHUNK)


def ssd_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor, chunk_size: int
) -> Tensor:
    """The same in plain torch: any device; float32 inside, float64 for float64.

    Log decays are summed only over tokens between the pair that they connect (a masked cumulative sum, not a
    difference of long sums), so nothing of another document enters, not even as rounding.
    """
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        length, n_groups = x.shape[1], B.shape[2]
        pad = -length % chunk_size
        chunks = {"q": chunk_size, "g": n_groups}
        values = rearrange(F.pad(x.to(wide), (0, 0, 0, 0, 0, pad)), "b (c q) (g h) p -> b c g h q p", **chunks)
        steps = rearrange(F.pad(dt.to(wide), (0, 0, 0, pad)), "b (c q) (g h) -> b c g h q", **chunks)
        keys, queries = (
            rearrange(F.pad(t.to(wide), (0, 0, 0, 0, 0, pad)), "b (c q) g n -> b c g q n", q=chunk_size) for t in (B, C)
        )
        segments = rearrange(F.pad(segment_ids, (0, pad), value=-1), "b (c q) -> b c q", q=chunk_size)
        log_decay = steps * rearrange(A.to(wide), "(g h) -> g h 1", g=n_groups)

        same = segments[..., :, None] == segments[..., None, :]
        lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
        between = repeat(log_decay, "b c g h i -> b c g h i j", j=chunk_size).masked_fill(~lower.tril(-1), 0)
        visible = rearrange(same & lower, "b c i j -> b c 1 1 i j")
        decay = between.cumsum(dim=-2).masked_fill(~visible, -torch.inf).exp()  # (b c g h i j), from j to i
        weights = (queries @ keys.mT)[:, :, :, None] * decay * steps[..., None, :]
        y = weights @ values

        # The state at a chunk's end, from its own tokens of the segment that the chunk ends in.
        to_end = (decay[..., -1, :] * steps)[..., None] * values  # (b c g h q p)
        own_states = torch.einsum("bcghqp,bcgqn->bcghpn", to_end, keys)
        last = segments[:, :, -1]
        before = F.pad(last[:, :-1], (1, 0), value=-2)  # the segment that the previous chunk ended in
        from_start = log_decay.cumsum(dim=-1).exp() * (segments == before[..., None])[:, :, None, None]
        carried = [torch.zeros_like(own_states[:, 0])]
        for chunk in range(own_states.shape[1] - 1):
            carried.append(own_states[:, chunk] + from_start[:, chunk, ..., -1, None, None] * carried[-1])
        y = y + from_start[..., None] * torch.einsum("bcgqn,bcghpn->bcghqp", queries, torch.stack(carried, dim=1))
        y = y + values * rearrange(D.to(wide), "(g h) -> g h 1 1", g=n_groups)
        return rearrange(y, "b c g h q p -> b (c q) (g h) p")[:, :length].to(x.dtype)


@torch.library.custom_op("amer::mamba_chunk_scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor, chunk: int) -> Tensor:
    kernel, reason = cuda_kernel()
    assert kernel is not None, reason
    with torch.no_grad():
        return kernel[0](x, dt, A, B, C, chunk, D=D, seq_idx=segment_ids).contiguous()


@_scan.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("amer::mamba_chunk_scan_backward", mutates_args=())
def _scan_backward(
    dy: Tensor,
    y: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    segment_ids: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernel, reason = cuda_kernel()
    assert kernel is not None, reason
    # dx, ddt, dA, dB, dC, dD, then those of arguments that are not used here
    grads = kernel[1](dy.contiguous(), x, dt, A, B, C, y, chunk, D=D, seq_idx=segment_ids)[:6]
    dx, ddt, dA, dB, dC, dD = (g.to(t.dtype).contiguous() for g, t in zip(grads, (x, dt, A, B, C, D), strict=True))
    return dx, ddt, dA, dB, dC, dD


@_scan_backward.register_fake
def _(
    dy: Tensor, y: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dD = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D))
    return dx, ddt, dA, dB, dC, dD


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.chunk = inputs
    ctx.save_for_backward(output, *tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.amer.mamba_chunk_scan_backward(dy, *ctx.saved_tensors, ctx.chunk), None, None


_scan.register_autograd(_backward, setup_context=_save)
