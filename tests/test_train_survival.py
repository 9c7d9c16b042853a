"""Disks and terminals that refuse: one clear line where the run cannot go on, and nothing at all where it can."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from tiny_run import ROOT, losses, make_place, receipt, start

from data.stream import TrainStream
from errors import InputError, StorageError
from training import checkpoint as checkpoint_module
from training import lifecycle, ownership
from training.lifecycle import Run


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def refuse(number):
    def write(path, *_):
        raise OSError(number, os.strerror(number), str(path))

    return write


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("module", [lifecycle, ownership], ids=["config", "owner"])
def test_a_disk_that_refuses_the_first_file_is_one_line(place, monkeypatch, module, number):
    monkeypatch.setattr(module, "replace_atomically", refuse(number))
    with pytest.raises(StorageError, match=f"run cannot begin: {os.strerror(number)}") as caught:
        start(monkeypatch, "run_id=a")
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert not Path("runs/a").exists()


def test_a_last_checkpoint_that_cannot_be_saved_names_the_newest_that_is_there(place, monkeypatch):
    honest, steps = checkpoint_module.write_tensors, []

    def write(folder, tensors, *rest):
        steps.append(1)
        if len(steps) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return honest(folder, tensors, *rest)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write)
    with pytest.raises(StorageError, match=r"No space left.*the newest is step-00000008: make room"):
        start(monkeypatch, "run_id=a")
    assert receipt("a")["status"] == "crashed" and "Traceback" not in receipt("a")["reason"]
    monkeypatch.setattr(checkpoint_module, "write_tensors", honest)
    start(monkeypatch, "run_id=a")
    assert receipt("a")["status"] == "finished"


def test_the_receipt_lists_a_checkpoint_as_soon_as_it_is_there(place, monkeypatch):
    honest, seen = Run.record, []

    def record(self, state, *rest):
        if self.saver.checkpoints._thread is not None:
            self.saver.checkpoints._thread.join()  # the step before began a save: it is done in this one
        honest(self, state, *rest)
        seen.append([entry["step"] for entry in receipt("a")["checkpoints"]])

    monkeypatch.setattr(Run, "record", record)
    start(monkeypatch, "run_id=a", "train.tokens=1400")
    assert [] in seen and [4] in seen  # `status` does not wait for the save after it
    assert seen[4] == [4] or seen[3] == [4]


def test_a_file_that_turns_out_bad_on_the_way_closes_the_receipt_with_its_line(place, monkeypatch):
    honest = TrainStream.batch

    def batch(self, step):
        if step == 3:
            raise InputError("texts: token id 999, but the tokenizer has 300")
        return honest(self, step)

    monkeypatch.setattr(TrainStream, "batch", batch)
    with pytest.raises(InputError, match="token id 999"):
        start(monkeypatch, "run_id=a", "train.tokens=1400")
    closed = receipt("a")
    assert closed["status"] == "crashed" and closed["reason"] == "texts: token id 999, but the tokenizer has 300"


def test_a_terminal_that_is_gone_changes_nothing(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "train.py"), "tiny.yaml", "run_id=mute", "train.tokens=900"]
    with open("/dev/full", "w") as full:  # noqa: PTH123 - every write to it says that the disk is full
        done = subprocess.run(line, env=environment, stdout=full, stderr=full, timeout=100)
    assert done.returncode == 0
    assert json.loads(Path("runs/mute/receipt.json").read_text())["status"] == "finished" and losses("mute")
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([*line, "stp.wieght=1"], env=environment, stdout=full, stderr=full, timeout=100)
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("ranks", "error", "seconds"),
    [(2, RuntimeError(), 7.0), (2, InputError("all raise it"), None), (2, None, None), (1, RuntimeError(), None)],
)
def test_a_rank_that_fails_alone_waits_for_its_save_no_longer_than_for_others(ranks, error, seconds):
    """The writers of a save wait for each other for half an hour, and some of them may be gone."""
    run = MagicMock(owner=None)
    run.world.size, run.config.parallel.timeout_seconds = ranks, 7.0
    Run.__exit__(run, type(error) if error else None, error, None)
    run.saver.wait.assert_called_once_with(seconds)
