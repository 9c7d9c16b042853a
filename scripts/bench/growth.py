"""How cost grows with the length of a row: time per token at T 4096 relative to T 512, per family."""

from __future__ import annotations

import torch

from blocks.ablock import Attention, AttentionConfig
from blocks.eblock import MoE, MoEConfig
from blocks.mblock import Mamba2, Mamba2Config
from blocks.rblock import M2RNN, M2RNNConfig
from model.context import SequenceContext
from scripts.bench.attention import ragged_rows
from scripts.bench.harness import Row, forward_backward, interleave, print_row, random_input

D_MODEL = 256


def main() -> None:
    mixers = {
        "A": Attention(D_MODEL, AttentionConfig()),
        "M": Mamba2(D_MODEL, Mamba2Config()),
        "E": MoE(D_MODEL, MoEConfig()),
        "R": M2RNN(D_MODEL, M2RNNConfig()),
    }
    for letter, mixer in mixers.items():
        mixer.init_weights(12, torch.Generator().manual_seed(0))  # type: ignore[operator]
        steps = {}
        for B, T in ((8, 512), (1, 4096)):
            # A's cost grows with the document, so its documents keep their length (mean 64) as the row grows.
            x, gradient = random_input(B, T, D_MODEL)
            context = ragged_rows(B, T, 64) if letter == "A" else SequenceContext.single_documents(x[..., 0])
            steps[f"T {T}"] = forward_backward(mixer, x, gradient, context)
        timing = interleave(steps)
        what = "documents of mean 64" if letter == "A" else "one document a row"
        name = f"{letter} time per token, T 4096 : T 512, {what}"
        print_row(Row(name, "itself", timing.ratio("T 4096", "T 512"), None, figures=timing.figures()))
