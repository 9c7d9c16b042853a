"""What is injected into a process that trains: a clock that jumps, a kill in the middle of a line of metrics.jsonl."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from training.metrics import Tracker
from training.progress import SpeedMeter
from training.receipt import Receipt

# Days forward and back between two looks, as after a wrong NTP answer or a suspended laptop.
JUMPS = (0.0, 86400.0, -86400.0, 3.15e7, -3.0, 0.0, -3.15e7, 7200.0)


def let_clocks_jump() -> None:
    """In this process: the wall clock, and the clocks injected into the receipt and the speed meter."""
    time.time = jumping(time.time)
    steady = jumping(time.monotonic)
    Receipt.__init__.__defaults__ = tuple(
        steady if value is time.monotonic else value for value in Receipt.__init__.__defaults__ or ()
    )
    (Receipt.start.__func__.__kwdefaults__ or {})["clock"] = steady  # type: ignore[attr-defined]
    SpeedMeter.__init__.__defaults__ = tuple(
        steady if value is time.monotonic else value for value in SpeedMeter.__init__.__defaults__ or ()
    )


def jumping(clock: Callable[[], float]) -> Callable[[], float]:
    offsets = itertools.cycle(JUMPS)
    return lambda: clock() + next(offsets)


def die_within_a_line(record: int) -> None:
    """In this process: SIGKILL when half of its record number `record` (from 0) is in metrics.jsonl."""
    honest = Tracker.__init__

    def open_tracker(tracker: Tracker, *arguments: Any, **named: Any) -> None:
        honest(tracker, *arguments, **named)
        tracker._file = HalfWriter(tracker._file, record)  # type: ignore[assignment]

    Tracker.__init__ = open_tracker  # type: ignore[assignment, method-assign]


class HalfWriter:
    """A file whose write number `fatal` (from 0) is the half of it and the last thing that this process does."""

    def __init__(self, file: Any, fatal: int) -> None:
        self._file, self._left = file, fatal

    def write(self, data: bytes) -> int:
        if self._left == 0:
            os.write(self._file.fileno(), data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1
        return int(self._file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "jumping clock": let_clocks_jump,
    **{f"killed in record {record}": partial(die_within_a_line, record) for record in (0, 7, 12)},
}
