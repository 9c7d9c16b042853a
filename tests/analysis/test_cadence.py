"""The subset that training logs: the same numbers as the inspector's, grouped by family, without a trace."""

import pytest
import torch

from analysis.cadence import RANK_TOKENS, cheap_metrics
from analysis.curvature import curvature_degrees
from tests.oracles import curvature_oracle as oracle

B, T, D = 3, 60, 16
LETTERS = ["A", "M", "A"]


def case():
    states = [torch.randn(B, T, D, requires_grad=True) for _ in range(5)]
    ids = torch.zeros(B, T, dtype=torch.int32)
    ids[0, 25:] = 1
    ids[1, 50:] = -1
    return states, ids


def test_families_are_means_of_their_boundaries():
    states, ids = case()
    found = cheap_metrics(states[:4], states[4], ids, LETTERS)
    degrees = [float(curvature_degrees(h, ids).mean()) for h in states]
    assert found["curvature/degrees/embedding"] == pytest.approx(degrees[0])
    assert found["curvature/degrees/A"] == pytest.approx((degrees[1] + degrees[3]) / 2)
    assert found["curvature/degrees/M"] == pytest.approx(degrees[2])
    assert found["curvature/degrees/final"] == pytest.approx(degrees[4])
    names = {"degrees", "stp_consecutive", "state_norm", "step_norm", "effective_rank"}
    assert {key.split("/")[1] for key in found} == names and len(found) == 5 * 4
    assert all(h.grad is None for h in states)


def test_rank_is_that_of_the_sampled_tokens():
    states, ids = case()
    places = (ids.flatten() >= 0).nonzero().flatten()
    chosen = places[torch.linspace(0, len(places) - 1, RANK_TOKENS).long()]
    want = oracle.effective_rank(states[2].detach().flatten(0, 1)[chosen].double().numpy())
    found = cheap_metrics(states[:4], states[4], ids, LETTERS)
    assert found["curvature/effective_rank/M"] == pytest.approx(want, rel=1e-4)


def test_padding_is_not_read_and_few_rows_are_enough():
    states, ids = case()
    spoiled = [h.detach().clone() for h in states]
    for h in spoiled:
        h[1, 50:] = float("nan")
    want = cheap_metrics(states[:4], states[4], ids, LETTERS)
    assert cheap_metrics(spoiled[:4], spoiled[4], ids, LETTERS) == pytest.approx(want)
    first = cheap_metrics([h[:1] for h in states[:4]], states[4][:1], ids[:1], LETTERS)
    assert cheap_metrics(states[:4], states[4], ids, LETTERS, max_rows=1) == pytest.approx(first)


def test_rows_without_a_turn_give_nan_and_no_error():
    states = [torch.randn(2, 2, 8) for _ in range(5)]
    found = cheap_metrics(states[:4], states[4], torch.zeros(2, 2, dtype=torch.int32), LETTERS)
    assert found["curvature/degrees/A"] != found["curvature/degrees/A"]
