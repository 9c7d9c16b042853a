"""The controls that act: noise of the size of STP's gradient, and a penalty on movement that asks for no direction."""

from dataclasses import replace

import pytest
import torch
from test_objective import LETTERS, Model, config, make_batch, step

from losses.controls import noise_like
from losses.keyed import keyed_directions
from losses.objective import Objective
from losses.stp import compute_stp_loss, stp_terms
from losses.triples import draw, draw_with_generator

ROWS = torch.arange(40, 44)


def layout():
    """Packed and padded rows, with few tokens, so that triples share some."""
    return torch.tensor([[0] * 12, [0] * 6 + [1] * 6, [0] * 5 + [-1] * 7, [0, 1] * 6])


def drawn(seed=3, number=5, n_spans=6, rows=ROWS):
    return draw("anchor", layout(), n_spans, seed=seed, step=number, row_ids=rows)


def states(n=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 12, 16, generator=generator, dtype=dtype, requires_grad=True) for _ in range(n)]


def gradients(variant, triples, given=None, weights=(1.0, 1.0, 1.0), **options):
    given = given or states()
    sums = stp_terms(given, triples, variant=variant, **options).sums
    return torch.autograd.grad((sums * torch.tensor(weights, dtype=sums.dtype)).sum(), given)


# --- noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"form": "consecutive"}, {"form": "patch_complement"}, {"distance": "mse"}])
def test_noise_has_the_norm_of_stps_gradient_at_every_token_and_its_value(options):
    triples = drawn()
    noise, stp = gradients("gradient_noise", triples, **options), gradients("standard", triples, **options)
    for a, b in zip(noise, stp, strict=True):
        torch.testing.assert_close(a.norm(dim=-1), b.norm(dim=-1), rtol=1e-12, atol=1e-14)
        assert float(b.norm()) > 0 and abs(float((a * b).sum() / b.square().sum())) < 0.4
    values = [stp_terms(states(), triples, variant=v, **options).sums for v in ("gradient_noise", "standard")]
    assert torch.equal(*values)


def test_noise_is_stps_norm_times_the_direction_of_row_boundary_and_token():
    """Built by hand, one token after the other."""
    triples = drawn()
    noise, stp = gradients("gradient_noise", triples), gradients("standard", triples)
    for boundary in range(3):
        for row in range(4):
            for token in range(12):
                place = torch.tensor(token + (boundary << 32))
                direction = keyed_directions(triples.key[row], place, 16)
                torch.testing.assert_close(
                    noise[boundary][row, token], stp[boundary][row, token].norm() * direction, rtol=1e-12, atol=1e-14
                )


def test_noise_follows_seed_step_and_row_and_no_generator():
    def noise(**key):
        torch.manual_seed(torch.seed() % 1000)
        return gradients("gradient_noise", drawn(**key))[0]

    assert torch.equal(noise(), noise())
    state = torch.get_rng_state()
    gradients("gradient_noise", drawn())
    assert torch.equal(torch.get_rng_state(), state)
    # The same triples and states, another key: another direction everywhere.
    triples = drawn()
    for other in (drawn(seed=4), drawn(number=6), drawn(rows=ROWS + 1)):
        mine, theirs = (gradients("gradient_noise", replace(triples, key=key))[0] for key in (triples.key, other.key))
        touched = mine.norm(dim=-1) > 0
        cosines = torch.nn.functional.cosine_similarity(mine[touched], theirs[touched], dim=-1)
        assert touched.sum() > 15 and float(cosines.mean().abs()) < 0.2 and float(cosines.abs().max()) < 0.95
    assert torch.equal(drawn(n_spans=1).key, triples.key)  # more triples, the same noise


def test_directions_are_uniform_and_independent():
    key, places = torch.arange(64)[:, None], torch.arange(256)
    u = keyed_directions(key, places, 8).view(-1, 8)
    torch.testing.assert_close(u.norm(dim=-1), torch.ones(len(u), dtype=torch.float64))
    assert float(u.mean(0).norm()) < 4 / len(u) ** 0.5
    torch.testing.assert_close(u.T @ u / len(u), torch.eye(8, dtype=torch.float64) / 8, atol=5e-3, rtol=0)
    neighbours = (u[1:] * u[:-1]).sum(-1)
    assert abs(float(neighbours.mean())) < 4 / (8 * len(u)) ** 0.5


def test_noise_scales_with_the_weight_and_passes_what_is_not_finite():
    triples = drawn()
    once, thrice = (gradients("gradient_noise", triples, weights=(w, 0.0, w)) for w in (1.0, 3.0))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)
    assert not bool(once[1].any())  # one boundary's term alone sends nothing to another
    gradient = torch.full((1, 3, 1, 1, 4), float("inf"))
    assert not bool(
        torch.isfinite(noise_like(gradient, torch.tensor([0, 1, 2]).view(3, 1, 1), torch.zeros(1).long())).any()
    )


def test_noise_needs_a_key():
    triples = drawn()
    with pytest.raises(ValueError, match="variant: gradient_noise needs triples with a key"):
        stp_terms(states(), replace(triples, key=None), variant="gradient_noise")
    assert draw_with_generator("uniform", (4, 12), 2).key.shape == (4,)


# --- norm penalty -------------------------------------------------------------------------------------------------


def test_penalty_by_hand():
    (hidden,) = states(1)
    triples = drawn()
    loss = compute_stp_loss(hidden, triples=triples, variant="norm_penalty")
    each = []
    for row in range(4):
        for k in range(6):
            if triples.valid[row, k]:
                s, r, t = (hidden[row, getattr(triples, name)[row, k]] for name in "srt")
                moved = (t - r).square().sum() + (r - s).square().sum() + (t - s).square().sum()
                each.append(moved / 3 / (s.square().sum() + r.square().sum() + t.square().sum()))
    torch.testing.assert_close(loss, torch.stack(each).mean())
    assert 0 < float(loss.detach()) < 1
    # Free of scale, 0 where nothing moves, 2/3 for states that have nothing to do with each other.
    scaled = compute_stp_loss(7 * hidden, triples=triples, variant="norm_penalty")
    torch.testing.assert_close(scaled, loss)
    still = hidden[:, :1].expand_as(hidden)
    assert float(compute_stp_loss(still, triples=triples, variant="norm_penalty").detach()) < 1e-12
    wide = torch.randn(4, 12, 4096, generator=torch.Generator().manual_seed(1))
    assert float(compute_stp_loss(wide, triples=triples, variant="norm_penalty")) == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("form", ["triple", "consecutive"])
def test_penalty_is_orthogonal_to_stp_triple_by_triple_and_the_obvious_one_is_not(form):
    (hidden,) = states(1)
    triples = drawn()
    seen = 0
    for row, k in triples.valid.nonzero().tolist():
        valid = torch.zeros_like(triples.valid)
        valid[row, k] = True
        one = replace(triples, valid=valid)
        (stp,), (penalty,) = (gradients(v, one, [hidden], (1.0,), form=form) for v in ("standard", "norm_penalty"))
        assert abs(float((stp * penalty).sum() / (stp.norm() * penalty.norm()))) < 1e-12
        s, r, t = (hidden[row, getattr(triples, name)[row, k]] for name in "srt")
        if form == "triple":
            obvious = ((t - r).square().sum() + (r - s).square().sum()) / 2
            (naive,) = torch.autograd.grad(obvious, hidden)
            seen += float((stp * naive).sum() / (stp.norm() * naive.norm())) > 0.01
    assert form != "triple" or seen > 5  # penalising the two displacements alone straightens


def test_descending_the_penalty_shortens_steps_and_keeps_the_angle():
    hidden = torch.randn(1, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    triples = draw("anchor", torch.zeros(1, 3, dtype=torch.int64), 1, seed=0, step=0, row_ids=torch.arange(1))
    angle, length = (
        float(compute_stp_loss(hidden, triples=triples).detach()),
        float((hidden[0, 1] - hidden[0, 0]).detach().norm()),
    )
    for _ in range(50):
        (gradient,) = torch.autograd.grad(compute_stp_loss(hidden, triples=triples, variant="norm_penalty"), hidden)
        hidden = (hidden - 0.5 * gradient).detach().requires_grad_()
    assert float((hidden[0, 1] - hidden[0, 0]).detach().norm()) < 0.5 * length
    assert float(compute_stp_loss(hidden, triples=triples).detach()) == pytest.approx(angle, abs=1e-9)


def test_penalty_gradient_and_nothing_from_zeros():
    triples = drawn(n_spans=2)
    hidden = states(1)[0].detach()[..., :3].requires_grad_()
    assert torch.autograd.gradcheck(lambda h: compute_stp_loss(h, triples=triples, variant="norm_penalty"), hidden)
    zero = torch.zeros(4, 12, 3, dtype=torch.float64, requires_grad=True)
    loss = compute_stp_loss(zero, triples=triples, variant="norm_penalty")
    (gradient,) = torch.autograd.grad(loss, zero)
    assert float(loss.detach()) == 0 and not bool(gradient.any())
    counted = stp_terms([zero.detach()], triples, variant="norm_penalty")
    assert int(counted.n_degenerate) == int(counted.n_valid)  # collapse is counted all the same


# --- in a training step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["gradient_noise", "norm_penalty"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_micro_batches_and_plain_autograd_agree(variant, dtype):
    model, batch = Model(dtype), make_batch()
    objective = Objective(config(variant=variant, boundaries=["all", "final"]), LETTERS)
    whole = step(model, objective, batch, 0.3)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 2e-6}
    for n in (2, 8):
        parts = step(model, objective, batch, 0.3, n)
        torch.testing.assert_close(parts[2], whole[2], **tolerance)
        for name, gradient in whole[3].items():
            torch.testing.assert_close(parts[3][name], gradient, **tolerance)
    model.zero_grad()
    output = model(batch.tokens)
    triples = objective.draw(batch.document_ids, batch.row_ids, 5)
    lm = objective(output, model.head.weight, batch.labels).total
    terms = objective.stp_terms(output.hidden_states, output.final, triples)
    (lm + torch.tensor(0.3) * torch.stack(list(terms.values())).mean()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(whole[3][name], parameter.grad, **tolerance)
    standard = step(model, Objective(config(boundaries=["all", "final"]), LETTERS), batch, 0.3)[3]
    assert not torch.allclose(standard["embedding.weight"], whole[3]["embedding.weight"])


@pytest.mark.parametrize("variant", ["gradient_noise", "norm_penalty"])
def test_a_batch_without_room_is_a_zero(variant):
    model, batch = Model(), make_batch()
    batch = replace(batch, document_ids=torch.arange(24).expand(8, 24))
    total, lm, _, found = step(model, Objective(config(variant=variant), LETTERS), batch, 0.3)
    assert total == pytest.approx(lm) and all(torch.isfinite(g).all() for g in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["gradient_noise", "norm_penalty"])
def test_one_compiled_graph_equals_eager(variant):
    torch._dynamo.reset()
    loss = torch.compile(
        lambda given, triples: compute_stp_loss(given, triples=triples, variant=variant),
        fullgraph=True,
        backend="aot_eager",
    )
    for number in (0, 1):
        given, copies = states(2, torch.float32), states(2, torch.float32)
        compiled, eager = (
            loss(given, drawn(number=number)),
            compute_stp_loss(copies, triples=drawn(number=number), variant=variant),
        )
        torch.testing.assert_close(compiled, eager)
        compiled.backward()
        eager.backward()
        for a, b in zip(given, copies, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
    torch._dynamo.reset()
