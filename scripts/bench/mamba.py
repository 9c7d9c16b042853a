"""M: our Mamba-2 mixer against transformers' with the same weights, and against mambapy's Mamba-1."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blocks.mblock import Mamba2, Mamba2Config
from model.context import SequenceContext
from scripts.bench.harness import Row, Timing, forward_backward, interleave, print_row, random_input

D_MODEL = 256
SHAPES = ((8, 512), (2, 2048))  # (B, T) of 4,096 tokens
PEER = "transformers Mamba2Mixer"


def peer_mixer() -> nn.Module:
    from transformers import Mamba2Config as PeerConfig
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = PeerConfig(
        hidden_size=D_MODEL,
        num_heads=8,
        head_dim=64,
        state_size=64,
        expand=2,
        n_groups=1,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        rms_norm=True,
        time_step_limit=(0.0, float("inf")),
    )
    return Mamba2Mixer(config, layer_idx=0)


def mambapy_block() -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=D_MODEL, n_layers=1))


def main() -> None:
    torch.manual_seed(0)
    ours, peer = Mamba2(D_MODEL, Mamba2Config()), peer_mixer()
    peer.load_state_dict(ours.state_dict())
    compiled: Any = torch.compile(ours, fullgraph=True)
    inputs = {T: random_input(B, T, D_MODEL) for B, T in SHAPES}
    contexts = {T: SequenceContext.single_documents(x[..., 0]) for T, (x, _) in inputs.items()}
    outputs = [ours(*(inputs[512][0], contexts[512])), peer(inputs[512][0])]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)  # the same work, or no comparison

    timings: dict[int, Timing] = {}
    for T, bar in ((512, 2.0), (2048, 1.9)):
        own = forward_backward(ours, *inputs[T], contexts[T])
        timings[T] = timing = interleave({"ours": own, "peer": forward_backward(peer, *inputs[T])})
        print_row(Row(f"M fp32 T {T}", PEER, timing.ratio("peer", "ours"), bar, 2.6, figures=timing.figures()))
    for T, _ in ((512, 0), (2048, 0)):
        x, gradient = inputs[T]
        candidates = {
            "ours bf16": forward_backward(ours, x, gradient, contexts[T], bf16=True),
            "ours bf16 compiled": forward_backward(compiled, x, gradient, contexts[T], bf16=True),
            "peer bf16": forward_backward(peer, x, gradient, bf16=True),
            "peer fp32": forward_backward(peer, x, gradient),
        }
        timing = interleave(candidates)
        eager = timing.ratio("peer bf16", "ours bf16")
        print_row(Row(f"M bf16 eager T {T}", f"{PEER} bf16", eager, 2.2, 3.0, figures=timing.figures()))
        speed = timing.ratio("peer fp32", "ours bf16 compiled")
        print_row(Row(f"M bf16 compiled T {T}", f"{PEER} fp32", speed, 3.3, 4.2, figures=timing.figures()))

    steps = {T: forward_backward(ours, *inputs[T], contexts[T]) for T in inputs}
    timing = interleave({"T 512": steps[512], "T 2048": steps[2048]}, rounds=15)
    growth = timing.ratio("T 2048", "T 512")
    print_row(Row("M time per token, T 2048 : T 512", "itself", growth, 1.20, 1.05, True, timing.figures()))

    x, gradient = inputs[512]
    own = forward_backward(ours, x, gradient, contexts[512])
    timing = interleave({"ours": own, "peer": forward_backward(mambapy_block(), x, gradient)}, rounds=5)
    print_row(
        Row(
            "M fp32 T 512", "mambapy MambaBlock (Mamba-1)", timing.ratio("peer", "ours"), None, figures=timing.figures()
        )
    )
