"""Documents, padding, masks and positions: which tokens the loss touches."""

import pytest
import torch

from losses.stp import FORMS, compute_stp_loss
from losses.triples import Triples


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_triple(s, r, t, length):
    index = [torch.tensor([[k]]) for k in (s, r, t)]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    return Triples(*index, torch.ones(1, 1, dtype=torch.bool), zero, zero + length - 1)


def test_three_tokens_have_one_triple():
    hidden = torch.randn(1, 3, 8, dtype=torch.float64)
    for sampler in ("sorted_offset", "uniform", "anchor"):
        loss = compute_stp_loss(hidden, 5, sampler=sampler)
        assert float(loss) == pytest.approx(float(compute_stp_loss(hidden, triples=one_triple(0, 1, 2, 3))), abs=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "ids",
    [[0, 1, 2, 3, 4, 5], [-1] * 6, [0, 0, 1, 1, 2, 2], [0, 0, -1, -1, -1, -1]],
    ids=["ones", "pad", "twos", "end"],
)
def test_rows_without_room_give_a_connected_zero(form, ids):
    hidden = torch.randn(2, 6, 4, requires_grad=True)
    loss = compute_stp_loss(hidden, 4, form=form, document_ids=torch.tensor([ids, ids]))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_do_not_touch_each_other(form):
    """The gradient stays inside documents that have room, and the value is theirs alone."""
    ids = torch.tensor([[0] * 8 + [1] * 2 + [2] * 6 + [-1] * 4])
    hidden = torch.randn(1, 20, 8, dtype=torch.float64)
    hidden[0, 16:] = float("nan")  # padding may hold anything
    hidden[0, 8:10] = float("nan")  # so may a document without room
    hidden.requires_grad_()
    loss = compute_stp_loss(hidden, 64, form=form, document_ids=ids, generator=generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert (hidden.grad[0, 8:10] == 0).all() and (hidden.grad[0, 16:] == 0).all()
    assert (hidden.grad[0, :8].norm(dim=-1) > 0).all() and (hidden.grad[0, 10:16].norm(dim=-1) > 0).all()
    # A jump between documents, however large, is not seen.
    moved = hidden.detach().clone()
    moved[0, 10:16] += 100.0
    again = compute_stp_loss(moved, 64, form=form, document_ids=ids, generator=generator())
    assert float(again) == pytest.approx(float(loss), abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_padding_may_hold_anything(form):
    hidden = torch.randn(2, 8, 4)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    ids = torch.tensor([[0] * 8, [-1] * 8])
    loss = compute_stp_loss(hidden, 8, form=form, document_ids=ids, generator=generator())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all() and (hidden.grad[1] == 0).all()


def test_positions_that_restart_are_documents():
    hidden = torch.randn(2, 20, 8)
    ids = torch.tensor([[0] * 12 + [1] * 8, [0] * 5 + [1] * 15])
    positions = torch.tensor([[*range(12), *range(8)], [*range(5), *range(15)]])
    by_ids = compute_stp_loss(hidden, 16, document_ids=ids, generator=generator())
    by_positions = compute_stp_loss(hidden, 16, positions=positions, generator=generator())
    assert torch.equal(by_ids, by_positions)


def test_mask_keeps_triples_on_content():
    hidden = torch.randn(1, 16, 8, requires_grad=True)
    mask = torch.tensor([[False, True, True, False, True, False, True, True] + [False] * 8])
    compute_stp_loss(hidden, 200, mask=mask, generator=generator()).backward()
    touched = hidden.grad[0].norm(dim=-1) > 0
    assert torch.equal(touched, mask[0])
    # Consecutive means neighbours in the content.
    consecutive = compute_stp_loss(hidden, 200, form="consecutive", mask=mask, generator=generator())
    content = hidden[:, mask[0]]
    alone = compute_stp_loss(content, 200, form="consecutive", generator=generator())
    assert float(consecutive) == pytest.approx(float(alone), abs=1e-6)


def test_left_padding():
    content = torch.randn(1, 10, 8)
    padded = torch.cat([torch.full((1, 5, 8), float("nan")), content], 1)
    mask = torch.arange(15)[None] >= 5
    with_padding = compute_stp_loss(padded, 16, sampler="uniform", mask=mask, generator=generator())
    alone = compute_stp_loss(content, 16, sampler="uniform", generator=generator())
    assert float(with_padding) == pytest.approx(float(alone), abs=1e-6)
