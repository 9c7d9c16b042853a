"""A step that hangs ends the process, visibly: its stacks on the disk, its receipt closed."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

STACKS = "hung_stacks.txt"


class Watchdog:
    """Ends a process whose step hangs: `beat` must be called at least every `seconds`. Use as a context manager.

    When it is late, the stacks of all threads go to hung_stacks.txt, `on_hang` gets one line (it closes the receipt),
    and the process exits with code 1: nothing that hangs can be trusted to unwind. Should Python itself be stuck (a
    kernel that holds the interpreter's lock), faulthandler's own thread does the same a minute later without on_hang.
    """

    GRACE_SECONDS = 60.0

    def __init__(
        self,
        seconds: float,
        folder: Path,
        on_hang: Callable[[str], None],
        rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        name = STACKS if rank == 0 else f"{STACKS}.{rank}"
        self.seconds, self.path, self.on_hang = seconds, folder / name, on_hang
        self._clock, self._leave = clock, leave
        self._beaten = self._armed = clock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        self._beaten = self._clock()
        if self.seconds > 0 and self._beaten - self._armed > self.seconds / 10:
            self._arm()

    def __enter__(self) -> Watchdog:
        if self.seconds > 0:
            self._file = self.path.open("w")
            self._beaten = self._clock()
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.seconds > 0:
            self._stop.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()
            with contextlib.suppress(
                OSError
            ):  # gone meanwhile, a disk that refuses: a run still has its receipt to close
                self._file.close()
                if self.path.stat().st_size == 0:
                    self.path.unlink()

    def _arm(self) -> None:
        self._armed = self._beaten
        faulthandler.dump_traceback_later(self.seconds * 1.1 + self.GRACE_SECONDS, exit=True, file=self._file)

    def _watch(self) -> None:
        while not self._stop.wait(min(self.seconds / 4, 5.0)):
            late = self._clock() - self._beaten
            if late > self.seconds:
                faulthandler.dump_traceback(self._file, all_threads=True)
                self._file.flush()
                self.on_hang(f"no step was finished for {late:.0f} s (health.hung_step_seconds); stacks: {self.path}")
                self._leave(1)
                return
