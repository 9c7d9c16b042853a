"""Prefetcher: the next steps' batches are made in one background thread while the current step computes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Iterates over fetch(start), fetch(start + 1), ... up to stop (exclusive; None = endless).

    fetch must be a pure function of the step, so the whole state is one integer: `next_step`, the step whose result
    comes next, whatever lies in the queue. An error in fetch is raised here, at the step where it belongs.
    pin_memory: call .pin_memory() on what fetch returns (on each, if it returns a list), for CUDA.
    Use it as a context manager, or call close().
    """

    def __init__(
        self,
        fetch: Callable[[int], T],
        start: int = 0,
        stop: int | None = None,
        *,
        depth: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self.next_step = start
        self.stop = stop
        self._fetch = fetch
        # a new thread would pin for the first GPU, and take up room there
        self._device = torch.cuda.current_device() if pin_memory else None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(start,), name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        if self._closing.is_set() or (self.stop is not None and self.next_step >= self.stop):
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        self.next_step += 1
        return item

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        self._closing.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self, step: int) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while not self._closing.is_set() and (self.stop is None or step < self.stop):
            try:
                item: Any = self._fetch(step)
                if self._device is not None:
                    item = [x.pin_memory() for x in item] if isinstance(item, list) else item.pin_memory()
            except BaseException as error:  # handed to the thread that asks for this step
                item = _Failure(error)
            while not self._closing.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, _Failure):
                return
            step += 1
