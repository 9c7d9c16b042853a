"""Ranks of 64 that do not exist: the whole layout is built, cut and taken through one step, without memory.

simulation_worker.py CONFIG RANKS [overrides]: torch's fake process group and fake tensors, one rank (5, or 0,63) after
the other. Prints a list of JSON objects.
"""

import json
import resource
import sys

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from blocks.eblock import balance
from losses.objective import Objective
from model.context import SequenceContext
from model.hybrid import HybridLM
from training.building import filling, without_memory
from training.config import load_config
from training.distributed import World, make_mesh
from training.optimizer import build_optimizer, clip_gradients

RANKS, LENGTH = 64, 512


def one(config, rank):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    mesh = make_mesh(config.parallel, "cpu", RANKS)
    with without_memory():
        model = HybridLM(config.model, 32_000).train()
    with FakeTensorMode(allow_non_fake_inputs=True):
        total = sum(parameter.numel() for parameter in model.parameters())
        world = World(config.parallel, torch.device("cpu"), rank, RANKS, mesh)
        world.parallelize(model, fill=filling(model, torch.Generator(), torch.device("cpu")))
        optimizer = build_optimizer(model, config.optimizer)
        objective = Objective(config.stp, model.letters)
        objective.join = lambda output: None  # the CPU kernel reads memory, which is not there
        tokens, ids = torch.zeros(1, LENGTH, dtype=torch.int64), torch.zeros(1, LENGTH, dtype=torch.int32)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(tokens, SequenceContext.from_document_ids(ids))
            triples = objective.draw(ids, torch.zeros(1, dtype=torch.int64), 0)
            weight = torch.tensor(0.1)
            loss = objective(output, model.head.weight, tokens, triples, stp_weight=weight, stp_divisor=64.0)
        loss.total.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = clip_gradients(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        balance(model.moe_mixers(), world.sum)
    found = {
        "parameters": total,
        "local": sum(parameter.to_local().numel() for parameter in model.parameters()),
        "states": [str(state.dtype) for state in output.hidden_states],
        "gradients": all(isinstance(gradient, DTensor) for gradient in gradients),
        "optimizer": all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values()),
        "norm": [list(norm.shape), isinstance(norm, DTensor)],
        "experts": [list(mixer.expert_bias.shape) for mixer in model.moe_mixers()],
        "rows": world.my_rows(config.train.batch_rows).tolist(),
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    dist.destroy_process_group()
    return found


def main(path, ranks, *overrides):
    config = load_config(path, overrides)
    print(json.dumps([one(config, int(rank)) for rank in ranks.split(",")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
