"""FSDP2 of a model, from outside, and what has to be said to it where weights are used outside of a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# parallel.gather -> the dtype in which a block's weights are gathered; None: their own.
GATHERED = {"fp32": None, "bf16": torch.bfloat16}


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    gathered: str = "fp32",
    before: Callable[[nn.Module], None] = lambda block: None,
) -> None:
    """FSDP2 per block, then the root (embedding, final norm, head), with gradients summed over ranks, in float32.

    Forward inputs are not cast, and the root (whose embedding begins the residual stream) is gathered as it is: so the
    residual stream stays float32 at every boundary, and with `gathered` fp32 autocast does what it does in one process.
    before: called with each block before it is cut.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    as_they_are = MixedPrecisionPolicy(cast_forward_inputs=False)
    of_blocks = as_they_are
    if GATHERED[gathered] is not None:
        of_blocks = MixedPrecisionPolicy(GATHERED[gathered], reduce_dtype=torch.float32, cast_forward_inputs=False)

    def placement(parameter: nn.Parameter) -> Shard:
        """The first dimension that all ranks get an equal part of (16 experts do not go round 64 ranks), else 0."""
        shards = mesh.size(mesh.ndim - 1)
        return Shard(next((dim for dim, size in enumerate(parameter.shape) if size % shards == 0), 0))

    blocks: Any = model.blocks
    for module in [*blocks, model]:
        policy = as_they_are if module is model else of_blocks
        if module is not model:
            before(module)
        marks = {name: vars(parameter).copy() for name, parameter in _own(module, model)}
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled reduction
        register_fsdp_forward_method(module, "step")
        for name, parameter in _own(module, model):  # new objects: what was noted on the old ones moves over
            vars(parameter).update(marks[name])
    if mesh.ndim == 2 and mesh.size(0) > 1:
        _copy_first_replica(model, mesh)


def _copy_first_replica(model: nn.Module, mesh: DeviceMesh) -> None:
    """Each machine has drawn the weights itself, and another processor may round their last bit otherwise; summed
    gradients would never bring the copies together again."""
    for parameter in model.parameters():
        dist.broadcast(own_part(parameter.detach()), group=mesh.get_group(0), group_src=0)


def _own(module: nn.Module, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are cut with a module: a block's; the model's without those of the blocks."""
    named = module.named_parameters()
    return [(name, parameter) for name, parameter in named if module is not model or not name.startswith("blocks.")]


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Inside, the module's own weights are whole, so that its parts can be called directly and its graph gone through
    once more; afterwards they are cut again. Nothing happens to a module that is not sharded."""
    is_sharded = hasattr(module, "unshard")
    if is_sharded:
        module.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        reshard(module)


def reshard(module: nn.Module) -> None:
    """Cuts the module's own weights again, where a forward pass has gathered them."""
    if hasattr(module, "reshard"):
        module.reshard()  # type: ignore[operator]


@contextmanager
def keep_gathered(model: nn.Module) -> Iterator[None]:
    """Inside, backward passes leave the root's weights gathered (the head works outside of its forward), so that the
    backward pass of the step can follow. For passes that give no gradient to weights."""
    root: Any = model
    is_sharded = hasattr(model, "unshard")
    if is_sharded:
        root.set_reshard_after_backward(False, recurse=False)
    try:
        yield
    finally:
        if is_sharded:
            root.set_reshard_after_backward(True, recurse=False)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole one on every rank; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
