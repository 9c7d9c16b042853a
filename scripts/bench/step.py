"""The whole training step of a stack against transformers' Nemotron-H class model of the same stack and size."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blocks.eblock import MoEConfig
from losses.lm import lm_loss_sum
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from scripts.bench.harness import Row, Step, interleave, peak_memory_mb, print_row
from training.compile import compile_blocks
from training.machine import gemm_gflops

PATTERN, D_MODEL, VOCABULARY = "AEMEAEMEAEME", 256, 4096
B, T = 8, 512
PEER = "transformers NemotronHForCausalLM"


def training_step(model: HybridLM, bf16: bool, batch: int = B, length: int = T) -> Step:
    """Forward, loss, backward, fused AdamW; one document per row."""
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = -100
    context = SequenceContext.single_documents(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            total, count = lm_loss_sum(model(tokens, context).final, model.head.weight, labels)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_step(model: nn.Module, bf16: bool) -> Step:
    tokens = torch.randint(0, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def own_model() -> HybridLM:
    config = ModelConfig(pattern=PATTERN, d_model=D_MODEL, moe=MoEConfig(expert="relu2", expert_ff=256))
    model = HybridLM(config, VOCABULARY)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def peer_model() -> nn.Module:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    names = {"A": "full_attention", "M": "linear_attention", "E": "moe"}
    config = NemotronHConfig(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        layers_block_type=[names[letter] for letter in PATTERN],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        ssm_state_size=64,
        mamba_num_heads=8,
        mamba_head_dim=64,
        n_groups=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=256,
        use_cache=False,
    )
    return NemotronHForCausalLM(config).train()


def main() -> None:
    torch.manual_seed(0)
    peer, eager, compiled = peer_model(), own_model(), own_model()
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in (eager, peer)]
    assert abs(sizes[0] - sizes[1]) < 1e-3 * sizes[1], f"not the same model: {sizes} parameters"
    flops = 3 * eager.flops_per_token(T) * B * T
    for bf16, bar, goal, share_bar, share_goal in ((False, 1.5, 2.0, 0.60, 0.80), (True, 1.8, 2.6, 0.42, 0.60)):
        name = "bf16" if bf16 else "fp32"
        candidates = {"ours": training_step(eager, bf16), "peer": peer_step(peer, bf16)}
        if bf16:
            compile_blocks(compiled)
            candidates["ours compiled"] = training_step(compiled, bf16)
        timing = interleave(candidates)
        seconds = timing.milliseconds("ours") / 1e3
        figures: dict[str, Any] = {**timing.figures(), "ours tokens/s": round(B * T / seconds)}
        figures["peer tokens/s"] = round(1e3 * B * T / timing.milliseconds("peer"))
        print_row(Row(f"step {PATTERN} {name}", PEER, timing.ratio("peer", "ours"), bar, goal, figures=figures))
        peak = gemm_gflops(torch.device("cpu"), torch.bfloat16 if bf16 else torch.float32, seconds=1.0)
        figures = {"model GFLOP/s": round(flops / seconds / 1e9, 1), "GEMM GFLOP/s": round(peak, 1)}
        share = flops / seconds / 1e9 / peak
        print_row(Row(f"step {name}, share of", "GEMM in the same run", share, share_bar, share_goal, figures=figures))
        memory: dict[str, float] = {
            f"{which} MB": round(peak_memory_mb(candidates[which])) for which in ("ours", "peer")
        }
        share = memory["ours MB"] / memory["peer MB"]
        print_row(Row(f"step {name} peak memory, share of", PEER, share, None, None, True, memory))
        if bf16:
            ratio = timing.ratio("peer", "ours compiled")
            speed: dict[str, float] = {"ours tokens/s": round(1e3 * B * T / timing.milliseconds("ours compiled"))}
            print_row(Row(f"step {PATTERN} bf16 compiled", f"{PEER} bf16", ratio, 2.2, 3.0, figures=speed))
