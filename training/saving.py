"""What a run saves and restores, and how its receipt lists it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.prepared import Prepared
from errors import InputError, StorageError
from model.hybrid import HybridLM
from training.checkpoint import Checkpointer, Saved
from training.checkpoint_folder import load_state
from training.config import RunConfig
from training.distributed import World
from training.durable import canonical_json
from training.measured import State
from training.optimizer import optimizer_tensors
from training.receipt import Receipt, read_receipt
from training.run import RunFolder
from training.weights import load_weights


class Saver:
    """The checkpoints of one run. message: receives one line for everything that a person should know."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        data: Prepared,
        model: HybridLM,
        optimizer: torch.optim.AdamW,
        message: Callable[[str], None],
        world: World,
    ) -> None:
        self.config, self.folder, self.model, self.optimizer = config, folder, model, optimizer
        self.message = message
        self.world, self.data = world, data_identity(data)
        self.checkpoints = Checkpointer(folder.path / "checkpoints", config.checkpoint, message, world)
        self.began_from: dict[str, str] | None = None  # by `restore`: the weights of `init_from`
        self._on_disk: int | None = None  # the newest step known to be there, whole
        self._listed: list[Saved] = []

    def restore(self) -> State:
        """Fills model and optimizer from the newest valid checkpoint, or the model alone from `init_from`.

        Raises InputError, on every rank, if that checkpoint was trained on other data than what is there now.
        """
        path = self.checkpoints.latest_valid() if self.folder.resumes else None
        if path is not None:
            self.world.from_main(lambda: self._require_same_data(path))
            state = State(**self.checkpoints.load(path, self._tensors())["run"])
            self._on_disk = state.step
            return state
        if self.folder.resumes:
            self.message(f"{self.folder.path}: no valid checkpoint, starting from the beginning")
        if self.config.init_from is not None:
            self.began_from = load_weights(self.config.init_from, self.model, self.world)
        return State()

    def due(self, step: int) -> bool:
        return self.checkpoints.due(step)

    def save(self, state: State) -> None:
        """A failed save is said by `message` and costs nothing but itself: the run goes on."""
        stored = {"run": asdict(state), "config_sha256": self.config.sha256, "data": self.data}
        self.checkpoints.save(state.step, self._tensors(), stored)

    def note(self, receipt: Receipt) -> None:
        """Between two steps: lists what the writing thread has finished in the meantime."""
        if not self.checkpoints.is_writing and self.checkpoints.saved[-1:] != self._listed:
            self._list(receipt)

    def confirm(self, state: State, receipt: Receipt) -> None:
        """Raises StorageError unless this very step is on the disk: what follows claims that it is."""
        problem = self.checkpoints.wait()
        self._list(receipt)
        self._on_disk = self.checkpoints.saved[-1].step if self.checkpoints.saved else self._on_disk
        if problem or self._on_disk != state.step:
            older = self.checkpoints.paths()
            where = f"the newest is {older[0].name}" if older else "there is none yet"
            raise StorageError(f"{problem or f'step {state.step} was not saved'}; {where}: make room and start again")

    def wait(self, seconds: float | None = None) -> None:
        """Before the process ends. seconds: not longer, where other ranks may be gone."""
        self.checkpoints.wait(seconds)

    def _require_same_data(self, path: Path) -> None:
        changed = changed_data(self.folder.path, path, self.data)
        if changed is not None:
            raise InputError(
                f"{changed}; put the texts back as they were, or start a new run (another run_id, resume=never) "
                f"with init_from={self.folder.run_id}"
            )

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}

    def _list(self, receipt: Receipt) -> None:
        self._listed = self.checkpoints.saved[-1:]
        for saved in self.checkpoints.saved:
            receipt.checkpoint(saved.step, saved.state["run"]["tokens"], saved.path, saved.manifest_sha256)


def data_identity(data: Prepared) -> dict[str, str]:
    """manifest_sha256: as the receipt has it. tokens_sha256: of what training sees alone, since a manifest also quotes
    the config and its notes, which a later version may word differently for the same tokens."""
    tokens = {key: data.manifest[key] for key in ("tokenizer", "corpora")}
    return {
        "manifest_sha256": data.manifest_sha256,
        "tokens_sha256": hashlib.sha256(canonical_json(tokens)).hexdigest(),
    }


def changed_data(run: Path, checkpoint: Path, now: dict[str, str]) -> str | None:
    """How the data of a run differ from those that its checkpoint was trained on; None if they do not, or nobody says.

    The config names texts, it does not hold them: a file that came or went makes other token ids, another order and
    other splits. A checkpoint of an earlier version does not know its data; the receipt of its run does. now: the
    `data_identity` of what the config gives today.
    """
    was = load_state(checkpoint).get("data") or read_receipt(run).get("data")
    if not isinstance(was, dict) or not was.get("manifest_sha256") or any(was.get(k) == v for k, v in now.items()):
        return None
    then, today = str(was["manifest_sha256"])[:12], now["manifest_sha256"][:12]
    return f"{run}: its data were {then} (sha256 of the manifest) and are now {today}"
