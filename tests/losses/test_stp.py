"""The properties of the loss: limits, gradients, degenerate states, layouts, invariances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.stp import FORMS, compute_stp_loss, stp_terms
from losses.triples import Triples, draw


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_triple(s, r, t, length):
    index = [torch.tensor([[k]]) for k in (s, r, t)]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return Triples(*index, torch.ones(1, 1, dtype=torch.bool), zero, zero + length - 1)


def line(batch=2, length=24, width=16, dtype=torch.float64):
    steps = torch.arange(length, dtype=dtype)[None, :, None]
    return torch.randn(batch, 1, width, dtype=dtype) + steps * torch.randn(batch, 1, width, dtype=dtype)


# --- the seven properties of the source article -------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_straight_lines_cost_nothing(form):
    assert float(compute_stp_loss(line(), 64, form=form, generator=generator())) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_random_states_cost_something(form):
    assert float(compute_stp_loss(torch.randn(4, 24, 64), 16, form=form, generator=generator())) > 1.2


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_rows_give_a_connected_zero(length):
    hidden = torch.randn(2, length, 8, requires_grad=True)
    loss = compute_stp_loss([hidden, hidden * 2])
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("form", FORMS)
def test_gradients_flow(form):
    hidden = torch.randn(2, 16, 8, requires_grad=True)
    compute_stp_loss(hidden, 8, form=form, generator=generator()).backward()
    assert torch.isfinite(hidden.grad).all() and hidden.grad.norm() > 1e-3


def test_gradient_is_the_true_one():
    hidden = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        fixed = draw("anchor", torch.zeros(2, 9, dtype=torch.int64), 5, seed=0, step=0, row_ids=torch.arange(2))
        assert torch.autograd.gradcheck(lambda h: compute_stp_loss(h, form=form, triples=fixed), (hidden,))  # noqa: B023


def test_more_spans_lower_the_variance_as_one_over_n():
    hidden = torch.randn(1, 64, 6, dtype=torch.float64)
    g = generator()

    def variance(n_spans):
        with torch.no_grad():
            return torch.stack([compute_stp_loss(hidden, n_spans, generator=g) for _ in range(400)]).var()

    one = variance(1)
    for n_spans in (4, 16):
        assert 0.7 < float(one / variance(n_spans)) / n_spans < 1.4  # two variances of 400 draws: 10% of noise


def test_lists_send_gradient_to_every_layer():
    states = [torch.randn(2, 12, 8, requires_grad=True) for _ in range(5)]
    compute_stp_loss(states, 4, generator=generator()).backward()
    assert all(h.grad is not None and h.grad.norm() > 0 for h in states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_promoted(dtype):
    hidden = torch.randn(2, 32, 64).to(dtype).requires_grad_()
    loss = compute_stp_loss(hidden, 16, generator=generator())
    exact = compute_stp_loss(hidden.detach().double(), 16, generator=generator())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(float(exact), abs=1e-5)
    loss.backward()
    assert hidden.grad.dtype == dtype and torch.isfinite(hidden.grad).all()
    constant = torch.full((2, 8, 4), 3.0, dtype=dtype, requires_grad=True)
    loss = compute_stp_loss(constant, 4)
    loss.backward()
    assert loss.item() == 1.0 and torch.equal(constant.grad, torch.zeros_like(constant))


# --- reading the number -------------------------------------------------------------------------------------------


def processes(width=2048, length=48):
    white = torch.randn(16, length, width)
    return {"line": line(16, length, width, torch.float32), "walk": white.cumsum(1), "white": white}


@pytest.mark.parametrize(
    ("form", "process", "expected"),
    [(form, process, value) for form in FORMS for process, value in (("line", 0.0), ("walk", 1.0))]
    + [("triple", "white", 1.5), ("consecutive", "white", 1.5)],
)
def test_high_dimensional_limits(form, process, expected):
    loss = compute_stp_loss(processes()[process], 128, form=form, generator=generator())
    assert float(loss) == pytest.approx(expected, abs=0.02)


def test_high_dimensional_limit_of_an_interior_patch():
    hidden = processes()["white"]
    interior = draw("patch", torch.zeros(16, 48, dtype=torch.int64), 256, seed=0, step=0, row_ids=torch.arange(16))
    valid = interior.valid & (interior.s > 0) & (interior.t < 47)
    interior = Triples(interior.s, interior.r, interior.t, valid, interior.first, interior.last, "patch")
    loss = compute_stp_loss(hidden, form="patch_complement", triples=interior)
    assert float(loss) == pytest.approx(1 + 1 / math.sqrt(2), abs=0.02)


def test_bf16_rounding_bends_straight_paths():
    """The reason for a float32 residual stream: a straight path whose states are much larger than its steps reads as
    curved once the states themselves are rounded to bfloat16, whatever the precision of the differences."""
    direction = torch.nn.functional.normalize(torch.randn(512), dim=0)
    offset = torch.nn.functional.normalize(torch.randn(512), dim=0)
    steps = torch.arange(64.0)[None, :, None] * direction
    for ratio, expected in ((20, 0.01), (200, 0.27), (600, 0.77), (2000, 0.97)):  # |state| / |step|
        path = offset * ratio + steps
        exact = compute_stp_loss(path, 512, form="consecutive", generator=generator())
        rounded = compute_stp_loss(path.to(torch.bfloat16), 512, form="consecutive", generator=generator())
        assert abs(float(exact)) < 1e-3
        assert float(rounded) == pytest.approx(expected, abs=0.08)


def test_there_and_back_again_is_two():
    hidden = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
    assert float(compute_stp_loss(hidden)) == 2.0


# --- degenerate states --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tiny", [0.0, 1e-9])
def test_a_collapsed_displacement_counts_as_one_with_zero_gradient(form, tiny):
    hidden = torch.randn(1, 6, 8, dtype=torch.float64)
    hidden[0, 3] = hidden[0, 2] + tiny  # r - 1 = 2, r = 3
    hidden.requires_grad_()
    given = one_triple(2, 3, 4, 6) if form != "patch_complement" else one_triple(2, 2, 3, 6)
    terms = stp_terms([hidden], given, form=form)
    assert terms.sums[0].item() == 1.0 and int(terms.n_degenerate[0]) == 1 and float(terms.divisor) == 1.0
    terms.sums.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_a_small_but_honest_displacement_is_not_degenerate():
    hidden = torch.randn(1, 3, 8, dtype=torch.float64)
    hidden[0, 1] = hidden[0, 0] + 1e-5 * torch.randn(8)
    hidden.requires_grad_()
    terms = stp_terms([hidden], one_triple(0, 1, 2, 3))
    assert int(terms.n_degenerate) == 0
    terms.sums.sum().backward()
    assert hidden.grad.norm() > 0


@pytest.mark.parametrize("value", [0.0, 1.0, -1e4])
def test_constant_states_read_as_one_not_as_straight(value):
    hidden = torch.full((2, 16, 8), value, requires_grad=True)
    loss = compute_stp_loss(hidden, 8)
    loss.backward()
    assert loss.item() == 1.0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_degenerate_and_plain_triples_add_up():
    hidden = torch.randn(1, 12, 8, dtype=torch.float64)
    hidden[0, :6] = hidden[0, :1]
    drawn = draw("uniform", torch.zeros(1, 12, dtype=torch.int64), 400, seed=1, step=0, row_ids=torch.zeros(1).long())
    terms = stp_terms([hidden], drawn)
    flat = drawn.r < 6  # then h_r = h_s
    assert int(terms.n_degenerate) == int(flat.sum()) and 0 < int(flat.sum()) < 400
    rest = Triples(drawn.s, drawn.r, drawn.t, drawn.valid & ~flat, drawn.first, drawn.last)
    assert float(terms.sums) == pytest.approx(float(stp_terms([hidden], rest).sums) + int(flat.sum()), abs=1e-9)


def test_not_finite_states_are_not_hidden():
    for bad in (float("nan"), float("inf")):
        hidden = torch.randn(1, 3, 4)
        hidden[0, 1, 0] = bad
        assert not torch.isfinite(compute_stp_loss(hidden))


# --- invariances (a loss of directions) ---------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.sampled_from(FORMS))
def test_invariances(seed, scale, form):
    torch.manual_seed(seed)
    ids = torch.tensor([[0] * 9 + [1] * 6 + [-1], [0] * 16, [0] * 4 + [1] * 12])
    hidden = torch.randn(3, 16, 6, dtype=torch.float64)
    drawn = draw("anchor", ids, 5, seed=seed, step=0, row_ids=torch.arange(3))

    def loss(h, triples=drawn):
        return float(compute_stp_loss(h, form=form, triples=triples))

    base = loss(hidden)
    assert 0 <= base <= 2
    assert loss(hidden * scale) == pytest.approx(base, abs=1e-9)
    assert loss(hidden * -1) == pytest.approx(base, abs=1e-9)
    assert loss(hidden + torch.randn(3, 1, 6, dtype=torch.float64)) == pytest.approx(base, abs=1e-9)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert loss(hidden @ rotation) == pytest.approx(base, abs=1e-9)
    assert loss(hidden[..., torch.randperm(6)]) == pytest.approx(base, abs=1e-9)
    rows = torch.randperm(3)
    assert loss(hidden[rows], drawn.select(rows)) == pytest.approx(base, abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_orthogonal_to_the_displacements(form):
    """A loss of directions cannot be lowered by stretching."""
    hidden = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    compute_stp_loss(hidden, 4, form=form, generator=generator()).backward()
    assert float((hidden.grad * hidden).sum()) == pytest.approx(0, abs=1e-10)
    assert float(hidden.grad.sum(1).abs().max()) == pytest.approx(0, abs=1e-10)
