"""Disks that are full, read-only or flicker between the two: on small file systems of its own (a mount namespace).

Run as a process of its own by scripts.chaos: `unshare --mount` as root, `unshare --user --map-root-user --mount` else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from scripts.chaos.damage import STOPPED
from scripts.chaos.place import Place, Tally, environment
from scripts.chaos.zygote import Zygote
from training.checkpoint import Checkpointer

GROUP = "full and read-only disks"


def in_own_mounts(place: Place, tally: Tally) -> None:
    """Runs the group in a namespace where it may mount; says so where that is refused."""
    wrapper = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    probe = [*wrapper, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place.runs)]
    try:
        refused = subprocess.run(probe, capture_output=True, text=True).stderr.strip()
    except OSError as error:
        refused = str(error)
    if refused:
        tally.skipped.append(f"{GROUP}: no mount namespace here ({refused})")
        return
    command = [*wrapper, sys.executable, "-m", "scripts.chaos.disk", str(place.folder)]
    done = subprocess.run(command, cwd=place.folder, env=environment(), capture_output=True, text=True)
    try:
        tally.merge(json.loads(done.stdout))
    except ValueError:
        tally.add("continued", GROUP, False, f"the group itself failed: {done.stderr[-600:]}")


def main(folder: Path) -> None:
    place, tally = Place(folder), Tally()
    with Zygote(place, number=9) as zygote:
        _full_at_the_start(place, zygote, tally)
        _full_while_saving(place, zygote, tally)
        _full_from_the_middle_on(place, zygote, tally)
        _read_only_at_the_start(place, zygote, tally)
        _read_only_while_saving(place, zygote, tally)
    print(json.dumps(dataclasses.asdict(tally)))


def _mount(path: Path, size: str) -> None:
    path.mkdir(parents=True, exist_ok=True)
    _sh("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path))


def _until_said(zygote: Zygote, *words: str) -> bool:
    """Waits for one of the words in what the run says; whether it was alive then."""
    while not zygote.is_done():
        if any(word in zygote.log.read_text(errors="replace") for word in words):
            return True
        time.sleep(0.001)
    return False


def _sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def one_line(code: int, said: str) -> bool:
    """A refusal that a person can read: exit code 1, its last line an error, no traceback."""
    last = said.strip().splitlines()[-1:] or [""]
    return code == 1 and "Traceback" not in said and last[0].startswith("error: ")


def _must_end_alike(place: Place, tally: Tally, run_id: str, code: int, said: str, words: str) -> None:
    """A run that went on must have ended well, and in the very bits of the undisturbed one."""
    problem = f"exit code {code}: {said[-400:]}" if code else place.difference(run_id)
    tally.add("continued", GROUP, problem is None, f"{words}: {problem}")


def _full_at_the_start(place: Place, zygote: Zygote, tally: Tally) -> None:
    for kilobytes in (4, 8, 16, 24):
        folder = place.runs / "full"
        _mount(folder, f"{kilobytes}k")
        code, said = zygote.run("full")
        words = f"full at the start, {kilobytes} KB: {code} {said[-300:]}"
        tally.add("input", GROUP, one_line(code, said) and "No space" in said, words)
        _sh("mount", "-o", "remount,size=64m", str(folder))
        code, said = zygote.run("full")
        _must_end_alike(place, tally, "full", code, said, f"{words}; after room was made")
        _sh("umount", str(folder))


def _full_while_saving(place: Place, zygote: Zygote, tally: Tally) -> None:
    """Room for one and a half checkpoints, and none for two: saves fail half-way, the first must stay whole."""
    folder = place.runs / "tight"
    _mount(folder, "1000k")
    code, said = zygote.run("tight")
    failed = said.count("was not saved")
    kept = Checkpointer(folder / "checkpoints", message=lambda _: None).latest_valid()
    good = failed > 2 and kept is not None and one_line(code, said)
    tally.add("input", GROUP, good, f"full while saving: {failed} failed, kept {kept}, {code} {said[-300:]}")
    _sh("mount", "-o", "remount,size=64m", str(folder))
    code, said = zygote.run("tight")
    _must_end_alike(place, tally, "tight", code, said, "full while saving, then room")
    tally.note(GROUP, saves_that_failed_half_way=failed)
    _sh("umount", str(folder))


def _full_from_the_middle_on(place: Place, zygote: Zygote, tally: Tally) -> None:
    """The disk fills up and is freed again while it trains: metrics and receipt wait, nothing is lost."""
    folder = place.runs / "filling"
    _mount(folder, "8m")
    pid = zygote.start("filling")
    while len(list((folder / "checkpoints").glob("step-*"))) < 2 and not zygote.is_done():
        time.sleep(0.001)
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    alive = _until_said(zygote, "not written", "was not saved")
    filler.unlink(missing_ok=True)
    code, said = zygote.wait()
    _must_end_alike(place, tally, "filling", code, said, f"full in the middle (pid {pid}, alive {alive})")
    _sh("umount", str(folder))


def _read_only_at_the_start(place: Place, zygote: Zygote, tally: Tally) -> None:
    folder = place.runs / "fixed"
    _mount(folder, "64m")
    shutil.copytree(place.runs / STOPPED, folder, dirs_exist_ok=True)
    _sh("mount", "-o", "remount,ro", str(folder))
    code, said = zygote.run("fixed")
    tally.add("input", GROUP, one_line(code, said), f"read-only at the start: {code} {said[-300:]}")
    _sh("mount", "-o", "remount,rw", str(folder))
    code, said = zygote.run("fixed")
    _must_end_alike(place, tally, "fixed", code, said, "read-only, then writable")
    _sh("umount", str(folder))


def _read_only_while_saving(place: Place, zygote: Zygote, tally: Tally) -> None:
    """The checkpoint folder becomes read-only under a running process, and writable again before its end."""
    folder = place.runs / "flicker"
    checkpoints = folder / "checkpoints"
    pid = zygote.start("flicker")
    while not list(checkpoints.glob("step-*")) and not zygote.is_done():
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # so that the mount cannot meet a save
    _sh("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(checkpoints))
    os.kill(pid, signal.SIGCONT)
    alive = _until_said(zygote, "was not saved")
    _sh("umount", "--lazy", str(checkpoints))
    code, said = zygote.wait()
    failed = said.count("was not saved")
    _must_end_alike(place, tally, "flicker", code, said, f"read-only while saving (alive {alive})")
    tally.note(GROUP, saves_refused_by_a_read_only_disk=failed)
    place.clean("flicker")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
