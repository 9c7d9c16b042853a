"""How processes find each other and part, with threads over one real store: also after others that are gone."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from errors import InputError
from training.meeting import leave_together, meet

SOON = timedelta(seconds=5)


@pytest.fixture
def store():
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=SOON)


def client(store):
    return dist.TCPStore("localhost", store.port, is_master=False, timeout=SOON)


def everyone(store, size, work, first=0):
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(client(store), rank), range(first, size)))


def round_of(store, size):
    """A key that rank 0 leaves in the common part, as every rank finds it; whether the job was there before."""

    def work(mine, rank):
        common, again = meet(mine, rank, size, SOON)
        if rank == 0:
            assert not common.check(["found"])
            common.set("found", "yes")
        common.wait(["found"], SOON)
        return again

    (again,) = set(everyone(store, size, work))
    return again


def test_rounds_of_any_size_meet_each_on_its_own(store):
    assert [round_of(store, size) for size in (3, 3, 2, 4)] == [False, True, True, True]


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_rank_that_dies_while_they_meet_does_not_spoil_the_next_round(store, gone):
    """The others of the round are killed by torchrun; here they give up."""

    def work(mine, rank):
        if rank != gone:
            with pytest.raises(InputError, match=r"parallel.timeout_seconds"):
                meet(mine, rank, 3, timedelta(seconds=0.3))

    if gone == 0:
        everyone(store, 3, work)
    else:  # a rank that was answered goes on, so the two others are looked at alone
        with pytest.raises(InputError, match=rf"1 of 3 ranks \(the first is {gone}\) did not come"):
            other = threading.Thread(target=meet, args=(client(store), 3 - gone, 3, SOON))
            other.start()
            meet(client(store), 0, 3, timedelta(seconds=0.3))
        other.join()
    assert round_of(store, 3) is (gone != 0)


def test_restart_counts_of_nodes_may_differ(store, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert round_of(store, 2)


def test_they_part_with_the_line_of_rank_0(store):
    lines = ["no such file", "rank 1 says more", ""]
    found = everyone(store, 3, lambda mine, rank: leave_together(mine, rank, 3, lines[rank], SOON))
    assert found == ["no such file"] * 3


def test_one_that_fails_alone_does_not_wait_long(store):
    since = time.monotonic()
    assert leave_together(client(store), 1, 2, "alone", timedelta(seconds=0.5)) is None
    assert time.monotonic() - since < 3
