"""Dropless expert MLPs on routed tokens: y_n = sum_k w_nk MLP_{e_nk}(x_n).

Assignments are sorted by expert (stable, so the result is deterministic), each expert's rows go through its two
matrices in one grouped product, and the rows of a token are summed. The routing weight is applied to the
activation, before the second product: the same sum, and its gradient needs no copy of the expert outputs.

Forms, picked by `grouped_experts` from device and dtype:
- CPU float32 and bfloat16: `amer::grouped_experts`, grouped products with a hand-written backward pass that saves
  only the pre-activations and regathers the rows.
- CUDA bfloat16: the same steps in plain torch over `F.grouped_mm` (not yet measured on a GPU).
- `grouped_experts_reference`: a loop over experts, any dtype; what float64 and CUDA float32 run.

Kinds of expert: `swiglu` (rows of up (2 F) in order gate, up; silu(gate) * up) and `relu2` (rows F; relu(h)^2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KINDS = ("swiglu", "relu2")
CPU_KERNEL = "sorted grouped products, hand-written backward"
CUDA_KERNEL = "sorted F.grouped_mm"
REFERENCE = "loop over experts"


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `grouped_experts` runs for this device and dtype."""
    if device.type == "cpu":
        return CPU_KERNEL if dtype in (torch.float32, torch.bfloat16) else REFERENCE
    return CUDA_KERNEL if dtype == torch.bfloat16 else REFERENCE


def grouped_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """x (N, D), expert_ids (N, K) int64, weights (N, K), up (E, 2 F or F, D), down (E, D, F) in x's dtype.

    Returns y (N, D) and rows (E,) int64: how many rows each expert processed; their sum is N * K.
    """
    name = kernel_name(x.device, x.dtype)
    if name == CPU_KERNEL:
        y, rows, _, _ = torch.ops.amer.grouped_experts(x, expert_ids, weights, up, down, kind)
        return y, rows
    form = _grouped_experts_cuda if name == CUDA_KERNEL else grouped_experts_reference
    return form(x, expert_ids, weights, up, down, kind)


def activate(h: Tensor, kind: str) -> Tensor:
    """(..., 2 F) -> (..., F) for swiglu, (..., F) -> (..., F) for relu2."""
    if kind == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_experts_reference(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """A loop over experts in plain torch."""
    y, rows = torch.zeros_like(x), []
    for expert in range(up.shape[0]):
        token, slot = (expert_ids == expert).nonzero(as_tuple=True)
        out = activate(x[token] @ up[expert].T, kind) @ down[expert].T
        y = y.index_add(0, token, (out * weights[token, slot, None]).to(y.dtype))
        rows.append(token.numel())
    return y, torch.tensor(rows, device=x.device)


def _sort(expert_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """order (N K,): flat assignments, expert by expert, tokens ascending; rows (E,)."""
    flat = expert_ids.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts)


def _grouped_experts_cuda(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    order, rows = _sort(expert_ids, up.shape[0])
    ends = rows.cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // expert_ids.shape[1]], up.transpose(1, 2), offs=ends)
    a = (activate(h, kind) * weights.flatten()[order, None]).to(h.dtype)
    out = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
    return out[order.argsort()].view(*expert_ids.shape, -1).sum(1), rows


@torch.library.custom_op("amer::grouped_experts", mutates_args=(), device_types="cpu")
def _grouped_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, rows = _sort(expert_ids, up.shape[0])
    ends = rows.cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // expert_ids.shape[1]], up.transpose(1, 2), offs=ends)
    a = (activate(h, kind) * weights.flatten()[order, None]).to(h.dtype)
    out = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
    y = out[order.argsort()].view(*expert_ids.shape, -1).sum(1)
    return y, rows, order, h


@_grouped_experts.register_fake
def _(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = expert_ids.numel()
    rows = expert_ids.new_empty(up.shape[0])
    return torch.empty_like(x), rows, expert_ids.new_empty(count), x.new_empty(count, up.shape[1])


@torch.library.custom_op("amer::grouped_experts_backward", mutates_args=(), device_types="cpu")
def _grouped_experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    order: Tensor,
    h: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = grad.contiguous()
    token = order // weights.shape[1]
    weight = weights.flatten()[order, None]
    ends = rows.cumsum(0).to(torch.int32)
    grad_rows = grad[token]
    grad_a = F.grouped_mm(grad_rows, down, offs=ends)
    if kind == "relu2":
        a = h.relu().square()
        grad_h = (2 * h.relu()) * (grad_a * weight)
    else:
        gate, value = h.float().chunk(2, dim=-1)
        sigmoid = gate.sigmoid()
        a = gate * sigmoid * value
        weighted = grad_a * weight
        grad_gate = weighted * value * sigmoid * (1 + gate * (1 - sigmoid))
        grad_h = torch.cat((grad_gate, weighted * gate * sigmoid), dim=-1)
    grad_weights = torch.empty_like(weights).flatten()
    grad_weights[order] = (grad_a * a).sum(-1, dtype=weights.dtype)
    grad_h, a = grad_h.to(h.dtype), (a * weight).to(h.dtype)
    grad_down = F.grouped_mm(grad_rows.T, a, offs=ends)
    grad_up = F.grouped_mm(grad_h.T, x[token], offs=ends)
    grad_x = F.grouped_mm(grad_h, up, offs=ends)[order.argsort()].view(*weights.shape, -1).sum(1)
    return grad_x, grad_weights.view_as(weights), grad_up, grad_down


@_grouped_experts_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    order: Tensor,
    h: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(up), torch.empty_like(down)


def _save(ctx, inputs, output) -> None:
    x, _, weights, up, down, ctx.kind = inputs
    _, rows, order, h = output
    ctx.save_for_backward(x, weights, up, down, rows, order, h)
    ctx.mark_non_differentiable(rows, order, h)


def _backward(ctx, grad: Tensor, *_unused):
    x, weights, up, down, rows, order, h = ctx.saved_tensors
    grads = torch.ops.amer.grouped_experts_backward(grad, x, weights, up, down, rows, order, h, ctx.kind)
    grad_x, grad_weights, grad_up, grad_down = grads
    return grad_x, None, grad_weights, grad_up, grad_down, None


_grouped_experts.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("amer::record_routing", mutates_args=("counts", "entropy"))
def record_routing(rows: Tensor, scores: Tensor, counts: Tensor, entropy: Tensor) -> None:
    """counts (E,) += rows; entropy (2,) += (summed entropy in nats of the normalised scores (N, E), N).

    Does nothing while a backward pass runs: a forward pass then is a recomputation, whose tokens were counted.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    p = scores / scores.sum(-1, keepdim=True)
    entropy += torch.stack((torch.special.entr(p).sum(), torch.tensor(scores.shape[0], device=scores.device)))
    counts += rows


@record_routing.register_fake
def _(rows: Tensor, scores: Tensor, counts: Tensor, entropy: Tensor) -> None:
    return None
