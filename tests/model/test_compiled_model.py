"""The whole model and its losses as one graph: the same values, every state an output, nothing that recompiles."""

import pytest
import torch
from torch._dynamo.utils import counters

from losses.objective import Objective, STPConfig
from model.context import SequenceContext
from model.hybrid import HybridLM, ModelConfig

VOCAB, B, T, DEPTH = 61, 2, 48, 4
LAYOUTS = (
    [[48], [48]],
    [[20, 17, 11], [1, 2, 45]],
    [[3] * 16, [10]],  # the rest of the second row is padding
)


def document_ids(layout):
    ids = torch.full((B, T), -1, dtype=torch.int32)
    for row, lengths in enumerate(layout):
        start = 0
        for number, length in enumerate(lengths):
            ids[row, start : start + length] = number
            start += length
    return ids


@pytest.fixture
def model():
    config = ModelConfig(pattern="AMER", d_model=32)
    config.attention.n_heads, config.attention.n_kv_heads = 4, 2
    config.mamba2.head_dim, config.mamba2.d_state, config.mamba2.chunk_size = 16, 8, 16
    config.moe.n_experts, config.moe.expert_ff = 4, 16
    model = HybridLM(config, VOCAB)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_model_step_is_one_graph_from_closed_gate_to_open(model, backend):
    """fullgraph: a break is an error. Gate, layout and draws change between calls; the graph does not."""
    objective = Objective(STPConfig(boundaries=["all", "final"], window=6), model.letters)

    def step(tokens, labels, ids, triples, stp_weight, lm_divisor, stp_divisor):
        output = model(tokens, SequenceContext.from_document_ids(ids))
        loss = objective(
            output,
            model.head.weight,
            labels,
            triples,
            stp_weight=stp_weight,
            lm_divisor=lm_divisor,
            stp_divisor=stp_divisor,
        )
        return loss.total, loss.stp_per_boundary, output.hidden_states, output.final

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for number, weight in enumerate((0.0, 0.0, 0.004, 0.02, 0.02, 0.02)):
        ids = document_ids(LAYOUTS[number % len(LAYOUTS)])
        tokens = torch.randint(VOCAB, (B, T))
        labels = torch.where(ids >= 0, tokens.roll(-1, 1), -100)
        triples = objective.draw(ids, torch.arange(B), number)
        divisors = (labels != -100).sum().float(), objective.divisor(triples)
        results = []
        for function in (step, compiled):
            model.zero_grad()
            total, per_boundary, states, final = function(tokens, labels, ids, triples, torch.tensor(weight), *divisors)
            assert len(states) == DEPTH + 1 and all(h.shape == (B, T, 32) for h in (*states, final))
            assert all(h.dtype == torch.float32 and h.requires_grad for h in states)
            assert len({h.data_ptr() for h in states}) == DEPTH + 1
            total.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            results.append([total.detach(), per_boundary.detach(), *(h.detach() for h in states), *gradients])
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=2e-4, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 1  # not 0: something was compiled; not 2: once
    assert not counters["graph_break"] and not counters["recompiles"]


def test_every_state_of_a_compiled_model_sends_gradient_down(model):
    """Each boundary of the compiled graph, alone, reaches the embedding."""

    def forward(tokens, ids):
        return model(tokens, SequenceContext.from_document_ids(ids)).hidden_states

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    tokens, ids = torch.randint(VOCAB, (B, T)), document_ids(LAYOUTS[1])
    for index in range(DEPTH + 1):
        expected = torch.autograd.grad(forward(tokens, ids)[index].square().sum(), model.embedding.weight)[0]
        found = torch.autograd.grad(compiled(tokens, ids)[index].square().sum(), model.embedding.weight)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1


def test_exported_model_has_no_shape_that_depends_on_data(model):
    """No unbacked symbol, no value read back from a tensor: what a static compiler such as XLA's needs."""
    model.eval()

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens, ids):
            output = self.model(tokens, SequenceContext.from_document_ids(ids))
            return [*output.hidden_states, output.final]

    with torch.no_grad():
        example = torch.randint(VOCAB, (B, T)), document_ids(LAYOUTS[0])
        exported = torch.export.export(Step(), example, strict=False)
        assert not exported.range_constraints
        operations = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert len(operations) > 20
        for name in ("nonzero", "_local_scalar_dense", "item", "masked_select", "unique", "sym_"):
            assert not [operation for operation in operations if f".{name}" in operation or name == operation], name
        tokens, ids = torch.randint(VOCAB, (B, T)), document_ids(LAYOUTS[2])  # another layout, the same graph
        expected = Step()(tokens, ids)
        found = exported.module()(tokens, ids)
        assert len(found) == DEPTH + 2
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
