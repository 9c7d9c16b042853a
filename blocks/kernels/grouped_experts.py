"""Dropless expert MLPs on routed tokens: y_n = sum_k w_nk MLP_{e_nk}(x_n).

Assignments are sorted by expert (stable, so the result is deterministic), each expert's rows go through its two
matrices in one grouped product, and the rows of a token are summed. The routing weight is applied to the
activation, before the second product: the same sum, and its gradient needs no copy of the expert outputs.

Forms, picked by `grouped_experts` from device and dtype:
- CPU: `amer::grouped_experts` with a hand-written backward pass that saves only the pre-activations and gathers the
  rows again: fused Numba kernels, block by block in cache. Products of float32, or of bfloat16 summed in float32;
  the weights stay float32 and so do their gradients.
- CUDA bfloat16: the same steps in plain torch over `F.grouped_mm` (not yet measured on a GPU).
- `grouped_experts_reference`: a loop over experts, any dtype; what float64 and CUDA float32 run.

Kinds of expert: `swiglu` (rows of up (2 F) in order gate, up; silu(gate) * up) and `relu2` (rows F; relu(h)^2).
"""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.kernels import expert_rows_cpu, grouped_experts_cpu
from blocks.kernels.numba_math import as_numpy, launch_threads

SWIGLU, RELU2 = KINDS = ("swiglu", "relu2")
WIDTH_MULTIPLE = 16  # of the model and inner widths: whole vectors, and what F.grouped_mm asks of a row
CPU_KERNEL = "fused grouped experts (Numba)"
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
    """x (N, D), expert_ids (N, K) int64, weights (N, K), up (E, 2 F or F, D), down (E, D, F). The dtype of x
    is that of the products, whatever the weights are kept in.

    Returns y (N, D) and rows (E,) int64: how many rows each expert processed; their sum is N * K.
    """
    name = kernel_name(x.device, x.dtype)
    if name == CPU_KERNEL:
        up, down = up.to(torch.float32), down.to(torch.float32)
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, up, down))
        y, rows, *_ = torch.ops.amer.grouped_experts(x, expert_ids, weights, up, down, kind, save)
        return y, rows
    form = _grouped_experts_cuda if name == CUDA_KERNEL else grouped_experts_reference
    return form(x, expert_ids, weights, up.to(x.dtype), down.to(x.dtype), kind)


def dense_expert(x: Tensor, up: Tensor, down: Tensor, kind: str) -> Tensor:
    """One expert for every token: x (N, D), up (2 F or F, D), down (D, F) -> (N, D)."""
    if kernel_name(x.device, x.dtype) != CPU_KERNEL:
        return activate(x @ up.to(x.dtype).T, kind) @ down.to(x.dtype).T
    first = torch.zeros(x.shape[0], 1, dtype=torch.int64)
    return grouped_experts(x, first, torch.ones(x.shape[0], 1), up[None], down[None], kind)[0]


def activate(h: Tensor, kind: str) -> Tensor:
    """(..., 2 F) -> (..., F) for swiglu, (..., F) -> (..., F) for relu2."""
    if kind == RELU2:
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
    # not bincount, which waits for a GPU to learn its own length; sums of integers are exact in any order
    rows = flat.new_zeros(n_experts).scatter_add_(0, flat, torch.ones_like(flat))
    return flat.argsort(stable=True), rows


def _grouped_experts_cuda(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    order, rows = _sort(expert_ids, up.shape[0])
    ends = rows.cumsum(0).to(torch.int32)
    h = F.grouped_mm(x[order // expert_ids.shape[1]], up.transpose(1, 2), offs=ends)
    a = (activate(h, kind) * weights.flatten()[order, None]).to(h.dtype)
    out = F.grouped_mm(a, down.transpose(1, 2), offs=ends)
    return out[order.argsort()].view(*expert_ids.shape, -1).sum(1), rows


_OPERANDS = {torch.float32: np.float32, torch.bfloat16: np.uint32}


def _flat(*tensors: Tensor) -> list[Any]:
    return [as_numpy(t).reshape(-1) for t in tensors]


@torch.library.custom_op("amer::grouped_experts", mutates_args=(), device_types="cpu")
def _grouped_experts(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (N, D), rows (E,), then for backward order (M,), position (M,) and, if saved, h (M, H)."""
    n_experts, wide, d = up.shape
    top_k, inner = expert_ids.shape[1], down.shape[2]
    count = expert_ids.numel()
    rows = expert_ids.new_empty(n_experts)
    order, position = expert_ids.new_empty(count), expert_ids.new_empty(count)
    launch_threads()
    expert_rows_cpu.sort(*_flat(expert_ids, rows, order, position))
    h, out = x.new_empty(count if save else 0, wide), x.new_empty(count, d)
    step = 4 // x.element_size()
    packed_up, packed_down = (np.empty(w.numel() // step, _OPERANDS[x.dtype]) for w in (up, down))
    grouped_experts_cpu.pack_for_forward(packed_up, *_flat(up), n_experts, wide, d, step)
    grouped_experts_cpu.pack_for_forward(packed_down, *_flat(down), n_experts, d, inner, step)
    blocks = grouped_experts_cpu.row_blocks(rows.numpy())
    arrays = *_flat(x, order, weights), top_k, blocks, packed_up, packed_down, *_flat(h, out)
    grouped_experts_cpu.forward(numba.get_num_threads(), *arrays, d, inner, kind == SWIGLU)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    expert_rows_cpu.combine(*_flat(y, out, position), top_k, d)
    return y, rows, order, position, h


@_grouped_experts.register_fake
def _(
    x: Tensor, expert_ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, kind: str, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count = expert_ids.numel()
    rows, order, position = (expert_ids.new_empty(n) for n in (up.shape[0], count, count))
    return x.new_empty(x.shape), rows, order, position, x.new_empty(count if save else 0, up.shape[1])


@torch.library.custom_op("amer::grouped_experts_backward", mutates_args=(), device_types="cpu")
def _grouped_experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    order: Tensor,
    position: Tensor,
    h: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_experts, d, inner = down.shape
    top_k, count = weights.shape[1], order.numel()
    launch_threads()
    grad_h, a, grad_rows = torch.empty_like(h), x.new_empty(count, inner), x.new_empty(count, d)
    grad_weights, grad_x = torch.empty_like(weights, memory_format=torch.contiguous_format), x.new_empty(x.shape)
    grad_up, grad_down = up.new_empty(up.shape), down.new_empty(down.shape)
    n_workers, blocks = numba.get_num_threads(), grouped_experts_cpu.row_blocks(rows.numpy())
    operands = _flat(up, down)
    if x.dtype == torch.bfloat16:
        operands = [np.empty(w.numel() // 2, np.uint32) for w in (up, down)]
        for packed, weight in zip(operands, (up, down), strict=True):
            width = weight.shape[2]
            grouped_experts_cpu.pack_for_backward(packed, *_flat(weight), weight.numel() // width, width)
    arrays = *_flat(grad, order, weights), top_k, blocks, *operands, *_flat(h, grad_h, a, grad_rows, grad_weights)
    grouped_experts_cpu.backward(n_workers, *arrays, d, inner, kind == SWIGLU)
    first_row = np.concatenate(([0], rows.cumsum(0).numpy()))
    split = grouped_experts_cpu.column_split(n_workers, n_experts, d)
    arrays = *_flat(x, grad, order), top_k, *_flat(grad_h, a, grad_up, grad_down)
    grouped_experts_cpu.weight_gradients(n_workers, split, first_row, *arrays, d, inner, operands[0])
    expert_rows_cpu.combine(*_flat(grad_x, grad_rows, position), top_k, d)
    return grad_x, grad_weights, grad_up, grad_down


@_grouped_experts_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    rows: Tensor,
    order: Tensor,
    position: Tensor,
    h: Tensor,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weights, grad_up, grad_down = (t.new_empty(t.shape) for t in (x, weights, up, down))
    return grad_x, grad_weights, grad_up, grad_down


def _save(ctx, inputs, output) -> None:
    x, _, weights, up, down, ctx.kind, _ = inputs
    ctx.save_for_backward(x, weights, up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad: Tensor, *_unused):
    grads = torch.ops.amer.grouped_experts_backward(grad, *ctx.saved_tensors, ctx.kind)
    grad_x, grad_weights, grad_up, grad_down = grads
    return grad_x, None, grad_weights, grad_up, grad_down, None, None


_grouped_experts.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("amer::record_routing", mutates_args=("counts", "entropy"))
def record_routing(rows: Tensor, scores: Tensor, counts: Tensor, entropy: Tensor) -> None:
    """counts (E,) += rows; entropy (2,) += (summed entropy in nats of the normalised scores (N, E), N).

    Does nothing while a backward pass runs: a forward pass then is a recomputation, whose tokens were counted.
    """
    if torch._C._current_graph_task_id() != -1:
        return
    p = scores / scores.sum(-1, keepdim=True)
    entropy[0] += torch.special.entr(p).sum()
    entropy[1] += scores.shape[0]
    counts += rows


@record_routing.register_fake
def _(rows: Tensor, scores: Tensor, counts: Tensor, entropy: Tensor) -> None:
    return None
