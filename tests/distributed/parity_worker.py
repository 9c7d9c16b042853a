"""Trains a tiny stack for some steps in a world of any kind; rank 0 writes losses, gradient norms and final weights.

torchrun --nproc-per-node 2 parity_worker.py OUT.json KIND RECOMPUTE DTYPE STEPS [COMPILE]
"""

import json
import sys
from pathlib import Path

import torch

from blocks.eblock import MoEConfig
from blocks.mblock import Mamba2Config
from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.distributed import ParallelConfig, World
from training.machine import configure_threads
from training.optimizer import OptimizerConfig, build_optimizer, clip_gradients
from training.sharding import full

VOCAB, ROWS, LENGTH = 97, 8, 64


def batch(step):
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([20, 30, 14])).expand(ROWS, -1).contiguous()
    return tokens, ids, torch.arange(ROWS) + ROWS * step


def train(world, dtype, steps, compile_mode="none"):
    config = ModelConfig(
        pattern="AMER",
        d_model=32,
        moe=MoEConfig(n_experts=4, expert_ff=16),
        mamba2=Mamba2Config(head_dim=16, d_state=8, chunk_size=16),
    )
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(dtype).train()
    world.parallelize(model, compile_mode)
    optimizer = build_optimizer(model, OptimizerConfig())
    objective = Objective(STPConfig(boundaries=["all", "final"], n_spans=3), model.letters, seed=1)
    found = []
    for step in range(steps):
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
        for mixer in model.moe_mixers():
            mixer.update_bias(world.sum)
        optimizer.zero_grad()
        found.append([*world.sum(values).tolist(), float(norm)])
    weights = {name: full(tensor).double().flatten().tolist() for name, tensor in model.state_dict().items()}
    return {"steps": found, "weights": weights}


def main(out, kind, recompute, dtype, steps, compile_mode="none"):
    torch.manual_seed(0)
    configure_threads(1)
    config = ParallelConfig(data=kind, recompute=recompute, shard_ranks=2 if kind == "hsdp" else None)
    with World.join(config, torch.device("cpu")) as world:
        found = train(world, getattr(torch, dtype), int(steps), compile_mode)
        if world.is_main:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
