"""Which folder a run lives in, and whether it starts or continues."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import InputError, nearest
from training.checkpoint import Checkpointer
from training.config import RunConfig, differing_keys, load_config
from training.receipt import read_receipt

RUNS = Path("runs")
UNFINISHED = ("running", "stopped", "preempted", "crashed", "killed")


@dataclass
class RunFolder:
    """path: runs/<run_id>. resumes: the folder was there and is continued."""

    path: Path
    resumes: bool

    @property
    def run_id(self) -> str:
        return self.path.name


def choose_run(config: RunConfig, config_name: str, runs: Path = RUNS) -> RunFolder:
    """Resolves `run_id` and `resume` to a folder; creates nothing.

    resume auto: an explicit run_id is continued if it exists, else the newest unfinished run of this very config;
    never: a new folder; anything else: that run. Raises InputError: no such run, a run of another config, a run that
    is finished, or one whose process is alive.
    """
    named = config.resume if config.resume not in ("auto", "never") else config.run_id
    if config.resume == "never":
        path = runs / (config.run_id or new_run_id(config_name, runs))
        if path.exists():
            raise InputError(f"run_id: {path} exists already; choose another name, or resume=auto to continue it")
        return RunFolder(path, resumes=False)
    if named is not None:
        path = runs / named
        if path.exists():
            _check_same_config(path, config)
            _check_can_continue(path)
            return RunFolder(path, resumes=True)
        if config.resume != "auto":
            raise InputError(f"resume: no run {path}{nearest(named, _run_ids(runs))}")
        return RunFolder(path, resumes=False)
    newest_first = sorted(runs.glob("*/receipt.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for run_id in (path.parent.name for path in newest_first):
        receipt = read_receipt(runs / run_id)
        unfinished = receipt.get("config_sha256") == config.sha256 and receipt.get("status") in UNFINISHED
        if unfinished and not _alive(receipt):
            return RunFolder(runs / run_id, resumes=True)
    return RunFolder(runs / new_run_id(config_name, runs), resumes=False)


def new_run_id(config_name: str, runs: Path = RUNS) -> str:
    """<config name>-<time>, made unique by a counter when two start within a second."""
    base = f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [base, *(f"{base}-{i}" for i in range(2, 1000))]
    return next(name for name in candidates if not (runs / name).exists())


def find_checkpoint(name: str, runs: Path = RUNS) -> Path:
    """The newest valid checkpoint of a run (its id or folder), or a checkpoint folder itself. Raises InputError."""
    path = Path(name) if Path(name).exists() else runs / name
    if (path / "manifest.json").is_file():
        return path
    if not path.is_dir():
        raise InputError(f"init_from: no run or checkpoint {name}{nearest(name, _run_ids(runs))}")
    found = Checkpointer(path / "checkpoints").latest_valid()
    if found is None:
        raise InputError(f"init_from: {path} has no valid checkpoint")
    return found


def process_identity() -> dict[str, Any]:
    """Who runs this: goes into the receipt, so that a second start can tell a live owner from a dead one."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": _start_time(os.getpid())}


def _run_ids(runs: Path) -> list[str]:
    return [path.parent.name for path in runs.glob("*/receipt.json")]


def _alive(receipt: dict[str, Any]) -> bool:
    process = receipt.get("process", {})
    if receipt.get("status") != "running" or process.get("host") != socket.gethostname():
        return False
    return process.get("started") is not None and _start_time(process.get("pid", -1)) == process["started"]


def _start_time(pid: int) -> str | None:
    """The kernel's start tick of a process: tells a recycled pid from its former owner."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return None


def _check_same_config(path: Path, config: RunConfig) -> None:
    stored = path / "config.yaml"
    if not stored.is_file():
        raise InputError(f"{path}: no config.yaml, so this is no run that could be continued; choose another run_id")
    keys = differing_keys(load_config(stored), config)
    if keys:
        listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        raise InputError(f"{path}: is a run of a different config ({listed}); choose another run_id or the same values")


def _check_can_continue(path: Path) -> None:
    receipt = read_receipt(path)
    if receipt.get("status") == "finished":
        raise InputError(f"{path}: is finished; choose another run_id, or init_from={path.name} to train on from it")
    if _alive(receipt):
        raise InputError(f"{path}: process {receipt['process']['pid']} is running it")
