"""Other people's implementations on given draws (tests/oracles/README.md), and a literal loop of our own."""

from pathlib import Path

import numpy as np
import pytest
import torch

from losses.geometry import close_gaps
from losses.stp import FORMS, compute_stp_loss
from losses.triples import Triples, draw

ORACLES = Path(__file__).parents[1] / "oracles"


def triples(points, first, last):
    """points (B, n, 3)."""
    s, r, t = points.unbind(-1)
    return Triples(s, r, t, torch.ones_like(s, dtype=torch.bool), torch.full_like(s, first), torch.full_like(s, last))


def test_seed_sample_loss():
    data = np.load(ORACLES / "stp_sample.npz")
    states = [torch.from_numpy(data[f"h{i}"]) for i in range(3)]
    length = states[0].shape[1]
    losses = []
    for hidden, base in zip(states, torch.from_numpy(data["base_positions"]), strict=True):
        points = base.sort(-1).values.permute(1, 0, 2) + torch.arange(3)
        losses.append(compute_stp_loss(hidden, triples=triples(points, 0, length - 1)))
    assert float(torch.stack(losses).mean()) == pytest.approx(float(data["loss"]), abs=1e-12)


def test_released_patch_complement_contiguous():
    data = np.load(ORACLES / "stp_patch_complement.npz")
    hidden, spans = torch.from_numpy(data["hidden"]), torch.from_numpy(data["spans"])
    (u0, _), (_, v1) = data["content_contiguous"].tolist()
    expected = torch.from_numpy(data["one_minus_cos_contiguous"])
    a, b = (spans + u0).unbind(1)
    points = torch.stack([a, (a + b) // 2, b], -1)[:, None]
    for row in range(hidden.shape[0]):
        here = triples(points, u0, v1).select(slice(row, row + 1))
        loss = compute_stp_loss(hidden[row : row + 1], form="patch_complement", triples=here)
        assert float(loss) == pytest.approx(float(expected[row]), abs=1e-12)


def test_released_patch_complement_with_a_gap():
    data = np.load(ORACLES / "stp_patch_complement.npz")
    hidden, spans = torch.from_numpy(data["hidden"]), torch.from_numpy(data["spans"])
    (u0, u1), (v0, v1) = data["content_gap"].tolist()
    expected = torch.from_numpy(data["one_minus_cos_gap"])
    length = hidden.shape[1]
    mask = torch.zeros(hidden.shape[:2], dtype=torch.bool)
    mask[:, u0 : u1 + 1] = mask[:, v0 : v1 + 1] = True

    def index(offset):  # an offset in content steps -> token
        return offset + u0 if offset <= u1 - u0 else offset - (u1 - u0) + v0

    for row, (a, b) in enumerate(spans.tolist()):
        points = torch.tensor([[[index(a), index(a), index(b)]]])
        loss = compute_stp_loss(
            hidden[row : row + 1],
            form="patch_complement",
            triples=triples(points, u0, v1),
            mask=mask[row : row + 1],
            gaps="close",
        )
        assert float(loss) == pytest.approx(float(expected[row]), abs=1e-12)
    # Both pieces keep their own steps, and nothing is left of the jump.
    closed = close_gaps(hidden, mask)
    assert torch.allclose(closed[:, v0], closed[:, u1], atol=1e-12)
    assert torch.allclose(closed[:, u0 + 1 : u1 + 1].diff(dim=1), hidden[:, u0 + 1 : u1 + 1].diff(dim=1), atol=1e-12)
    assert closed.shape[1] == length


@pytest.mark.parametrize("form", FORMS)
def test_literal_loop(form):
    """The definition, one triple at a time, over packed rows with padding."""
    ids = torch.tensor([[0] * 9 + [1] * 4 + [2] + [-1] * 2, [0] * 2 + [1] * 13 + [-1], [-1] * 16])
    hidden = [torch.randn(3, 16, 5, dtype=torch.float64) for _ in range(2)]
    drawn = draw("anchor", ids, 6, seed=0, step=3, row_ids=torch.arange(3))
    layers = []
    for h in hidden:
        values = []
        for b in range(3):
            for j in range(6):
                if not drawn.valid[b, j]:
                    continue
                s, r, t = (int(x[b, j]) for x in (drawn.s, drawn.r, drawn.t))
                members = [k for k in range(16) if ids[b, k] == ids[b, r]]
                if form == "consecutive":
                    s, t = r - 1, r + 1
                if form == "patch_complement":
                    if (s, t) == (members[0], members[-1]):
                        continue
                    one = h[b, t] - h[b, s]
                    two = (h[b, members[-1]] - h[b, members[0]]) - one
                else:
                    one, two = h[b, t] - h[b, r], h[b, r] - h[b, s]
                values.append(1 - torch.nn.functional.cosine_similarity(one, two, dim=0))
        layers.append(torch.stack(values).mean())
    expected = torch.stack(layers).mean()
    assert float(compute_stp_loss(hidden, form=form, triples=drawn)) == pytest.approx(float(expected), abs=1e-12)
