"""torch.compile, one graph per block, applied from outside: the model files know nothing of it."""

from __future__ import annotations

import torch
import torch._functorch.config

from model.hybrid import HybridLM

# Training, evaluation and the shapes of either, for each block: what one block may compile before it is a fault.
GRAPHS_PER_BLOCK = 8


def compile_blocks(model: HybridLM) -> None:
    """Compiles each block as one full graph, in place.

    All blocks share the code of Block.forward, and dynamo counts recompilations per code object, so its limit (a guard
    against a single module that recompiles for ever) has to grow with the depth.
    """
    limit = GRAPHS_PER_BLOCK * len(model.stack)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    # Preflight and the live evidence keep the graph for several backward passes, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    for block in model.stack:
        block.compile(fullgraph=True)
