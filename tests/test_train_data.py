"""A run goes on with the data that it began with, or not at all."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ENVIRONMENT, ROOT, make_place, receipt, start, stop_at

from errors import InputError, Stopped
from training.checkpoint import Checkpointer


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def half_a_run(place, monkeypatch):
    stop_at(monkeypatch, 5, signal.SIGTERM)
    with pytest.raises(Stopped):
        start(monkeypatch, "run_id=a")
    monkeypatch.undo()
    monkeypatch.chdir(place)


def contents(run_id):
    return {path: path.read_bytes() for path in Path("runs", run_id).rglob("*") if path.is_file()}


def refused(monkeypatch, *overrides):
    """The line of a start that touches nothing of run a. overrides: run_id=a, or none for the newest of its config."""
    before = contents("a")
    with pytest.raises(InputError) as caught:
        start(monkeypatch, *overrides)
    assert contents("a") == before
    return str(caught.value)


def test_a_text_that_came_between_refuses_the_resume_and_touches_nothing(place, monkeypatch):
    half_a_run(place, monkeypatch)
    was = receipt("a")["data"]["manifest_sha256"]
    (place / "texts" / "late.txt").write_text("def late(y): return y + 1\n" * 3)
    for overrides in (["run_id=a"], []):
        line = refused(monkeypatch, *overrides)
        assert "runs/a" in line and was[:12] in line and "init_from=a" in line and "\n" not in line
    (place / "texts" / "late.txt").unlink()
    start(monkeypatch, "run_id=a")
    assert receipt("a")["status"] == "finished" and receipt("a")["data"]["manifest_sha256"] == was


def test_a_checkpoint_that_does_not_know_its_data_asks_the_receipt(place, monkeypatch):
    honest = Checkpointer.save
    monkeypatch.setattr(Checkpointer, "save", lambda *a: honest(*a[:3], {k: v for k, v in a[3].items() if k != "data"}))
    half_a_run(place, monkeypatch)
    (place / "texts" / "late.txt").write_text("def late(y): return y + 1\n" * 3)
    was = receipt("a")
    assert was["data"]["manifest_sha256"][:12] in refused(monkeypatch, "run_id=a")
    Path("runs/a/receipt.json").write_text(json.dumps(was | {"data": "edited by hand"}))  # then nobody knows
    start(monkeypatch, "run_id=a")


def test_the_same_tokens_under_another_manifest_are_the_same_data(place, monkeypatch):
    """As a later version prepares them again: with a key more in the config that the manifest quotes."""
    half_a_run(place, monkeypatch)
    was = receipt("a")["data"]["manifest_sha256"]
    (path,) = Path("artifacts").glob("*/manifest.json")
    manifest = json.loads(path.read_text())
    manifest["config"]["new_key"] = 1
    path.write_text(json.dumps(manifest))
    start(monkeypatch, "run_id=a")
    assert receipt("a")["status"] == "finished" and receipt("a")["data"]["manifest_sha256"] != was


@pytest.mark.slow
def test_all_ranks_refuse_together(place, monkeypatch):
    half_a_run(place, monkeypatch)
    (place / "texts" / "late.txt").write_text("def late(y): return y + 1\n" * 3)
    before = contents("a")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
    plan = ["tiny.yaml", "run_id=a", "parallel.data=ddp", "train.accumulation=1", "parallel.timeout_seconds=60"]
    line = [sys.executable, *launcher, *plan]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and done.stderr.count("error: runs/a: its data were") == 1, done.stderr[-3000:]
    assert "exitcode  : 2" in done.stderr and "timeout" not in done.stderr.lower(), done.stderr[-3000:]
    assert contents("a") == before
