"""Tubes, forecasts and sampled STP forms on paths with known answers."""

import math

import pytest
import torch

from analysis.forecast import forecast_errors
from analysis.forms import draw_triples, stp_forms
from analysis.paths import Path
from analysis.tube import SPAN_BINS, draw_spans, tube

N, T, D = 16, 200, 512


def paths():
    noise = torch.randn(N, T, D)
    return {"iid": noise, "walk": noise.cumsum(1), "line": torch.arange(float(T))[:, None] * torch.randn(N, 1, D)}


def read(states, n=8):
    path, lengths = Path.of(states), torch.full((len(states),), states.shape[1])
    index = torch.arange(len(states))
    triples = draw_triples(lengths, states.shape[1], index, 32, 0, 64)
    return tube(path, draw_spans(lengths, index, n, 0)), forecast_errors(path), stp_forms(path, triples)


@pytest.mark.parametrize(
    ("name", "radius", "triple", "patch", "transition", "plain"),
    [("iid", 0.866, 1.5, 1.70, 3.0, 6.0), ("walk", 0.41, 1.0, 1.0, 2.0, None), ("line", 0.0, 0.0, 0.0, 0.0, 0.0)],
)
def test_reference_processes(name, radius, triple, patch, transition, plain):
    """The table of random baselines (simulated values: two digits)."""
    (mean_radius, max_radius, efficiency), errors, forms = read(paths()[name])
    middle = mean_radius[:, 1:].mean()  # in the shortest spans the few tokens inside lie nearer to the ends
    assert float(middle) == pytest.approx(radius, abs=0.02)
    assert bool((max_radius >= mean_radius).all())
    assert float(forms["stp_triple"].mean()) == pytest.approx(triple, abs=0.02)
    assert float(forms["stp_patch_complement"].mean()) == pytest.approx(patch, abs=0.05)
    assert float(errors["transition_1"].mean()) == pytest.approx(transition, abs=0.02)
    if plain is not None:
        assert float(errors["plain_1"].mean()) == pytest.approx(plain, abs=0.05)
    if name == "line":
        assert float(efficiency.min()) == pytest.approx(1, abs=1e-5)
    if name == "walk":  # chord sqrt(n) over n steps
        expected = sum(1 / math.sqrt(n) for n in range(9, 25)) / 16
        assert float(efficiency[:, 1].mean()) == pytest.approx(expected, rel=0.1)


def test_a_semicircle_has_its_radius():
    """Span of the whole half circle: chord 2, the middle is 1 away, the path is pi long."""
    phase = torch.linspace(0, math.pi, 65, dtype=torch.float64)
    path = Path.of(torch.stack([phase.cos(), phase.sin(), torch.zeros(65)], -1)[None])
    spans = draw_spans(torch.tensor([65]), torch.arange(1), 1, 0, bins=((64, 64),))
    mean_radius, max_radius, efficiency = tube(path, spans)
    assert float(max_radius) == pytest.approx(0.5, abs=1e-9)
    assert float(mean_radius) == pytest.approx(float(phase.sin()[1:-1].mean()) / 2, abs=1e-9)
    assert float(efficiency) == pytest.approx(2 / math.pi, rel=1e-3)


def test_tubes_do_not_change_with_rotation_scale_and_translation():
    states = torch.randn(4, 80, 16, dtype=torch.float64).cumsum(1)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    moved = 3 * states @ rotation + torch.randn(16, dtype=torch.float64)
    for one, other in zip(read(states)[0], read(moved)[0]):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_plain_forecast_errors_change_with_translation_and_the_others_do_not():
    """A shared mean makes the plain error small for free: the reason for the other columns."""
    states = torch.randn(8, 100, 64, dtype=torch.float64)
    still, moved = forecast_errors(Path.of(states)), forecast_errors(Path.of(states + 30.0))
    for m in (1, 4, 16):
        for kind in ("centred", "transition"):
            torch.testing.assert_close(still[f"{kind}_{m}"], moved[f"{kind}_{m}"], rtol=1e-9, atol=0)
        assert bool((moved[f"plain_{m}"] < 0.1 * still[f"plain_{m}"]).all())
    # three standard deviations of common mean: .68 and .23 where noise around zero reads 6 and 2
    shifted = forecast_errors(Path.of(torch.randn(8, 400, 64, dtype=torch.float64) + math.sqrt(8.0)))
    assert float(shifted["plain_1"].mean()) == pytest.approx(6 / 9, abs=0.02)
    assert float(shifted["copy_last_1"].mean()) == pytest.approx(2 / 9, abs=0.01)


def test_draws_depend_on_the_document_alone_and_stay_inside():
    lengths = torch.tensor([5, 9, 64, 200, 26])
    index = torch.tensor([7, 3, 900, 11, 0])
    together = draw_spans(lengths, index, 50, 0)
    for i in range(5):
        alone = draw_spans(lengths[i : i + 1], index[i : i + 1], 50, 0)
        assert torch.equal(alone.start[0], together.start[i]) and torch.equal(alone.length[0], together.length[i])
    for b, (low, high) in enumerate(SPAN_BINS):
        assert together.valid[:, b].tolist() == [n - 1 >= low for n in lengths.tolist()]
        ok = together.valid[:, b]
        start, length = together.start[ok, b], together.length[ok, b]
        assert bool((length >= low).all() and (length <= high).all())
        assert bool((start >= 0).all() and (start + length <= lengths[ok, None] - 1).all())
    assert together.length[3, 2].unique().numel() > 20  # not always the same span


def test_short_documents_have_no_numbers_rather_than_wrong_ones():
    """Three tokens: one turn, no span, no forecast of four."""
    states = torch.randn(2, 3, 8)
    (mean_radius, _, efficiency), errors, _ = read(states)
    assert mean_radius.isnan().all() and efficiency.isnan().all()
    assert errors["plain_4"].isnan().all() and errors["plain_1"].isfinite().all()
