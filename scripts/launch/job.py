"""launch.json: how a run was started, and the backend that starts jobs on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    gpus: int = 0
    nodes: int = 1
    # Lines for sbatch, e.g. --partition=a100; and the time limit, the resubmission keeps both.
    sbatch: list[str] = field(default_factory=list)
    time_limit: str | None = None
    command: list[str] = field(default_factory=list)
    cwd: str = ""
    started: str = ""
    process: dict[str, Any] = field(default_factory=dict)
    slurm_job: str | None = None

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
    """Starts it in a session of its own: it outlives this process and its terminal. Raises OSError."""
    job.command = train_command(folder)
    if job.gpus > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.gpus}"]
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
    job.process = process_identity() | {"pid": child.pid, "started": start_time(child.pid)}
    job.write(folder)


def local_process(folder: Path, job: Job | None) -> dict[str, Any] | None:
    """The living process of this machine that runs a folder: the launched one, or one of train.py typed by hand."""
    candidates = [job.process if job else {}, read_owner(folder)]
    return next((process for process in candidates if process and is_alive(process)), None)


def stop_local(process: dict[str, Any], now: bool) -> None:
    """Asks for a clean save, or (now) ends the whole session at once. Raises InputError if it is not ours to end."""
    try:
        if not now:
            os.kill(process["pid"], signal.SIGTERM)
        elif os.getpgid(process["pid"]) == process["pid"]:
            os.killpg(process["pid"], signal.SIGKILL)
        else:
            os.kill(process["pid"], signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise InputError(f"process {process['pid']}: belongs to another user") from None
