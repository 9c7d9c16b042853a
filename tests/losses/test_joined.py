"""Cheap gradients equal autograd's."""

import pytest
import torch
from joined_cases import (
    DEPTH,
    IDS,
    B,
    D,
    Stack,
    T,
    close,
    gradients,
    gradients_keeping,
    lm_of,
    setup,
    tolerance,
    total_of,
)

from losses.joined import GradientJoin, ReadRows
from losses.stp import FORMS, compute_stp_loss, stp_terms
from losses.triples import draw

__all__ = ["setup"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("boundaries", [range(DEPTH + 1), [0], [DEPTH], [1, 3]], ids=str)
def test_equals_autograd(setup, form, boundaries):
    model, tokens, triples = setup
    cheap, terms, join = total_of(*model(tokens), triples, boundaries, form)
    assert all(join.joined)
    plain, expected, _ = total_of(*model(tokens), triples, boundaries, form, cheap=False)
    torch.testing.assert_close(cheap, plain, **tolerance(model))
    torch.testing.assert_close(terms.sums, expected.sums, **tolerance(model))
    assert torch.equal(terms.n_degenerate, expected.n_degenerate) and torch.equal(terms.divisor, expected.divisor)
    found = gradients(model, cheap)
    close(model, found, gradients(model, plain))
    without = gradients(model, lm_of(model(tokens)[1]))
    assert (found[0] - without[0]).norm() > 1e-3  # the term is in there


@pytest.mark.parametrize("length_weighting", ["cosine_like", "jaccard_like"])
def test_weighted_triples_equal_autograd(length_weighting):
    states = [torch.randn(B, T, D, requires_grad=True) for _ in range(2)]
    triples = draw("anchor", IDS, 6, seed=0, step=0, row_ids=torch.arange(B))
    weights = torch.rand(B, 6)
    found = {}
    for join in (GradientJoin(states, [False, False]), None):
        terms = stp_terms(states, triples, join=join, sample_weights=weights, length_weighting=length_weighting)
        found[join is None] = [
            terms.sums,
            terms.divisor,
            *torch.autograd.grad(terms.sums @ torch.tensor([1.0, 2]), states),
        ]
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_kernel_counts_degenerate_triples_and_passes_on_what_is_not_finite(form):
    constant = torch.full((B, T, D), 2.5, requires_grad=True)
    triples = draw("anchor", IDS, 6, seed=0, step=0, row_ids=torch.arange(B))
    terms = stp_terms([constant], triples, form=form, join=GradientJoin([constant], [False]))
    assert terms.per_boundary().item() == 1.0 and torch.equal(terms.n_degenerate[0], terms.n_valid)
    terms.sums.sum().backward()
    assert torch.equal(constant.grad, torch.zeros_like(constant))
    for bad in (float("nan"), float("inf"), -float("inf")):
        states = [torch.randn(B, T, D) for _ in range(2)]
        states[0][1, ::2, 3] = bad  # at some points of a triple, or at all
        states[1][0, 17:] = bad  # padding may hold anything
        terms = stp_terms(states, triples, form=form, join=GradientJoin(states, [False, False]))
        assert not torch.isfinite(terms.sums[0]) and torch.isfinite(terms.sums[1])
        assert terms.n_degenerate.tolist() == [0, 0]


def large_allocations(function, smallest):
    """Names of the operations that allocate a tensor of at least `smallest` bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return sorted(event.name for event in profile.events() if event.self_cpu_memory_usage >= smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["kernel", "plain"])
def test_no_tensor_of_full_size_is_made(dtype):
    """Neither forward nor backward allocates a (B, T, D) tensor for the rows."""
    model, tokens = Stack(dtype), torch.randint(16, (2, 500))
    ids = torch.zeros(2, 500, dtype=torch.int64)
    triples = draw("anchor", ids, 4, seed=0, step=0, row_ids=torch.arange(2))
    full = 2 * 500 * D * (4 if dtype == torch.float32 else 8)

    def counts(make):
        states, final = model(tokens)
        total = []
        forward = large_allocations(lambda: total.append(make(states, final)), full)
        model.zero_grad()
        return forward, large_allocations(total[0].backward, full)

    counts(lambda states, final: total_of(states, final, triples)[0])  # compiles the kernels
    alone = counts(lambda states, final: lm_of(final))
    assert counts(lambda states, final: total_of(states, final, triples)[0]) == alone
    plain = counts(lambda states, final: total_of(states, final, triples, cheap=False)[0])
    assert len(plain[1]) >= len(alone[1]) + DEPTH  # the measurement sees what it should


def test_one_terms_own_gradient_is_dense_and_direct(setup):
    """What preflight and the live evidence ask: the gradient of one boundary's term alone, at that boundary."""
    model, tokens, triples = setup
    states, final = model(tokens)
    total, terms, _ = total_of(states, final, triples)
    losses = terms.per_boundary()
    for i, state in enumerate(states):
        (found,) = torch.autograd.grad(losses[i], state, retain_graph=True)
        leaf = state.detach().requires_grad_()
        compute_stp_loss(leaf, triples=triples).backward()
        torch.testing.assert_close(found, leaf.grad, **tolerance(model))
    # None of that is left over in the backward that follows.
    plain, _, _ = total_of(*model(tokens), triples, cheap=False)
    close(model, gradients(model, total), gradients(model, plain))


def test_partial_and_repeated_backwards(setup):
    model, tokens, triples = setup
    states, final = model(tokens)
    total, _, _ = total_of(states, final, triples)
    plain, _, _ = total_of(states, final, triples, cheap=False)
    for part in ([states[2]], [states[-1], final], [model.branches[1].weight], list(model.parameters())):
        found = torch.autograd.grad(total, part, retain_graph=True)
        close(model, found, torch.autograd.grad(plain, part, retain_graph=True))
    first = gradients_keeping(model, total)
    for _ in range(2):
        model.zero_grad()
        total.backward(retain_graph=True)
        close(model, first, [p.grad for p in model.parameters()])
    close(model, first, gradients_keeping(model, plain))
    # Two uses of the same states at once: each adds its own share.
    other, _, _ = total_of(states, final, triples, [1, 2])
    other_plain, _, _ = total_of(states, final, triples, [1, 2], cheap=False)
    expected = gradients_keeping(model, plain + 3 * other_plain)
    model.zero_grad()
    (total + 3 * other).backward()
    close(model, [p.grad for p in model.parameters()], expected)


def test_an_error_in_the_middle_leaves_nothing_behind(setup):
    model, tokens, triples = setup
    states, final = model(tokens)
    total, _, _ = total_of(states, final, triples)

    def fail(gradient):
        raise KeyError("stop")

    handle = states[2].register_hook(fail)
    with pytest.raises(KeyError):
        total.backward(retain_graph=True)
    handle.remove()
    plain, _, _ = total_of(states, final, triples, cheap=False)
    other, _, _ = total_of(*model(tokens), triples, cheap=False)
    expected = gradients(model, other)
    # A backward that does not come through the total must not pick up rows that the failed one left.
    close(model, gradients_keeping(model, plain), expected)
    model.zero_grad()
    total.backward(retain_graph=True)
    close(model, [p.grad for p in model.parameters()], expected)


def test_nothing_to_join_is_an_error_not_a_loss():
    """If the certainty should ever be wrong, the step stops."""
    state = torch.randn(B, T, D, requires_grad=True) * 1.0
    join = GradientJoin([state], [True])
    rows = ReadRows.apply(join, join.sentinel, torch.tensor([1, 2]), state)
    total = rows.sum()
    join.watch(total)
    with pytest.raises(RuntimeError, match="no gradient arrived"):
        total.backward()


def test_second_derivatives_are_refused_by_the_kernel_and_right_without_it():
    state = torch.randn(1, 6, 4, requires_grad=True)
    triples = draw("uniform", torch.zeros(1, 6, dtype=torch.int64), 4, seed=0, step=0, row_ids=torch.zeros(1).long())
    terms = stp_terms([state], triples, join=GradientJoin([state], [False]))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(terms.sums.sum(), state, create_graph=True)
    double = state.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: compute_stp_loss(h, triples=triples), (double,))
