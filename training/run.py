"""Which folder a run lives in, and whether it starts or continues."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errors import InputError, Stopped, nearest
from training.checkpoint import Checkpointer
from training.config import RunConfig, differing_keys, load_config
from training.distributed import World
from training.manifest import MANIFEST
from training.ownership import LOCK, OWNER, Ownership, describe_owner, live_owner, way_out
from training.receipt import RECEIPT, read_receipt, run_folder

RUNS = Path("runs")
# What a process that dies right after its start leaves: not a run yet, so that its id stays usable.
BEGINNING = {LOCK, OWNER}
UNFINISHED = ("running", "stopped", "preempted", "crashed", "killed")


@dataclass
class RunFolder:
    """path: runs/<run_id>. resumes: a run was started there and is continued. known: the folder was there. notes: what
    a person should know about the choice."""

    path: Path
    resumes: bool
    known: bool = False
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For other ranks."""
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> RunFolder:
        return cls(**{**fields, "path": Path(fields["path"])})

    @property
    def run_id(self) -> str:
        return self.path.name

    def claim(self, config: RunConfig) -> Ownership:
        """Makes this process the only one that runs it; the caller releases. What `choose_run` saw is judged again.

        Raises InputError: another process owns it, began it or finished it in the meantime; OSError: not writable.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=self.known)
        except FileExistsError:
            raise InputError(f"{self.path}: another process is starting it") from None
        owner = Ownership(self.path)
        try:
            owner.take()
        except OSError:
            self.remove_if_empty()
            raise
        try:
            for name in (OWNER, "config.yaml"):
                for half in self.path.glob(f".{name}.*.tmp"):  # of a process that was killed while writing
                    half.unlink()
            _check_can_continue(self.path, config)
            self.resumes = has_started(self.path)
        except BaseException:
            owner.release()
            raise
        return owner

    def remove_if_empty(self) -> None:
        """After a start that failed: bad input leaves nothing behind."""
        if not self.known and {entry.name for entry in self.path.iterdir()} <= {LOCK}:
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()


def choose_run(config: RunConfig, config_name: str, runs: Path = RUNS, again: bool = False) -> RunFolder:
    """Resolves `run_id` and `resume` to a folder; creates nothing.

    resume auto: an explicit run_id is continued if it exists, else the newest unfinished run of this very config;
    never: a new folder; anything else: that run. A folder where nothing was started yet (`scripts.launch` makes those,
    and so does a kill right after the start) is begun. Raises InputError: no such run, a run of another config, a run
    that is finished, or one whose process is alive.

    again: torchrun starts the processes of this job once more. Then `auto` and `never` both mean the run that the job
    has begun: its run_id, else the newest run of this config. Raises Stopped if that is finished, and InputError if
    another machine holds it: nothing begins at step 0 unseen.
    """
    notes: list[str] = []
    named = config.resume if config.resume not in ("auto", "never") else config.run_id
    if again:
        path = runs / (named or next((run_id for run_id, _ in _runs_of(config, runs)), ""))
        if read_receipt(path).get("status") == "finished":
            raise Stopped(f"{path} is finished; nothing is left to do")
        if path != runs and path.exists():
            return _continued(path, config)
    if config.resume == "never":
        path = runs / (config.run_id or new_run_id(config_name, runs))
        if path.exists():
            raise InputError(f"run_id: {path} exists already; choose another name, or resume=auto to continue it")
        return RunFolder(path, resumes=False)
    if named is not None:
        path = runs / named
        if path.exists():
            return _continued(path, config)
        if config.resume != "auto":
            raise InputError(f"resume: no run {path}{nearest(named, _run_ids(runs))}")
        return RunFolder(path, resumes=False)
    for run_id, status in _runs_of(config, runs):
        owner = live_owner(runs / run_id)
        if status in UNFINISHED and owner is None:
            return RunFolder(runs / run_id, resumes=True, known=True, notes=notes)
        if status in UNFINISHED and owner is not None and owner.get("host") != socket.gethostname():
            who = f"is left alone: {describe_owner(owner)} may be running it; {way_out(runs / run_id)}"
            notes.append(f"{runs / run_id}, a run of this config, {who}")
    return RunFolder(runs / new_run_id(config_name, runs), resumes=False, notes=notes)


def _runs_of(config: RunConfig, runs: Path) -> Iterator[tuple[str, str]]:
    """(run id, status) of the runs of this very config, newest first."""
    for path in sorted(runs.glob("*/receipt.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        receipt = read_receipt(path.parent)
        if receipt.get("config_sha256") == config.sha256:
            yield path.parent.name, str(receipt.get("status"))


def _continued(path: Path, config: RunConfig) -> RunFolder:
    """A run that is there. Raises InputError if it cannot be continued, or is running."""
    _check_can_continue(path, config)
    owner = live_owner(path)
    if owner is not None:
        more = f"; {way_out(path)}" if owner.get("host") != socket.gethostname() else ""
        raise InputError(f"{path}: {describe_owner(owner)} is running it{more}")
    return RunFolder(path, has_started(path), known=True)


def new_run_id(config_name: str, runs: Path = RUNS) -> str:
    """<config name>-<time>, made unique by a counter when two start within a second."""
    base = f"{re.sub(r'[^A-Za-z0-9_.+=-]+', '-', config_name).lstrip('.-') or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    candidates = [base, *(f"{base}-{i}" for i in range(2, 1000))]
    return next(name for name in candidates if not (runs / name).exists())


def find_checkpoint(name: str, runs: Path = RUNS, world: World | None = None) -> Path:
    """The newest valid checkpoint of a run (its id or folder), or a checkpoint folder itself. Raises InputError.

    world: the ranks that ask for it together share the reading of bytes for their hashes.
    """
    world = world or World.alone()

    def folder() -> tuple[str, bool]:
        path = run_folder(name, runs)
        if not path.is_dir():
            raise InputError(f"init_from: no run or checkpoint {name}{nearest(name, _run_ids(runs))}")
        return str(path), (path / MANIFEST).is_file()

    place, is_checkpoint = world.from_main(folder)
    if is_checkpoint:
        return Path(place)
    message = print if world.is_main else lambda line: None
    found = Checkpointer(Path(place, "checkpoints"), message=message, world=world).latest_valid()
    if found is None:
        raise InputError(f"init_from: {place} has no valid checkpoint")
    return found


def has_started(path: Path) -> bool:
    """Whether a process ever opened this run: it left a receipt or checkpoints."""
    return (path / RECEIPT).exists() or (path / "checkpoints").is_dir()


def _run_ids(runs: Path) -> list[str]:
    return [path.parent.name for path in runs.glob("*/receipt.json")]


def _check_can_continue(path: Path, config: RunConfig) -> None:
    stored = path / "config.yaml"
    if stored.is_file():
        keys = differing_keys(load_config(stored), config)
        if keys:
            listed = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise InputError(
                f"{path}: is a run of a different config ({listed}); choose another run_id or the same values"
            )
    elif not path.is_dir() or any(e.name not in BEGINNING and e.suffix != ".tmp" for e in path.iterdir()):
        raise InputError(f"{path}: no config.yaml, so this is no run that could be continued; choose another run_id")
    if read_receipt(path).get("status") == "finished":
        raise InputError(f"{path}: is finished; choose another run_id, or init_from={path.name} to train on from it")
