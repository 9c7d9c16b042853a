from __future__ import annotations

import threading
import time

import pytest
import torch

from data.loader import Prefetcher


def test_steps_come_in_order_from_any_start() -> None:
    for start, stop in ((0, 20), (7, 20), (20, 20)):
        with Prefetcher(lambda step: step * step, start, stop, depth=3) as batches:
            assert list(batches) == [step * step for step in range(start, stop)]
            assert batches.next_step == stop


def test_state_is_what_was_taken_not_what_was_fetched() -> None:
    fetched: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        return step

    with Prefetcher(fetch, 5, depth=2) as batches:
        assert next(batches) == 5
        deadline = time.monotonic() + 5
        while len(fetched) < 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert batches.next_step == 6
        # one taken, two in the queue, one waiting for room: it does not run ahead without bound
        assert fetched == [5, 6, 7, 8]
    with Prefetcher(fetch, batches.next_step, depth=2) as resumed:
        assert next(resumed) == 6


def test_an_error_is_raised_at_its_step() -> None:
    def fetch(step: int) -> int:
        if step == 2:
            raise RuntimeError("disk gone")
        return step

    with Prefetcher(fetch, depth=4) as batches:
        assert [next(batches), next(batches)] == [0, 1]
        with pytest.raises(RuntimeError, match="disk gone"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_it_overlaps_with_the_consumer() -> None:
    def fetch(step: int) -> int:
        time.sleep(0.1)
        return step

    with Prefetcher(fetch, stop=10) as batches:
        next(batches)
        time.sleep(0.4)
        start = time.monotonic()
        next(batches)
        next(batches)
        assert time.monotonic() - start < 0.1


def test_closing_leaves_no_thread_even_when_the_queue_is_full() -> None:
    before = threading.active_count()
    batches = Prefetcher(lambda step: step, depth=1)
    next(batches)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(batches)


class Pinnable:
    pinned = False

    def pin_memory(self) -> Pinnable:
        result = Pinnable()
        result.pinned = True
        return result


def test_batches_are_pinned_alone_and_in_lists_for_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    name = lambda: threading.current_thread().name  # noqa: E731
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: bound.append((name(), device)))
    with Prefetcher(lambda step: Pinnable(), stop=1, pin_memory=True) as batches:
        assert next(batches).pinned
    with Prefetcher(lambda step: [Pinnable(), Pinnable()], stop=1, pin_memory=True) as lists:
        assert all(batch.pinned for batch in next(lists))
    assert bound == [("prefetch", 3)] * 2
