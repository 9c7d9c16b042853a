"""The causal convolution in plain torch against a literal loop, and the layout that the CUDA kernel is given."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_cases import random_segments

from blocks.kernels import causal_conv as kernels
from blocks.kernels.causal_conv import causal_conv, causal_conv_reference


def literal(x, weight, bias, segment_ids):
    y = torch.zeros_like(x)
    taps = weight.shape[1]
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias
            for back in range(min(taps, t + 1)):
                if segment_ids[b, t - back] == segment_ids[b, t]:
                    total = total + weight[:, taps - 1 - back] * x[b, t - back]
            y[b, t] = F.silu(total)
    return y


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 2), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_equals_the_literal_loop(batch, length, taps, share, seed):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((batch, length, 3), (3, taps), (3,)))
    segment_ids = random_segments(batch, length, share, seed)
    expected = literal(x, weight, bias, segment_ids)
    assert (causal_conv_reference(x, weight, bias, segment_ids) - expected).abs().max() < 1e-12


def test_gradients():
    segment_ids = random_segments(2, 9, 0.3, 0)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 9, 3), (3, 4), (3,))]
    assert torch.autograd.gradcheck(lambda *t: causal_conv_reference(*t, segment_ids), leaves)


@pytest.mark.parametrize("channels", [8, 21])
def test_the_cuda_kernel_gets_the_layout_that_it_expects(monkeypatch, channels):
    def convolve(x, weight, bias, seq_idx=None, activation=None):
        assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.shape[1] % 8 == 0
        assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous() and activation == "silu"
        return causal_conv_reference(x.transpose(1, 2), weight, bias, seq_idx).transpose(1, 2)

    monkeypatch.setattr(kernels, "kernel_name", lambda device, dtype: kernels.CUDA_KERNEL)
    monkeypatch.setattr(kernels, "cuda_kernel", lambda: ((convolve, None), "imported"))
    wide = torch.randn(2, 10, channels + 5)  # as a slice of the projection
    x, weight, bias = wide[..., 5:], torch.randn(channels, 4), torch.randn(channels)
    segment_ids = random_segments(2, 10, 0.3, 0)
    assert torch.allclose(
        causal_conv(x, weight, bias, segment_ids), causal_conv_reference(x, weight, bias, segment_ids), atol=1e-6
    )


def test_the_choice_is_named_and_its_reason_kept():
    assert kernels.kernel_name(torch.device("cpu"), torch.float32) == kernels.REFERENCE
    name = kernels.kernel_name(torch.device("cuda"), torch.bfloat16)
    assert name == kernels.CUDA_KERNEL or (kernels.REFERENCE in name and "Error" in name)
