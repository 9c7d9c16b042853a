"""A model that is cut while it is made has the weights that one process gives it, and is never whole anywhere."""

import json

import pytest
import torch
from jobs import FREED, ROOT, run

from blocks.eblock import MoEConfig
from blocks.mblock import Mamba2Config
from losses.objective import Objective, STPConfig
from model.hybrid import HybridLM, ModelConfig
from training.building import filling, without_memory
from training.distributed import ParallelConfig, World
from training.optimizer import split_by_decay
from training.sharding import full

VOCAB, SEED = 97, 3


def config(head):
    small = Mamba2Config(head_dim=16, d_state=8, chunk_size=16)
    return ModelConfig(pattern="AMER", d_model=32, head=head, moe=MoEConfig(n_experts=4, expert_ff=16), mamba2=small)


def marks(model):
    return {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("kind", ["none", "fsdp"])
def test_the_weights_are_those_of_one_process(kind, head):
    whole = HybridLM(config(head), VOCAB)
    whole.init_weights(torch.Generator().manual_seed(SEED))
    with World.join(ParallelConfig(data=kind), torch.device("cpu")) as world:
        with without_memory():
            model = HybridLM(config(head), VOCAB)
        predictor = Objective(STPConfig(predictor="linear"), model.letters, seed=1).make_predictor(32)
        model.stp_predictor = predictor
        before = [parameter.clone() for parameter in predictor.parameters()]
        world.parallelize(model, fill=filling(model, torch.Generator().manual_seed(SEED), torch.device("cpu")))
        found = {name: full(tensor.detach()) for name, tensor in model.state_dict().items()}
        kept = [found.pop(name) for name in list(found) if name.startswith("stp_predictor")]
        assert len(kept) == len(before) and all(map(torch.equal, kept, before))
        assert found.keys() == whole.state_dict().keys()
        assert all(found[name].equal(tensor) for name, tensor in whole.state_dict().items())
        buffers = dict(whole.named_buffers())
        assert buffers and all(buffer.equal(buffers[name]) for name, buffer in model.named_buffers())
        assert marks(model) == marks(whole) != set()
        decayed, exempt = split_by_decay(whole)
        ours = [[name for name in group if "predictor" not in name] for group in split_by_decay(model)]
        assert ours == [list(decayed), list(exempt)]
        assert (model.head.weight is model.embedding.weight) == (head == "tied")


@pytest.mark.slow
def test_a_rank_holds_one_block_and_its_own_share(tmp_path):
    """Really built, as rank 3 of 8: its largest resident size above what was there before."""
    job = run(0, "building_worker.py", ROOT / "configs/scale/hybrid_150m.yaml", 3, cwd=tmp_path, **FREED)
    assert job.returncode == 0, job.stderr[-3000:]
    found = json.loads(job.stdout)
    blocks = found["blocks"]
    bound = found["root"] + 1.1 * max(blocks) + found["local"]
    assert found["peak_bytes"] / 4 < bound < 0.5 * (found["root"] + sum(blocks))
