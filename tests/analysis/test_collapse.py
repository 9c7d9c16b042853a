"""Ranks, anisotropy and position shares with known answers; rounding."""

import math

import pytest
import torch
from analysis_cases import documents, measure

from analysis.collapse import (
    Moments,
    effective_rank,
    groups_that_fit,
    participation_ratio,
    rms_normalised,
    sample_tokens,
)
from analysis.families import block_changes, family_changes
from analysis.rounding import rounding_bias, stored_precision


def test_ranks_of_known_spectra():
    flat = torch.eye(20, dtype=torch.float64)
    assert float(effective_rank(flat)) == pytest.approx(20) and float(participation_ratio(flat)) == pytest.approx(20)
    line = torch.zeros(20, 20, dtype=torch.float64)
    line[3, 3] = 5.0
    assert float(effective_rank(line)) == pytest.approx(1) and float(participation_ratio(line)) == pytest.approx(1)
    two = torch.diag(torch.tensor([9.0, 1.0], dtype=torch.float64))  # singular values 3 : 1
    assert float(effective_rank(two)) == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert float(participation_ratio(two)) == pytest.approx(100 / 82)


def test_ranks_do_not_change_with_rotation_scale_and_translation():
    """The last one also where the mean is 1e4 times the spread: sums are taken around an origin near it."""
    rows = documents()
    rotation = torch.linalg.qr(torch.randn(12, 12)).Q
    moved = [3.0 * row @ rotation + 100.0 for row in rows]
    far = [row + 1e4 for row in rows]
    for name in ("effective_rank", "participation_ratio", "effective_rank_steps", "participation_ratio_steps"):
        want = float(measure([rows], centred=False).get(name).value[0])
        assert float(measure([moved], centred=False).get(name).value[0]) == pytest.approx(want, rel=1e-4)
        assert float(measure([far], centred=False).get(name).value[0]) == pytest.approx(want, rel=5e-3)


def test_mean_direction_energy_and_anisotropy_of_a_cone():
    """Unit noise around a mean of length 2 in many dimensions: energy 4 / 5, cosine of two tokens 4 / 5."""
    d_model = 400
    centre = torch.zeros(d_model)
    centre[0] = 2.0
    rows = [centre + torch.randn(60, d_model) / d_model**0.5 for _ in range(30)]
    found = measure([rows])
    for name in ("mean_direction_energy", "anisotropy"):
        assert float(found.get(name).value[0]) == pytest.approx(0.8, abs=0.01)
    assert abs(float(found.get("position_explained_share").value[0])) < 0.01


def test_anisotropy_pairs_tokens_of_different_documents_only():
    """Each document has its own direction: tokens of one agree, those of two do not."""
    rows = [
        torch.nn.functional.normalize(torch.randn(1, 256), dim=1).repeat(20, 1) * (1 + torch.rand(20, 1))
        for _ in range(40)
    ]
    assert abs(float(measure([rows]).get("anisotropy").value[0])) < 0.02


def test_anisotropy_of_two_orthogonal_documents_of_two_pieces_is_zero():
    """A long document comes as several rows: its own agreement is no likeness of different documents."""
    rows = torch.eye(2)[[0, 0, 1, 1]][:, None].repeat(1, 9, 1) * torch.arange(1.0, 10.0)[:, None]
    moments = Moments(2, 8)
    for piece in range(4):
        moments.update(rows[[piece]], sample_tokens(torch.tensor([9])), torch.tensor([piece // 2]))
    assert moments.metrics()["anisotropy"][0] == 0


def test_position_share_of_a_mixture():
    """x = position code of variance 1 + noise of variance 3: a quarter is explained."""
    code = torch.randn(50, 200)
    rows = [code + 3**0.5 * torch.randn(50, 200) for _ in range(64)]
    assert float(measure([rows]).get("position_explained_share").value[0]) == pytest.approx(0.25, abs=0.01)


def test_rms_normalised_states_have_unit_mean_square():
    normed = rms_normalised(5 * torch.randn(3, 7, 64))
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3, 7))


def test_groups_are_given_up_where_they_need_too_much_memory():
    assert groups_that_fit(28, 192) == 8
    assert groups_that_fit(66, 4096) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_precision_finds_what_was_rounded(dtype):
    x = torch.randn(4, 5, 6, dtype=dtype)
    assert stored_precision(x) == str(dtype)[6:]
    assert stored_precision(x.bfloat16()) == "bfloat16" == stored_precision(x.bfloat16().to(dtype))
    assert stored_precision(x.half().to(dtype)) == "float16"


@pytest.mark.parametrize("ratio", [50, 200, 600])
def test_rounding_bias_predicts_what_bfloat16_does_to_a_line(ratio):
    """1 - cos of neighbours on a straight path, states `ratio` times as long as the steps."""
    d_model = 2048
    start = torch.randn(32, 1, d_model, dtype=torch.float64)
    start *= ratio / start.norm(dim=-1, keepdim=True)
    step = torch.nn.functional.normalize(torch.randn(32, 1, d_model, dtype=torch.float64), dim=-1)
    line = (start + step * torch.arange(3)[:, None]).bfloat16().double()
    v = line.diff(dim=1)
    measured = 1 - torch.nn.functional.cosine_similarity(v[:, 0], v[:, 1], dim=-1).mean()
    assert rounding_bias(ratio, 1.0, "bfloat16") == pytest.approx(float(measured), rel=0.3)
    assert rounding_bias(ratio, 1.0, "float32") < 1e-6


def test_family_changes_add_up_and_are_means_of_blocks():
    """Boundaries that are 0, 1, 3, 6, 10 times a walk in norm: change by each block is known."""
    rows = documents()
    scales = [1.0, 2.0, 4.0, 7.0, 11.0]
    found = measure([[scale * row for row in rows] for scale in scales], centred=False)
    letters = ["A", "M", "A", "E"]
    norm = found.get("state_norm")
    unit = float(norm.value[0])
    assert block_changes(norm, letters).value == pytest.approx([unit, 2 * unit, 3 * unit, 4 * unit], rel=1e-5)
    changes = family_changes(norm, letters)
    assert {letter: family.blocks for letter, family in changes.items()} == {"A": [1, 3], "M": [2], "E": [4]}
    assert float(changes["A"].change.value[0]) == pytest.approx(2 * unit, rel=1e-5)
    assert float(changes["E"].entering.value[0]) == pytest.approx(7 * unit, rel=1e-5)
    assert float(changes["M"].leaving.value[0]) == pytest.approx(4 * unit, rel=1e-5)
    curvature = family_changes(found.get("curvature"), letters)["A"].change  # scale invariant: paired to nothing
    low, high = curvature.interval()
    assert abs(low[0]) < 1e-4 and abs(high[0]) < 1e-4
