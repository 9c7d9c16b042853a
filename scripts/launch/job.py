"""launch.json: how a run was started, and the backend that starts jobs on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from errors import InputError
from training.durable import replace_atomically
from training.ownership import is_alive, process_identity, read_owner, start_time

LAUNCH = "launch.json"
LOG = "output.log"
TRAIN = Path(__file__).parents[2] / "train.py"


@dataclass
class Job:
    """One start of a run. process: of a local job (see `process_identity`); slurm_job: its id under Slurm."""

    backend: str
    # Per node: GPUs, each with a process of its own; or processes that ask for no GPU (0: one).
    gpus: int = 0
    nodes: int = 1
    processes: int = 0
    # Lines for sbatch, e.g. --partition=a100; and the time limit. A resubmission keeps what is not given again.
    sbatch: list[str] = field(default_factory=list)
    time_limit: str | None = None
    # Under Slurm, of each process; None: what `sbatch` says, else as `slurm.render` has it.
    cpus_per_task: int | None = None
    command: list[str] = field(default_factory=list)
    cwd: str = ""
    started: str = ""
    process: dict[str, Any] = field(default_factory=dict)
    slurm_job: str | None = None

    @property
    def per_node(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus, self.processes)

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.per_node

    @classmethod
    def read(cls, folder: Path) -> Job | None:
        """None: not started by `scripts.launch`, or the file cannot be read."""
        try:
            return cls(**json.loads((folder / LAUNCH).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def write(self, folder: Path) -> None:
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        replace_atomically(folder / LAUNCH, json.dumps(asdict(self), indent=2).encode() + b"\n")


def train_command(folder: Path) -> list[str]:
    """The command that begins or continues the run of a folder, whichever it needs."""
    return [sys.executable, str(TRAIN), str(folder / "config.yaml"), f"run_id={folder.name}", "resume=auto"]


def start_local(folder: Path, job: Job) -> None:
    """Starts it in a session of its own: it outlives this process and its terminal. Raises OSError: nothing
    runs then."""
    job.command = train_command(folder)
    if job.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.per_node}"]
        job.command = [sys.executable, *launcher, *job.command[1:]]
    job.cwd = str(Path.cwd())
    with (folder / LOG).open("ab") as log:
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(job.command)}\n".encode())
        log.flush()
        child = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    job.slurm_job = None
    job.process = process_identity() | {"pid": child.pid, "started": start_time(child.pid)}
    try:
        job.write(folder)
    except BaseException:
        child.kill()  # what nobody could find again is not left running
        child.wait()
        raise


def local_processes(folder: Path, job: Job | None) -> list[dict[str, Any]]:
    """The living processes of this machine behind a run: the one that owns it, then the launched one (torchrun)."""
    candidates = [read_owner(folder), job.process if job else {}]
    return [process for process in candidates if process and is_alive(process)]


def stop_local(processes: list[dict[str, Any]], now: bool) -> None:
    """Asks the owner for a clean save (other ranks follow it), or (now) kills all with everything that they started.

    Raises InputError if they are not ours to end.
    """
    try:
        if not now:
            os.kill(processes[0]["pid"], signal.SIGTERM)
            return
        for process in reversed(processes):  # torchrun first, as it would start its workers again
            with contextlib.suppress(psutil.NoSuchProcess):
                root = psutil.Process(process["pid"])
                for one in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()
    except ProcessLookupError:
        pass
    except (PermissionError, psutil.AccessDenied):
        raise InputError(f"process {processes[0]['pid']}: belongs to another user") from None
