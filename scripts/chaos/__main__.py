"""Breaks runs in every way that we could think of, and compares what comes of them: python -m scripts.chaos.

Ends with `chaos: N undisturbed-identical of M continued, D of F damages detected, C of B bad inputs clean`, and exits
with 1 unless all are equal. --size nightly takes a quarter of an hour on two idle cores, --size slice three minutes.

Run it on files that nobody edits meanwhile: it starts processes all the time, and they import what is there then.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.chaos import inputs, kills, mishaps, pickles
from scripts.chaos.damage import damage_checkpoints, damage_for_collect
from scripts.chaos.disk import in_own_mounts
from scripts.chaos.place import ROOT, Place, Tally
from scripts.chaos.zygote import Zygote
from training.environment import cores, cpu_name, git_state

RESULTS = ROOT / "docs" / "results" / "chaos.md"


@dataclass
class Size:
    """seconds: no new chain of interruptions begins after them, so that a slow machine misses counts and not time."""

    kills: int
    signals: int
    configs: int
    file_rounds: int
    commands: int
    seconds: float


SIZES = {
    "nightly": Size(kills=220, signals=60, configs=5000, file_rounds=60, commands=99, seconds=2700),
    "slice": Size(kills=24, signals=6, configs=250, file_rounds=4, commands=12, seconds=600),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="slice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes that train at once, one thread each")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), help="only these groups")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    tally, started = Tally(), time.monotonic()
    chosen = arguments.only or list(GROUPS)
    with tempfile.TemporaryDirectory(prefix="amer-chaos-") as folder, ThreadPoolExecutor(arguments.workers) as pool:
        place = Place(Path(folder))
        _say(started, f"undisturbed run: {place.build():.1f} s as a command")
        zygotes = list(pool.map(lambda number: Zygote(place, number), range(arguments.workers)))
        list(pool.map(Zygote.warm_up, zygotes))
        _say(started, f"{len(zygotes)} workers; {zygotes[0].seconds:.1f} s per undisturbed run in one")
        interruptions = Interruptions(place, tally, size, arguments.seed, started + size.seconds)
        killing = [pool.submit(interruptions.work, zygote) for zygote in zygotes[1:] if "kills" in chosen]
        for name, group in GROUPS.items():
            if name in chosen or (name == "checkpoints" and {"mishaps", "files", "disks"} & set(chosen)):
                if name == "files":  # these damage the corpus itself, so nothing else may run
                    for one in killing:
                        one.result()
                group(place, zygotes[0], tally, size, arguments.seed, interruptions)
                _say(started, f"{name}: {tally.line()}")
        for one in killing:
            one.result()
        interruptions.close()
        for zygote in zygotes:
            zygote.__exit__()
    tally.seconds, tally.core_seconds = time.monotonic() - started, _core_seconds()
    if arguments.write:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(report(tally, arguments.size, arguments.seed))
    for failure in tally.failures:
        print(f"FAILED {failure}")
    for words in tally.skipped:
        print(f"SKIPPED {words}")
    print(f"{tally.seconds / 60:.1f} minutes, {tally.core_seconds / 60:.1f} of computing; {json.dumps(tally.groups)}")
    print(tally.line())
    return 0 if tally.passed else 1


class Interruptions:
    """Chains of signals, then of kills, by as many workers as there are; they share the numbers that are wanted."""

    def __init__(self, place: Place, tally: Tally, size: Size, seed: int, until: float) -> None:
        self.place, self.tally, self.seed, self.until = place, tally, seed, until
        self.killed, self.signalled = kills.Quota(size.kills, share_during_save=1 / 3), kills.Quota(size.signals)

    def work(self, zygote: Zygote) -> None:
        name = f"{self.seed}-{zygote.number}"
        kills.signal_chains(self.place, zygote, self.signalled, self.tally, name, self.until)
        kills.kill_chains(self.place, zygote, self.killed, self.tally, name, self.until)

    def close(self) -> None:
        killed, signalled = self.killed, self.signalled
        if not (killed.done or signalled.done):
            return
        self.tally.note(kills.GROUP_KILLS, kills=killed.done, during_a_save=killed.during_save)
        self.tally.note(kills.GROUP_SIGNALS, signals=signalled.done)
        if killed.open or signalled.open:
            missed = f"{killed.done} of {killed.wanted} kills ({killed.during_save} during a save)"
            self.tally.failures.append(f"out of time: {missed}, {signalled.done} of {signalled.wanted} signals")


def _checkpoints(place: Place, zygote: Zygote, tally: Tally, size: Size, *_: Any) -> None:
    damage_checkpoints(place, zygote, tally)


def _mishaps(place: Place, zygote: Zygote, tally: Tally, size: Size, *_: Any) -> None:
    mishaps.all_mishaps(place, zygote, tally)


def _disks(place: Place, zygote: Zygote, tally: Tally, *_: Any) -> None:
    in_own_mounts(place, tally)


def _configs(place: Place, zygote: Zygote, tally: Tally, size: Size, seed: int, _: Any) -> None:
    inputs.bad_commands(place, zygote, tally, size.commands)
    inputs.fuzz_configs(tally, size.configs, seed, place.folder)


def _kills(place: Place, zygote: Zygote, tally: Tally, size: Size, seed: int, interruptions: Interruptions) -> None:
    interruptions.work(zygote)  # the other workers have been at it since the start


def _files(place: Place, zygote: Zygote, tally: Tally, size: Size, seed: int, _: Any) -> None:
    damage_for_collect(place, tally)
    inputs.fuzz_files(place, tally, size.file_rounds, seed)
    pickles.malicious_pickles(place, zygote, tally)


# In this order: the later ones use the stopped run that `checkpoints` leaves.
GROUPS: dict[str, Callable[..., None]] = {
    "checkpoints": _checkpoints,
    "mishaps": _mishaps,
    "disks": _disks,
    "configs": _configs,
    "kills": _kills,
    "files": _files,
}


def report(tally: Tally, size: str, seed: int) -> str:
    """The page under docs/results."""
    commit = str(git_state(ROOT)["commit"])[:12]
    lines = [
        "# Chaos: what runs survive",
        "",
        f"Command: `python -m scripts.chaos --size {size} --seed {seed} --write` (`make chaos`),",
        f"{tally.seconds / 60:.1f} minutes, {tally.core_seconds / 60:.1f} of computing, commit {commit},",
        f"{cpu_name()}, {cores()} cores, Python {platform.python_version()}.",
        "",
        "Every continued run is compared with the undisturbed one bit by bit: weights, optimizer, selection biases,",
        "counters, the window of outliers, every metrics record but the timings, the intervals in which STP was live.",
        "",
        "| group | continued: identical / all | damages: detected / all | bad inputs: clean / all | notes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for group, found in tally.groups.items():
        kinds = [found.get(kind) for kind in ("continued", "damage", "input")]
        cells = [f"{kind[0]} / {kind[1]}" if kind else "" for kind in kinds]
        notes = ", ".join(f"{name.replace('_', ' ')}: {number}" for name, number in found.get("notes", {}).items())
        lines.append(f"| {group} | {' | '.join(cells)} | {notes} |")
    lines += ["", f"`{tally.line()}`", ""]
    lines += [f"Skipped: {words}" for words in tally.skipped] + [f"FAILED: {words}" for words in tally.failures]
    return "\n".join(lines).rstrip() + "\n"


def _core_seconds() -> float:
    """Of this process and all that it waited for: what the suite costs whatever else the machine does."""
    spent = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def _say(started: float, words: str) -> None:
    print(f"[{time.monotonic() - started:6.1f} s] {words}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
