"""Slow changes that nobody sees step by step: training that became slower, memory that keeps growing."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from training.health import HealthConfig

GIB = 2**30


class DriftMonitor:
    """Says once per drift that training became slower than it was, or that memory keeps growing.

    message: receives one line; it is said again only after a recovery (speed) or another growth (memory).
    """

    def __init__(
        self,
        config: HealthConfig,
        message: Callable[[str], None],
        memory: Callable[[], int] = lambda: psutil.Process().memory_info().rss,
    ) -> None:
        self.config, self.message, self._memory = config, message, memory
        self._best = 0.0
        self._slow = False
        self._settled: int | None = None
        self._seen = 0

    def observe(self, step: int, tokens_per_second: float) -> None:
        """At the logging cadence. The first few observations settle what is normal."""
        self._seen += 1
        self._best = max(self._best, tokens_per_second)
        slow = tokens_per_second < self.config.slow_share * self._best
        if slow and not self._slow:
            share = tokens_per_second / self._best
            self.message(f"step {step}: {tokens_per_second:,.0f} tokens/s, {share:.0%} of the best so far")
        self._slow = slow
        if self._seen < 5:
            return
        memory = self._memory()
        settled = self._settled if self._settled is not None else memory
        self._settled = settled
        if memory > settled * (1 + self.config.memory_growth) and memory - settled > GIB:
            self.message(
                f"step {step}: this process holds {memory / GIB:.1f} GiB of main memory, {settled / GIB:.1f} GiB before"
            )
            self._settled = memory


def device_memory(device: torch.device) -> Callable[[], int]:
    """What DriftMonitor watches: the allocator's reserve on a GPU, the resident size elsewhere."""
    if device.type == "cuda":
        return lambda: torch.cuda.memory_reserved(device)
    return lambda: psutil.Process().memory_info().rss
