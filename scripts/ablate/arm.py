"""One run of a grid, as a process of its own: an ordinary run of train.py in the grid's folder, then its evaluation.

    python -m scripts.ablate.arm FOLDER [--answers SPLIT] [--limit N] [--curvature-rows N] [--checkpoints keep|remove]

FOLDER holds config.yaml. What is done already is not done again: a finished run is only evaluated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import train
from analysis.cadence import cheap_metrics
from data.prepare import prepare
from data.stream import validation_batches
from errors import exit_with
from model.context import SequenceContext
from model.hybrid import HybridLM
from scripts.ablate.grid import Evaluation
from scripts.trained_data import require_same_data
from training.answers import answer_accuracy
from training.config import RunConfig, load_config
from training.durable import replace_atomically
from training.hardware import Machine
from training.receipt import read_receipt
from training.run import find_checkpoint
from training.weights import load_weights

EVALUATION = "evaluation.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.ablate.arm", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--answers", default="none")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--curvature-rows", type=int, default=8)
    parser.add_argument("--checkpoints", default="keep", choices=["keep", "remove"])
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    config = load_config(folder / "config.yaml", [f"run_id={folder.name}", "resume=auto"])
    warnings = config.validate()
    if read_receipt(folder).get("status") != "finished":
        train.train(config, folder.name, warnings, runs=folder.parent)
    settings = Evaluation(arguments.answers, arguments.limit, arguments.curvature_rows)
    found = evaluate(folder, config, settings)
    content = {"settings": asdict(settings), "metrics": found}
    replace_atomically(folder / EVALUATION, json.dumps(content, indent=1).encode() + b"\n")
    if arguments.checkpoints == "remove":
        shutil.rmtree(folder / "checkpoints")
    return 0


def read_evaluation(folder: Path, settings: Evaluation) -> dict[str, Any] | None:
    """The metrics of a run, or None where it was not evaluated in just this way."""
    try:
        content = json.loads((folder / EVALUATION).read_bytes())
        return dict(content["metrics"]) if content["settings"] == asdict(settings) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def evaluated_with(folder: Path) -> dict[str, Any]:
    """The settings of the evaluation that is there, {} if there is none that can be read."""
    try:
        return dict(json.loads((folder / EVALUATION).read_bytes())["settings"])
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def evaluate(folder: Path, config: RunConfig, settings: Evaluation) -> dict[str, Any]:
    """Of the last checkpoint. weights_sha256 identifies every weight: equal for arms that are equal bit for bit.

    A predictor of STP is no part of the model (see training/weights.py), nor of weights_sha256. Raises InputError: no
    checkpoint, or texts that changed since.
    """
    machine = Machine.resolve(config)
    data = prepare(config.data)
    checkpoint = find_checkpoint(str(folder))
    require_same_data(data, folder, checkpoint)
    model = HybridLM(config.model, data.vocab_size)
    load_weights(checkpoint, model)
    model.to(machine.device).eval()
    found: dict[str, Any] = {"weights_sha256": weights_sha256(model)}
    if settings.curvature_rows:
        found |= curvature(model, machine, data, config, settings.curvature_rows)
    if settings.answers != "none":
        report = answer_accuracy(model, data, settings.answers, limit=settings.limit, autocast=machine.autocast)
        kept = ("split", "n", "exact", "dfa", "dfa_letter", "invalid", "limit", "unfinished")
        found |= {f"answers_{name}" if name in ("split", "n", "limit") else name: report[name] for name in kept}
    return found


def weights_sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def curvature(model: HybridLM, machine: Machine, data: Any, config: RunConfig, rows: int) -> dict[str, float]:
    """The cheap curvature and collapse numbers per family on the first held-out rows."""
    batch = next(validation_batches(data, config.data.sequence_length, rows, rows)).to(machine.device)
    with machine.autocast():
        output = model(batch.tokens, SequenceContext.from_document_ids(batch.document_ids))
    return cheap_metrics(output.hidden_states, output.final, batch.document_ids, model.letters, max_rows=rows)


if __name__ == "__main__":
    exit_with(main)
