"""Real signals to real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from training.signals import StopSignals

SCRIPT = """
    import sys, time
    from training.signals import StopSignals
    with StopSignals() as stop:
        print("ready", flush=True)
        for _ in range(600):
            if stop.requested and sys.argv[1] == "obedient":
                print(stop.name, stop.status, flush=True)
                sys.exit(4)
            if stop.requested:
                print("busy", flush=True)
            time.sleep(0.02)
"""


def start(kind: str) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", "stopped"), ("SIGINT", "stopped"), ("SIGUSR1", "preempted")])
def test_one_signal_sets_the_flag(name, status):
    process = start("obedient")
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=10)
    assert process.returncode == 4 and out.strip() == f"{name} {status}"
    assert "Traceback" not in err and "saving and stopping" in err


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGUSR1", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_the_second_exits_at_once(first, second):
    process = start("stubborn")
    process.send_signal(getattr(signal, first))
    assert process.stdout.readline() == "busy\n"
    began = time.monotonic()
    process.send_signal(getattr(signal, second))
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1 and time.monotonic() - began < 2 and "Traceback" not in err


def test_earlier_handlers_come_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested and stop.name == "SIGUSR1"
    assert {number: signal.getsignal(number) for number in before} == before


def test_below_a_launcher_the_copy_of_a_signal_is_one_wish(monkeypatch):
    now = [0.0]
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with StopSignals(clock=lambda: now[0]) as stop:
        for moment in (0.0, 0.2, 1.9):  # from the terminal, from torchrun, from srun
            now[0] = moment
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM" and left == []
        os.kill(os.getpid(), signal.SIGINT)  # another one is another wish
        assert left == [1]
        now[0] = 2.1
        os.kill(os.getpid(), signal.SIGTERM)  # and so is a late one
        assert left == [1, 1]
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    with StopSignals(clock=lambda: 0.0):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a person who means it
        assert left == [1, 1, 1]
