"""Weights that travel rounded: residual stream, gradients and what is stored stay float32, and the proof holds."""

import pytest
import torch
from parity_worker import LENGTH, ROWS, VOCAB, batch
from test_jobs import job
from tiny_run import losses, make_place, receipt

from blocks.eblock import MoEConfig
from blocks.mblock import Mamba2Config
from data.batch import Batch
from errors import InputError
from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.config import RunConfig, differing_keys, merge
from training.distributed import ParallelConfig, World
from training.hardware import Machine
from training.preflight import Preflight


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def in_world_of_one(gather, look):
    """What `look(world, model)` gives for a stack of all four families, sharded over one process."""
    small = Mamba2Config(head_dim=16, d_state=8, chunk_size=16)
    config = ModelConfig(pattern="AMER", d_model=32, moe=MoEConfig(n_experts=4, expert_ff=16), mamba2=small)
    with World.join(ParallelConfig(data="fsdp", gather=gather), torch.device("cpu")) as world:
        model = HybridLM(config, VOCAB)
        model.init_weights(torch.Generator().manual_seed(0))
        model.train()
        world.parallelize(model)
        return look(world, model)


def one_pass(world, model):
    """dtypes of the states, of what blocks read as weights, of weights and gradients; all gradients as one vector."""
    read = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda mixer, _: read.extend(p.dtype for p in mixer.parameters()))
    tokens, ids, _ = batch(0)
    with autocast():
        output = model(tokens, SequenceContext.from_document_ids(ids))
        loss = output.final.square().mul(torch.linspace(-1, 1, 32)).sum()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "states": {state.dtype for state in [*output.hidden_states, output.final]},
        "read": set(read),
        "stored": {tensor.dtype for tensor in [*model.parameters(), *gradients]},
        "gradient": torch.cat([gradient.full_tensor().flatten() for gradient in gradients]),
    }


def test_states_gradients_and_weights_stay_float32():
    whole, rounded = (in_world_of_one(gather, one_pass) for gather in ("fp32", "bf16"))
    assert whole["states"] == rounded["states"] == {torch.float32}
    assert whole["stored"] == rounded["stored"] == {torch.float32}
    assert (whole["read"], rounded["read"]) == ({torch.float32}, {torch.bfloat16})
    a, b = whole["gradient"], rounded["gradient"]
    assert not a.equal(b) and (a - b).norm() < 0.05 * a.norm()


def test_the_wire_is_proven_with_rounded_weights():
    def prove(world, model):
        tokens, ids, row_ids = batch(0)
        objective = Objective(STPConfig(boundaries=["all", "final"], n_spans=8), model.letters, seed=1)
        preflight = Preflight.of(model, objective, autocast, torch.bfloat16, 0, world)
        labels = tokens.roll(-1, 1)
        return preflight.run(Batch(tokens, labels, ids, row_ids), objective.draw(ids, row_ids, 0))

    report = in_world_of_one("bf16", prove)
    assert report.ok, report.failures()
    assert len(report.boundaries) == 6 and (ROWS, LENGTH) == (8, 64)


def test_where_it_does_not_fit_it_is_one_line():
    with pytest.raises(InputError, match=r"parallel.gather: bf16 is for ddp, fsdp and hsdp"):
        merge(RunConfig(), ["parallel.gather=bf16"]).validate()
    with pytest.raises(InputError, match=r"parallel.gather: unknown value 'fp16'"):
        merge(RunConfig(), ["parallel.gather=fp16"]).validate()
    with pytest.raises(InputError, match=r"parallel.gather: bf16 rounds .* precision is fp32"):
        Machine.resolve(merge(RunConfig(), ["parallel.gather=bf16", "parallel.data=fsdp", "precision=fp32"]))


def test_rounded_weights_are_another_run_and_the_rest_of_the_section_is_not():
    base = merge(RunConfig(), [])
    same = merge(RunConfig(), ["parallel.data=fsdp", "parallel.recompute=full"])
    other = merge(RunConfig(), ["parallel.data=fsdp", "parallel.gather=bf16"])
    assert base.sha256 == same.sha256 != other.sha256
    assert differing_keys(base, same) == [] and differing_keys(base, other) == ["parallel.gather"]


@pytest.mark.slow
def test_a_run_of_two_processes_with_rounded_weights(tmp_path, monkeypatch):
    place = make_place(tmp_path, monkeypatch)
    for gather in ("fp32", "bf16"):
        done = job(place, "fsdp2", "none", gather, "precision=bf16", f"parallel.gather={gather}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert receipt(gather)["preflight"]["ok"] and receipt(gather)["preflight"]["checks"]["ranks_agree"]
    ends = [losses(gather)[-1]["val_loss"] for gather in ("fp32", "bf16")]
    assert ends[0] != ends[1] and ends[0] == pytest.approx(ends[1], rel=0.02)
