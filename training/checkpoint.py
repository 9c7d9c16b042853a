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
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import require_choice, require_number
from training.checkpoint_folder import NAME, load_checkpoint, order_of, spell, unreadable
from training.distributed import World
from training.durable import canonical_json, fsync_path, write_durably
from training.manifest import damages, entries, write_manifest
from training.tensor_store import Tree, flatten, shard_prefix, snapshot, write_tensors

TEMPORARY = ".saving-"
DELETING = ".deleting-"
# How long the ranks wait for each other in a save: a disk may be slow without anybody being dead.
PATIENCE = timedelta(minutes=30)


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
        self._group = self.world.side_group(PATIENCE)  # the writing thread talks beside the training one
        self._group_failed = False
        # Finished saves of this process whose folders are still there, oldest first.
        self.saved: list[Saved] = []
        self._known_damaged: set[Path] = set()
        self._known_sound: set[Path] = set()
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
        if self.world.any(self._group_failed):
            self._group, self._group_failed = self.world.side_group(PATIENCE), False
        if not self.world.any(not self._has(step)):
            return earlier  # the cadence and a stop may meet at the same step
        data = canonical_json({"step": step, "state": state})
        state = json.loads(data)["state"]  # a copy that the caller cannot change under the writing thread
        copies = snapshot(flatten(tensors))
        self._thread = threading.Thread(
            target=self._write, args=(step, copies, state, data), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        if self.config.mode == "sync":
            return self.wait()
        return earlier

    def wait(self, seconds: float | None = None) -> str | None:
        """Waits for the save in flight; returns its error, or None. Call it before the process ends.

        seconds: not longer. What is still being written then is left: nothing reads a temporary folder.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return f"{self._thread.name}: not finished in {seconds:g} s"
            self._thread = None
        error, self._error = self._error, None
        return error

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose every byte is what its manifest says; skipped ones are named by `message`.

        All ranks ask together and share the reading of bytes for their hashes.
        """
        for name in self.world.from_main(lambda: [str(path) for path in self.paths()]):
            path = Path(name)
            found = self.world.gather(damages(path, part=(self.world.rank, self.world.size)) or unreadable(path))
            problems = list(dict.fromkeys(problem for seen in found for problem in seen))
            if not problems:
                self._known_sound.add(path)
                return path
            self._known_damaged.add(path)
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            self.message(f"skipped damaged checkpoint {path}: {problems[0]}{more}")
        return None

    def load(self, path: str | Path, into: Tree) -> dict[str, Any]:
        """See `load_checkpoint`; the ranks of the run do it together. What `latest_valid` gave is not read twice."""
        return load_checkpoint(path, into, self.world, checked=Path(path) in self._known_sound)

    def paths(self) -> list[Path]:
        """Every finished checkpoint folder, newest first, valid or not."""
        if not self.folder.is_dir():
            return []
        return sorted((path for path in self.folder.iterdir() if NAME.fullmatch(path.name)), key=order_of, reverse=True)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], data: bytes) -> None:
        """The body of a save: never raises, since a failed save must not end the run."""
        started = time.monotonic()
        temporary = self.folder / f"{TEMPORARY}{step:08d}"
        try:
            self.world.bind_thread()
            self._together(lambda: self._begin(temporary, data))
            hashes = self._together(lambda: self._write_tensors(temporary, tensors), everywhere=True)
            known = {name: entry for written in hashes for name, entry in written.items()}
            [(path, manifest_sha256)] = self._together(lambda: self._complete(temporary, step, known))
            self.saved.append(Saved(step, state, Path(path), manifest_sha256, time.monotonic() - started))
        except Exception as error:
            self._error = f"checkpoint of step {step} was not saved: {spell(error)}"
            self.message(self._error)
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        try:
            [there] = self._together(self._prune)  # another machine of a shared disk may not see them yet
            self.saved = [saved for saved in self.saved if saved.path.name in there]
        except Exception as error:
            self.message(f"old checkpoints were not removed: {spell(error)}")

    def _together(self, work: Callable[[], Any], everywhere: bool = False) -> list[Any]:
        """What rank 0's work gave (of every rank with `everywhere`, by rank), which is JSON-able where there are many.
        It fails on all ranks if it fails on one."""
        if self.world.size == 1:
            return [work()]
        told: dict[str, Any] = {"value": None}
        try:
            if everywhere or self.world.is_main:
                told = {"value": work()}
        except Exception as error:
            told = {"error": spell(error)}
        try:
            ranks = self.world.gather(told, self._group)
        except RuntimeError:
            self._group_failed = True
            raise
        failed = next((f"rank {rank}: {seen['error']}" for rank, seen in enumerate(ranks) if "error" in seen), None)
        if failed is not None:
            raise OSError(failed)
        return [seen["value"] for seen in (ranks if everywhere else ranks[:1])]

    def _has(self, step: int) -> bool:
        """Whether this process knows of a save of this step (rank 0: sees it too)."""
        known = bool(self.saved) and self.saved[-1].step == step
        return known and (not self.world.is_main or self.saved[-1].path.is_dir())

    def _begin(self, temporary: Path, data: bytes) -> None:
        self._clean()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write_durably(temporary / "state.json", data)

    def _write_tensors(self, temporary: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """This rank's shards, and what the manifest says of them."""
        write_tensors(temporary / "tensors", tensors, self._group)
        return entries(temporary, f"tensors/{shard_prefix(self.world.rank)}")

    def _complete(self, temporary: Path, step: int, known: dict[str, Any]) -> tuple[str, str]:
        """The rest, the manifest last, and the name that makes it a checkpoint: its path and its manifest's sha256."""
        fsync_path(temporary / "tensors")
        manifest_sha256 = write_manifest(temporary, step, known)
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
            if self.config.keep_every and order_of(path)[0] % self.config.keep_every == 0:
                continue
            # renamed first: a kill while deleting must not leave something that looks like a damaged checkpoint
            doomed = self.folder / f"{DELETING}{path.name}"
            path.rename(doomed)
            shutil.rmtree(doomed)
        return [path.name for path in self.paths()]
