"""Controls, the reference implementation's ablation axes, and errors."""

import pytest
import torch

from losses.stp import LinearPredictor, compute_stp_loss
from losses.triples import Triples, draw_with_generator


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_triple(s, r, t, length):
    index = [torch.tensor([[k]]) for k in (s, r, t)]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return Triples(*index, torch.ones(1, 1, dtype=torch.bool), zero, zero + length - 1)


def line(batch=2, length=24, width=16, dtype=torch.float64):
    steps = torch.arange(length, dtype=dtype)[None, :, None]
    return torch.randn(batch, 1, width, dtype=dtype) + steps * torch.randn(batch, 1, width, dtype=dtype)


def test_detached_sends_no_gradient_and_reads_the_same():
    hidden = torch.randn(2, 16, 8, requires_grad=True)
    placebo = compute_stp_loss(hidden, 4, variant="detached", generator=generator())
    assert not placebo.requires_grad
    assert float(placebo) == float(compute_stp_loss(hidden, 4, generator=generator()))


def test_shuffled_order_puts_another_token_in_the_middle():
    hidden = torch.randn(1, 3, 8, dtype=torch.float64)
    loss = compute_stp_loss(hidden, variant="shuffled_order", triples=one_triple(0, 1, 2, 3))
    s, r, t = hidden[0]
    expected = 1 - torch.nn.functional.cosine_similarity(r - t, t - s, dim=0)
    assert float(loss) == pytest.approx(float(expected), abs=1e-12)
    # A straight line in the wrong order turns back: the control is far from the loss where it matters.
    assert float(compute_stp_loss(line(), 8, variant="shuffled_order")) == pytest.approx(2.0, abs=1e-9)


def test_length_weighting():
    hidden = torch.randn(1, 12, 8, dtype=torch.float64)
    # Lengths (4, 4) and (1, 7).
    even, uneven = one_triple(0, 4, 8, 12), one_triple(1, 8, 9, 12)
    losses = [float(compute_stp_loss(hidden, triples=x)) for x in (even, uneven)]
    both = Triples(
        *(torch.cat([getattr(even, k), getattr(uneven, k)], 1) for k in ("s", "r", "t", "valid", "first", "last"))
    )
    for name, weight in (("cosine_like", 2 * 7 / 50), ("jaccard_like", 1 - 6 / 8)):
        loss = compute_stp_loss(hidden, triples=both, length_weighting=name)
        assert float(loss) == pytest.approx((losses[0] + weight * losses[1]) / (1 + weight), abs=1e-7)


def test_sample_weights_are_a_weighted_mean():
    hidden = torch.randn(3, 16, 8, dtype=torch.float64)
    drawn = draw_with_generator("uniform", (3, 16), 4, generator=generator())
    weights = torch.tensor([1.0, 0.0, 3.0])
    rows = [float(compute_stp_loss(hidden[b : b + 1], triples=drawn.select(slice(b, b + 1)))) for b in range(3)]
    loss = compute_stp_loss(hidden, triples=drawn, sample_weights=weights)
    assert float(loss) == pytest.approx((rows[0] + 3 * rows[2]) / 4, abs=1e-7)
    per_triple = compute_stp_loss(hidden, triples=drawn, sample_weights=weights[:, None].expand(3, 4))
    assert float(per_triple) == float(loss)


def test_mse_distance():
    hidden = torch.randn(1, 3, 8, dtype=torch.float64)
    s, r, t = hidden[0]
    expected = float(((t - r) - (r - s)).square().mean())
    assert float(compute_stp_loss(hidden, distance="mse")) == pytest.approx(expected, abs=1e-12)


def test_rms_normalised_states_do_not_see_norm_growth():
    hidden = torch.randn(2, 16, 8, dtype=torch.float64)
    growth = torch.linspace(1, 50, 16, dtype=torch.float64)[None, :, None]
    drawn = draw_with_generator("uniform", (2, 16), 8, generator=generator())
    plain, grown = (float(compute_stp_loss(h, triples=drawn, normalize="rms")) for h in (hidden, hidden * growth))
    assert plain == pytest.approx(grown, abs=1e-9)
    normed = torch.nn.functional.rms_norm(hidden, (8,), eps=1e-12)
    assert plain == pytest.approx(float(compute_stp_loss(normed, triples=drawn)), abs=1e-9)


def test_predictor_is_applied_to_the_second_displacement_and_learns():
    hidden = torch.randn(2, 16, 8)
    predictor = LinearPredictor(8)
    loss = compute_stp_loss(hidden, 8, predictor=predictor, generator=generator())
    loss.backward()
    assert predictor.bias is None and predictor.weight.grad.norm() > 0
    with torch.no_grad():
        predictor.weight.copy_(torch.eye(8))
    identity = compute_stp_loss(hidden, 8, predictor=predictor, generator=generator())
    plain = compute_stp_loss(hidden, 8, generator=generator())
    assert float(identity) == pytest.approx(float(plain), abs=1e-6)


def test_layer_choice_and_mean_over_layers():
    states = [torch.randn(2, 16, 8) for _ in range(4)]
    each = [float(compute_stp_loss(h, 4, generator=generator())) for h in states]
    assert float(compute_stp_loss(states, 4, layers=[-1], generator=generator())) == pytest.approx(each[-1], abs=1e-6)
    both = compute_stp_loss(states, 4, layers=[0, 2], generator=generator())
    assert float(both) == pytest.approx((each[0] + each[2]) / 2, abs=1e-6)  # the same triples at both


def test_divisor_of_the_global_batch_makes_parts_add_up():
    hidden = torch.randn(4, 16, 8, dtype=torch.float64)
    drawn = draw_with_generator("anchor", (4, 16), 4, generator=generator())
    whole = float(compute_stp_loss(hidden, triples=drawn))
    parts = [
        float(compute_stp_loss(hidden[k], triples=drawn.select(k), divisor=16.0)) for k in (slice(0, 1), slice(1, 4))
    ]
    assert sum(parts) == pytest.approx(whole, abs=1e-12)


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hidden_states": []}, "empty list"),
        ({"hidden_states": torch.randn(4, 8)}, "shape"),
        ({"hidden_states": [torch.randn(1, 8, 4), torch.randn(1, 9, 4)]}, "shape"),
        ({"hidden_states": torch.zeros(1, 8, 4, dtype=torch.int64)}, "floating"),
        ({"layers": [5]}, "layers: 5"),
        ({"layers": []}, "empty list"),
        ({"triples": draw_with_generator("anchor", (2, 8), 1)}, "triples: drawn for 2 rows"),
        ({"form": "tripel"}, "form"),
        ({"variant": "none"}, "variant"),
        ({"distance": "l2"}, "distance"),
        ({"normalize": "layer"}, "normalize"),
        ({"length_weighting": "dice"}, "length_weighting"),
        ({"gaps": "skip"}, "gaps"),
        ({"sampler": "gaussian"}, "sampler"),
        ({"sampler": "patch"}, "patch"),
        ({"form": "patch_complement", "variant": "shuffled_order"}, "shuffled_order"),
    ],
)
def test_errors_name_the_argument(arguments, words):
    with pytest.raises(ValueError, match=words):
        compute_stp_loss(**{"hidden_states": torch.randn(1, 8, 4), **arguments})
