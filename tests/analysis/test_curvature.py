"""Angles of paths that are known exactly: lines, circles, helices, walks, noise, AR(1)."""

import math

import pytest
import torch

from analysis.curvature import curvature_degrees, straightening, tangent_correlation, turning_angles
from analysis.paths import Path


def circle(degrees, length=100, d_model=32, dtype=torch.float32, radius=7.0):
    """Points on a circle in a random plane, `degrees` of arc a step: each turn is exactly that angle."""
    phase = torch.arange(length, dtype=torch.float64) * math.radians(degrees)
    plane = torch.linalg.qr(torch.randn(d_model, 2, dtype=torch.float64)).Q
    points = radius * torch.stack([phase.cos(), phase.sin()], -1) @ plane.T + torch.randn(d_model, dtype=torch.float64)
    return points.to(dtype)[None]


def ar1(rho, rows=32, length=400, d_model=512):
    x = torch.randn(rows, length, d_model)
    for k in range(1, length):
        x[:, k] = rho * x[:, k - 1] + math.sqrt(1 - rho**2) * x[:, k]
    return x


@pytest.mark.parametrize("degrees", [0.05, 1.0, 10.0, 90.0, 179.0])
def test_a_circle_reads_its_angle(degrees):
    assert float(curvature_degrees(circle(degrees, dtype=torch.float64))) == pytest.approx(degrees, abs=1e-7)
    if degrees >= 10:  # float32 points of a small angle carry their own rounding
        assert float(curvature_degrees(circle(degrees))) == pytest.approx(degrees, abs=0.01)


def test_a_helix_reads_its_closed_form():
    """x = (cos wk, sin wk, pk): chord 2 sin(w/2) turns by w in the plane, the rise p stays."""
    w, p = 0.3, 0.2
    k = torch.arange(200, dtype=torch.float64)
    helix = torch.stack([(w * k).cos(), (w * k).sin(), p * k], -1)[None]
    chord = (2 * math.sin(w / 2)) ** 2
    expected = math.degrees(math.acos((chord * math.cos(w) + p * p) / (chord + p * p)))
    assert float(curvature_degrees(helix)) == pytest.approx(expected, abs=1e-9)
    assert float(curvature_degrees(helix.float())) == pytest.approx(expected, abs=0.01)


def test_a_line_reads_zero_and_the_way_back_180():
    line = torch.arange(50.0)[:, None] * torch.randn(16)
    assert float(curvature_degrees(line[None])) == pytest.approx(0, abs=0.02)  # the states are rounded to float32
    assert float(curvature_degrees(line.double()[None])) < 1e-3
    there_and_back = torch.tensor([0.0, 1.0]).repeat(20)[:, None] * torch.randn(16)
    assert float(curvature_degrees(there_and_back[None])) == pytest.approx(180, abs=1e-4)


def test_angles_are_exact_where_arccos_is_not():
    """Three points that turn by a microradian: arccos of a float32 dot product reads 0 or 3e-4."""
    angle = 1e-6
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0 + math.cos(angle), math.sin(angle)]], dtype=torch.float32)
    steps = points.diff(dim=0)
    naive = torch.arccos((steps[0] @ steps[1]) / (steps[0].norm() * steps[1].norm()))
    assert float(turning_angles(Path.of(points[None]))[0]) == pytest.approx(angle, rel=1e-5)
    assert abs(float(naive) - angle) > 0.5 * angle


@pytest.mark.parametrize(
    ("make", "degrees", "correlation"),
    [
        (lambda: torch.randn(32, 400, 512), 120.0, -0.5),
        (lambda: torch.randn(32, 400, 512).cumsum(1), 90.0, 0.0),
        (lambda: ar1(0.5), 104.5, -0.25),
        (lambda: ar1(0.9), 92.9, -0.05),
    ],
    ids=["iid", "walk", "ar1 .5", "ar1 .9"],
)
def test_random_paths_read_their_expectation(make, degrees, correlation):
    """Cosine of neighbouring steps of AR(1) is -(1 - rho) / 2; in 512 dimensions angles concentrate around it."""
    x = make()
    assert float(curvature_degrees(x).mean()) == pytest.approx(degrees, abs=0.15)
    assert float(tangent_correlation(Path.of(x), 1).mean()) == pytest.approx(correlation, abs=0.003)
    assert abs(float(tangent_correlation(Path.of(x), 40).mean())) < 0.003


def test_tangent_correlation_of_a_circle_is_a_cosine():
    path = Path.of(circle(10.0, dtype=torch.float64))
    for lag in (1, 4, 9, 18):
        expected = math.cos(math.radians(10 * lag))
        assert float(tangent_correlation(path, lag)) == pytest.approx(expected, abs=1e-9)
    assert math.isnan(float(tangent_correlation(path, 99)))


def test_rotation_translation_and_scale_change_nothing():
    x = torch.randn(3, 60, 24, dtype=torch.float64).cumsum(1) + 0.3 * torch.randn(3, 60, 24, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    moved = 17.0 * (x @ rotation) + torch.randn(24, dtype=torch.float64)
    torch.testing.assert_close(curvature_degrees(moved), curvature_degrees(x), rtol=1e-10, atol=0)


def test_a_norm_of_its_own_for_each_state_does_change_it():
    """The documented lack of invariance: a line that does not pass the origin becomes an arc on the sphere."""
    line = torch.arange(40.0, dtype=torch.float64)[:, None] * torch.randn(16, dtype=torch.float64) + 5
    normed = line / line.norm(dim=-1, keepdim=True)
    assert float(curvature_degrees(line[None])) < 1e-3 < 0.1 < float(curvature_degrees(normed[None]))


def test_packed_equals_alone():
    lengths = [3, 40, 1, 2, 30, 17]
    documents = [torch.randn(n, 12) for n in lengths]
    packed = torch.cat([*documents, torch.randn(7, 12)])[None]  # the last seven are padding
    ids = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * 7)[None]
    turns = torch.tensor([max(n - 2, 0) for n in lengths], dtype=torch.float64)
    alone = torch.stack([curvature_degrees(document[None])[0] for document in documents])
    assert alone.isnan().tolist() == [n < 3 for n in lengths]
    expected = (alone.nan_to_num() * turns).sum() / turns.sum()
    torch.testing.assert_close(curvature_degrees(packed, ids)[0], expected)
    assert abs(float(curvature_degrees(packed)[0] - expected)) > 1e-3  # without ids it reads across documents


def test_an_id_that_comes_back_is_another_document():
    hidden = torch.randn(1, 20, 8)
    ids = torch.tensor([[0] * 10 + [1] * 5 + [0] * 5])
    other = torch.tensor([[0] * 10 + [1] * 5 + [2] * 5])
    assert torch.equal(curvature_degrees(hidden, ids), curvature_degrees(hidden, other))


def test_steps_of_length_zero_are_left_out():
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    with_a_stop = torch.cat([x[:, :15], x[:, 14:15], x[:, 15:]], 1)  # token 14 twice
    path = Path.of(with_a_stop)
    angles, mask = turning_angles(path)
    assert int(path.degenerate.sum()) == 1 and int((~mask).sum()) == 2
    kept = torch.rad2deg(angles[mask])
    torch.testing.assert_close(curvature_degrees(with_a_stop)[0], kept.mean())
    assert curvature_degrees(torch.ones(2, 9, 4)).isnan().all()  # nothing moves: no angle, not "straight"


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="expected floating"):
        curvature_degrees(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="document_ids"):
        curvature_degrees(torch.zeros(3, 4, 2), torch.zeros(3, 5))


def test_straightening_of_a_u():
    found = straightening([120.0, 110.0, 90.0, 80.0, 100.0])
    assert (found.change, found.minimum, found.minimum_boundary) == (-20.0, 80.0, 3)
    assert found.ratio == pytest.approx(1 / 6)
    assert found.slope == pytest.approx(-28.0)  # by hand: sum of centred depth x value over sum of squares
    with pytest.raises(ValueError, match="two boundaries"):
        straightening([1.0])
