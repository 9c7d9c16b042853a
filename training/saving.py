"""What a run saves and restores, and how its receipt lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from errors import StorageError
from model.hybrid import HybridLM
from training.checkpoint import Checkpointer, Saved, load_checkpoint
from training.config import RunConfig
from training.distributed import World
from training.measured import State
from training.optimizer import optimizer_tensors
from training.receipt import Receipt
from training.run import RunFolder
from training.weights import load_weights


class Saver:
    """The checkpoints of one run. message: receives one line for everything that a person should know."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        model: HybridLM,
        optimizer: torch.optim.AdamW,
        message: Callable[[str], None],
        world: World,
    ) -> None:
        self.config, self.folder, self.model, self.optimizer = config, folder, model, optimizer
        self.message = message
        self.checkpoints = Checkpointer(folder.path / "checkpoints", config.checkpoint, message, world)
        self._on_disk: int | None = None  # the newest step known to be there, whole
        self._listed: list[Saved] = []

    def restore(self) -> State:
        """Fills model and optimizer from the newest valid checkpoint, or the model alone from `init_from`."""
        path = self.checkpoints.latest_valid() if self.folder.resumes else None
        if path is not None:
            state = State(**load_checkpoint(path, self._tensors())["run"])
            self._on_disk = state.step
            return state
        if self.folder.resumes:
            self.message(f"{self.folder.path}: no valid checkpoint, starting from the beginning")
        if self.config.init_from is not None:
            load_weights(self.config.init_from, self.model)
        return State()

    def due(self, step: int) -> bool:
        return self.checkpoints.due(step)

    def save(self, state: State) -> None:
        """A failed save is said by `message` and costs nothing but itself: the run goes on."""
        stored = {"run": asdict(state), "config_sha256": self.config.sha256}
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

    def wait(self) -> None:
        self.checkpoints.wait()

    def _tensors(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": optimizer_tensors(self.model, self.optimizer)}

    def _list(self, receipt: Receipt) -> None:
        self._listed = self.checkpoints.saved[-1:]
        for saved in self.checkpoints.saved:
            receipt.checkpoint(saved.step, saved.state["run"]["tokens"], saved.path, saved.manifest_sha256)
