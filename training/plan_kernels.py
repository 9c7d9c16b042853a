"""What the tracer of plan_trace.py cannot see: memory inside our operators, and the branches that a GPU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import blocks.ablock
from blocks.kernels import (
    causal_conv,
    grouped_experts,
    linear_cross_entropy,
    m2rnn,
    m2rnn_mixer,
    mamba2,
    qk_norm_rope,
    ssd,
)
from blocks.kernels.ssd_cpu import slabs_per_group

F32 = 4


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _experts(x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, *_: Any) -> int:
    """The rows' results and both matrices, packed."""
    return (expert_ids.numel() * x.shape[1] + up.numel() + down.numel()) * x.element_size()


def _experts_backward(grad: Tensor, x: Tensor, weights: Tensor, up: Tensor, down: Tensor, *rest: Any) -> int:
    """Gradients of pre-activations and rows, the activations, and in bfloat16 both matrices, packed."""
    order, h = rest[1], rest[3]
    packed = 2 * (up.numel() + down.numel()) if x.dtype == torch.bfloat16 else 0
    return _size(h) + order.numel() * (down.shape[2] + x.shape[1]) * x.element_size() + packed


def _mamba(zxbcdt: Tensor, *parameters: Any) -> int:
    """dt as float32, before and after softplus."""
    D = parameters[4]
    return 2 * F32 * zxbcdt.shape[0] * zxbcdt.shape[1] * D.shape[0]


def _mamba_backward(gradient: Tensor, y: Tensor, states: Tensor, zxbcdt: Tensor, *parameters: Any) -> int:
    """Gradients of y and of the convolution's output, the latter of B and C once per slab of heads."""
    D, norm, (_, d_state, n_groups) = parameters[4], parameters[5], parameters[7:10]
    batch, length = y.shape[:2]
    tokens, n_heads = batch * length, D.shape[0]
    slabs = slabs_per_group(batch, n_groups, n_heads // n_groups)
    group = 2 * n_groups * d_state
    small = 4 * tokens * n_heads + 2 * (tokens // 64 + 1) * 3 * (norm.shape[0] + group)
    return 2 * _size(y) + F32 * (slabs * tokens * group + small)


def _m2rnn(projected: Tensor, conv_weight: Tensor, *parameters: Any) -> int:
    """q, k and v after the convolution and the forget gates, as float32."""
    channels, n_heads = conv_weight.shape[0], parameters[2].shape[0]
    return F32 * projected.shape[0] * projected.shape[1] * (channels + 3 * n_heads)


def _m2rnn_backward(gradient: Tensor, y: Tensor, checkpoints: Tensor, projected: Tensor, *parameters: Any) -> int:
    """The same again and its gradients, those of queries and keys once per value head, the transition's per row."""
    channels, n_heads, state_weight, key_dim = (
        parameters[0].shape[0],
        parameters[3].shape[0],
        parameters[5],
        parameters[9],
    )
    batch, length = projected.shape[:2]
    per_token = 2 * channels + 6 * n_heads + 2 * n_heads * key_dim
    return _size(y) + F32 * (batch * length * per_token + batch * state_weight.numel())


def _m2rnn_cuda(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    """float32 copies of q, k and v, and y before its cast."""
    return F32 * (q.numel() + k.numel() + 2 * v.numel())


def _m2rnn_backward_cuda(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, *rest: Any) -> int:
    """The same and gradients, those of queries and keys once per value head; one chunk of states and candidates."""
    batch, length, n_heads, value_dim = v.shape
    key_dim = q.shape[-1]
    per_head = 2 * batch * length * n_heads * key_dim
    states = 2 * m2rnn.CHUNK_SIZE * batch * n_heads * key_dim * value_dim
    return F32 * (q.numel() + k.numel() + 3 * v.numel() + per_head + states + batch * weight.numel())


def _chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, segment_ids: Tensor, chunk: int
) -> int:
    """Summed decays, states per chunk and C B^T per chunk and group, all float32."""
    (batch, length, n_heads, head_dim), (n_groups, d_state) = x.shape, B.shape[2:]
    per_chunk = n_heads * head_dim * d_state + n_groups * chunk * chunk
    return F32 * (dt.numel() + batch * -(-length // chunk) * per_chunk)


def _chunk_scan_backward(dy: Tensor, y: Tensor, *inputs: Any) -> int:
    """The same again and its gradients."""
    return 2 * _chunk_scan(*inputs)


def _head(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool) -> int:
    """Packed words, the logits of one chunk (and in bfloat16 its gradient and the words once more)."""
    tokens = min(labels.numel(), chunk or linear_cross_entropy.chunk_tokens(weight.shape[0], hidden.dtype, "cpu"))
    if hidden.dtype == torch.bfloat16:
        return 2 * 2 * weight.numel() + 6 * tokens * weight.shape[0]
    return F32 * (weight.numel() + tokens * weight.shape[0])


def _head_cuda(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool) -> int:
    """The weight in the products' dtype, and per chunk logits and log probabilities (float32), or the gradient of the
    logits and its two products."""
    n_words = weight.shape[0]
    tokens = min(labels.numel(), chunk or linear_cross_entropy.chunk_tokens(n_words, hidden.dtype, "cuda"))
    size = hidden.element_size()
    cast = size * weight.numel() if hidden.dtype != weight.dtype else 0
    products = size * (tokens * n_words + weight.numel()) if need_gradient else 0
    return cast + max(2 * F32 * tokens * n_words, products)


# kernels -> operator -> bytes that it allocates inside beyond its results, from its arguments
SCRATCH: dict[str, dict[str, Callable[..., int]]] = {
    "cpu": {
        "amer::grouped_experts": _experts,
        "amer::grouped_experts_backward": _experts_backward,
        "amer::mamba2_inner": _mamba,
        "amer::mamba2_inner_backward": _mamba_backward,
        "amer::m2rnn_mixer": _m2rnn,
        "amer::m2rnn_mixer_backward": _m2rnn_backward,
        "amer::linear_cross_entropy": _head,
    },
    "cuda": {
        "amer::mamba_chunk_scan": _chunk_scan,
        "amer::mamba_chunk_scan_backward": _chunk_scan_backward,
        "amer::m2rnn": _m2rnn_cuda,
        "amer::m2rnn_backward": _m2rnn_backward_cuda,
        "amer::linear_cross_entropy": _head_cuda,
    },
}


@contextmanager
def cuda_branches() -> Iterator[None]:
    """Inside, blocks take the branches that they take on a GPU in bfloat16, on tensors of any device, and the kernels
    of other packages are replaced by stand-ins that hold what those hold."""
    changes: list[tuple[Any, str, Any]] = [
        (torch.nn.functional, "rms_norm", lambda x, shape, weight, eps: FusedNorm.apply(x, weight)),
        (qk_norm_rope, "kernel_name", lambda *_: qk_norm_rope.REFERENCE),
        (blocks.ablock, "document_attention", lambda q, k, v, *_: FlexAttention.apply(q, k, v)),
        (mamba2, "kernel_name", lambda *_: ssd.CUDA_KERNEL),
        (ssd, "kernel_name", lambda *_: ssd.CUDA_KERNEL),
        (causal_conv, "kernel_name", lambda *_: causal_conv.CUDA_KERNEL),
        (m2rnn_mixer, "kernel_name", lambda *_: m2rnn.TRITON),
        (grouped_experts, "kernel_name", lambda *_: grouped_experts.CUDA_KERNEL),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for module, name, value in changes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class FusedNorm(torch.autograd.Function):
    """torch's RMSNorm on a GPU keeps its input and one number per token; on a CPU it keeps the normed input too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class FlexAttention(torch.autograd.Function):
    """flex_attention keeps its inputs, its output and the log sum of every query's exponentials."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, lse = ctx.saved_tensors
        torch.empty_like(lse)  # the row sums of output x gradient
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
