"""Whole graphs: the loss compiles without a break, equals eager, and nothing that changes in training recompiles it."""

import pytest
import torch
from torch._dynamo.utils import counters

from losses.objective import Objective, STPConfig
from losses.stp import FORMS, compute_stp_loss
from losses.triples import SAMPLERS, content_of, draw, sample

LETTERS = tuple("AEMR")
B, T, D, V = 3, 24, 16, 32
LAYOUTS = (
    torch.zeros(B, T, dtype=torch.int32),
    torch.tensor([[0] * 10 + [1] * 14, [0] * 2 + [1] * 22, [0] * 20 + [-1] * 4], dtype=torch.int32),
    torch.tensor([[0, 1] * 12, [-1] * 24, [0] * 24], dtype=torch.int32),
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("form", FORMS)
def test_loss_is_one_graph_for_every_draw_layout_and_weight(form):
    loss = torch.compile(
        lambda states, triples, weight: weight * compute_stp_loss(states, form=form, triples=triples),
        fullgraph=True,
        backend="aot_eager",
    )
    for number, ids in enumerate((*LAYOUTS, *LAYOUTS)):
        triples = draw("anchor", ids, 4, seed=0, step=number, row_ids=torch.arange(B))
        for weight in (0.0, 0.01, 0.3):
            states = [torch.randn(B, T, D, requires_grad=True) for _ in range(3)]
            copies = [h.detach().clone().requires_grad_() for h in states]
            compiled = loss(states, triples, torch.tensor(weight))
            eager = weight * compute_stp_loss(copies, form=form, triples=triples)
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
            compiled.backward()
            eager.backward()
            for a, b in zip(states, copies, strict=True):
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    assert graphs() == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_have_static_shapes(sampler):
    """Drawing compiles too, exports without a shape that depends on data, and gives the same triples."""

    def drawn(ids, step, row_ids):
        triples = draw(sampler, ids, 4, seed=1, step=step, row_ids=row_ids, window=5)
        return triples.s, triples.r, triples.t, triples.valid, triples.first, triples.last

    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    for number, ids in enumerate(LAYOUTS):
        inputs = (ids, torch.tensor(number), torch.arange(B) + number)
        for a, b in zip(compiled(*inputs), drawn(*inputs), strict=True):
            assert torch.equal(a, b)
    assert graphs() == 1
    module = torch.nn.Module()
    module.forward = drawn
    exported = torch.export.export(module, (LAYOUTS[0], torch.tensor(0), torch.arange(B)))
    assert not any("unbacked" in str(symbol) or str(symbol).startswith("u") for symbol in exported.range_constraints)
    for a, b in zip(
        exported.module()(LAYOUTS[1], torch.tensor(2), torch.arange(B)), drawn(LAYOUTS[1], 2, torch.arange(B))
    ):
        assert torch.equal(a, b)


def test_sample_accepts_given_bits():
    bits = torch.randint(2**62, (B, 4, 3))
    compiled = torch.compile(
        lambda b, ids: sample("uniform", b, content_of(ids)).s, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(bits, LAYOUTS[1]), sample("uniform", bits, content_of(LAYOUTS[1])).s)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, D)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in LETTERS)
        self.norm = torch.nn.RMSNorm(D)
        self.head = torch.nn.Linear(D, V, bias=False)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        self.hidden_states = [hidden]
        for branch in self.branches:
            hidden = hidden + branch(hidden).tanh()
            self.hidden_states.append(hidden)
        self.final = self.norm(hidden)
        return self


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_step_is_one_graph_from_closed_gate_to_open(backend):
    """Model, LM and STP with every state among the outputs; closed, ramp and open are the same graph."""
    model = Model()
    objective = Objective(STPConfig(boundaries=["all", "final"], window=6), LETTERS)

    def loss(tokens, labels, triples, stp_weight, lm_divisor, stp_divisor):
        output = model(tokens)
        out = objective(
            output,
            model.head.weight,
            labels,
            triples,
            stp_weight=stp_weight,
            lm_divisor=lm_divisor,
            stp_divisor=stp_divisor,
        )
        return out.total, out.stp_per_boundary, [*output.hidden_states, output.final]

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for number, weight in enumerate((0.0, 0.0, 0.004, 0.02, 0.02)):
        ids = LAYOUTS[number % len(LAYOUTS)]
        triples = objective.draw(ids, torch.arange(B), number)
        tokens = torch.randint(V, (B, T))
        labels = torch.where(ids >= 0, tokens.roll(-1, 1), -100)
        inputs = (tokens, labels, triples, torch.tensor(weight))
        divisors = ((labels != -100).sum().float(), objective.divisor(triples))
        results = {}
        for name, function in (("eager", loss), ("compiled", compiled)):
            model.zero_grad()
            total, per_boundary, states = function(*inputs, *divisors)
            total.backward()
            results[name] = [total.detach(), per_boundary.detach(), *(p.grad.clone() for p in model.parameters())]
            assert len(states) == len(LETTERS) + 2 and all(h.shape == (B, T, D) for h in states)
            assert len({h.data_ptr() for h in states}) == len(states)
        for a, b in zip(results["eager"], results["compiled"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert graphs() == 1


def test_the_counter_sees_a_recompilation():
    """A weight that is a Python number is baked in: what the tests above must be able to notice."""
    compiled = torch.compile(lambda h, weight: weight * h.sum(), fullgraph=True, backend="aot_eager", dynamic=False)
    for weight in (0.0, 0.5, 1.0):
        compiled(torch.randn(3), weight)
    assert graphs() == 3
