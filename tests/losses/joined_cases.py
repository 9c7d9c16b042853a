"""A small residual stack and its total, with cheap gradients or by plain autograd."""

import pytest
import torch

from losses.joined import GradientJoin, joins
from losses.stp import stp_terms
from losses.triples import draw

B, T, D, DEPTH = 3, 20, 8, 4
IDS = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 3, [0] * 20, [0] * 2 + [1] * 18])


class Stack(torch.nn.Module):
    """Residual blocks with a branch that autograd has to go through."""

    def __init__(self, dtype):
        super().__init__()
        self.embedding = torch.nn.Embedding(16, D, dtype=dtype)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(D, D, dtype=dtype) for _ in range(DEPTH))
        self.norm = torch.nn.RMSNorm(D, dtype=dtype)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        states = [hidden]
        for branch in self.branches:
            hidden = hidden + branch(hidden).tanh()
            states.append(hidden)
        return states, self.norm(hidden)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["kernel", "plain"])
def setup(request):
    model = Stack(request.param)
    tokens = torch.randint(16, (B, T))
    triples = draw("anchor", IDS, 6, seed=0, step=0, row_ids=torch.arange(B))
    return model, tokens, triples


def tolerance(model):
    return {"rtol": 2e-5, "atol": 1e-6} if model.norm.weight.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}


def lm_of(final):
    return (final * torch.linspace(-1, 1, D, dtype=final.dtype)).square().mean()


def total_of(states, final, triples, boundaries=range(DEPTH + 1), form="triple", cheap=True):
    """The total as the objective makes it, cheap or by plain autograd; and its terms."""
    chosen = [states[i] for i in boundaries]
    join = None
    if cheap:
        arrives = joins(states, final, list(boundaries))
        join = GradientJoin(chosen, [arrives[i] for i in boundaries])
    terms = stp_terms(chosen, triples, form=form, join=join)
    total = lm_of(final) + 0.7 * terms.per_boundary().mean()
    if join is not None:
        join.watch(total)
    return total, terms, join


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return [p.grad.clone() for p in model.parameters()]


def close(model, a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance(model))


def gradients_keeping(model, total):
    return [g.clone() for g in torch.autograd.grad(total, list(model.parameters()), retain_graph=True)]
