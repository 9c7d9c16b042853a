"""Preflight alone: python -m scripts.preflight CONFIG [key.path=value ...]

Builds the real model of a config, draws the first batch of its run, proves the wiring of STP on them and prints what
every boundary and check showed. Trains nothing and writes no run folder.
Exit code 0: proven; 2: bad input; 3: not wired as configured.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data.prepare import prepare
from data.progress import show_progress
from data.stream import TrainStream
from errors import PreflightError, exit_with, require
from losses.gate import TokenGate
from losses.objective import Objective
from model.hybrid import HybridLM
from training.compile import compile_blocks
from training.config import RunConfig, load_config
from training.hardware import Machine
from training.preflight import Preflight, PreflightReport
from training.saving import load_weights

MEANING = {
    "triples_inside_documents": "every triple of the batch stays in its document, off padding",
    "triples_of_a_layout": "so do those of a packed and padded layout; padding is not in the divisor",
    "triples_repeatable": "triples follow from seed, step and row alone",
    "collector": "one state per boundary, the very tensors of the stream, float32, with gradient",
    "experts_process_all_tokens": "expert rows processed = tokens x top_k",
    "state_gradient": "each boundary's own term reaches its state",
    "stream_below": "and the state below, through the block",
    "block_parameters": "and every parameter tensor of the block",
    "blocks_above": "and no block above",
    "block_link": "what arrives below is the gradient of hidden + mixer(norm(hidden))",
    "gradient_scale": "no boundary's gradient vanishes beside the others'",
    "control_sends_nothing": "the control sends no gradient, as it declares",
    "control_as_declared": "the control pushes as hard as STP elsewhere, or leaves angles alone, as it declares",
    "predictor": "the learned predictor is trained with the model and reached by every term",
    "total": "forced open, the total is LM + weight x STP, in value and in a plain backward",
    "collector_eval": "the same states in evaluation mode",
    "causality": "a token changes its own state and none before it",
    "document_isolation": "another first document changes no later one",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.preflight", description="Prove the wiring of a config.")
    parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. stp.boundaries=[last]")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    warnings = config.validate()
    require(config.stp.enabled, "stp.weight", "is 0: STP is off and there is nothing to prove")
    console = Console()
    for warning in warnings:
        console.print(f"note: {warning}", markup=False)
    report = prove(config, console)
    show(report, console)
    if not report.ok:
        raise PreflightError(f"{', '.join(report.failed())}: STP is not wired as configured")
    return 0


def prove(config: RunConfig, console: Console) -> PreflightReport:
    """The model and batch that train.py would start with, and the same proof."""
    machine = Machine.resolve(config)
    with show_progress() as progress:
        data = prepare(config.data, progress=progress)
    model = HybridLM(config.model, data.vocab_size)
    model.init_weights(torch.Generator().manual_seed(config.seed))
    objective = Objective(config.stp, model.letters, seed=config.seed)
    if (predictor := objective.make_predictor(config.model.d_model)) is not None:
        model.stp_predictor = predictor
    if config.init_from is not None:
        load_weights(config.init_from, model)
    model.to(machine.device).train()
    stream = TrainStream(data, config.data.sequence_length, config.train.batch_rows, seed=config.seed)
    batch = stream.batch(0).to(machine.device)
    preflight = Preflight.of(model, objective, machine.autocast, machine.precision.dtype, config.seed)
    if config.train.compile == "blocks":
        compile_blocks(model)
    gate = TokenGate(config.stp.gate, config.stp.weight)
    console.print(f"machine: {machine.describe()}", markup=False)
    console.print(
        f"model: {''.join(model.letters)}; STP: {config.stp.form}, {config.stp.variant}, weight {config.stp.weight:g}, "
        f"from token {gate.opens_at_token:,}, full at {gate.full_at_token:,}",
        markup=False,
    )
    return preflight.run(batch, objective.draw(batch.document_ids, batch.row_ids, 0))


def show(report: PreflightReport, console: Console) -> None:
    """What each boundary's own STP term did, then every check."""
    if report.boundaries:
        table = Table("boundary", "family", "|d term / d state|", "|d term / d block|", "", title="STP, term by term")
        for b in report.boundaries:
            found = "ok" if b.ok else ", ".join(b.problems)
            table.add_row(str(b.index), b.family, f"{b.grad_norm:.2e}", f"{b.block_grad_norm:.2e}", found)
        console.print(table)
    table = Table("check", "what it shows", "", title="checks")
    for name, problem in report.checks.items():
        table.add_row(name, MEANING[name], "ok" if problem is None else f"[bold]{escape(problem)}[/bold]")
    console.print(table)
    console.print(f"preflight: {'ok' if report.ok else 'FAILED'} in {report.seconds:.2f} s")


if __name__ == "__main__":
    exit_with(main)
