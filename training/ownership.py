"""One process runs a run, never two: a lock that dies with its owner, and a note that says who that is.

The lock (`.lock`, flock) is the kernel's: it is free the moment its holder is dead, so nothing stale can block a run
on the same machine. The note (`owner.json`) names the holder for people and for `scripts.launch`, and decides where the
kernel cannot know: on another machine of a shared file system. It is removed on a clean end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errors import InputError
from training.durable import replace_atomically

LOCK = ".lock"
OWNER = "owner.json"
# How long a start waits for a lock that is held without an owner: one that is being taken or given back.
PATIENCE_SECONDS = 5.0


class Ownership:
    """Holds a run folder (which exists) from `take` to `release`."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        # thread_local off: taken on the main thread, may be released by the watchdog's
        self._lock = FileLock(self.folder / LOCK, thread_local=False)

    def take(self, gone: dict[str, Any] | None = None) -> None:
        """Raises InputError naming the owner if there is one, OSError if the folder cannot be written.

        gone: the note of a process on another machine of which somebody (Slurm) knows that it is dead.
        """
        until = time.monotonic() + PATIENCE_SECONDS
        while not self._try():
            owner = live_owner(self.folder)
            if owner is not None or time.monotonic() > until:
                raise InputError(f"{self.folder}: {describe_owner(owner)} is running it")
            time.sleep(0.05)
        try:
            owner = read_owner(self.folder)
            elsewhere = owner and owner != gone and owner.get("host") != socket.gethostname()
            if elsewhere and not _same_slurm_job(owner):
                raise InputError(f"{self.folder}: {describe_owner(owner)} is running it; {way_out(self.folder)}")
            replace_atomically(self.folder / OWNER, json.dumps(process_identity(), indent=2).encode() + b"\n")
        except BaseException:
            self._lock.release()
            raise

    def release(self) -> None:
        """Safe to call twice, and without `take`."""
        if self._lock.is_locked:
            with contextlib.suppress(OSError):  # a note that stays is one of a dead process
                (self.folder / OWNER).unlink(missing_ok=True)
            self._lock.release()

    def _try(self) -> bool:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True


def process_identity() -> dict[str, Any]:
    """Who runs this: pid, its start time in kernel ticks, host, boot, and the Slurm job if there is one."""
    return {
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "host": socket.gethostname(),
        "boot_id": boot_id(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def read_owner(folder: str | Path) -> dict[str, Any]:
    """owner.json, or {} if there is none that can be read."""
    try:
        return dict(json.loads((Path(folder) / OWNER).read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def live_owner(folder: str | Path) -> dict[str, Any] | None:
    """The process that runs a run folder, or None. One on another machine counts as alive. Takes no lock."""
    owner = read_owner(folder)
    if not owner or (owner.get("host") == socket.gethostname() and not is_alive(owner)) or _same_slurm_job(owner):
        return None
    return owner


def is_alive(identity: dict[str, Any]) -> bool:
    """Whether a process of this machine, as `process_identity` describes it, still runs (a zombie does not)."""
    if identity.get("host") != socket.gethostname() or identity.get("boot_id") != boot_id():
        return False
    started, pid = identity.get("started"), identity.get("pid")
    return started is not None and isinstance(pid, int) and start_time(pid) == started


def describe_owner(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another process"
    job = f" (Slurm job {owner['slurm_job']})" if owner.get("slurm_job") else ""
    return f"process {owner.get('pid')} on {owner.get('host')}{job}"


def way_out(folder: Path) -> str:
    """What to do about an owner on another machine, of which nobody here can know whether it lives."""
    take_over = f"`python -m scripts.launch resume {folder.name} --take-over`"
    return f"if that machine is gone, {take_over} (for a run of a grid: remove {folder / OWNER})"


def start_time(pid: int) -> str | None:
    """The kernel's start tick of a living process: tells a recycled pid from its former owner. None: dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def boot_id() -> str | None:
    """Changes with every boot of the machine: no process survives one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _same_slurm_job(owner: dict[str, Any]) -> bool:
    """Slurm requeues a job only after its steps are gone: the note of another host by the same job is an old one."""
    job = os.environ.get("SLURM_JOB_ID")
    return job is not None and owner.get("slurm_job") == job and owner.get("host") != socket.gethostname()
