"""Trains a tiny stack for some steps in worlds of any kind; rank 0 writes losses, gradient norms and final weights.

torchrun --nproc-per-node 2 parity_worker.py CASES.json: `Case`s as JSON, each with a process group of its own.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from blocks.eblock import MoEConfig, balance
from blocks.mblock import Mamba2Config
from data.batch import Batch
from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.checkpoint import CheckpointConfig, Checkpointer
from training.distributed import ParallelConfig, World
from training.machine import configure_threads
from training.optimizer import OptimizerConfig, build_optimizer, clip_gradients, optimizer_tensors
from training.preflight import Preflight, require_ok
from training.sharding import full

VOCAB, ROWS, LENGTH = 97, 8, 64


def batch(step):
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 30, 14])).expand(ROWS, -1).contiguous()
    return tokens, ids, torch.arange(ROWS) + ROWS * step


@dataclass
class Case:
    """out: where the result goes. steps: how many. load, save: a folder of checkpoints to go on from, to end with."""

    out: str
    kind: str = "none"
    recompute: str = "none"
    dtype: str = "float64"
    steps: int = 20
    compile: str = "none"
    load: str | None = None
    save: str | None = None

    def run(self):
        """The result, on rank 0 in `out` too."""
        config = ParallelConfig(self.kind, recompute=self.recompute, shard_ranks=2 if self.kind == "hsdp" else None)
        with World.join(config, torch.device("cpu")) as world:
            if world.mesh is not None:
                groups = (group._get_backend(world.device) for group in world.mesh.get_all_groups())
                waits = {group.options._timeout.total_seconds() for group in groups}
                assert waits == {config.timeout_seconds}
            found = train(world, self)
            if world.is_main:
                Path(self.out).write_text(json.dumps(found))
        return found


def train(world, case):
    dtype, graphs = getattr(torch, case.dtype), counters["stats"]["unique_graphs"]
    config = ModelConfig(
        pattern="AMER",
        d_model=32,
        moe=MoEConfig(n_experts=4, expert_ff=16),
        mamba2=Mamba2Config(head_dim=16, d_state=8, chunk_size=16),
    )
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(dtype).train()
    world.parallelize(model, case.compile)
    optimizer = build_optimizer(model, OptimizerConfig())
    objective = Objective(STPConfig(boundaries=["all", "final"], n_spans=3), model.letters, seed=1)
    tensors = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer)}
    first = 0
    if case.load:
        keeper = Checkpointer(case.load, world=world)
        first = keeper.load(keeper.latest_valid(), tensors)["step"]
    if case.compile != "none":  # every boundary's own gradient, through compiled graphs
        tokens, ids, row_ids = batch(0)
        rows = Batch(tokens, tokens.roll(-1, 1), ids, row_ids)
        preflight = Preflight.of(model, objective, nullcontext, dtype, seed=0, world=world)
        require_ok(preflight.run(rows, objective.draw(ids, row_ids, 0)), "of compiled blocks")
    found = []
    for step in range(first, first + case.steps):
        tokens, ids, row_ids = batch(step)
        triples = objective.draw(ids, row_ids, step)
        values = torch.zeros(2, dtype=torch.float64)
        for rows in world.my_rows(ROWS).chunk(2):
            output = model(tokens[rows], SequenceContext.from_document_ids(ids[rows]))
            loss = objective(
                output,
                model.head.weight,
                tokens[rows].roll(-1, 1),
                triples.select(rows),
                stp_weight=torch.tensor(0.5, dtype=dtype),
                lm_divisor=ROWS * LENGTH,
                stp_divisor=objective.divisor(triples),
            )
            loss.total.backward()
            values += torch.stack([loss.lm.detach(), loss.stp.detach()]).double()
        norm = clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        balance(model.moe_mixers(), world.sum)
        optimizer.zero_grad()
        found.append([*world.sum(values).tolist(), float(norm)])
    if case.save:
        saver = Checkpointer(case.save, CheckpointConfig(mode="sync"), world=world)
        assert saver.save(first + case.steps, tensors, {"step": first + case.steps}) is None
    weights = {name: full(tensor).double().flatten().tolist() for name, tensor in model.state_dict().items()}
    return {"steps": found, "weights": weights, "graphs": counters["stats"]["unique_graphs"] - graphs}


def main(cases):
    configure_threads(1)
    for case in json.loads(Path(cases).read_text()):  # as after a restart: torchrun keeps its store
        Case(**case).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
