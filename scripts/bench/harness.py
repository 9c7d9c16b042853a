"""How things are timed: interleaved in one process, medians, and a bar and a goal for each row."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from training.machine import resident_growth

Step = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One line of the table. ratio is how many times better than the peer unless `lower_is_better`."""

    name: str
    peer: str
    ratio: float
    bar: float | None  # None: information only
    goal: float | None = None
    lower_is_better: bool = False
    figures: dict[str, float] = field(default_factory=dict)  # milliseconds, MB, tokens/s as named

    @property
    def ok(self) -> bool:
        return self.bar is None or self.reaches(self.bar)

    def reaches(self, target: float) -> bool:
        return self.ratio <= target if self.lower_is_better else self.ratio >= target

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok, "reaches_goal": self.goal is not None and self.reaches(self.goal)}


def print_row(row: Row) -> None:
    """One JSON object a line: how a benchmark process hands its rows to the one that draws the table."""
    print(json.dumps(row.as_dict()), flush=True)


@dataclass(frozen=True)
class Timing:
    """seconds: the rounds of each candidate, measured in turn."""

    seconds: dict[str, list[float]]

    def milliseconds(self, name: str) -> float:
        """Median of the rounds."""
        return 1e3 * statistics.median(self.seconds[name])

    def ratio(self, peer: str, own: str) -> float:
        """How many times longer the peer takes: the median over rounds of the quotient within a round.

        Within a round both meet the same weather: a slow phase of the machine cancels.
        """
        pairs = zip(self.seconds[peer], self.seconds[own], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    def figures(self) -> dict[str, float]:
        return {f"{name} ms": round(self.milliseconds(name), 2) for name in self.seconds}


def interleave(candidates: dict[str, Step], rounds: int = 9, warmup: int = 2) -> Timing:
    """Runs every candidate once per round, in turn. A median of 9 rounds ignores 4 disturbed ones."""
    for step in candidates.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    return Timing(seconds)


def forward_backward(module: nn.Module, x: Tensor, gradient: Tensor, *arguments: Any, bf16: bool = False) -> Step:
    """A step: module(x, *arguments), then backward into x and every parameter, with fresh gradients."""

    def step() -> None:
        x.grad = None
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = module(x, *arguments)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(gradient.to(y.dtype))

    return step


def random_input(batch: int, length: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (B, T, D) that wants a gradient, and the gradient to start backward from."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=generator).requires_grad_()
    return x, torch.randn(batch, length, width, generator=generator)


def peak_memory_mb(work: Callable[[], Any]) -> float:
    """How far `work` raises this process's largest resident size, MB (10^6 bytes)."""
    return resident_growth(work) / 1e6
