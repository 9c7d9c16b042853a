"""Causal grouped-query attention inside the documents of packed rows.

Forms, picked by `document_attention` from device and dtype:
- CPU: `amer::document_attention`, whose cost grows with the length of the documents and not with that of the row:
  the Numba kernels of attention_cpu.py for float32 and bfloat16, for float64 one causal flash call of torch per
  document (a sliding window is cut into query blocks of the window's length against at most two windows of keys).
- CUDA: flex attention with a block mask made from the segments, once per batch (not yet measured on a GPU).
- `document_attention_reference`: dense scaled dot product with a boolean mask, any dtype, for tests.

All of them take q (B, T, H, d), k and v (B, T, G, d) with H a multiple of G (query head h reads key head
h // (H / G)), segment_ids (B, T) as in SequenceContext, and return (B, T, H, d).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from blocks.kernels import attention_cpu
from blocks.kernels.numba_math import as_numpy, launch_threads

NO_WINDOW = 0
CPU_KERNEL = "per-document attention (Numba)"
CPU_DOUBLE_KERNEL = "per-document flash attention (torch CPU)"
CUDA_KERNEL = "flex attention with a document block mask"


def uses_flex(device: torch.device) -> bool:
    """Whether `document_attention` on this device is flex attention."""
    return device.type == "cuda"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `document_attention` runs for this device and dtype."""
    if uses_flex(device):
        return CUDA_KERNEL
    return CPU_DOUBLE_KERNEL if dtype == torch.float64 else CPU_KERNEL


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int | None = None, mask: Any = None
) -> Tensor:
    """Softmax(q k^T / sqrt(d)) v over the keys j <= i of the own document, i - j < window if one is given.

    mask: `block_mask` of these segments and this window, which a caller keeps for several calls; None: made here.
    """
    if uses_flex(q.device):
        return flex_document_attention(q, k, v, block_mask(segment_ids, window) if mask is None else mask)
    return torch.ops.amer.document_attention(q, k, v, segment_ids, window or NO_WINDOW)[0]


def block_mask(segment_ids: Tensor, window: int | None) -> Any:
    """flex attention's BlockMask of a batch, (B, T) segments: which blocks of keys a block of queries reads, and which
    of these wholly. None on a device whose form reads the segments themselves."""
    if not uses_flex(segment_ids.device):
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query >= key if window is None else (query >= key) & (query - key < window)
        return near & (segment_ids[batch, query] == segment_ids[batch, key])

    batch, length = segment_ids.shape
    return create_block_mask(allowed, batch, None, length, length, device=str(segment_ids.device))


def document_mask(segment_ids: Tensor, window: int | None = None) -> Tensor:
    """(B, T, T) bool: True where query i may read key j."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    distance = index[:, None] - index[None, :]
    allowed = distance >= 0
    if window is not None:
        allowed = allowed & (distance < window)
    return allowed & (segment_ids[:, :, None] == segment_ids[:, None, :])


def document_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int | None = None
) -> Tensor:
    """The same by one dense masked attention, O(T^2) whatever the documents."""
    mask = document_mask(segment_ids, window)
    q, k, v = (rearrange(t, "b t h d -> b h t d") for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    return rearrange(out, "b h t d -> b t h d")


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_document_attention(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """The CUDA form; mask as `block_mask` makes it. Backward is not implemented by torch on a CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    attend: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (rearrange(t, "b t h d -> b h t d") for t in (q, k, v))
    out = attend(q, k, v, block_mask=mask, enable_gqa=True)
    return rearrange(out, "b h t d -> b t h d")


def _document_bounds(segment_ids: Tensor) -> list[int]:
    """Token index in the flattened batch at which each document starts, and B * T at the end."""
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return [*starts.flatten().nonzero().flatten().tolist(), segment_ids.numel()]


def _pieces(segment_ids: Tensor, window: int) -> Iterator[tuple[slice, slice, bool]]:
    """(queries, keys, needs the band mask) of every flash call, as ranges of flattened tokens."""
    bounds = _document_bounds(segment_ids)
    for start, stop in itertools.pairwise(bounds):
        if window == NO_WINDOW or stop - start <= window:
            yield slice(start, stop), slice(start, stop), False
            continue
        for first in range(start, stop, window):
            last = min(first + window, stop)
            yield slice(first, last), slice(max(start, first - window + 1), last), first > start


def _band_mask(queries: slice, keys: slice, window: int, like: Tensor) -> Tensor:
    """(queries, keys) additive mask: 0 where 0 <= i - j < window, else -inf."""
    i = torch.arange(queries.start, queries.stop)[:, None]
    j = torch.arange(keys.start, keys.stop)[None, :]
    mask = torch.zeros(i.shape[0], j.shape[1], dtype=like.dtype)
    return mask.masked_fill_((j > i) | (i - j >= window), float("-inf"))


def _grouped(q: Tensor, n_kv_heads: int) -> Tensor:
    """(L, H, d) -> (G, H / G, L, d), a view: key heads as the batch, the queries of a group as heads."""
    length, n_heads, head_dim = q.shape
    return q.view(length, n_kv_heads, n_heads // n_kv_heads, head_dim).permute(1, 2, 0, 3)


def _shared(k: Tensor, group: int) -> Tensor:
    """(L, G, d) -> (G, H / G, L, d) by stride 0 over the group."""
    return k.permute(1, 0, 2).unsqueeze(1).expand(-1, group, -1, -1)


def _flat(*tensors: Tensor) -> list[Any]:
    return [as_numpy(t).reshape(-1) for t in tensors]


def _plan(q: Tensor, k: Tensor, segment_ids: Tensor, window: int) -> tuple[Any, ...]:
    """The arguments that forward and backward of attention_cpu share; sets the thread count."""
    launch_threads()
    bounds = np.array(_document_bounds(segment_ids))
    n_heads, n_kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    tasks, first_task = attention_cpu.assign(bounds, n_kv_heads, numba.get_num_threads())
    return bounds, tasks, first_task, n_heads, n_kv_heads, head_dim, window, np.float32(head_dim**-0.5)


@torch.library.custom_op("amer::document_attention", mutates_args=(), device_types="cpu")
def _document_attention(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    group = n_heads // n_kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    if q.dtype != torch.float64:
        attention_cpu.forward(*_flat(q, k, v, out, lse), *_plan(q, k, segment_ids, window))
        return out, lse
    flat = batch * length
    q, k, v = (t.reshape(flat, -1, head_dim) for t in (q, k, v))
    flat_out, flat_lse = out.view(flat, n_heads, head_dim), lse.view(flat, n_heads)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for queries, keys, banded in _pieces(segment_ids, window):
        mask = _band_mask(queries, keys, window, q) if banded else None
        own_q, own_k, own_v = _grouped(q[queries], n_kv_heads), _shared(k[keys], group), _shared(v[keys], group)
        part, part_lse = flash(own_q, own_k, own_v, 0.0, not banded, attn_mask=mask)
        _grouped(flat_out[queries], n_kv_heads).copy_(part)
        flat_lse[queries] = rearrange(part_lse, "g r l -> l (g r)")
    return out, lse


@_document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("amer::document_attention_backward", mutates_args=(), device_types="cpu")
def _document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segment_ids: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    group = n_heads // n_kv_heads
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros_like(k, memory_format=torch.contiguous_format)
    grad_v = torch.zeros_like(v, memory_format=torch.contiguous_format)
    grads = grad_q, grad_k, grad_v
    if q.dtype != torch.float64:
        attention_cpu.backward(*_flat(grad, q, k, v, out, lse, *grads), *_plan(q, k, segment_ids, window))
        return grads
    grad, q, k, v, out, grad_q, grad_k, grad_v = (
        t.reshape(batch * length, -1, head_dim) for t in (grad, q, k, v, out, *grads)
    )
    lse = lse.reshape(batch * length, n_heads)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for queries, keys, banded in _pieces(segment_ids, window):
        mask = _band_mask(queries, keys, window, q) if banded else None
        own = _grouped(q[queries], n_kv_heads), _shared(k[keys], group), _shared(v[keys], group)
        own_grad, own_out = _grouped(grad[queries], n_kv_heads), _grouped(out[queries], n_kv_heads)
        own_lse = rearrange(lse[queries], "l (g r) -> g r l", g=n_kv_heads)
        parts = flash(own_grad, *own, own_out, own_lse, 0.0, not banded, attn_mask=mask)
        _grouped(grad_q[queries], n_kv_heads).copy_(parts[0])
        grad_k[keys] += parts[1].sum(1).permute(1, 0, 2)
        grad_v[keys] += parts[2].sum(1).permute(1, 0, 2)
    return grads


@_document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segment_ids: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, segment_ids, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, segment_ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _: Tensor | None):
    q, k, v, out, lse, segment_ids = ctx.saved_tensors
    grads = torch.ops.amer.document_attention_backward(grad, q, k, v, out, lse, segment_ids, ctx.window)
    return *grads, None, None


_document_attention.register_autograd(_backward, setup_context=_save)
