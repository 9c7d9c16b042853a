"""Real signals to real processes."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from training.signals import StopSignals, ends_at_once

SCRIPT = """
    import sys, time
    from training.signals import StopSignals, ends_at_once
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


@pytest.fixture
def interruptible():
    """A shell's script starts what it puts in the background with SIGINT ignored, and so may these tests be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


EARLY = """
    import os, signal, sys
    from training.signals import ends_at_once
    class Library:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass
    try:
        with ends_at_once():
            Library()  # Python drops what is raised in here
            print("not interrupted", flush=True)
    finally:
        print("cleaned up", flush=True)
"""


def test_an_interrupt_is_not_lost_in_a_library_before_the_run_is_open(interruptible):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(EARLY)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == done.stderr == ""


def test_afterwards_an_interrupt_is_an_exception_again(interruptible):
    with ends_at_once():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_handler_that_is_there_stays():
    with StopSignals() as stop, ends_at_once():
        signal.raise_signal(signal.SIGINT)
    assert stop.requested
