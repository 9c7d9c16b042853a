"""The chunked SSD in plain torch against the recurrence spelled out, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_cases import random_segments, recurrence, scan_inputs, segments_of

from blocks.kernels import ssd as kernels
from blocks.kernels.ssd import ssd, ssd_reference

TOLERANCE = 1e-12


def outputs_and_gradients(form, inputs, *arguments):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = form(*leaves, *arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def assert_close(found, expected, tolerance=TOLERANCE):
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).abs().max() <= tolerance * (1 + b.abs().max())


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.integers(1, 24),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3, 4, 8, 64]),
    st.sampled_from([0.0, 0.2, 1.0]),
    st.integers(0, 99),
)
def test_equals_the_recurrence(batch, length, n_groups, per_group, chunk, share, seed):
    inputs = scan_inputs(batch, length, n_groups * per_group, n_groups, head_dim=3, d_state=2, seed=seed)
    segment_ids = random_segments(batch, length, share, seed)
    assert_close(
        outputs_and_gradients(ssd_reference, inputs, segment_ids, chunk),
        outputs_and_gradients(recurrence, inputs, segment_ids),
    )


@pytest.mark.parametrize("lengths", [[130], [64, 66], [63, 1, 1, 65], [10, 100, 20]], ids=str)
def test_chunk_size_does_not_change_the_result(lengths):
    inputs = scan_inputs(2, 130, 4, 2, head_dim=8, d_state=8)
    segment_ids = segments_of(lengths, batch=2)
    one = outputs_and_gradients(ssd_reference, inputs, segment_ids, 130)
    for chunk in (1, 16, 64, 1000):
        assert_close(outputs_and_gradients(ssd_reference, inputs, segment_ids, chunk), one)


def test_nothing_of_another_document_enters_not_even_rounding():
    segment_ids = segments_of([20, 30, 14])
    inputs = scan_inputs(1, 64, 2, 1, head_dim=8, d_state=8, dtype=torch.float32)
    other = [t.clone() for t in inputs]
    for i in (0, 1, 3, 4):
        other[i][:, :20] = 1e3 * other[i][:, :20].abs()
    y, y_other = (ssd_reference(*t, segment_ids, 32) for t in (inputs, other))
    assert torch.equal(y[:, 20:], y_other[:, 20:]) and not torch.equal(y[:, :20], y_other[:, :20])


def test_autocast_does_not_lower_the_products():
    inputs = scan_inputs(1, 40, 2, 1, head_dim=8, d_state=8, dtype=torch.float32)
    segment_ids = segments_of([40])
    with torch.autocast("cpu", torch.bfloat16):
        lowered = ssd_reference(*inputs, segment_ids, 16)
    assert torch.equal(lowered, ssd_reference(*inputs, segment_ids, 16))


def test_the_cuda_kernel_gets_what_it_expects(monkeypatch):
    def scan(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False, seq_idx=None):
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and chunk_size == 256
        return ssd_reference(x, dt, A, B, C, D, seq_idx, chunk_size)

    monkeypatch.setattr(kernels, "kernel_name", lambda device, dtype: kernels.CUDA_KERNEL)
    monkeypatch.setattr(kernels, "cuda_kernel", lambda: ((scan, None), "imported"))
    inputs, segment_ids = scan_inputs(2, 50, 4, 2, head_dim=4, d_state=4), random_segments(2, 50, 0.1, 0)
    assert_close([ssd(*inputs, segment_ids, 16)], [ssd_reference(*inputs, segment_ids, 16)])


def test_the_choice_is_named_and_its_reason_kept():
    assert kernels.kernel_name(torch.device("cpu"), torch.float32) == kernels.REFERENCE
    name = kernels.kernel_name(torch.device("cuda"), torch.bfloat16)
    assert name == kernels.CUDA_KERNEL or (kernels.REFERENCE in name and "Error" in name)
