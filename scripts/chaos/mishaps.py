"""Mishaps around a run: a jumping clock, starts that collide, a dead owner's note, a line of metrics cut in two."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.chaos.damage import STOPPED
from scripts.chaos.faults import FAULTS
from scripts.chaos.place import Place, Tally, environment
from scripts.chaos.zygote import Zygote
from training.ownership import OWNER, process_identity

GROUP = "mishaps"


def all_mishaps(place: Place, zygote: Zygote, tally: Tally) -> None:
    """Each is continued to the end, and compared. Needs the stopped run of scripts.chaos.damage."""
    _clock_jumps(place, zygote, tally)
    _collisions(place, zygote, tally)
    _simultaneous_starts(place, tally)
    _stale_owners(place, zygote, tally)
    _killed_writers(place, zygote, tally)
    _cut_metrics(place, zygote, tally)
    _half_begun(place, zygote, tally)


def _finish(place: Place, tally: Tally, run_id: str, code: int, said: str, what: str) -> None:
    problem = f"exit code {code}: {said[-400:]}" if code else place.difference(run_id)
    tally.add("continued", GROUP, problem is None, f"{what}: {problem}")
    place.clean(run_id)


def _clock_jumps(place: Place, zygote: Zygote, tally: Tally) -> None:
    _finish(place, tally, "jumping", *zygote.run("jumping", fault="jumping clock"), "a clock that jumps")
    shutil.copytree(place.runs / STOPPED, place.runs / "jumping")
    _finish(place, tally, "jumping", *zygote.run("jumping", fault="jumping clock"), "a clock that jumps, resumed")


def _collisions(place: Place, zygote: Zygote, tally: Tally) -> None:
    """While a run goes on, it is started again by hand and by the launcher."""
    folder = place.runs / "twice"
    pid = zygote.start("twice", "train.log_every=2")
    while not (folder / OWNER).exists() and not zygote.is_done():
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # it lives, however long the second start takes
    by_hand = place.command("run_id=twice")
    launched = subprocess.run(
        [sys.executable, "-m", "scripts.launch", "resume", "twice"],
        cwd=place.folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    os.kill(pid, signal.SIGCONT)
    for what, done in (("train.py", by_hand), ("launch resume", launched)):
        tally.add("input", GROUP, refused_cleanly(done.returncode, done.stderr), f"second {what}: {done.stderr[-300:]}")
    _finish(place, tally, "twice", *zygote.wait(), "started again while it ran")


def _simultaneous_starts(place: Place, tally: Tally) -> None:
    """Two real processes begin one new run at the same moment: one runs it, the other is refused."""
    processes = [place.popen("run_id=race") for _ in range(2)]
    ends = [(process.communicate(timeout=120), process.returncode) for process in processes]
    winners = [code for _, code in ends if code == 0]
    for (_, err), code in ends:
        if code != 0:
            tally.add("input", GROUP, refused_cleanly(code, err), f"start at once: {code} {err[-300:]}")
    problem = f"{len(winners)} of 2 ran it" if len(winners) != 1 else ""
    _finish(place, tally, "race", 0 if not problem else 1, problem, "two starts at once")


def _stale_owners(place: Place, zygote: Zygote, tally: Tally) -> None:
    notes = {
        "a recycled pid": process_identity() | {"started": "1"},
        "an earlier boot": process_identity() | {"boot_id": "0"},
        "a dead pid": process_identity() | {"pid": 2**22 - 3},
        "half a note": None,
    }
    for number, (what, note) in enumerate(notes.items()):
        run_id = f"stale-{number}"
        shutil.copytree(place.runs / STOPPED, place.runs / run_id)
        text = json.dumps(note) if note else '{"pid": 12'
        (place.runs / run_id / OWNER).write_text(text)
        _finish(place, tally, run_id, *zygote.run(run_id), f"stale owner: {what}")


def _killed_writers(place: Place, zygote: Zygote, tally: Tally) -> None:
    """The process is killed while half a record is in metrics.jsonl: its first, and others before and after saves."""
    for number, fault in enumerate(name for name in FAULTS if name.startswith("killed in record")):
        run_id = f"half-{number}"
        code, _ = zygote.run(run_id, fault=fault)
        metrics = (place.runs / run_id / "metrics.jsonl").read_bytes()
        if code != -signal.SIGKILL or metrics.endswith(b"\n") or not metrics:
            tally.failures.append(f"{GROUP}: {fault}: no half line was left ({code}, {len(metrics)} bytes)")
        _finish(place, tally, run_id, *zygote.run(run_id), fault)


def _cut_metrics(place: Place, zygote: Zygote, tally: Tally) -> None:
    """Other ends of metrics.jsonl after a power cut: inside braces, before a newline, bytes of nothing."""
    for number, rest in enumerate((b'{"step": 99, "loss/to', b'{"step": 99, "loss/lm": 1.0}', b"\x00" * 700)):
        run_id = f"cut-{number}"
        shutil.copytree(place.runs / STOPPED, place.runs / run_id)
        with (place.runs / run_id / "metrics.jsonl").open("ab") as file:
            file.write(rest)
        _finish(place, tally, run_id, *zygote.run(run_id), f"metrics cut after {rest[:10]!r}")


def _half_begun(place: Place, zygote: Zygote, tally: Tally) -> None:
    """What a kill leaves between the first mkdir and the first receipt."""
    for number, names in enumerate(((), (".lock",), (".lock", OWNER, ".config.yaml.1.tmp"))):
        run_id = f"begun-{number}"
        folder: Path = place.runs / run_id
        folder.mkdir()
        for name in names:
            (folder / name).write_text("")
        _finish(place, tally, run_id, *zygote.run(run_id), f"half begun with {names}")


def refused_cleanly(code: int, stderr: str) -> bool:
    """Exit code 2, one line that begins with error, no traceback."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    return code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
