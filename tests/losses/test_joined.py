"""Cheap gradients equal autograd's, whoever else holds the gradient that they join."""

import pytest
import torch

from losses.joined import GradientJoin, ReadRows, is_owned, joins
from losses.stp import FORMS, compute_stp_loss, stp_terms
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


def gradients_keeping(model, total):
    return [g.clone() for g in torch.autograd.grad(total, list(model.parameters()), retain_graph=True)]


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


def test_nothing_to_join_is_an_error_not_a_loss():
    """If the certainty should ever be wrong, the step stops."""
    state = torch.randn(B, T, D, requires_grad=True) * 1.0
    join = GradientJoin([state], [True])
    rows = ReadRows.apply(join, join.sentinel, torch.tensor([1, 2]), state)
    total = rows.sum()
    join.watch(total)
    with pytest.raises(RuntimeError, match="no gradient arrived"):
        total.backward()


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


def test_second_derivatives_are_refused_by_the_kernel_and_right_without_it():
    state = torch.randn(1, 6, 4, requires_grad=True)
    triples = draw("uniform", torch.zeros(1, 6, dtype=torch.int64), 4, seed=0, step=0, row_ids=torch.zeros(1).long())
    terms = stp_terms([state], triples, join=GradientJoin([state], [False]))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(terms.sums.sum(), state, create_graph=True)
    double = state.detach().double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda h: compute_stp_loss(h, triples=triples), (double,))
