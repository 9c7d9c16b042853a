"""One rank of 8 that do not exist builds its part of a model, for real: prints how much memory that took at its most.

building_worker.py CONFIG RANK [overrides]: torch's fake process group, so nobody else is needed to cut a model.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from model.hybrid import HybridLM
from training.building import filling, without_memory
from training.config import load_config
from training.distributed import ParallelConfig, World, make_mesh
from training.machine import resident_growth

RANKS = 8


def main(path, rank, *overrides):
    config = load_config(path, overrides)
    parallel = ParallelConfig(data="fsdp")
    dist.init_process_group("fake", store=FakeStore(), rank=int(rank), world_size=RANKS)
    world = World(parallel, torch.device("cpu"), int(rank), RANKS, make_mesh(parallel, "cpu", RANKS))

    def build(model_config):
        with without_memory():
            model = HybridLM(model_config, 8_000)
        blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.blocks]
        root = sum(parameter.numel() for parameter in model.parameters()) - sum(blocks)
        world.parallelize(model, fill=filling(model, torch.Generator().manual_seed(0), torch.device("cpu")))
        return model, {"root": root, "blocks": blocks}

    build(config.model)  # libraries are loaded, numba's and torch's own tables are there
    found = {}

    def measured():
        model, sizes = build(config.model)
        found.update(sizes, local=sum(parameter.to_local().numel() for parameter in model.parameters()))

    print(json.dumps({"peak_bytes": resident_growth(measured), **found}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
