"""The run, top to bottom: config -> data -> model -> preflight -> the visible training step -> finish.

python train.py configs/demo.yaml [key.path=value ...] [--dry-run | --print-layout]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

from analysis.cadence import cheap_metrics
from blocks.eblock import balance
from data.loader import Prefetcher
from data.prepare import prepare
from data.progress import show_progress
from data.stream import TrainStream
from errors import exit_with
from losses.gate import TokenGate
from losses.objective import Objective
from model.context import SequenceContext
from model.hybrid import HybridLM
from training import summary
from training.building import filling, without_memory
from training.config import RunConfig, load_config
from training.distributed import World
from training.evidence import gradient_evidence
from training.hardware import Machine
from training.health import StepGuard
from training.lifecycle import Run
from training.measured import Measured, over_ranks
from training.optimizer import build_optimizer, clip_gradients, set_learning_rate
from training.preflight import Preflight
from training.recompute import repeatable
from training.run import RUNS, RunFolder, choose_run
from training.schedule import learning_rate_factor
from training.sharding import keep_gathered
from training.signals import StopSignals, ends_at_once


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a hybrid language model with Semantic Tube Prediction.")
    parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. stp.weight=0.05 model.pattern=AMEMR")
    parser.add_argument("--dry-run", action="store_true", help="print config, layout and cost; start nothing")
    parser.add_argument("--print-layout", action="store_true", help="print the table of blocks; start nothing")
    arguments = parser.parse_intermixed_args()

    with ends_at_once():
        config = load_config(arguments.config, arguments.overrides)
        warnings = config.validate()
    if arguments.dry_run or arguments.print_layout:
        summary.preview(config, warnings, Console(), layout_only=arguments.print_layout)
    else:
        train(config, Path(arguments.config).stem, warnings)
    return 0


def train(config: RunConfig, name: str, warnings: list[str], runs: Path = RUNS) -> None:
    """One run, on one process or on all that torchrun started. runs: the folder that its folder is in."""
    machine = Machine.resolve(config)
    with World.join(config.parallel, machine.device) as world:
        train_in(world, machine, config, name, warnings, runs)


def train_in(world: World, machine: Machine, config: RunConfig, name: str, warnings: list[str], runs: Path) -> None:
    """To the token budget or a stop signal. Whatever can be known about the run is in its folder afterwards."""
    folder = RunFolder.from_json(world.from_main(lambda: choose_run(config, name, runs, world.again).as_json()))
    with show_progress() as progress:
        data = world.main_first(lambda: prepare(config.data, progress=progress))

    with without_memory():
        model = HybridLM(config.model, data.vocab_size)
    objective = Objective(config.stp, model.letters, seed=config.seed)
    if predictor := objective.make_predictor(config.model.d_model):
        model.stp_predictor = predictor  # stp.predictor: trained and saved with the model
    model.train()
    weights = filling(model, torch.Generator().manual_seed(config.seed), machine.device)
    world.parallelize(model, config.train.compile, weights)
    optimizer = build_optimizer(model, config.optimizer)
    gate = TokenGate(config.stp.gate, config.stp.weight)
    stream = TrainStream(data, config.data.sequence_length, config.train.batch_rows, seed=config.seed)
    # Every rank reads the layout of the whole step, so counts need no communication, and works on its own rows.
    micro_batches = world.my_rows(config.train.batch_rows).chunk(config.train.accumulation)

    run_of = Run(config, folder, machine, data, model, optimizer, objective, world, warnings)
    with StopSignals(ranks=world.size) as signals, run_of as run:
        state = run.restored
        machine.check_kernels("".join(model.letters))
        guard = StepGuard(config.health, config.train.max_skipped_steps, folder.path, world.rank)
        preflight = Preflight.of(model, objective, machine.autocast, machine.precision.dtype, config.seed, world)

        with Prefetcher(stream.batch, state.step, pin_memory=machine.is_cuda) as batches:
            # A run that was killed between its last save and its end has nothing left to do but to say so.
            for batch in batches if state.tokens < config.train.tokens else ():
                loss_tokens = batch.loss_tokens  # counted here, where no device has to be waited for
                batch = batch.to(machine.device)
                triples = objective.draw(batch.document_ids, batch.row_ids, state.step) if config.stp.enabled else None
                stp_weight = gate.weight(state.tokens) if config.stp.enabled else 0.0
                run.prove(preflight, batch, triples, stp_weight)
                if stp_weight == 0 and (state.step + 1) % config.train.log_every:
                    triples = None  # while the gate is closed, STP is measured (without gradient) at a cadence only

                # Sums are divided by the counts of the whole step, so that micro-batches of any size add up.
                stp_divisor = objective.divisor(triples) if triples is not None else None
                measured = Measured()
                for number, rows in enumerate(micro_batches):
                    probing = number == 0 and stp_weight != 0 and state.step % config.train.probe_every == 0
                    with machine.autocast(), repeatable(model, probing):
                        output = model(batch.tokens[rows], SequenceContext.from_document_ids(batch.document_ids[rows]))
                        loss = objective(
                            output,
                            model.head.weight,
                            batch.labels[rows],
                            triples.select(rows) if triples is not None else None,
                            stp_weight=torch.full((), stp_weight, device=machine.device) if stp_weight else None,
                            lm_divisor=max(loss_tokens, 1),
                            stp_divisor=stp_divisor,
                        )
                    if probing:
                        with keep_gathered(model):
                            measured.evidence = gradient_evidence(objective, output, loss, world)
                    if number == 0 and (state.step + 1) % config.train.curvature_every == 0:
                        ids = batch.document_ids[rows]
                        measured.curvature = cheap_metrics(output.hidden_states, output.final, ids, model.letters)
                    loss.total.backward()  # total = lm + stp_weight * stp
                    measured.add(loss)
                    del output, loss  # else the states at every boundary stay while the next forward makes new ones

                grad_norm = clip_gradients(model.parameters(), config.optimizer.grad_clip)
                over_ranks(measured, world, signals)  # here the host waits for the device, once per step
                progress_made = (state.tokens + loss_tokens) / config.train.tokens
                factor = learning_rate_factor(config.schedule, progress_made)
                set_learning_rate(optimizer, factor * config.optimizer.learning_rate)
                accepted = guard.accepts(measured, grad_norm, batch, state)
                if accepted:
                    optimizer.step()
                    balance(model.moe_mixers(), world.sum)
                else:
                    for mixer in model.moe_mixers():
                        mixer.start_counting()
                optimizer.zero_grad(set_to_none=True)

                run.record(state, measured, grad_norm, stp_weight, accepted, loss_tokens)
                if state.tokens >= config.train.tokens:
                    break
                if signals.requested:
                    run.stop(state, signals.status)
        run.finish(state)


if __name__ == "__main__":
    exit_with(main)
