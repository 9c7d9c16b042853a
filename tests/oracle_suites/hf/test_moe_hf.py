"""The E mixer against transformers' mixtures, weights carried over: Nemotron-H (sigmoid router) and Mixtral experts.

Run in an environment with transformers 5.24: python -m pytest tests/oracle_suites/hf
"""

import pytest
import torch

from blocks.eblock import MoE, MoEConfig
from blocks.kernels.grouped_experts import grouped_experts

transformers = pytest.importorskip("transformers")

D_MODEL, WIDTH, N_EXPERTS, TOP_K = 64, 48, 8, 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6}  # the peer's router is float32 in any model


def close(a, b, dtype):
    return (a - b).norm() <= TOLERANCE[dtype] * b.norm()


@DTYPES
def test_equals_the_nemotron_h_mixture(dtype):
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    config = transformers.NemotronHConfig(
        hidden_size=D_MODEL,
        n_routed_experts=N_EXPERTS,
        num_experts_per_tok=TOP_K,
        moe_intermediate_size=WIDTH,
        moe_shared_expert_intermediate_size=WIDTH,
        mlp_hidden_act="relu2",
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        n_group=1,
        topk_group=1,
    )
    peer = NemotronHMoE(config)
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    peer.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, N_EXPERTS))
    peer = peer.to(dtype)
    own = MoE(
        D_MODEL,
        MoEConfig(n_experts=N_EXPERTS, top_k=TOP_K, expert_ff=WIDTH, expert="relu2", route_scale=2.5),
    ).to(dtype)
    pairs = [
        (own.router.weight, peer.gate.weight),
        (own.up_proj, peer.experts.up_proj),
        (own.down_proj, peer.experts.down_proj),
        (own.shared.up_proj.weight, peer.shared_experts.up_proj.weight),
        (own.shared.down_proj.weight, peer.shared_experts.down_proj.weight),
    ]
    with torch.no_grad():
        own.expert_bias.copy_(peer.gate.e_score_correction_bias)
        for mine, theirs in pairs:
            mine.copy_(theirs)
    x, cotangent = torch.randn(2, 2, 50, D_MODEL, dtype=dtype)
    leaf = x.clone().requires_grad_()
    y, y_peer = own(leaf, None), peer(leaf)
    assert close(y, y_peer, dtype)
    own_grads = torch.autograd.grad(y, [leaf, *(mine for mine, _ in pairs)], cotangent)
    peer_grads = torch.autograd.grad(y_peer, [leaf, *(theirs for _, theirs in pairs)], cotangent)
    assert all(close(a, b, dtype) for a, b in zip(own_grads, peer_grads, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_equals_mixtral_experts(implementation):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=WIDTH, num_local_experts=N_EXPERTS, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    peer = MixtralExperts(config)
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, cotangent = torch.randn(2, 100, D_MODEL)
    ids = torch.rand(100, N_EXPERTS - 1).topk(TOP_K).indices  # one expert stays idle
    weights = torch.rand(100, TOP_K)
    leaves = [x.requires_grad_(), weights.requires_grad_(), peer.gate_up_proj, peer.down_proj]
    y, _ = grouped_experts(x, ids, weights, peer.gate_up_proj, peer.down_proj, "swiglu")
    y_peer = peer(x, ids, weights)
    assert close(y, y_peer, torch.float32)
    grads = [torch.autograd.grad(out, leaves, cotangent) for out in (y, y_peer)]
    assert all(close(a, b, torch.float32) for a, b in zip(*grads, strict=True))
