"""Cheap gradients never change a gradient that somebody else holds, and never count on one that may not come."""

import pytest
import torch
from joined_cases import (
    DEPTH,
    IDS,
    B,
    D,
    T,
    close,
    setup,
    total_of,
)

from losses.joined import is_owned
from losses.triples import draw

__all__ = ["setup"]


@pytest.mark.parametrize(
    "holder", ["retain_grad", "hook", "capture", "inputs", "caller", "expanded", "second consumer"]
)
def test_gradients_that_others_hold_are_not_changed(setup, holder):
    """Every observer of a gradient sees what it would see with plain autograd."""
    model, tokens, triples = setup
    given = torch.randn(B, T, D, dtype=model.norm.weight.dtype)
    results = {}
    for cheap in (True, False):
        states, final = model(tokens)
        kept = []
        if holder == "retain_grad":
            for state in states:
                state.retain_grad()
        if holder == "hook":
            for state in states:
                state.register_hook(kept.append)
        if holder == "second consumer":
            # Two residual sums hand the very same gradient tensor to both of their inputs.
            final = final + states[2] + states[2]
        total, _, _ = total_of(states, final, triples, cheap=cheap)
        parameters = list(model.parameters())
        if holder == "capture":
            kept = list(torch.autograd.grad(total, [*states, *parameters]))
        elif holder == "inputs":
            model.zero_grad()
            total.backward(inputs=[states[0], states[3], parameters[0]])
            kept = [states[0].grad, states[3].grad, parameters[0].grad]
        elif holder == "caller":
            before = given.clone()
            model.zero_grad()
            torch.autograd.backward([final, total], [given, torch.ones_like(total)])
            assert torch.equal(given, before)
            kept = [p.grad for p in parameters]
        elif holder == "expanded":
            model.zero_grad()
            (total + states[-1].sum()).backward()  # a stride-0 gradient at the last boundary
            kept = [p.grad for p in parameters]
        else:
            model.zero_grad()
            total.backward()
            kept += [state.grad for state in states] if holder == "retain_grad" else []
            kept += [p.grad for p in parameters]
        results[cheap] = [k.clone() for k in kept]
    close(model, results[True], results[False])


def test_a_residual_sum_whose_inputs_share_a_gradient():
    """hidden + x hands one tensor to both sides; changing it in place for one would change it for the other, and for
    whoever kept it on the way."""
    triples = draw("anchor", IDS, 6, seed=0, step=0, row_ids=torch.arange(B))
    source = torch.randn(B, T, D, requires_grad=True)
    for observe in ("nothing", "hooks", "retain_grad"):
        added = [torch.randn(B, T, D, requires_grad=True) for _ in range(DEPTH)]
        found = {}
        for cheap in (True, False):
            hidden = source * 1.0
            states, kept = [hidden], []
            for x in added:
                hidden = hidden + x
                states.append(hidden)
            for state in states:
                if observe == "hooks":
                    state.register_hook(kept.append)
                if observe == "retain_grad":
                    state.retain_grad()
            total, _, join = total_of(states, hidden * 1.0, triples, cheap=cheap)
            assert join is None or all(join.joined)
            for leaf in (source, *added):
                leaf.grad = None
            total.backward()
            kept += [state.grad for state in states] if observe == "retain_grad" else []
            found[cheap] = [g.clone() for g in (*kept, source.grad, *(x.grad for x in added))]
        for a, b in zip(found[True], found[False], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_is_owned():
    seen = {}

    def observe(name, keep=None):
        class Observer:
            def hook(self, index, gradient):
                if keep is not None:
                    keep.append(gradient)
                seen[name] = is_owned(gradient)

        import functools

        return functools.partial(Observer().hook, 0)

    leaf = torch.ones(4, 4, requires_grad=True)

    def run(name, use, keep=None, capture=False):
        middle = leaf * 2
        middle.register_hook(observe(name, keep))
        output = use(middle)
        if capture:
            torch.autograd.grad(output, [middle, leaf])
        else:
            output.backward()

    factor = torch.full((4, 4), 3.0)
    run("free", lambda x: (x * factor).sum())
    run("two consumers", lambda x: (x * factor).sum() + (x * factor).sum())
    run("kept", lambda x: (x * factor).sum(), keep=[])
    run("expanded", lambda x: x.sum())
    run("transposed", lambda x: (x.t() * torch.arange(16.0).view(4, 4)).sum())
    run("part of another", lambda x: (torch.stack([x, x]) * torch.ones(2, 4, 4)).sum())
    assert seen["free"] and seen["two consumers"]
    assert not (seen["kept"] or seen["expanded"] or seen["transposed"])


@pytest.mark.parametrize("fault", ["clones", "detached list", "cut stream", "cut stream, one boundary", "frozen below"])
def test_boundaries_that_the_lm_does_not_reach_get_dense_gradients(setup, fault):
    """Where no other gradient is certain to arrive, the way is plain autograd: never a lost row, never an error."""
    model, tokens, triples = setup
    boundaries = [1] if fault == "cut stream, one boundary" else range(DEPTH + 1)
    results = {}
    for cheap in (True, False):
        if fault == "frozen below":
            model.embedding.requires_grad_(False)
            model.branches[0].requires_grad_(False)
        hidden = model.embedding(tokens)
        states = [hidden]
        for i, branch in enumerate(model.branches):
            hidden = hidden.detach() if fault.startswith("cut stream") and i == 2 else hidden
            hidden = hidden + branch(hidden).tanh()
            states.append(hidden)
        final = model.norm(hidden)
        if fault == "clones":
            states = [state.clone() for state in states]
        if fault == "detached list":
            states = [state.detach() if i == 2 else state for i, state in enumerate(states)]
        total, _, join = total_of(states, final, triples, boundaries, cheap=cheap)
        if cheap and fault in ("clones", "cut stream, one boundary"):
            assert not any(join.joined)
        model.zero_grad()
        total.backward()
        results[cheap] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    close(model, results[True], results[False])
