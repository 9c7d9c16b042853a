"""What proofs cost in memory (training/total.py, training/evidence.py): piece by piece they see the same."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from data.batch import Batch
from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig
from training.distributed import World
from training.evidence import gradient_evidence
from training.gradients import by_backward
from training.plan_memory import PREFLIGHT, PROBE, STEP, Replay, Stack
from training.plan_proofs import peaks, preflight, probing_step, selected
from training.plan_trace import Held, LiveBytes
from training.total import WEIGHT, ForcedTotals, check_total

ROWS, LENGTH, D_MODEL = 2, 128, 32


def forward(pattern, vocab_size=97, **stp):
    """A small model of real blocks and its output: model, objective, batch, triples, output."""
    config = ModelConfig(pattern=pattern, d_model=D_MODEL)
    config.attention.n_heads, config.attention.n_kv_heads = 4, 2
    config.mamba2.head_dim, config.mamba2.d_state, config.mamba2.chunk_size = 16, 8, 16
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, vocab_size)
    model.init_weights(torch.Generator().manual_seed(0))
    objective = Objective(STPConfig(boundaries=["all", "final"], n_spans=4, **stp), model.letters)
    tokens = torch.randint(vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    batch = Batch(tokens, tokens.roll(-1, 1), ids, torch.arange(ROWS))
    output = model(tokens, SequenceContext.from_document_ids(ids))
    return model, objective, batch, objective.draw(ids, batch.row_ids, 0), output


def grown(make, work):
    """The most bytes that `work` on what `make` returns holds at once beyond what is there before."""
    live = LiveBytes({})
    with live:
        made = make()
        before = live.peak = live.now
        work(*made)
    return live.peak - before


def totals_of(model, objective, batch, triples, output):
    totals = ForcedTotals.of(model, objective, contextlib.nullcontext, output, batch, triples)
    return totals, objective.stp_terms(output.hidden_states, output.final, triples)


def test_gradients_of_a_large_embedding_are_compared_without_whole_copies(monkeypatch):
    """Those of embedding and head and the one that is compared with: no float64 beside them."""
    monkeypatch.setattr("training.total.PIECE", 1 << 16)

    def make():
        model, objective, *rest = forward("A", 60_000)
        return model, objective, *totals_of(model, objective, *rest), World.alone()

    embedding = 4 * 60_000 * D_MODEL
    assert grown(make, check_total) < 4 * embedding


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.5])
def test_the_error_is_that_of_the_whole_vectors(factor):
    """`opened` with STP at a factor of its weight: the same verdict and figure as from flat float64 vectors."""
    model, objective, batch, triples, output = forward("AMER")
    totals, terms = totals_of(model, objective, batch, triples, output)
    stp = sum(terms.values()) / len(terms)
    other = stp.detach() + factor * (stp - stp.detach())  # of the same value
    given = ForcedTotals(totals.closed + WEIGHT * other, totals.closed)
    leaves = [model.embedding.weight, *(b.norm.weight for b in model.stack[:-1]), *model.stack[-1].parameters()]

    def flat(scalar):
        return torch.cat([g.flatten().double() for g in by_backward(model, scalar, parameters=leaves)[1]])

    difference = flat(given.opened) - flat(totals.closed + WEIGHT * stp)
    expected = float(difference.norm() / (WEIGHT * flat(stp)).norm())
    problem = check_total(model, objective, given, terms, World.alone())
    assert (problem is None) == (expected <= 3e-2) == (factor < 1.03)
    assert problem is None or f"differs by {expected:.1e} from" in problem


def test_a_rank_whose_total_is_sound_leaves_with_one_whose_total_is_not(monkeypatch):
    """The gradients are a matter of all ranks: one that went on alone would wait there for the others."""
    model, objective, *rest = forward("AE")
    totals, terms = totals_of(model, objective, *rest)
    elsewhere = World.alone()
    elsewhere.any = lambda here: True
    monkeypatch.setattr("training.total.by_backward", lambda *_, **__: pytest.fail("alone"))
    assert check_total(model, objective, totals, terms, elsewhere) is None
    off = ForcedTotals(totals.opened + 1, totals.closed)
    assert "LM + weight x STP" in check_total(model, objective, off, terms, elsewhere)


def step(model, objective, batch, triples, output):
    weight = torch.tensor(0.1)
    return objective(output, model.head.weight, batch.labels, triples, stp_weight=weight)


def test_evidence_is_that_of_all_gradients_at_once_to_the_last_bit():
    model, objective, batch, triples, output = forward("AMER")
    loss = step(model, objective, batch, triples, output)
    states = objective.select(output.hidden_states, output.final)
    lm = torch.autograd.grad(loss.lm, states, retain_graph=True)
    stp = [
        torch.autograd.grad(term + 0.0 * state.sum(), state, retain_graph=True)[0]
        for term, state in zip(loss.stp_per_boundary.unbind(), states, strict=True)
    ]
    found = gradient_evidence(objective, output, loss)
    assert set(objective.families) == {"embedding", "A", "M", "E", "R", "final"}
    for family, a, b in zip(objective.families, stp, lm, strict=True):
        norms = float(a.norm()), float(b.norm())
        assert found[f"stp/grad_norm/{family}"] == norms[0]
        assert found[f"stp/grad_ratio/{family}"] == norms[0] / norms[1]
        assert found[f"stp/grad_cosine/{family}"] == float((a * b).sum()) / (norms[0] * norms[1])


def test_evidence_of_boundaries_that_the_language_model_does_not_reach_from_below():
    """A stream that is cut: what is above the cut has a gradient of the LM, what is below has none."""
    model, objective, batch, triples, output = forward("AMER")
    hidden = output.hidden_states[2].detach().requires_grad_()
    context = SequenceContext.from_document_ids(batch.document_ids)
    cut = [*output.hidden_states[:2], hidden]
    for block in model.stack[2:]:
        cut.append(block(cut[-1], context))
    output = SimpleNamespace(hidden_states=cut, final=model.final_norm(cut[-1]))
    found = gradient_evidence(objective, output, step(model, objective, batch, triples, output))
    ratios = {family: found[f"stp/grad_ratio/{family}"] for family in objective.families}
    assert ratios["embedding"] == ratios["A"] == 0 and all(ratios[family] > 0 for family in ("M", "E", "R", "final"))


def test_evidence_holds_a_few_gradients_of_a_deep_stack_and_not_one_for_every_boundary():
    """Of the two of a boundary: STP's come all at once where its rows are read (losses/joined.py)."""

    def taken(pattern):
        def make():
            model, objective, *rest, output = forward(pattern)
            return objective, output, step(model, objective, *rest, output)

        return grown(make, gradient_evidence)

    state = 4 * ROWS * LENGTH * D_MODEL
    assert taken("A" * 24) - taken("A" * 4) < 1.2 * 20 * state


def by_hand(**changes):
    """Two blocks of 100 parameters, kept 50 beyond an output of 10; a head of 30 and an embedding of 20."""
    block = Held(100, 10, 60, 60, 80, 500)
    stack = Stack(
        **{"blocks": (block, block), "head": Held(30, 0, 15, 15, 17, 19), "embedding": 20, "tied": False}, state=10
    )
    return Replay(stack, **changes)


def find(moments, name):
    return next(memory for memory in moments if memory.moment == name)


def test_preflight_by_hand():
    moments = preflight(by_hand(), [0, 1, 3])
    forward_pass = find(moments, "forward of block 2")
    assert (forward_pass.activations, forward_pass.states, forward_pass.working) == (50, 2 * 10, 80)
    held = 2 * 50 + (15 - 10) + 4 * 30 + 10  # blocks, both losses of the head
    last = find(moments, "backward of the total's block 2")
    assert (last.gradients, last.activations) == (4 * 30, held + 4 * (20 + 100))
    assert last.working == 500 - 60 + 2 * 10  # boundaries 0 and 1 wait with STP's gradient
    assert find(moments, "norm of the embedding's gradient").working == 4 * 4 * 20
    assert all(memory.optimizer == 8 * 250 and memory.during == PREFLIGHT for memory in moments)


def test_cut_weights_are_whole_once_more_in_preflight():
    """The gradients of one boundary's block at a time, not those of all blocks above it."""
    moments = preflight(by_hand(shards=10, gathers=True), [0, 1, 2])
    assert find(moments, "gradient below a boundary").gradients == 4 * 100
    assert find(moments, "norm of the embedding's gradient").gradients == 4 * 20


def test_a_probing_step_by_hand():
    moments = probing_step(by_hand(accumulates=True), [0, 1, 3])
    held = 2 * 50 + 15 - 10
    at_boundary = find(moments, "gradient of STP at a boundary")
    assert (at_boundary.activations, at_boundary.working, at_boundary.gradients) == (held, 5 * 10, 0)
    block = find(moments, "gradient of the LM at block 1")
    assert (block.activations, block.working) == (held, 500 - 60 + 2 * 10)


def test_the_worst_decides_and_nothing_is_proven_where_stp_is_off():
    def trace(rows, kind, again):
        assert (kind == "full") == again
        return by_hand().stack

    found = peaks(trace, "selective", 1, 4, [1])
    assert list(found) == [STEP, PROBE, PREFLIGHT] and {m.during for m in found.values()} == set(found)
    assert list(peaks(trace, "selective", 1, 4, [])) == [STEP]
    assert selected(STPConfig(boundaries=["last", "final"]), "AE") == [2, 3] and not selected(STPConfig(weight=0), "AE")
