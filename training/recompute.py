"""Activation recomputation, per block and from outside: the hidden states at the boundaries are always kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

RECOMPUTE = ("none", "selective", "full")
# What `selective` keeps: the results of matmuls and of our fused kernels. Norms, gates and casts are computed again.
KEPT = ("aten.mm", "aten.addmm", "aten.bmm", "aten._grouped_mm", "aten._scaled_dot_product")


class Recompute:
    """A block's forward that keeps only its input (full), or also what `KEPT` and our kernels return (selective), and
    computes the rest again in the backward pass."""

    def __init__(self, forward: Callable[..., Tensor], kind: str) -> None:
        self.forward, self.kind = forward, kind

    def __call__(self, *arguments: Any) -> Tensor:
        contexts: dict[str, Any] = {}
        if self.kind == "selective":
            contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        # no block draws random numbers, so there is no random state to put back
        return checkpoint(self.forward, *arguments, use_reentrant=False, preserve_rng_state=False, **contexts)


def recompute(block: nn.Module, kind: str) -> None:
    """In place, from outside."""
    if kind != "none":
        block.forward = Recompute(block.forward, kind)


@contextmanager
def repeatable(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, forward passes give graphs that can be gone through several times: torch's selective recomputation lets
    go of what it kept after the first, so everything is computed again instead. The numbers are the same."""
    blocks: Any = model.blocks
    found = [block.forward for block in blocks if isinstance(block.forward, Recompute)]
    selective = [forward for forward in found if forward.kind == "selective"] if wanted else []
    for forward in selective:
        forward.kind = "full"
    try:
        yield
    finally:
        for forward in selective:
            forward.kind = "selective"


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = str(operation)
    kept = name.startswith((*KEPT, "amer."))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
