"""What the person sees while it trains: one live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text


@dataclass
class Status:
    """One moment of the run. tokens: loss-bearing ones so far; stp: raw loss, None where it was not measured."""

    step: int
    tokens: int
    loss: float
    stp: float | None = None
    stp_weight: float = 0.0
    learning_rate: float | None = None


class SpeedMeter:
    """Tokens per second of training and overall, and the share of the machine's matmul speed.

    flops_per_token: forward and backward; gflops: measured by training.machine.gemm_gflops. Over the last `window`
    steps; time spent in `pause` (validation, checkpoints) counts for the estimate of the end only.
    """

    def __init__(
        self,
        total_tokens: int,
        flops_per_token: float,
        gflops: float,
        window: int = 50,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_tokens = total_tokens
        self.flops_per_token = flops_per_token
        self.gflops = gflops
        self._clock = clock
        self._laps: deque[tuple[float, int]] = deque(maxlen=window)
        self._begun = self._mark = clock()
        self._tokens = 0
        self._training_seconds = 0.0

    def lap(self, tokens: int) -> None:
        """One training step is done, with this many tokens."""
        now = self._clock()
        self._laps.append((now - self._mark, tokens))
        self._training_seconds += now - self._mark
        self._mark = now
        self._tokens += tokens

    def pause(self) -> None:
        """The time since the last lap was not training."""
        self._mark = self._clock()

    @property
    def tokens_per_second(self) -> float:
        """Over the window; 0 before the first lap."""
        seconds = sum(lap[0] for lap in self._laps)
        return sum(lap[1] for lap in self._laps) / seconds if seconds > 0 else 0.0

    @property
    def mean_tokens_per_second(self) -> float:
        """Over all training steps of this process, pauses left out."""
        return self._tokens / self._training_seconds if self._training_seconds > 0 else 0.0

    @property
    def gemm_share(self) -> float:
        """Model FLOPs per second over the measured matmul speed, of the whole process so far."""
        return self.mean_tokens_per_second * self.flops_per_token / (self.gflops * 1e9) if self.gflops > 0 else 0.0

    @property
    def recent_gemm_share(self) -> float:
        return self.tokens_per_second * self.flops_per_token / (self.gflops * 1e9) if self.gflops > 0 else 0.0

    def seconds_left(self, tokens: int) -> float | None:
        """From the speed of this process with its pauses; None before the first lap."""
        elapsed = self._clock() - self._begun
        if self._tokens == 0 or elapsed <= 0:
            return None
        return max(self.total_tokens - tokens, 0) * elapsed / self._tokens


class Progress:
    """Shows statuses and messages. A context manager: leaving it keeps the last line.

    In a terminal the line is redrawn at most four times a second, so update it after every step; elsewhere every
    `update(..., line=True)` prints a plain line and the others print nothing.
    """

    def __init__(self, meter: SpeedMeter, console: Console | None = None) -> None:
        self.meter = meter
        self.console = console or Console(highlight=False)
        self._live: Live | None = None
        self._drawn = float("-inf")

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, auto_refresh=False, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None

    def update(self, status: Status, *, line: bool = False) -> None:
        text = format_status(status, self.meter)
        if self._live is None:
            if line:
                self.message(text)
        elif line or time.monotonic() - self._drawn > 0.25:
            with contextlib.suppress(OSError):
                self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
            self._drawn = time.monotonic()

    def message(self, text: str) -> None:
        """A line that stays: above the live line, or between the plain ones. Corpus text is shown as it is."""
        with contextlib.suppress(OSError):  # a full disk below the log, a terminal that is gone: the run goes on
            self.console.print(text, soft_wrap=True, markup=False)


def format_status(status: Status, meter: SpeedMeter) -> str:
    """step 120 | 0.49M/1.60M tokens (31%) | loss 4.812 | stp 0.998 x 0.020 | 5,312 tok/s | 24% of matmul | ETA 3:31"""
    share = status.tokens / meter.total_tokens if meter.total_tokens else 0.0
    stp = "-" if status.stp is None else f"{status.stp:.3f}"
    parts = [
        f"step {status.step}",
        f"{_count(status.tokens)}/{_count(meter.total_tokens)} tokens ({share:.0%})",
        f"loss {status.loss:.3f}",
        f"stp {stp} x {status.stp_weight:.3f}",
    ]
    if status.learning_rate is not None:
        parts.append(f"lr {status.learning_rate:.2e}")
    if meter.tokens_per_second > 0:
        parts += [f"{meter.tokens_per_second:,.0f} tok/s", f"{meter.recent_gemm_share:.0%} of matmul"]
    left = meter.seconds_left(status.tokens)
    if left is not None:
        parts.append(f"ETA {format_duration(left)}")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """0:42, 3:05, 2:03:04, 3d 4h."""
    whole = round(seconds)
    days, hours, minutes, rest = whole // 86400, whole // 3600 % 24, whole // 60 % 60, whole % 60
    if days:
        return f"{days}d {hours}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _count(tokens: int) -> str:
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.2f}{letter}"
    return str(tokens)
