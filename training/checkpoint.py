"""Checkpoints that are either whole or not there.

checkpoints/step-00000120/
  tensors/shard-*.safetensors   model, optimizer: every tensor, bit for bit (training/tensor_store.py)
  state.json                    everything else
  manifest.json                 size and sha256 of the files above, written last (training/manifest.py)

A save writes into a hidden temporary folder, forces every file to the disk, renames, and forces the rename to the
disk. So a kill at any moment leaves the older checkpoints untouched and at most a temporary folder, which the next
save removes. Nothing is unpickled, ever.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import InputError, require_choice, require_number
from training.distributed import World
from training.durable import canonical_json, fsync_path, write_durably
from training.manifest import damages, read_manifest, write_manifest
from training.tensor_store import Tree, flatten, open_shards, read_tensors, require_stored, snapshot, write_tensors

NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
TEMPORARY = ".saving-"
DELETING = ".deleting-"


@dataclass
class CheckpointConfig:
    # Steps between two checkpoints; 0: only at the end and when stopped.
    every_steps: int = 100
    # The newest ones that are kept; at least 2, so that a damaged newest one costs some steps and not the run.
    keep_last: int = 2
    # Checkpoints at multiples of this many steps are kept for ever; 0: none.
    keep_every: int = 0
    # async: training goes on while a thread writes a copy; sync: training waits.
    mode: str = "async"

    def validate(self, path: str = "checkpoint") -> None:
        require_number(f"{path}.every_steps", self.every_steps, 0)
        require_number(f"{path}.keep_last", self.keep_last, 2)
        require_number(f"{path}.keep_every", self.keep_every, 0)
        require_choice(f"{path}.mode", self.mode, ["async", "sync"])


@dataclass
class Saved:
    """A finished save. manifest_sha256 identifies all its bytes; state is what was given to `save`."""

    step: int
    state: dict[str, Any]
    path: Path
    manifest_sha256: str
    seconds: float


class Checkpointer:
    """Saves into `folder` (created by the first save), finds the newest valid checkpoint, loads it.

    message: receives one line for everything that a person should know (skipped and failed checkpoints).
    """

    def __init__(
        self,
        folder: str | Path,
        config: CheckpointConfig | None = None,
        message: Callable[[str], None] = print,
        world: World | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.config = config or CheckpointConfig()
        self.message = message
        self.world = world or World.alone()
        self._group = self.world.side_group()  # the writing thread talks beside the training one
        # Finished saves of this process whose folders are still there, oldest first.
        self.saved: list[Saved] = []
        self._known_damaged: set[Path] = set()
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._cleaned = False

    def due(self, step: int) -> bool:
        """Whether the cadence asks for a save after this many steps."""
        return self.config.every_steps > 0 and step > 0 and step % self.config.every_steps == 0

    def save(self, step: int, tensors: Tree, state: dict[str, Any]) -> str | None:
        """Saves nested mappings of tensors and a JSON-able state (string keys) under the number of finished steps.

        Returns None, or one line saying why it failed: the older checkpoints are untouched then, the run can go on. In
        async mode that is returned by the next `save` or `wait`, and sent to `message` at once. Raises TypeError for a
        state that is not JSON-able or a leaf that is no tensor, before writing.
        """
        earlier = self.wait()
        if self.saved and self.saved[-1].step == step and self._together(self.saved[-1].path.is_dir):
            return earlier  # the cadence and a stop may meet at the same step
        data = canonical_json({"step": step, "state": state})
        state = json.loads(data)["state"]  # a copy that the caller cannot change under the writing thread
        copies = snapshot(flatten(tensors))
        self._thread = threading.Thread(target=self._write, args=(step, copies, state, data), name=f"checkpoint-{step}")
        self._thread.start()
        if self.config.mode == "sync":
            return self.wait()
        return earlier

    def wait(self) -> str | None:
        """Waits for the save in flight; returns its error, or None. Call it before the process ends."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose every byte is what its manifest says; skipped ones are named by `message`."""
        found = self.world.from_main(self._latest_valid)
        return None if found is None else Path(found)

    def _latest_valid(self) -> str | None:
        for path in self.paths():
            problems = damages(path) or _unreadable(path)
            if not problems:
                return str(path)
            self._known_damaged.add(path)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.message(f"skipped damaged checkpoint {path}: {problems[0]}{more}")
        return None

    def load(self, path: str | Path, into: Tree) -> dict[str, Any]:
        """See `load_checkpoint`; the ranks of the run do it together."""
        return load_checkpoint(path, into, self.world)

    def paths(self) -> list[Path]:
        """Every finished checkpoint folder, newest first, valid or not."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)), key=_order, reverse=True)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], data: bytes) -> None:
        """The body of a save: never raises, since a failed save must not end the run."""
        started = time.monotonic()
        temporary = self.folder / f"{TEMPORARY}{step:08d}"
        try:
            self._together(lambda: self._begin(temporary))
            self._together(lambda: write_tensors(temporary / "tensors", tensors, self._group), everywhere=True)
            path, manifest_sha256 = self._together(lambda: self._complete(temporary, step, data))
            self.saved.append(Saved(step, state, Path(path), manifest_sha256, time.monotonic() - started))
        except Exception as error:
            self._error = f"checkpoint of step {step} was not saved: {_spell(error)}"
            self.message(self._error)
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        try:
            there = self._together(self._prune)  # another machine of a shared disk may not see them yet
            self.saved = [saved for saved in self.saved if saved.path.name in there]
        except Exception as error:
            self.message(f"old checkpoints were not removed: {_spell(error)}")

    def _together(self, work: Callable[[], Any], everywhere: bool = False) -> Any:
        """Work of rank 0 (of every rank with `everywhere`) that fails on all ranks if it fails on one. Returns what
        rank 0's gave, which is JSON-able then."""
        if self.world.size == 1:
            return work()
        told: dict[str, Any] = {"value": None}
        try:
            if everywhere or self.world.is_main:
                told = {"value": work()}
        except Exception as error:
            told = {"error": _spell(error)}
        ranks = self.world.gather(told, self._group)
        failed = next((f"rank {rank}: {seen['error']}" for rank, seen in enumerate(ranks) if "error" in seen), None)
        if failed is not None:
            raise OSError(failed)
        return ranks[0]["value"]

    def _begin(self, temporary: Path) -> None:
        self._clean()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def _complete(self, temporary: Path, step: int, data: bytes) -> tuple[str, str]:
        """The rest, the manifest last, and the name that makes it a checkpoint: its path and its manifest's sha256."""
        write_durably(temporary / "state.json", data)
        fsync_path(temporary / "tensors")
        manifest_sha256 = write_manifest(temporary, step)
        fsync_path(temporary)
        path = self._free_path(step)
        temporary.rename(path)
        fsync_path(self.folder)
        return str(path), manifest_sha256

    def _free_path(self, step: int) -> Path:
        """A step that is saved again gets a new name: nothing finished is ever overwritten."""
        path = self.folder / f"step-{step:08d}"
        attempt = 2
        while path.exists():
            path = self.folder / f"step-{step:08d}-{attempt}"
            attempt += 1
        return path

    def _clean(self) -> None:
        """Removes what a killed process left behind. Only a process that saves does this, and only once."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._cleaned:
            return
        for path in self.folder.iterdir():
            if path.name.startswith((TEMPORARY, DELETING)):
                shutil.rmtree(path)
        self._cleaned = True

    def _prune(self) -> list[str]:
        """Keeps the newest `keep_last` sound ones and the multiples of `keep_every`; removes what is older. Returns
        the names of those that are there."""
        sound = 0
        for path in self.paths():
            if sound < self.config.keep_last:
                if path not in self._known_damaged and not damages(path, hashes=False):
                    sound += 1
                continue
            if self.config.keep_every and _order(path)[0] % self.config.keep_every == 0:
                continue
            # renamed first: a kill while deleting must not leave something that looks like a damaged checkpoint
            doomed = self.folder / f"{DELETING}{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed)
        return [path.name for path in self.paths()]


def load_checkpoint(path: str | Path, into: Tree, world: World | None = None) -> dict[str, Any]:
    """Checks every byte against the manifest, fills the tensors of `into` in place, and returns the state.

    `into` has the form given to `save`, or only some of its top-level sections: {"model": model.state_dict()} takes
    the weights alone. world: the ranks that load it together share the reading of bytes for their hashes.
    Raises InputError, on all of them: damaged, or names, shapes or dtypes differ (nothing is filled then).
    """
    path, flat, world = Path(path), flatten(into), world or World.alone()

    def check() -> dict[str, Any]:
        if not path.is_dir():
            raise InputError(f"{path}: no such checkpoint")
        problems = damages(path, part=(world.rank, world.size))
        if problems:
            raise InputError(f"{path}: damaged checkpoint: {problems[0]}")
        state = load_state(path)
        require_stored(path / "tensors", flat, set(into))
        return state

    state = world.everywhere(check)
    read_tensors(path / "tensors", flat)
    return state


def load_state(path: str | Path) -> dict[str, Any]:
    """state.json alone, without checking the other files. Raises InputError if it cannot be read."""
    try:
        return dict(json.loads((Path(path) / "state.json").read_bytes())["state"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: state.json is not readable: {_spell(error)}") from None


def step_of(path: str | Path) -> int:
    """The number of finished steps that a checkpoint folder's name carries."""
    return _order(Path(path))[0]


def _order(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path}: not a checkpoint folder (step-00000000)")
    return int(match[1]), int(match[2] or 1)


def _unreadable(path: Path) -> list[str]:
    """Problems that a rewritten manifest hides: files that are not what their names say, a step of another folder."""
    try:
        load_state(path)
        if read_manifest(path)["step"] != step_of(path):
            return ["manifest.json: is of another step"]
        open_shards(path / "tensors")
    except Exception as error:  # safetensors raises many kinds on foreign bytes
        return [_spell(error)]
    return []


def _spell(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
