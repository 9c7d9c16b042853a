"""Two steps on every rank, for real: rank 0 prints how far its resident size grew, and what the plan says of a CPU.

torchrun --nproc-per-node 2 memory_worker.py CONFIG KIND [overrides]
"""

import json
import sys
from dataclasses import replace

import torch

from losses.objective import Objective
from model.context import SequenceContext
from model.hybrid import HybridLM
from training.building import filling, without_memory
from training.config import load_config
from training.distributed import ParallelConfig, World
from training.machine import configure_threads, resident_growth
from training.optimizer import build_optimizer, clip_gradients
from training.plan_memory import Replay, Stack, largest

VOCAB = 16_384


def steps(world, config, model_config, rows, length):
    with without_memory():
        model = HybridLM(model_config, VOCAB).train()
    world.parallelize(model, fill=filling(model, torch.Generator().manual_seed(0), torch.device("cpu")))
    optimizer = build_optimizer(model, config.optimizer)
    objective = Objective(config.stp, model.letters)
    ids = torch.zeros(rows, length, dtype=torch.int32)
    for step in range(2):
        tokens = torch.randint(VOCAB, (rows, length))
        output = model(tokens, SequenceContext.from_document_ids(ids))
        triples = objective.draw(ids, torch.arange(rows), step)
        weight = torch.tensor(config.stp.weight)
        loss = objective(output, model.head.weight, tokens.roll(-1, 1), triples, stp_weight=weight)
        loss.total.backward()
        del output, loss
        clip_gradients(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def main(path, kind, *overrides):
    config = load_config(path, overrides)
    configure_threads(1)
    rows, length = config.train.batch_rows, config.data.sequence_length
    with World.join(ParallelConfig(kind), torch.device("cpu")) as world:
        small = replace(config.model, pattern="".join(sorted(set(config.model.pattern))), depth=None)
        steps(world, config, small, 1, 128)
        measured = resident_growth(lambda: steps(world, config, config.model, rows, length))
        stack = Stack.trace(config.model, VOCAB, rows, length, torch.float32, "none", "cpu")
        shards = {"none": 1, "ddp": 1, "fsdp": world.size}[kind]
        found = largest(Replay(stack, shards, kind != "none").step())
        if world.is_main:
            print(json.dumps({"measured": measured, "predicted": found.total, **vars(found)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
