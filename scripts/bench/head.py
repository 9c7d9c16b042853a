"""The head: projection to the vocabulary and cross-entropy, against plain logits; time and peak memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.lm import lm_loss_sum
from scripts.bench.harness import Row, interleave, peak_memory_mb, print_row

N_TOKENS, D_MODEL = 2048, 256
PEER = "plain logits, F.cross_entropy"


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return lm_loss_sum(hidden, weight, labels)[0]


def head_step(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
    def step() -> None:
        hidden.grad = weight.grad = None
        (loss(hidden, weight, labels) / N_TOKENS).backward()

    return step


def main() -> None:
    for vocabulary in (8192, 32768):
        torch.manual_seed(0)
        hidden = torch.randn(4, N_TOKENS // 4, D_MODEL).requires_grad_()
        weight = (0.05 * torch.randn(vocabulary, D_MODEL)).requires_grad_()
        labels = torch.randint(0, vocabulary, (4, N_TOKENS // 4))
        steps = {name: head_step(loss, hidden, weight, labels) for name, loss in (("ours", chunked), ("peer", plain))}
        timing = interleave(steps, rounds=7)
        memory = {name: peak_memory_mb(run) for name, run in steps.items()}
        name = f"head V {vocabulary // 1024}k fp32"
        print_row(Row(name, PEER, timing.ratio("peer", "ours"), 1.0, 1.15, figures=timing.figures()))
        figures = {f"{which} MB": round(size, 1) for which, size in memory.items()}
        share = memory["ours"] / memory["peer"]
        print_row(Row(f"head V {vocabulary // 1024}k peak memory, share of", PEER, share, 1 / 5, None, True, figures))
