"""Slow changes that nobody sees step by step: training that became slower, memory that keeps growing."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from training.health import HealthConfig

GIB = 2**30


class DriftMonitor:
    """Says once per drift that training became slower than it was, or that memory keeps growing.

    message: receives one line; it is said again only after a recovery (speed) or another growth (memory). memory: bytes
    that this process holds now.
    """

    # Observations that settle what is normal, and slow ones in a row that are no hiccup.
    PATIENCE = 5

    def __init__(self, config: HealthConfig, message: Callable[[str], None], memory: Callable[[], int]) -> None:
        self.config, self.message, self._memory = config, message, memory
        self._best = 0.0
        self._slow = self._seen = 0
        self._settled = 0

    def observe(self, step: int, tokens_per_second: float) -> None:
        """At the logging cadence."""
        self._seen += 1
        memory = self._memory()
        if self._seen <= self.PATIENCE:
            self._settled = max(self._settled, memory)
            return
        self._best = max(self._best, tokens_per_second)
        self._slow = self._slow + 1 if tokens_per_second < self.config.slow_share * self._best else 0
        if self._slow == self.PATIENCE:
            share = tokens_per_second / self._best
            self.message(f"step {step}: {tokens_per_second:,.0f} tokens/s, {share:.0%} of the best so far")
        if memory > self._settled * (1 + self.config.memory_growth) and memory - self._settled > GIB:
            held, settled = memory / GIB, self._settled / GIB
            self.message(f"step {step}: this process holds {held:.1f} GiB of memory, {settled:.1f} GiB before")
            self._settled = memory


def device_memory(device: torch.device) -> Callable[[], int]:
    """What DriftMonitor watches: the allocator's reserve on a GPU, the resident size elsewhere."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_reserved(device)
    return lambda: psutil.Process().memory_info().rss
