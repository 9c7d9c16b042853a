"""torchrun --nproc-per-node 2 sharing_worker.py SCENARIO FOLDER: rank 0 prints one line of JSON."""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from blocks.mblock import Mamba2Config
from model.hybrid import HybridLM, ModelConfig
from training import checkpoint
from training.building import filling, without_memory
from training.distributed import ParallelConfig, World

CPU = torch.device("cpu")


def slow_disk(folder):
    """Rank 0 writes a manifest for longer than the ranks wait; afterwards it is as fast as ever. Problems by save."""
    checkpoint.PATIENCE = timedelta(seconds=2)
    honest, slept = checkpoint.write_manifest, []

    def slow(*given):
        if not slept:
            slept.append(time.sleep(5))
        return honest(*given)

    checkpoint.write_manifest = slow
    with World.join(ParallelConfig(data="ddp"), CPU) as world:
        keeper = checkpoint.Checkpointer(folder, message=lambda line: None, world=world)
        problems = []
        for step in (1, 2, 3):
            keeper.save(step, {"model": {"a": torch.full((4,), float(step))}}, {})
            problems.append(keeper.wait())
        newest = keeper.latest_valid()
        return world.gather([[problem is None for problem in problems], newest.name])


def hashes(folder):
    """How many bytes each rank reads for hashes: of a save of equal shares, of `latest_valid`, and of `load`."""
    from torch.distributed.tensor import Shard, distribute_tensor

    from training import manifest

    honest, sizes = manifest.sha256_file, []
    manifest.sha256_file = lambda path: sizes.append(Path(path).stat().st_size) or honest(path)

    def read_by(work):
        sizes.clear()
        return work(), sum(sizes)

    with World.join(ParallelConfig(data="fsdp"), CPU) as world:
        tensors = {"model": {"a": distribute_tensor(torch.arange(20_000.0), world.mesh, [Shard(0)])}}
        keeper = checkpoint.Checkpointer(folder, world=world)
        _, saved = read_by(lambda: keeper.save(1, tensors, {}) or keeper.wait())
        path, found = read_by(keeper.latest_valid)
        _, loaded = read_by(lambda: keeper.load(path, tensors))
        return world.gather([saved, found, loaded])


def other_weights(folder):
    """The local weights of every rank, where rank 1 has drawn them otherwise."""
    small = Mamba2Config(head_dim=16, d_state=8, chunk_size=16)
    with World.join(ParallelConfig(data="ddp"), CPU) as world:
        with without_memory():
            model = HybridLM(ModelConfig(pattern="AM", d_model=32, mamba2=small), 97)
        honest = filling(model, torch.Generator().manual_seed(0), CPU)

        def fill(part):
            honest(part)
            with torch.no_grad():
                for parameter in part.parameters():
                    if not parameter.is_meta:
                        parameter += 0.1 * world.rank

        world.parallelize(model, fill=fill)
        return world.gather([float(parameter.to_local().double().sum()) for parameter in model.parameters()])


if __name__ == "__main__":
    found = {"slow_disk": slow_disk, "hashes": hashes, "other_weights": other_weights}[sys.argv[1]](sys.argv[2])
    if os.environ["RANK"] == "0":
        print(json.dumps(found))
