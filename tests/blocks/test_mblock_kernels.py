"""The fused CPU kernel of the M block, in the dtypes that it trains in, against plain torch in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_cases import (
    PARTS,
    inner_inputs,
    random_segments,
    relative_errors,
    run_inner,
    segments_of,
    shapes,
)

from blocks.kernels import mamba2
from blocks.kernels.mamba2 import Mamba2Shape, check_against_reference, mamba2_inner, mamba2_inner_reference
from blocks.kernels.mamba2_cpu import mamba2_inner as operator
from errors import PreflightError

# Rounding of the projection and of y, dy and dx to 8 bits, in whatever cancels of it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
SHAPE = Mamba2Shape(head_dim=16, d_state=16, n_groups=1, chunk_size=16, eps=1e-5)
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float32", "bfloat16"])


@DTYPES
@settings(max_examples=40, deadline=None)
@given(
    shapes(),
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(2, 4),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 99),
)
def test_equals_plain_torch(dtype, sizes, batch, length, taps, share, seed):
    shape, n_heads = sizes
    tensors = inner_inputs(batch, length, n_heads, shape, taps, seed)
    tensors = [t.to(dtype if i == 0 else torch.float32).double() for i, t in enumerate(tensors)]
    segment_ids = random_segments(batch, length, share, seed)
    found = run_inner(mamba2_inner, tensors, segment_ids, shape, dtype)
    expected = run_inner(mamba2_inner_reference, tensors, segment_ids, shape, torch.float64)
    assert max(relative_errors(found, expected).values()) < TOLERANCE[dtype], relative_errors(found, expected)


@DTYPES
@pytest.mark.parametrize("lengths", [[64, 64], [63, 2, 63], [1] * 128, [16, 48, 1, 63], [128]], ids=str)
def test_documents_at_and_inside_chunk_edges(dtype, lengths):
    tensors = inner_inputs(2, 128, 4, SHAPE)
    tensors = [t.to(dtype if i == 0 else torch.float32).double() for i, t in enumerate(tensors)]
    segment_ids = segments_of(lengths, batch=2)
    found = run_inner(mamba2_inner, tensors, segment_ids, SHAPE, dtype)
    expected = run_inner(mamba2_inner_reference, tensors, segment_ids, SHAPE, torch.float64)
    assert max(relative_errors(found, expected).values()) < TOLERANCE[dtype]


@DTYPES
def test_nothing_of_another_document_enters_not_even_rounding(dtype):
    segment_ids = segments_of([20, 30, 14])
    tensors = inner_inputs(1, 64, 2, SHAPE)
    other = [t.clone() for t in tensors]
    other[0][:, :20] = 100 * other[0][:, :20]
    y, grad, *_ = run_inner(mamba2_inner, tensors, segment_ids, SHAPE, dtype)
    y_other, grad_other, *_ = run_inner(mamba2_inner, other, segment_ids, SHAPE, dtype)
    assert torch.equal(y[:, 20:], y_other[:, 20:]) and torch.equal(grad[:, 20:], grad_other[:, 20:])
    assert not torch.equal(y[:, :20], y_other[:, :20])


@DTYPES
def test_threads_do_not_change_a_bit(dtype):
    tensors, segment_ids = inner_inputs(3, 200, 4, SHAPE), random_segments(3, 200, 0.02, 0)
    one = run_inner(mamba2_inner, tensors, segment_ids, SHAPE, dtype)
    torch.set_num_threads(2)
    try:
        two = run_inner(mamba2_inner, tensors, segment_ids, SHAPE, dtype)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("part", range(len(PARTS)), ids=PARTS)
def test_nan_comes_out_where_it_went_in(part):
    """So that the finite check of a training step sees it."""
    tensors, segment_ids = inner_inputs(1, 40, 2, SHAPE), segments_of([40])
    tensors[part].view(-1)[-1] = torch.nan
    y, *gradients = run_inner(mamba2_inner, tensors, segment_ids, SHAPE, torch.float32)
    assert y.isnan().any() and gradients[0].isnan().any()


def test_gradients_of_any_strides():
    tensors, segment_ids = inner_inputs(2, 20, 2, SHAPE), segments_of([20], batch=2)
    leaf = tensors[0].float().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    parameters = [t.float() for t in tensors[1:]]
    mamba2_inner(leaf, *parameters, segment_ids, SHAPE).sum().backward()  # a gradient of stride 0
    expected = leaf.detach().double().requires_grad_()
    mamba2_inner_reference(expected, *[t.double() for t in parameters], segment_ids, SHAPE).sum().backward()
    assert (leaf.grad - expected.grad).norm() < 1e-5 * expected.grad.norm()


def test_states_are_kept_for_a_backward_only():
    tensors, segment_ids = [t.float() for t in inner_inputs(2, 40, 2, SHAPE)], segments_of([40], batch=2)
    sizes = (SHAPE.head_dim, SHAPE.d_state, SHAPE.n_groups, SHAPE.chunk_size, SHAPE.eps)
    with_states, without = (operator(*tensors, segment_ids, *sizes, save) for save in (True, False))
    assert torch.equal(with_states[0], without[0])
    assert with_states[2].shape == (2, 3, 2, 16, 16) and without[2].numel() == 0


@DTYPES
def test_operator_is_registered_in_full(dtype):
    tensors = [t.to(dtype if i == 0 else torch.float32) for i, t in enumerate(inner_inputs(2, 20, 2, SHAPE))]
    tensors = [t.requires_grad_() for t in tensors]
    sizes = (SHAPE.head_dim, SHAPE.d_state, SHAPE.n_groups, SHAPE.chunk_size, SHAPE.eps)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.library.opcheck(
        operator, (*tensors, segments_of([13, 7], batch=2), *sizes, True), test_utils=checks, **tolerance
    )


@DTYPES
def test_the_start_up_check_passes_here(dtype):
    errors = check_against_reference(torch.device("cpu"), dtype)
    assert set(errors) == {"output", *PARTS} and max(errors.values()) < TOLERANCE[dtype]


@pytest.mark.parametrize("damage", [lambda y: y.roll(1, dims=1), lambda y: y * torch.nan], ids=["shifted", "NaN"])
def test_the_start_up_check_stops_a_wrong_kernel(monkeypatch, damage):
    monkeypatch.setattr(mamba2, "mamba2_inner", lambda *a: damage(mamba2_inner_reference(*a)))
    with pytest.raises(PreflightError, match="disagrees with plain torch"):
        check_against_reference(torch.device("cpu"), torch.float32)
