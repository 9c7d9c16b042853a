"""E: our mixture of experts against transformers' mixture block with its default, grouped matmul."""

from __future__ import annotations

import torch
from torch import nn

from blocks.eblock import MoE, MoEConfig
from scripts.bench.harness import Row, forward_backward, interleave, print_row, random_input

D_MODEL = 256
PEER = "transformers MixtralSparseMoeBlock (grouped_mm)"
# (experts, top k, expert width, bar, goal)
SIZES = ((64, 6, 96, 1.10, 1.25), (8, 2, 512, 0.97, 1.05))


def peer_block(n_experts: int, top_k: int, width: int, implementation: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=width, num_local_experts=n_experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.05)
    return block


def main() -> None:
    torch.manual_seed(0)
    x, gradient = random_input(8, 512, D_MODEL)
    for n_experts, top_k, width, bar, goal in SIZES:
        ours = MoE(D_MODEL, MoEConfig(n_experts=n_experts, top_k=top_k, expert_ff=width, n_shared_experts=0))
        ours.init_weights(12)
        peer = peer_block(n_experts, top_k, width, "grouped_mm")
        loop = peer_block(n_experts, top_k, width, "eager")
        loop.load_state_dict(peer.state_dict())
        name = f"top-{top_k} of {n_experts}"
        candidates = {
            "ours": forward_backward(ours, x, gradient, None),
            "peer": forward_backward(peer, x, gradient),
            "loop": forward_backward(loop, x, gradient),
        }
        timing = interleave(candidates)
        print_row(Row(f"E fp32 {name}", PEER, timing.ratio("peer", "ours"), bar, goal, figures=timing.figures()))
        print_row(Row(f"E fp32 {name}", "transformers loop over experts", timing.ratio("loop", "ours"), None))
        own, theirs = (forward_backward(m, x, gradient, *a, bf16=True) for m, a in ((ours, (None,)), (peer, ())))
        timing = interleave({"ours": own, "peer": theirs})
        print_row(Row(f"E bf16 {name}", f"{PEER} bf16", timing.ratio("peer", "ours"), None, figures=timing.figures()))
