"""A process that hangs ends itself: by Python's thread, or by faulthandler's where Python is stuck too."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.distributed import ParallelConfig, World
from training.drift import GIB, DriftMonitor
from training.health import HealthConfig
from training.lifecycle import Run
from training.receipt import Receipt
from training.watchdog import STACKS, Watchdog

HANG = """
    import sys, time
    from pathlib import Path
    from training.watchdog import Watchdog
    Watchdog.GRACE_SECONDS = 0.5
    def said(reason):
        print(reason, flush=True)
    with Watchdog(1.0, Path(sys.argv[1]), said) as watchdog:
        for _ in range(8):
            watchdog.beat()
            time.sleep(0.3)
        print("hanging", flush=True)
        the_step_that_hangs = {hang}
        the_step_that_hangs()
    print("came back")
"""
# the second holds the interpreter's lock: a C function that never returns to Python
HANGS = {
    "waits": "lambda: time.sleep(60)",
    "holds the lock": "lambda: __import__('ctypes').PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("how", HANGS)
def test_a_hung_step_ends_the_process_with_its_stacks(tmp_path, how):
    code = textwrap.dedent(HANG).replace("{hang}", HANGS[how])
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1 and time.monotonic() - began < 20, done
    assert "hanging" in done.stdout and "came back" not in done.stdout
    stacks = (tmp_path / STACKS).read_text()
    assert "the_step_that_hangs" in stacks or "<lambda>" in stacks
    if how == "waits":
        assert "no step was finished for" in done.stdout and STACKS in done.stdout


def test_beats_keep_it_quiet_and_nothing_stays(tmp_path):
    reasons = []
    with Watchdog(0.4, tmp_path, reasons.append, leave=reasons.append) as watchdog:
        for _ in range(20):
            watchdog.beat()
            time.sleep(0.05)
    assert reasons == [] and list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    with Watchdog(0, tmp_path, reasons.append):
        assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_gone_or_kept_is_no_trouble_at_the_end(tmp_path, monkeypatch):
    with Watchdog(5, tmp_path, print):
        (tmp_path / STACKS).unlink()
    assert list(tmp_path.iterdir()) == []

    def refuse(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with Watchdog(5, tmp_path, print):
        pass


def test_a_hung_run_closes_its_receipt(tmp_path):
    """Through train.py: a step that never ends."""
    from tiny_run import ROOT, TINY

    (tmp_path / "texts").mkdir()
    for number in range(30):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"def f{number}(x): return x * {number}\n" * 8)
    (tmp_path / "tiny.yaml").write_text(TINY)
    code = "import sys, time, train; train.clip_gradients = lambda *_: time.sleep(90); train.main()"
    command = [sys.executable, "-c", code, "tiny.yaml", "run_id=hung", "health.hung_step_seconds=6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        out, _ = process.communicate(timeout=80)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
    import json

    receipt = json.loads((tmp_path / "runs/hung/receipt.json").read_text())
    assert process.returncode == 1 and b"no step was finished" in out, out[-600:]
    assert receipt["status"] == "crashed" and "hung_step_seconds" in receipt["reason"]
    assert "train.py" in (tmp_path / "runs/hung" / STACKS).read_text()


def drift(**config):
    said, memory = [], [GIB]
    return DriftMonitor(HealthConfig(**config), said.append, lambda: memory[0]), said, memory


def test_slow_training_is_said_once_and_again_after_a_recovery():
    monitor, said, _ = drift(slow_share=0.6)
    speeds = [9000, *[1000] * 40, *[300] * 20, *[1000] * 3, *[300] * 4, *[1000] * 3, *[500] * 9]
    for step, speed in enumerate(speeds):
        monitor.observe(step, speed)
    assert [line.split(":")[0] for line in said] == ["step 45", "step 75"]  # 9000 was warming up, four are a hiccup
    assert "300 tokens/s, 30% of the best" in said[0]


def test_growing_memory_is_said_at_every_further_growth():
    monitor, said, memory = drift(memory_growth=0.5)
    for step in range(60):
        memory[0] = int((4 + step * 0.2) * GIB)
        monitor.observe(step, 1000)
    assert len(said) == 2 and "4.8 GiB before" in said[0]
    monitor, said, memory = drift(memory_growth=0.5)
    for step in range(20):
        memory[0] = GIB // 4 if step < 8 else GIB  # below one GiB of growth is nobody's business
        monitor.observe(step, 1000)
    assert said == []


@pytest.mark.parametrize(("rank", "line"), [(0, ""), (3, "rank 3: warning: 9.0 GiB more\n")])
def test_a_warning_of_a_rank_without_a_log_is_on_stderr(capfd, rank, line):
    world = World(ParallelConfig(data="fsdp"), torch.device("cpu"), rank, 4, None)
    log, receipt = [], Receipt.unwritten("a")
    Run._warn(
        SimpleNamespace(world=world, progress=SimpleNamespace(message=log.append), receipt=receipt), "9.0 GiB more"
    )
    assert capfd.readouterr().err == line
    assert log == ["warning: 9.0 GiB more"] and receipt.content["warnings"] == ["9.0 GiB more"]
