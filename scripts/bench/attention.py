"""A: attention inside documents against SDPA with a document mask, on packed rows with ragged boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.ablock import Attention, AttentionConfig
from blocks.kernels.attention import document_attention, document_mask
from model.context import SequenceContext
from scripts.bench.harness import Row, forward_backward, interleave, print_row, random_input

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
PEER = "SDPA with a document mask"


def ragged_rows(batch: int, length: int, mean: int) -> SequenceContext:
    """Document lengths uniform in [mean / 2, 3 mean / 2], other boundaries in each row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(batch, length, dtype=torch.int32)
    for row in ids:
        start = number = 0
        while start < length:
            stop = start + int(torch.randint(mean // 2, mean * 3 // 2 + 1, (1,), generator=generator))
            row[start:stop] = number
            start, number = stop, number + 1
    return SequenceContext.from_document_ids(ids)


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, segment_ids: Tensor) -> Tensor:
    mask = document_mask(segment_ids)[:, None]
    heads = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(1, 2)


class PlainAttention(nn.Module):
    """The attention block of small training repos (nanoGPT's form): one projection, causal SDPA, no documents."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))


def core_step(
    attention: Callable[..., Tensor], leaves: tuple[Tensor, ...], segment_ids: Tensor, gradient: Tensor
) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(attention(*leaves, segment_ids), leaves, gradient)


def main() -> None:
    for B, T, bar, goal in ((8, 512, 2.0, 3.0), (2, 2048, 3.0, 6.0)):
        context = ragged_rows(B, T, T // 8)
        for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            torch.manual_seed(0)
            q, k, v = (
                torch.randn(B, T, n, HEAD_DIM, dtype=dtype).requires_grad_() for n in (HEADS, KV_HEADS, KV_HEADS)
            )
            gradient = torch.randn_like(q)

            steps = {
                "ours": core_step(document_attention, (q, k, v), context.segment_ids, gradient),
                "peer": core_step(masked_sdpa, (q, k, v), context.segment_ids, gradient),
            }
            timing = interleave(steps)
            targets = {"bar": bar, "goal": goal} if dtype == torch.float32 else {"bar": None}
            print_row(Row(f"A {name} T {T}", PEER, timing.ratio("peer", "ours"), **targets, figures=timing.figures()))

    x, gradient = random_input(8, 512, 256)
    context = SequenceContext.single_documents(x[..., 0])
    ours = Attention(256, AttentionConfig(n_heads=HEADS, n_kv_heads=HEADS))
    ours.init_weights(12)
    candidates = {
        "ours": forward_backward(ours, x, gradient, context),
        "peer": forward_backward(PlainAttention(256, HEADS), x, gradient),
    }
    timing = interleave(candidates)
    name = "A block fp32 T 512, one document a row (ours with QK-norm and RoPE)"
    peer = "nanoGPT-style attention block (neither)"
    print_row(Row(name, peer, timing.ratio("peer", "ours"), None, figures=timing.figures()))
