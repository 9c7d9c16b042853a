"""Output projection and cross-entropy in one, chunk by chunk: the (N, V) logits never exist at once.

Where gradients are wanted they are computed in the forward pass, chunk by chunk, because a chunk's probabilities
are at hand there; the backward pass only scales them. Matrix products run in the dtype of the inputs (bfloat16
under autocast), softmax and sums in float32 (float64 for float64 inputs). Any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100
DEFAULT_CHUNK = 512  # tokens; see docs/results for what other sizes cost


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `linear_cross_entropy` runs for this device and dtype."""
    return "chunked linear cross-entropy"


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """(N,) negative log likelihoods from full logits; 0 where the label is ignored."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
    """hidden (N, D), weight (V, D), labels (N,) int64 (-100 = ignored) -> summed NLL in nats, a float32 scalar.

    Zero, with a zero gradient, where every label is ignored.
    """
    need_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return torch.ops.amer.linear_cross_entropy(hidden, weight, labels, chunk, need_gradient)[0]


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = DEFAULT_CHUNK) -> Tensor:
    """The same per token, (N,), without gradient: for evaluation."""
    with torch.no_grad():
        return torch.cat(
            [
                linear_cross_entropy_reference(part, weight, label)
                for part, label in zip(hidden.split(chunk), labels.split(chunk), strict=True)
            ]
        )


@torch.library.custom_op("amer::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed loss, d loss / d hidden (N, D) and d loss / d weight (V, D); the gradients empty if not needed."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if need_gradient else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if need_gradient else weight.new_empty(0)
    for start in range(0, hidden.shape[0], chunk):
        part, label = hidden[start : start + chunk], labels[start : start + chunk]
        scored = label != IGNORE_INDEX
        target = torch.where(scored, label, 0)[:, None]
        log_p = (part @ weight.T).to(wide).log_softmax(dim=-1)
        total -= (log_p.gather(1, target)[:, 0] * scored).sum()
        if need_gradient:
            grad_logits = log_p.exp_()
            grad_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            grad_logits = (grad_logits * scored[:, None]).to(weight.dtype)
            grad_hidden[start : start + chunk] = grad_logits @ weight
            grad_weight += grad_logits.T @ part
    return total, grad_hidden, grad_weight if grad_weight.dtype == weight.dtype else grad_weight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, need_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = hidden.new_empty((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not need_gradient:
        return total, hidden.new_empty(0), weight.new_empty(0)
    return total, torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], output[2])
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad: Tensor, _hidden: Tensor | None, _weight: Tensor | None):
    grad_hidden, grad_weight = ctx.saved_tensors
    return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
