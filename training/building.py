"""A model that no process ever holds as a whole: named on the meta device, then made and cut part by part.

The weights are those that `HybridLM.init_weights` gives one process, bit for bit: every rank draws all numbers in the
same order, and keeps of each part what is its own before it draws the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from model.hybrid import HybridLM

# Gives the own weights of a part (a block; the model: embedding, final norm, head), just before it is cut.
Fill = Callable[[nn.Module], None]


def without_memory() -> torch.device:
    """A context: modules that are built inside have shapes and no weights yet."""
    return torch.device("meta")


def filling(model: HybridLM, generator: torch.Generator, device: torch.device) -> Fill:
    """Fills the parts of a model `without_memory` in the order of `init_weights`: the model first, then block by block.

    Weights are drawn on the CPU, so that they are the same on any device, and moved to `device`. What has memory
    already (stp.predictor) is moved as it is.
    """

    def fill(part: nn.Module) -> None:
        if part is not model:
            materialize(part)
            model.init_block(part, generator)  # type: ignore[arg-type]
            move(part, device)
            return
        for module in (model.embedding, model.final_norm, model.head):
            materialize(module)
        model.tie()
        model.init_root(generator)
        for name, child in model.named_children():
            if name != "blocks":
                move(child, device)

    return fill


def materialize(module: nn.Module) -> None:
    """Memory on the CPU for what has none, with what was noted on the parameters (`_no_weight_decay`)."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            made = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad)
            vars(made).update(vars(parameter))
            setattr(owner, name, made)
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty_like(buffer, device="cpu"))


def move(module: nn.Module, device: torch.device) -> None:
    """As `module.to(device)`, on fake tensors too."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.to(device)
