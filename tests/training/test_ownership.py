"""Who runs a run: the kernel's lock decides on one machine, the note on others; the dead never block the living."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from errors import InputError
from training import ownership
from training.ownership import OWNER, Ownership, is_alive, live_owner, process_identity, read_owner

HOLDER = """
    import sys, time
    from training.ownership import Ownership
    try:
        own = Ownership(sys.argv[1])  # kept: a collected lock is a free one
        own.take()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    else:
        print("taken", flush=True)
        time.sleep(60)
"""


def holder(folder):
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_many_starts_at_once_one_wins_and_its_kill_frees_the_run(tmp_path):
    processes = [holder(tmp_path) for _ in range(4)]
    lines = {}
    try:
        lines = {process: process.stdout.readline() for process in processes}
        winners = [process for process, line in lines.items() if line == "taken\n"]
        assert len(winners) == 1
        others = [line for line in lines.values() if line != "taken\n"]
        assert all(f"InputError {tmp_path}: process {winners[0].pid} on" in line for line in others), others
        assert live_owner(tmp_path)["pid"] == winners[0].pid
        winners[0].send_signal(signal.SIGKILL)
        winners[0].wait()
        assert read_owner(tmp_path)["pid"] == winners[0].pid and live_owner(tmp_path) is None
        own = Ownership(tmp_path)
        own.take()
        assert live_owner(tmp_path)["pid"] == os.getpid()
        own.release()
        assert read_owner(tmp_path) == {}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_taking_twice_in_one_process_is_refused_and_the_first_keeps_it(tmp_path):
    first, second = Ownership(tmp_path), Ownership(tmp_path)
    first.take()
    with pytest.raises(InputError, match="is running it"):
        second.take()
    second.release()  # not its own
    assert live_owner(tmp_path)["pid"] == os.getpid()
    first.release()
    second.take()
    second.release()


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**22 - 7}, {"started": "1"}, {"boot_id": "an earlier boot"}, {"pid": "1; rm"}, {"pid": None}],
    ids=str,
)
def test_a_note_of_a_dead_process_of_this_machine_is_stale(tmp_path, change):
    (tmp_path / OWNER).write_text(json.dumps(process_identity() | change))
    assert live_owner(tmp_path) is None
    own = Ownership(tmp_path)
    own.take()
    own.release()


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 5000, '"x"'])
def test_a_damaged_note_is_no_owner(tmp_path, text):
    (tmp_path / OWNER).write_text(text)
    assert live_owner(tmp_path) is None
    Ownership(tmp_path).take()


def test_an_owner_on_another_machine_is_alive_until_someone_says_otherwise(tmp_path):
    (tmp_path / OWNER).write_text(json.dumps({"pid": 7, "host": "node17", "slurm_job": "42"}))
    assert live_owner(tmp_path)["host"] == "node17"
    own = Ownership(tmp_path)
    with pytest.raises(InputError, match=r"process 7 on node17 \(Slurm job 42\) is running it.*--take-over"):
        own.take()
    (tmp_path / OWNER).unlink()
    own.take()
    own.release()


def test_a_requeued_slurm_job_takes_over_from_its_own_earlier_node(tmp_path, monkeypatch):
    (tmp_path / OWNER).write_text(json.dumps({"pid": 7, "host": "node17", "slurm_job": "42"}))
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    with pytest.raises(InputError):
        Ownership(tmp_path).take()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    own = Ownership(tmp_path)
    own.take()
    assert read_owner(tmp_path)["slurm_job"] == "42"
    own.release()


def test_a_zombie_is_dead(tmp_path):
    process = subprocess.Popen(["true"])
    identity = process_identity() | {"pid": process.pid, "started": ownership.start_time(process.pid)}
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not is_alive(identity)
    process.wait()


def test_a_folder_that_cannot_be_written_keeps_no_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ownership, "replace_atomically", full)
    own = Ownership(tmp_path)
    with pytest.raises(OSError, match="No space"):
        own.take()
    monkeypatch.undo()
    Ownership(tmp_path).take()
