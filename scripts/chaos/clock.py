"""A clock that jumps: days forward and back between two looks, as after a wrong NTP answer or a suspended laptop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

from training.progress import SpeedMeter
from training.receipt import Receipt

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
