"""The fused form of what stands between an R layer's projections, against its parts in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m2rnn_cases import make_inputs, random_starts

from blocks.kernels import m2rnn_mixer as mixers
from blocks.kernels.m2rnn_layout import M2RNNShape
from blocks.kernels.m2rnn_mixer import (
    CPU_KERNEL,
    check_against_reference,
    kernel_name,
    m2rnn_mixer,
    m2rnn_mixer_composed,
    m2rnn_mixer_reference,
)
from errors import PreflightError

NAMES = ("projected", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "state_weight", "norm_weight")


def make_case(batch, length, n_heads, n_q, n_k, key_dim, value_dim, taps=4, share=0.1, clip=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inner, channels = n_heads * value_dim, (n_q + n_k) * key_dim + n_heads * value_dim
    weight = make_inputs(n_heads=n_heads, n_q=1, n_k=1, key_dim=key_dim, value_dim=value_dim, seed=seed)[3]
    tensors = [
        normal(batch, length, inner + channels + n_heads),
        0.5 * normal(channels, taps),
        0.5 * normal(channels),
        normal(n_heads) - 2,
        normal(n_heads),
        normal(n_heads, value_dim),
        weight,
        1 + 0.2 * normal(inner),
    ]
    starts = random_starts(batch, length, share, seed)
    starts[:, 0] = True
    segment_ids = (starts.cumsum(dim=1) - 1).to(torch.int32)
    return (
        tensors,
        segment_ids,
        starts,
        M2RNNShape(key_dim, value_dim, n_q, n_k, 0.1, clip),
    )  # an epsilon that keeps a norm over one channel tame


def run(form, tensors, segment_ids, starts, shape):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = form(*leaves, segment_ids, starts, shape)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).bfloat16()  # exact in every dtype
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))]


def errors(found, expected):
    pairs = zip(("y", *NAMES), found, expected, strict=True)
    return {n: float((a.double() - b).norm() / b.norm().clamp(min=b.numel() ** 0.5)) for n, a, b in pairs}


def as_trained(tensors, dtype):
    """The projection in `dtype`, parameters in float32."""
    return [t.to(dtype if i == 0 else torch.float32) for i, t in enumerate(tensors)]


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.sampled_from([1, 2, 5, 31, 33, 63, 65, 130]),  # around the blocks of 64 and the chunks of 32
    heads=st.sampled_from([(1, 1, 1), (4, 1, 2), (6, 3, 1)]),
    key_dim=st.sampled_from([1, 3, 8, 16]),
    value_dim=st.sampled_from([1, 5, 16, 20]),
    taps=st.integers(2, 4),
    share=st.sampled_from([0.0, 0.1, 0.6]),
    clip=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 100),
)
def test_fused_equals_its_parts(batch, length, heads, key_dim, value_dim, taps, share, clip, seed):
    case = make_case(batch, length, *heads, key_dim, value_dim, taps, share, clip, seed)
    expected = run(m2rnn_mixer_reference, *case)
    found = run(m2rnn_mixer, as_trained(case[0], torch.float32), *case[1:])
    worst = errors(found, expected)
    assert max(worst.values()) < 1e-4, worst  # sums over 130 tokens of terms that cancel


def test_float64_takes_the_parts_and_says_so():
    case = make_case(2, 9, 2, 1, 1, 4, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(run(m2rnn_mixer, *case), run(m2rnn_mixer_composed, *case), strict=True)
    )
    cpu = torch.device("cpu")
    assert kernel_name(cpu, torch.float32) == kernel_name(cpu, torch.bfloat16) == CPU_KERNEL
    assert kernel_name(cpu, torch.float64) != CPU_KERNEL


def test_the_composed_form_equals_the_reference():
    case = make_case(2, 40, 4, 1, 2, 5, 6, taps=3, clip=0.2)
    worst = errors(run(m2rnn_mixer_composed, *case), run(m2rnn_mixer_reference, *case))
    assert max(worst.values()) < 1e-12, worst


def test_start_up_check(monkeypatch):
    """It passes on the kernels that are here, and stops a run whose kernel is wrong or gives NaN."""
    cpu = torch.device("cpu")
    assert max(check_against_reference(cpu, torch.float32).values()) < 1e-4
    assert 1e-4 < max(check_against_reference(cpu, torch.bfloat16).values()) < 5e-2
    for wrong in (lambda *a: 1.1 * m2rnn_mixer(*a), lambda *a: m2rnn_mixer(*a) * float("nan")):
        monkeypatch.setattr(mixers, "m2rnn_mixer", wrong)
        with pytest.raises(PreflightError, match="R kernel 'fused M2RNN"):
            check_against_reference(cpu, torch.float32)


def test_bfloat16_rounds_only_what_it_stores():
    """The projection, the result and the projection's gradient are bfloat16; all between is float32."""
    tensors, *rest = make_case(2, 70, 4, 1, 1, 16, 16)
    low = as_trained(tensors, torch.bfloat16)
    found = run(m2rnn_mixer, low, *rest)
    expected = run(m2rnn_mixer_composed, [t.double() for t in low], *rest)
    worst = errors(found, expected)
    assert max(worst.values()) < 4e-3, worst
    assert [t.dtype for t in found] == [torch.bfloat16] * 2 + [torch.float32] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_threads_give_the_same_bits(dtype):
    tensors, *rest = make_case(3, 130, 4, 2, 1, 16, 16)
    one = run(m2rnn_mixer, as_trained(tensors, dtype), *rest)
    torch.set_num_threads(2)
    try:
        two = run(m2rnn_mixer, as_trained(tensors, dtype), *rest)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_projection_that_is_not_contiguous():
    tensors, *rest = make_case(2, 20, 2, 1, 1, 16, 16)
    tensors = as_trained(tensors, torch.float32)

    def strided(projected, *others):
        return m2rnn_mixer(projected.transpose(0, 1).contiguous().transpose(0, 1), *others)

    pairs = zip(run(strided, tensors, *rest), run(m2rnn_mixer, tensors, *rest), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_is_saved_for_the_backward_pass():
    """Besides its inputs: y and every 32nd state, nothing of the length of the row times the state."""
    tensors, *rest = make_case(2, 64, 4, 1, 1, 16, 16)
    leaves = [t.requires_grad_() for t in as_trained(tensors, torch.float32)]
    own, seen = {t.untyped_storage().data_ptr() for t in (*leaves, *rest[:2])}, {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = m2rnn_mixer(*leaves, *rest)
    assert kept.requires_grad
    saved = sum(size for pointer, size in seen.items() if pointer not in own)
    y, states = 4 * 2 * 64 * 64, 4 * 2 * 4 * 2 * 256
    assert saved <= (y + states) * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_operator_is_registered_as_it_behaves(dtype):
    tensors, segment_ids, starts, shape = make_case(2, 18, 2, 1, 1, 16, 16)
    leaves = [t.requires_grad_() for t in as_trained(tensors, dtype)]
    sizes = (shape.key_dim, shape.value_dim, shape.n_q_heads, shape.n_k_heads, shape.eps, float("inf"))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.amer.m2rnn_mixer.default, (*leaves, segment_ids, starts, *sizes), test_utils=checks)
