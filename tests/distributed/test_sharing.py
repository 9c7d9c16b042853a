"""What one rank meets is raised by all, in threads that pass each other what real ranks would send."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from jobs import ENVIRONMENT, run

from errors import InputError, StorageError
from training import manifest
from training.checkpoint import Checkpointer
from training.checkpoint_folder import load_checkpoint
from training.distributed import ParallelConfig, World
from training.run import find_checkpoint

CPU = torch.device("cpu")


class Table(World):
    """One of `size` ranks whose messages lie on a table. They are spelled in JSON, as the real ones."""

    def __init__(self, rank, size, table, barrier):
        super().__init__(ParallelConfig(data="fsdp"), CPU, rank, size, mesh="threads")
        self.table, self.barrier = table, barrier

    def side_group(self, patience):
        return None

    def gather(self, value, group=None):
        self.table[self.rank] = json.dumps(value)
        self.barrier.wait(5)
        seen = [json.loads(text) for text in self.table]
        self.barrier.wait(5)
        return seen


def ranks(work, size=2):
    """What `work(world)` gave or raised, by rank."""
    table, barrier = [""] * size, threading.Barrier(size)

    def one(rank):
        try:
            return work(Table(rank, size, table, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def failing_on(rank, error, value="done"):
    def work(world):
        if world.rank == rank:
            raise error
        return value

    return work


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_an_error_of_any_rank_is_an_error_of_all(rank):
    work = failing_on(rank, InputError("texts: no such file"))
    found = ranks(lambda world: world.everywhere(lambda: work(world)), size=3)
    assert all(isinstance(error, InputError) for error in found)
    assert {str(error) for error in found} == {f"rank {rank}: texts: no such file" if rank else "texts: no such file"}


def test_a_disk_error_of_another_rank_names_rank_and_file():
    work = failing_on(1, OSError(28, "No space left on device", "runs/a/hung_stacks.txt.1"))
    found = ranks(lambda world: world.everywhere(lambda: work(world)))
    assert all(isinstance(error, StorageError) for error in found)
    assert {str(error) for error in found} == {"rank 1: runs/a/hung_stacks.txt.1: No space left on device"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_corpus_that_one_rank_cannot_have_ends_all(rank):
    """Rank 0 prepares it, the others open it: an error of the first or of the second work."""
    work = failing_on(rank, InputError("data.path: nothing there"))
    found = ranks(lambda world: world.main_first(lambda: work(world)))
    assert all(isinstance(error, InputError) and "data.path: nothing there" in str(error) for error in found)
    assert ranks(lambda world: world.main_first(lambda: world.rank)) == [0, 1]


def test_what_rank_0_alone_meets_is_raised_as_it_is():
    def work():
        raise OSError(20, "Not a directory", "runs/a")

    found = ranks(lambda world: world.from_main(work))
    assert [(type(error), error.errno, error.filename) for error in found] == [(NotADirectoryError, 20, "runs/a")] * 2


def test_damage_in_any_file_is_seen_by_one_rank_and_refused_by_all(tmp_path):
    """They share the hashing, so each flipped bit is in the share of one of them."""
    saved = {"model": {"a": torch.arange(8.0)}}
    keeper = Checkpointer(tmp_path)
    keeper.save(3, saved, {"tokens": 5})
    keeper.wait()
    (path,) = keeper.paths()
    names = sorted(json.loads((path / "manifest.json").read_bytes())["files"])
    refused_by = set()
    for name in names:
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        into = {"model": {"a": torch.zeros(8)}}
        found = ranks(lambda world, into=into: load_checkpoint(path, into, world))
        (path / name).write_bytes(whole)
        assert all(isinstance(error, InputError) and f"damaged checkpoint: {name}" in str(error) for error in found)
        assert not into["model"]["a"].any()
        refused_by |= {str(error).startswith("rank 1: ") for error in found}
    assert refused_by == {False, True}  # some in the share of rank 0, some in that of rank 1


def test_ranks_share_the_reading_of_the_weights_they_begin_from(tmp_path, monkeypatch):
    """init_from: while rank 0 alone hashes a large checkpoint, the others would wait for their timeout."""
    keeper = Checkpointer(tmp_path / "a" / "checkpoints")
    keeper.save(1, {"model": {"a": torch.arange(8.0)}}, {})
    keeper.wait()
    honest, read = manifest.sha256_file, []
    monkeypatch.setattr(manifest, "sha256_file", lambda path: read.append(path.name) or honest(path))
    found = ranks(lambda world: find_checkpoint("a", tmp_path, world))
    assert found == [*keeper.paths()] * 2 and len(read) == len(set(read)) > 1


def of_two(scenario, folder):
    job = run(2, "sharing_worker.py", scenario, folder, cwd=folder)
    assert job.returncode == 0, job.stderr[-3000:]
    return json.loads(job.stdout)


@pytest.mark.slow
def test_a_disk_that_was_slow_once_costs_one_save_and_no_more(tmp_path):
    """The group of the writing threads is of no use after a timeout; the next save makes another one."""
    for done, newest in of_two("slow_disk", tmp_path):
        assert done[1:] == [True, True] and newest == "step-00000003"


@pytest.mark.slow
def test_ranks_share_the_hashing(tmp_path):
    """Each reads what it wrote, then its share of the files, and nothing twice."""
    (saved, found, loaded), other = of_two("hashes", tmp_path)
    assert loaded == other[2] == 0
    for mine, theirs in ((saved, other[0]), (found, other[1])):
        assert min(mine, theirs) > 40_000 and max(mine, theirs) < 42_000


@pytest.mark.slow
def test_copies_of_the_weights_begin_equal(tmp_path):
    one, other = of_two("other_weights", tmp_path)
    assert one == other and any(one)


HANGS = """
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
from errors import InputError, Stopped, exit_with
from training import distributed, meeting
meeting.PARTING = timedelta(seconds=1)
meeting.dist.destroy_process_group = lambda: time.sleep(120)
def main():
    with distributed.World.join(distributed.ParallelConfig(data="ddp"), torch.device("cpu")):
        try:
            1 / 0
        except ZeroDivisionError:
            raise {"memory": RuntimeError, "input": InputError, "stop": Stopped}[sys.argv[1]](sys.argv[2])
exit_with(main)
"""


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [("memory", 1, "RuntimeError: ended"), ("input", 2, "error: ended"), ("stop", 0, "stopped: ended")],
)
def test_a_rank_leaves_though_its_group_waits_for_others(kind, code, line):
    """As NCCL does when the other ranks are in another collective. Line and code are those of any other end."""
    environment = {**ENVIRONMENT, "TORCHELASTIC_RUN_ID": "job"}
    command = [sys.executable, "-c", HANGS, kind, "ended"]
    left = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert left.returncode == code and left.stderr.splitlines()[-1] == line
    assert ("Traceback" in left.stderr) == (kind == "memory")


def test_leaving_with_an_error_leaves_no_thread_behind(monkeypatch):
    """The thread that waits with `PARTING` knows the error, whose frames know the process group. Let loose, it may be
    the last to drop them, while the interpreter ends: then the process aborts (measured: 1 to 5 of 60)."""

    class Late(threading.Timer):
        def run(self):
            super().run()
            time.sleep(0.3)

    monkeypatch.setattr(threading, "Timer", Late)
    before = set(threading.enumerate())
    with pytest.raises(InputError), World.join(ParallelConfig(data="ddp"), CPU):
        raise InputError("nothing of it stays")
    assert set(threading.enumerate()) == before
