"""Chains of interruptions: a run is killed at random moments until it comes through, and must end as if undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from pathlib import Path

from scripts.chaos.place import Place, Tally
from scripts.chaos.zygote import Zygote
from training.checkpoint import DELETING, TEMPORARY
from training.receipt import read_receipt

GROUP_KILLS, GROUP_SIGNALS = "SIGKILL", "SIGTERM, SIGINT"


class Quota:
    """How many interruptions are still wanted, shared by the workers."""

    def __init__(self, wanted: int, share_during_save: float = 0.0) -> None:
        self.wanted, self.share_during_save = wanted, share_during_save
        self.done = self.during_save = 0
        self._lock = threading.Lock()

    @property
    def open(self) -> bool:
        return self.done < self.wanted or self.during_save < self.share_during_save * self.done

    def count(self, during_save: bool) -> None:
        with self._lock:
            self.done += 1
            self.during_save += during_save


def kill_chains(place: Place, zygote: Zygote, quota: Quota, tally: Tally, seed: str, until: float) -> None:
    """SIGKILL at a random moment of the process's life, or once a save has begun; two of three aim at a save."""
    chance = random.Random(f"kill {seed}")
    number = 0
    while quota.open and time.monotonic() < until:
        number += 1
        run_id = f"killed-{seed}-{number}"
        kills, planned = 0, chance.randint(2, 7)
        folder = place.runs / run_id / "checkpoints"
        while True:
            before = _halves(folder)
            pid = zygote.start(run_id)
            if kills < planned:
                if chance.random() < 0.65:
                    _until_saving(folder, zygote, saves=chance.randint(1, 3))
                    _pause(chance.uniform(0.0, 0.08), zygote)
                else:
                    _pause(chance.uniform(0.0, 1.2 * zygote.seconds), zygote)
                if not zygote.is_done():
                    os.kill(pid, signal.SIGKILL)
            code, said = zygote.wait()
            if code == -signal.SIGKILL:
                kills += 1
                quota.count(bool(_halves(folder) - before))
            elif kills or code:
                problem = f"exit code {code}: {said[-400:]}" if code else place.difference(run_id)
                kept = place.put_away(run_id, problem)
                tally.add("continued", GROUP_KILLS, problem is None, f"{run_id} after {kills} kills: {problem}{kept}")
                break
            else:  # it was through before the first kill
                break
        place.clean(run_id)


def signal_chains(place: Place, zygote: Zygote, quota: Quota, tally: Tally, seed: str, until: float) -> None:
    """SIGTERM or SIGINT at a random moment; the process must leave the step it is in on the disk and exit with 4. One
    in four is followed by another, so that it exits at once."""
    chance = random.Random(f"signal {seed}")
    number = 0
    while quota.open and time.monotonic() < until:
        number += 1
        run_id = f"signalled-{seed}-{number}"
        signals, planned = 0, chance.randint(1, 4)
        problem: str | None = None
        while problem is None:
            pid = zygote.start(run_id)
            name = chance.choice((signal.SIGTERM, signal.SIGINT))
            if signals < planned:
                _pause(chance.uniform(0.0, zygote.seconds), zygote)
                if not zygote.is_done():
                    os.kill(pid, name)
                if chance.random() < 0.25:
                    _pause(chance.uniform(0.0, 0.03), zygote)
                    if not zygote.is_done():
                        os.kill(pid, signal.SIGTERM)
            code, said = zygote.wait()
            if code == 0:
                problem = place.difference(run_id)
                break
            if code == 4:
                signals += 1
                quota.count(False)
                problem = _stopped_badly(place.runs / run_id)
            elif code == 1 and "second signal" in said:
                signals += 1
                quota.count(False)
                tally.note(GROUP_SIGNALS, a_second_one_ended_it=1)
            elif code in (-signal.SIGTERM, -signal.SIGINT, 130):  # before the run was open: nothing to save yet
                signals += 1
                quota.count(False)
                tally.note(GROUP_SIGNALS, before_the_run_was_open=1)
            else:
                problem = f"exit code {code}: {said[-400:]}"
        kept = place.put_away(run_id, problem)
        if signals:
            words = f"{run_id} after {signals} signals: {problem}{kept}"
            tally.add("continued", GROUP_SIGNALS, problem is None, words)


def _stopped_badly(folder: Path) -> str | None:
    """Whether the receipt is not closed, or its last step is not the newest checkpoint's."""
    receipt = read_receipt(folder)
    newest = max((path.name for path in (folder / "checkpoints").glob("step-*")), default="none")
    if receipt.get("status") != "stopped":
        return f"exit code 4, but the receipt says {receipt.get('status')}"
    return None if f"step-{receipt['step']:08d}" == newest[:13] else f"step {receipt['step']}, but saved {newest}"


def _until_saving(folder: Path, zygote: Zygote, saves: int) -> None:
    """Returns when the given number of saves has begun, or the process has ended."""
    seen: set[str] = set()
    while len(seen) < saves and not zygote.is_done():
        with contextlib.suppress(FileNotFoundError):
            seen |= {entry.name for entry in os.scandir(folder) if entry.name.startswith(TEMPORARY)}
        time.sleep(0.001)


def _halves(folder: Path) -> set[tuple[str, int]]:
    """Half a save, or half a removal of an old one: what a process leaves that was killed in the middle of it."""
    if not folder.is_dir():
        return set()
    return {(path.name, path.inode()) for path in os.scandir(folder) if path.name.startswith((TEMPORARY, DELETING))}


def _pause(seconds: float, zygote: Zygote) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not zygote.is_done():
        time.sleep(min(0.005, max(0.0, end - time.monotonic())))
