"""The lines that a person reads at the beginning and at the end of a run."""

from __future__ import annotations

from typing import Any

from data.prepared import Prepared
from model.hybrid import HybridLM
from training.hardware import Machine
from training.measured import State
from training.run import RunFolder
from training.summary import parameter_counts


def opening(
    folder: RunFolder, restored: State, machine: Machine, data: Prepared, model: HybridLM, warnings: list[str]
) -> list[str]:
    letters, counts = "".join(model.letters), parameter_counts(model)
    kernels = "; ".join(f"{name}: {kernel}" for name, kernel in machine.kernels(letters).items())
    return [
        *(f"note: {warning}" for warning in [*folder.notes, *warnings, *data.notes]),
        f"run {folder.path}" + (f", continued from step {restored.step}" if folder.resumes else ""),
        f"machine: {machine.describe()}",
        f"kernels: {kernels}",
        f"data: {data.name}, {data.train_tokens:,} training tokens, vocabulary {data.vocab_size:,}",
        f"model: {letters}, {counts['total']:,} parameters, {counts['active']:,} per token",
    ]


def closing(folder: RunFolder, state: State, metrics: dict[str, Any], stp_enabled: bool) -> list[str]:
    live, path, run_id = state.live_tokens, folder.path, folder.run_id
    speed = metrics["tokens_per_second"]  # None: the receipt that had it is gone, and no step was left to measure
    stp = [f"STP live over tokens {live}" if live else "STP: control, no live tokens"] if stp_enabled else []
    again = f"python train.py {path}/config.yaml run_id={run_id}-more init_from={run_id}"
    return [
        f"finished: {state.step:,} steps, {state.tokens:,} tokens" + (f", {speed:,.0f} tokens/s" if speed else ""),
        *stp,
        f"run folder: {path}",
        f"next: python -m scripts.plot_run {path}   (draw its curves)",
        f"      python -m scripts.inspect_curvature {path}   (where its trajectories bend: a report)",
        f"      {again}   (train on from these weights)",
    ]
