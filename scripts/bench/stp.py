"""What STP costs at all 13 boundaries of a 12-block stack, beside three other ways to compute the same number.

The cost of a way is what it adds to the forward and backward of a chain of residual additions: the same states, the
same triples, the same gradients (compared before anything is timed). Its share is of a whole compiled bf16 training
step of that size, measured in the same process.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.joined import GradientJoin, joins
from losses.stp import stp_terms
from losses.triples import Triples, draw
from scripts.bench.harness import Row, Timing, interleave, peak_memory_mb, print_row
from scripts.bench.step import own_model, training_step
from training.compile import compile_blocks

B, T, D, BLOCKS, N_SPANS, WINDOW, WEIGHT = 8, 512, 256, 12, 4, 64, 0.02
ROUNDS = 61
STEP_ROUNDS = 9
SHARE_BAR, SHARE_GOAL, CHEAPER_BAR, MEMORY_BAR = 0.002, 0.0005, 8.0, 0.01

# A way: states at every boundary, the state that the head reads, LM loss, triples -> total.
Way = Callable[[list[Tensor], Tensor, Tensor, Triples], Tensor]


def nothing(states: list[Tensor], final: Tensor, lm: Tensor, triples: Triples) -> Tensor:
    return lm


def ours(states: list[Tensor], final: Tensor, lm: Tensor, triples: Triples) -> Tensor:
    """As losses/objective.py does in a training step."""
    join = GradientJoin(states, joins(states, final, range(len(states))))
    terms = stp_terms(states, triples, join=join)
    total = lm + torch.tensor(WEIGHT) * terms.per_boundary().mean()
    join.watch(total)
    return total


def naive(states: list[Tensor], final: Tensor, lm: Tensor, triples: Triples) -> Tensor:
    """Layer by layer: three gathers and a cosine."""
    total = torch.zeros(())
    for h in states:
        s, r, t = (h.gather(1, _expanded(k, h)) for k in (triples.s, triples.r, triples.t))
        total = total + (1 - F.cosine_similarity(t - r, r - s, dim=-1)).mean()
    return lm + WEIGHT * total / len(states)


def stacked(states: list[Tensor], final: Tensor, lm: Tensor, triples: Triples) -> Tensor:
    """All layers in one (L, B, T, D) tensor, then gathered once."""
    h = torch.stack(states)
    s, r, t = (h.gather(2, _expanded(k, h[0]).expand(len(h), -1, -1, -1)) for k in (triples.s, triples.r, triples.t))
    return lm + WEIGHT * (1 - F.cosine_similarity(t - r, r - s, dim=-1)).mean()


def row_by_row(states: list[Tensor], final: Tensor, lm: Tensor, triples: Triples) -> Tensor:
    """As the paper's released code goes about it: a Python loop over rows and spans that subtracts single states into
    float32 buffers, whose cosine is taken for the whole batch."""
    s, r, t = (k.tolist() for k in (triples.s, triples.r, triples.t))
    total = torch.zeros(())
    for h in states:
        for span in range(N_SPANS):
            first, second = torch.zeros(B, D), torch.zeros(B, D)
            for row in range(B):
                first[row] = h[row, t[row][span]] - h[row, r[row][span]]
                second[row] = h[row, r[row][span]] - h[row, s[row][span]]
            total = total + (1 - F.cosine_similarity(first, second, dim=-1)).mean()
    return lm + WEIGHT * total / (len(states) * N_SPANS)


def _expanded(index: Tensor, h: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, h.shape[-1])


@dataclass
class Chain:
    """h_(i+1) = h_i + x_i, whose LM loss is a linear form of the last state."""

    embedding: Tensor
    updates: list[Tensor]
    head: Tensor
    triples: Triples

    @classmethod
    def random(cls) -> Chain:
        generator = torch.Generator().manual_seed(0)
        embedding, head, *updates = (torch.randn(B, T, D, generator=generator) for _ in range(BLOCKS + 2))
        ids = torch.zeros(B, T, dtype=torch.int32)
        triples = draw("anchor", ids, N_SPANS, seed=0, step=0, row_ids=torch.arange(B), window=WINDOW)
        return cls(embedding.requires_grad_(), updates, head, triples)

    def step(self, way: Way) -> Callable[[], Tensor]:
        def run() -> Tensor:
            self.embedding.grad = None
            hidden = self.embedding * 1.0
            states = [hidden]
            for update in self.updates:
                hidden = hidden + update
                states.append(hidden)
            final = hidden * 1.0
            way(states, final, (final * self.head).sum(), self.triples).backward()
            assert self.embedding.grad is not None
            return self.embedding.grad

        return run


def added_ms(timing: Timing, way: str) -> float:
    """Median over rounds of what a way adds to the chain without STP in the same round."""
    pairs = zip(timing.seconds[way], timing.seconds["chain alone"], strict=True)
    return 1e3 * statistics.median(with_it - without for with_it, without in pairs)


def check_gradients(chain: Chain, ways: dict[str, Way]) -> None:
    """All ways send the same gradient. Without the chain's own, which is a million times larger and would hide it."""
    silent = replace(chain, head=torch.zeros_like(chain.head))
    expected = silent.step(naive)().clone()
    assert float(expected.norm()) > 0
    for name, way in ways.items():
        if way is not nothing:
            error = float((silent.step(way)() - expected).norm() / expected.norm())
            assert error < 1e-4, f"{name}: other gradients, off by {error:.1e}"


def main() -> None:
    chain = Chain.random()
    ways: dict[str, Way] = {
        "chain alone": nothing,
        "ours": ours,
        "gather and cosine per layer": naive,
        "stack everything": stacked,
        "row by row": row_by_row,
    }
    steps: dict[str, Callable[[], Any]] = {name: chain.step(way) for name, way in ways.items()}
    check_gradients(chain, ways)
    slow = {name: steps[name] for name in ("chain alone", "row by row")}
    quick = {name: step for name, step in steps.items() if name != "row by row"}
    timing, slow_timing = interleave(quick, rounds=ROUNDS), interleave(slow, rounds=9)
    own = added_ms(timing, "ours")
    added = {name: added_ms(timing, name) for name in quick if name != "chain alone"}
    added["row by row"] = added_ms(slow_timing, "row by row")
    figures = {f"{name} adds ms": round(value, 3) for name, value in added.items()}
    figures["chain alone ms"] = round(timing.milliseconds("chain alone"), 2)
    peers: Sequence[tuple[str, float | None]] = (
        ("gather and cosine per layer", CHEAPER_BAR),
        ("stack everything", None),
        ("row by row", None),
    )
    for peer, bar in peers:
        print_row(Row("STP at 13 boundaries", peer, added[peer] / own, bar, figures=figures))
    whole_step(chain, steps)


def whole_step(chain: Chain, steps: dict[str, Callable[[], Any]]) -> None:
    """Shares of the compiled bf16 step: time and peak memory. Both are measured in turn, since a slow phase of the
    machine must not hit one of them alone."""
    model = own_model()
    compile_blocks(model)
    step = training_step(model, bf16=True, batch=B, length=T)
    ids, rows = torch.zeros(B, T, dtype=torch.int32), torch.arange(B)

    def drawing() -> Triples:
        return draw("anchor", ids, N_SPANS, seed=0, step=1, row_ids=rows, window=WINDOW)

    added, drawn, whole = [], [], []
    pair = {name: steps[name] for name in ("chain alone", "ours")}
    for _ in range(STEP_ROUNDS):
        whole.append(interleave({"step": step}, rounds=1, warmup=1).milliseconds("step"))
        added.append(added_ms(interleave(pair, rounds=ROUNDS // 3), "ours"))
        drawn.append(interleave({"draw": drawing}, rounds=9).milliseconds("draw"))
    figures = {
        "ours adds ms": round(statistics.median(added), 3),
        "step ms": round(statistics.median(whole), 1),
        "drawing triples ms": round(statistics.median(drawn), 3),
    }
    peer = "compiled bf16 step"
    share = statistics.median(own / all_of_it for own, all_of_it in zip(added, whole, strict=True))
    print_row(Row("STP, share of", peer, share, SHARE_BAR, SHARE_GOAL, True, figures))
    share += statistics.median(own / all_of_it for own, all_of_it in zip(drawn, whole, strict=True))
    print_row(Row("STP with its draws, share of", peer, share, None, None, True, figures))
    rounds = [(peak_memory_mb(steps["ours"]), peak_memory_mb(steps["chain alone"])) for _ in range(5)]
    extra = max(statistics.median(a - b for a, b in rounds), 0.0)
    memory = peak_memory_mb(step)
    figures = {"extra MB": round(extra, 2), "step MB": round(memory)}
    print_row(Row("STP peak memory, share of", peer, extra / memory, MEMORY_BAR, None, True, figures))
