"""Ways to look straight without content: each fools plain curvature, and each is caught by a guard."""

import torch
from analysis_cases import measure

from analysis.guards import guards

N, T, D = 64, 128, 64


def noise(generator):
    return torch.randn(N, T, D, generator=generator)


def make(build, seed=0):
    return list(build(torch.Generator().manual_seed(seed)))


def look(model, *references):
    return {(guard.name, guard.reads.split()[0]) for guard in guards(model, *references) if guard.state == "look"}


def honest():
    """Content without coherence: reads 120 degrees, and no guard has anything to say."""
    return make(noise)


def shared_drift(generator):
    """All documents move along one direction with the position."""
    direction = torch.nn.functional.normalize(torch.randn(D, generator=generator), dim=0)
    return noise(generator) + 300.0 * torch.arange(T)[:, None] * direction


def norm_growth(generator):
    """Every document grows along a direction of its own: nothing is shared, so position means see nothing."""
    direction = torch.nn.functional.normalize(torch.randn(N, 1, D, generator=generator), dim=-1)
    return 0.02 * noise(generator) + (1 + torch.arange(T)[:, None]) * direction


def slow_arc(generator):
    """States of equal norm on one great circle, 60 degrees in all: RMSNorm does not help."""
    plane = torch.linalg.qr(torch.randn(D, 2, generator=generator)).Q
    phase = torch.linspace(0, torch.pi / 3, T)
    arc = torch.stack([phase.cos(), phase.sin()], -1) @ plane.T
    return 10.0 * torch.nn.functional.normalize(arc + 2e-4 * noise(generator), dim=-1)


def collapse(generator):
    """Content in three dimensions, smooth: straight because there is nowhere to turn to."""
    walk = torch.randn(N, T, 3, generator=generator)
    smooth = torch.nn.functional.avg_pool1d(walk.mT, 33, 1, 16).mT
    basis = torch.linalg.qr(torch.randn(D, 3, generator=generator)).Q
    return smooth @ basis.T


def test_honest_noise_makes_no_guard_speak():
    model = measure([honest(), honest()])
    assert abs(float(model.get("curvature").value[0]) - 120) < 1
    assert look(model, model) == set()


def test_shared_drift_is_caught_by_position():
    model = measure([make(shared_drift)])
    assert float(model.get("curvature").value[0]) < 5  # fooled: content is still noise
    assert float(model.get("stp_triple").value[0]) < 0.01
    assert {("shared drift", "variance"), ("shared drift", "curvature")} <= look(model)
    assert abs(float(model.get("curvature_centred").value[0]) - 120) < 2  # what is there without the drift
    assert float(model.get("position_explained_share").value[0]) > 0.99
    assert float(model.get("curvature", "rms").value[0]) > 60  # the norm removes most of it, too


def test_norm_growth_is_caught_by_normalised_states():
    model = measure([make(norm_growth)])
    assert float(model.get("curvature").value[0]) < 25 < 90 < float(model.get("curvature", "rms").value[0])
    assert ("norm growth", "curvature") in look(model)
    assert ("shared drift", "variance") not in look(model)  # position means cannot see what documents do not share


def test_a_slow_arc_is_caught_by_position_though_norms_are_equal():
    model = measure([make(slow_arc)])
    for variant in ("raw", "rms"):  # fooled with and without the norm
        assert float(model.get("curvature", variant).value[0]) < 30
        assert float(model.get("stp_triple", variant).value[0]) < 0.1
    assert {("shared drift", "variance"), ("shared drift", "curvature")} <= look(model)
    assert float(model.get("mean_direction_energy").value[0]) > 0.5
    assert ("shared mean", "energy") in look(model)


def test_collapse_is_caught_by_the_rank():
    model, reference = measure([make(collapse)]), measure([honest()])
    assert float(model.get("curvature").value[0]) < float(reference.get("curvature").value[0]) - 15
    assert {("collapse", "effective")} <= look(model, reference)
    assert {("collapse", "effective")} <= look(model, model, reference)  # the worst of several references counts
    assert float(model.get("effective_rank").value[0]) < 3.1  # float32 sums leave the rest
    assert float(reference.get("effective_rank").value[0]) > 0.9 * D


def test_standing_still_is_counted_not_straight():
    """Every state twice: half of the steps have no direction. They are left out and shown."""
    rows = [row.repeat_interleave(2, 0) for row in honest()]
    model = measure([rows])
    assert 0.49 < float(model.get("dropped_steps").value[0]) < 0.51
    assert ("standing still", "steps") in look(model)


def test_bfloat16_states_are_flagged_where_rounding_bends_them():
    """A straight line, far from the origin, kept in bfloat16: rounding alone makes it look like noise."""
    generator = torch.Generator().manual_seed(0)
    start, step = torch.randn(2, N, 1, D, generator=generator)
    line = 40 * start + step * 0.05 * torch.arange(T)[:, None]
    exact, rounded = measure([list(line)]), measure([list(line.bfloat16().float())])
    assert float(exact.get("curvature").value[0]) < 0.1
    assert float(rounded.get("curvature").value[0]) > 40
    assert rounded.precision == ["bfloat16"]
    assert ("rounding", "1") in look(rounded) and ("rounding", "1") not in look(exact)
