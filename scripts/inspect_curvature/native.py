"""Runs and checkpoints of this repository as subjects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.prepare import prepare
from data.prepared import Prepared
from data.progress import show_progress
from errors import InputError, nearest
from model.context import SequenceContext
from model.hybrid import HybridLM
from scripts.inspect_curvature.subject import Subject
from scripts.trained_data import require_same_data
from training.checkpoint import Checkpointer
from training.checkpoint_folder import NAME, load_state, step_of
from training.config import RunConfig, load_config
from training.receipt import read_receipt, run_folder
from training.run import RUNS
from training.weights import load_weights


@dataclass(frozen=True)
class RunSource:
    """A run folder and the checkpoint of it that was asked for (the newest valid one, or the one named)."""

    folder: Path
    checkpoint: Path
    config: RunConfig
    named_checkpoint: bool

    @property
    def receipt(self) -> dict:
        return read_receipt(self.folder)

    @property
    def tokenizer_sha256(self) -> str | None:
        return self.receipt.get("data", {}).get("tokenizer_sha256")

    def prepared(self) -> Prepared:
        """The run's corpus, from the cache or made again. Raises InputError where that is not possible."""
        with show_progress() as progress:
            return prepare(self.config.data, progress=progress)

    def trained_on(self) -> Prepared:
        """The same, if it is what the run was trained on. Raises InputError."""
        data = self.prepared()
        require_same_data(data, self.folder, self.checkpoint)
        return data

    def other_checkpoints(self) -> list[Path]:
        """The run's other checkpoints, oldest first, valid or not: whoever loads one checks every byte of it, and a
        run that goes on may remove it before that."""
        paths = reversed(Checkpointer(self.folder / "checkpoints").paths())
        return [path for path in paths if path.resolve() != self.checkpoint.resolve()]


def open_run(name: str, runs: Path = RUNS) -> RunSource:
    """A run id, a run folder or a checkpoint folder. Raises InputError: nothing there, no run, no valid checkpoint."""
    path = run_folder(name, runs)
    if not path.exists():
        known = [receipt.parent.name for receipt in runs.glob("*/receipt.json")]
        raise InputError(f"{name}: no run or checkpoint{nearest(name, known)}")
    if path.is_file():
        raise InputError(f"{name}: is a file; expected a run folder, a checkpoint folder or a run id")
    path = path.resolve() if path.is_symlink() else path
    if (path / "manifest.json").is_file() and NAME.fullmatch(path.name):
        folder = path.parent.parent
        if not (folder / "config.yaml").is_file():
            raise InputError(
                f"{name}: a checkpoint outside a run; expected RUN/checkpoints/{path.name} with RUN/config.yaml"
            )
        return RunSource(folder, path, _config(folder), named_checkpoint=True)
    if not (path / "config.yaml").is_file():
        hint = "; for a Hugging Face model: --hf" if (path / "config.json").is_file() else ""
        raise InputError(f"{name}: is no run (no config.yaml) and no checkpoint (no manifest.json){hint}")
    checkpointer = Checkpointer(path / "checkpoints")
    if not checkpointer.paths():
        raise InputError(f"{name}: the run has no checkpoint yet")
    newest = checkpointer.latest_valid()
    if newest is None:
        raise InputError(f"{name}: the run has no valid checkpoint")
    return RunSource(path, newest, _config(path), named_checkpoint=False)


def load_subject(source: RunSource, vocab_size: int, device: torch.device, checkpoint: Path | None = None) -> Subject:
    """The weights of a checkpoint (default: the source's own). Raises InputError: gone, damaged, of another model."""
    path = checkpoint or source.checkpoint
    if not path.is_dir():
        raise InputError(f"{path}: was removed meanwhile (a run keeps its newest checkpoints)")
    model = HybridLM(source.config.model, vocab_size)
    load_weights(path, model)
    state = load_state(path).get("run", {})
    name = f"{source.folder.name}, step {step_of(path):,}"
    return _subject(source, model, name, device, step_of(path), state.get("tokens"))


def untrained_twin(source: RunSource, vocab_size: int, device: torch.device) -> Subject:
    """The same model as it was before its first step: the same config, the same seed."""
    model = HybridLM(source.config.model, vocab_size)
    model.init_weights(torch.Generator().manual_seed(source.config.seed))
    return _subject(source, model, f"{source.folder.name}, untrained", device, 0, 0)


def before_training(source: RunSource, vocab_size: int, device: torch.device) -> Subject:
    """The model before its first step: the untrained twin, or the weights of `init_from`.

    Raises InputError: they are gone, are not those that the receipt says the run began from, or it does not say.
    """
    name = source.config.init_from
    if name is None:
        return untrained_twin(source, vocab_size, device)
    began = source.receipt.get("init_from")
    if not began:  # a run of an earlier version
        raise InputError(f"init_from: the receipt does not say which weights of {name} the run began from")
    model = HybridLM(source.config.model, vocab_size)
    if load_weights(began["path"], model)["sha256"] != began["sha256"]:
        raise InputError(f"init_from: {began['path']} holds other weights than the run began from")
    return _subject(source, model, f"{source.folder.name}, step 0 (from {name})", device, 0, 0)


def _subject(
    source: RunSource, model: HybridLM, name: str, device: torch.device, step: int, tokens: int | None
) -> Subject:
    model.to(device).eval()
    config = source.config

    @torch.no_grad()
    def forward(tokens: Tensor, lengths: Tensor) -> list[Tensor]:
        positions = torch.arange(tokens.shape[1])
        document_ids = torch.where(positions < lengths[:, None], 0, -1)
        context = SequenceContext.from_document_ids(document_ids.to(device))
        output = model(tokens.to(device), context)  # no autocast: the least rounded states there are
        return [*output.hidden_states, output.final]

    return Subject(
        name=name,
        letters=list(model.letters),
        d_model=config.model.d_model,
        vocab_size=model.embedding.num_embeddings,
        forward=forward,
        trained_length=config.data.sequence_length,
        window=config.stp.window,
        tokenizer_sha256=source.tokenizer_sha256,
        step=step,
        tokens=tokens,
        stp={
            "weight": config.stp.weight,
            "form": config.stp.form,
            "variant": config.stp.variant,
            "boundaries": source.receipt.get("stp", {}).get("boundaries", []),
            "live_tokens": source.receipt.get("stp", {}).get("live_tokens", []),
        },
    )


def _config(folder: Path) -> RunConfig:
    config = load_config(folder / "config.yaml")
    config.validate()
    return config
