"""What a person sees while data is prepared: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TextIO

from data.prepare import Progress


@contextlib.contextmanager
def show_progress(stream: TextIO | None = None, every_seconds: float = 5.0) -> Iterator[Progress]:
    """Yields the function to hand to `prepare`. Nothing is shown if it is never called (a cached corpus)."""
    stream = stream or sys.stderr
    if stream.isatty():
        yield from _bars(stream)
    else:
        yield _Lines(stream, every_seconds)


def _bars(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(file=stream)) as bars:
        tasks: dict[str, object] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for other in tasks.values():  # the stage before is over
                    task = bars.tasks[bars.task_ids.index(other)]  # type: ignore[arg-type]
                    bars.update(task.id, total=task.completed or 1, completed=task.completed or 1)
                tasks[stage] = bars.add_task(stage, total=total or None)
            bars.update(tasks[stage], completed=done, total=total or None)  # type: ignore[arg-type]

        yield show


class _Lines:
    def __init__(self, stream: TextIO, every_seconds: float) -> None:
        self._stream, self._every = stream, every_seconds
        self._stage, self._last = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self._stage and now - self._last < self._every and not 0 < total == done:
            return
        self._stage, self._last = stage, now
        amount = f"{done / 1e6:.1f} MB" if done else ""
        if total:
            amount = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB"
        with contextlib.suppress(OSError):  # a log on a full disk: what it tells of goes on
            print(f"data: {stage}{': ' if amount else ''}{amount}", file=self._stream, flush=True)
