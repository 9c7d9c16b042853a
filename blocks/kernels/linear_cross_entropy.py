"""Output projection and cross-entropy in one, chunk by chunk: the (N, V) logits never exist at once.

Where gradients are wanted they are computed in the forward pass, chunk by chunk, because a chunk's probabilities
are at hand there; the backward pass only scales them. Matrix products run in the dtype of the hidden states (bfloat16
under autocast), softmax and sums in float32 (float64 for float64 inputs).

Forms, picked by `linear_cross_entropy` from device, dtype and width: Numba on the CPU for float32 and bfloat16 and
a width that is a multiple of 16, chunked plain torch elsewhere.
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.kernels import linear_cross_entropy_cpu
from blocks.kernels.numba_math import as_numpy, launch_threads

IGNORE_INDEX = -100
AUTO_CHUNK = 0
CHUNK_BYTES = 16 * 2**20  # of logits and their gradient: large enough for the products, small enough for a cache
# of a GPU's float32 logits: every chunk reads the weight and adds to its gradient, so few of them (unmeasured)
CUDA_CHUNK_BYTES = 512 * 2**20
CPU_KERNEL = "chunked linear cross-entropy (Numba)"
TORCH_KERNEL = "chunked linear cross-entropy (torch)"


def kernel_name(device: torch.device, dtype: torch.dtype, d_model: int = 16) -> str:
    """What `linear_cross_entropy` runs for this device, dtype and width."""
    fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and d_model % 16 == 0
    return CPU_KERNEL if fits else TORCH_KERNEL


def chunk_tokens(n_words: int, dtype: torch.dtype, device: str) -> int:
    """Tokens per chunk. On a CPU 128 to 512, so that a chunk's logits (and bfloat16 gradient) take about CHUNK_BYTES;
    on other devices (device: their type) 2,048 to 8,192, so that its float32 logits take about CUDA_CHUNK_BYTES."""
    if device != "cpu":
        return max(2048, min(8192, CUDA_CHUNK_BYTES // (4 * n_words) // 256 * 256))
    word_bytes = 6 if dtype == torch.bfloat16 else 4
    return max(128, min(512, CHUNK_BYTES // (word_bytes * n_words) // 64 * 64))


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,) negative log likelihoods from full logits; 0 where the label is ignored."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = AUTO_CHUNK) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N,) int64 (-100 = ignored) -> summed NLL in nats, a float32 scalar.

    The dtype of hidden is that of the products, whatever the weight is kept in. The sum is zero, with a zero gradient,
    where every label is ignored. Raises ValueError for a label that is neither a word nor -100 (on the CPU).
    """
    need_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return torch.ops.amer.linear_cross_entropy(hidden, weight, labels, chunk, need_gradient)[0]


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = AUTO_CHUNK) -> Tensor:
    """The same per token, (N,), without gradient: for evaluation."""
    return torch.ops.amer.linear_cross_entropy(hidden.detach(), weight.detach(), labels, chunk, False)[1]


@torch.library.custom_op("amer::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Summed loss, per-token losses (N,), d sum / d hidden (N, D) and / d weight (V, D), empty if not needed."""
    chunk = chunk if chunk != AUTO_CHUNK else chunk_tokens(weight.shape[0], hidden.dtype, hidden.device.type)
    if labels.device.type == "cpu" and bool(
        ((labels != IGNORE_INDEX) & ((labels < 0) | (labels >= weight.shape[0]))).any()
    ):
        raise ValueError(f"labels: expected words 0 .. {weight.shape[0] - 1} or {IGNORE_INDEX}, got {labels.aminmax()}")
    if kernel_name(hidden.device, hidden.dtype, hidden.shape[1]) == CPU_KERNEL:
        losses, *grads = _numba_form(hidden, weight, labels, chunk, need_gradient)
    else:
        losses, *grads = _torch_form(hidden, weight, labels, chunk, need_gradient)
    return losses.sum(), losses, grads[0], grads[1].to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total, losses = hidden.new_empty((), dtype=wide), hidden.new_empty(labels.shape, dtype=wide)
    if not need_gradient:
        return total, losses, hidden.new_empty(0), weight.new_empty(0)
    return total, losses, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape)


def _torch_form(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight = weight.to(hidden.dtype)
    losses = hidden.new_empty(labels.shape, dtype=wide)
    grad_hidden = hidden.new_empty(hidden.shape if need_gradient else 0)
    grad_weight = weight.new_zeros(weight.shape if need_gradient else 0, dtype=wide)
    for start in range(0, hidden.shape[0], chunk):
        part, rows = hidden[start : start + chunk], slice(start, start + chunk)
        losses[rows], grad_logits = _torch_chunk(part, weight, labels[rows], need_gradient)
        if grad_logits is not None:
            grad_hidden[rows] = grad_logits @ weight
            grad_weight += grad_logits.T @ part
        del grad_logits  # before the next chunk's logits are made
    return losses, grad_hidden, grad_weight


def _torch_chunk(part: Tensor, weight: Tensor, label: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Losses and the gradient of the logits. At most two float32 tensors of the logits' size at once."""
    scored = label != IGNORE_INDEX
    target = torch.where(scored, label, 0)[:, None]
    log_p = (part @ weight.T).to(torch.promote_types(part.dtype, torch.float32)).log_softmax(dim=-1)
    losses = -log_p.gather(1, target)[:, 0] * scored
    if not need_gradient:
        return losses, None
    grad_logits = log_p.exp_()
    grad_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=grad_logits.dtype))
    return losses, grad_logits.mul_(scored[:, None]).to(weight.dtype)


def _flat(*tensors: Tensor) -> list[Any]:
    return [as_numpy(t).reshape(-1) for t in tensors]


def _numba_form(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = linear_cross_entropy_cpu
    (n_tokens, d), n_words = hidden.shape, weight.shape[0]
    step, stride, pairs = 4 // hidden.element_size(), -(-n_words // 16) * 16, hidden.dtype == torch.bfloat16
    operand = np.uint32 if pairs else np.float32
    losses = torch.empty(n_tokens)
    grad_hidden = hidden.new_empty(hidden.shape if need_gradient else 0)
    grad_weight = torch.empty(weight.shape if need_gradient else 0)
    hidden_np, losses_np, labels_np, weight_np = _flat(hidden, losses, labels, weight.to(torch.float32))
    launch_threads()
    packed = np.empty(stride * d // step, operand)
    kernels.pack_words(packed, weight_np, n_words, d, step)
    words = weight_np
    if pairs and need_gradient:
        words = np.empty((n_words + 1) // 2 * d, operand)
        kernels.pair_words(words, weight_np, n_words, d)
    room = -(-min(chunk, n_tokens) // 4) * 4
    logits = np.empty(room * stride, np.float32)
    grad = np.empty(room * stride if need_gradient else stride, np.uint16) if pairs else logits
    part, tokens = np.zeros(room * d, hidden_np.dtype), np.empty(room * d // step, operand)
    part_gradient = torch.empty(room, d)
    for start in range(0, n_tokens, chunk):
        stop = min(start + chunk, n_tokens)
        rows, padded = stop - start, -(-(stop - start) // 4) * 4
        part[: rows * d] = hidden_np[start * d : stop * d]
        kernels.logits(logits, stride, part.view(operand), packed, padded, d // step)
        kernels.softmax(losses_np[start:stop], grad, logits, stride, labels_np[start:stop], n_words, need_gradient)
        if need_gradient:
            kernels.hidden_gradient(*_flat(part_gradient), grad, stride, words, n_words, padded, d, step)
            grad_hidden[start:stop] = part_gradient[:rows]
            kernels.pair_tokens(tokens, part, rows, d, step)
            kernels.weight_gradient(*_flat(grad_weight), grad, stride, tokens, n_words, rows, d, step, start > 0)
    return losses, grad_hidden, grad_weight


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2], output[3])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_unused: Tensor | None):
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
