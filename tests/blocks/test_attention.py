"""Document attention: the fast forms against dense masked attention in float64, whatever the layout of documents."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.kernels import attention, attention_cpu
from blocks.kernels.attention import (
    CPU_DOUBLE_KERNEL,
    CPU_KERNEL,
    document_attention,
    document_attention_reference,
    kernel_name,
)
from model.context import SequenceContext

# relative to the norm of the float64 result; bfloat16: inputs are rounded first, so this is the kernel's own rounding
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])


def segments_of(rows):
    """rows: document lengths of each row -> segment_ids (B, T)."""
    ids = [[i for i, length in enumerate(lengths) for _ in range(length)] for lengths in rows]
    return SequenceContext.from_document_ids(torch.tensor(ids, dtype=torch.int32)).segment_ids


def operands(segment_ids, n_heads, n_kv_heads, head_dim, dtype):
    shape = segment_ids.shape
    return [torch.randn(*shape, heads, head_dim).to(dtype) for heads in (n_heads, n_kv_heads, n_kv_heads)]


def with_gradients(function, operands, cotangent):
    operands = [t.clone().requires_grad_() for t in operands]
    out = function(*operands)
    return [out.detach(), *torch.autograd.grad(out, operands, cotangent)]


def assert_equals_reference(segment_ids, tensors, window, dtype):
    cotangent = torch.randn_like(tensors[0])
    fast = with_gradients(lambda q, k, v: document_attention(q, k, v, segment_ids, window), tensors, cotangent)
    wide = [t.double() for t in (*tensors, cotangent)]
    slow = with_gradients(lambda q, k, v: document_attention_reference(q, k, v, segment_ids, window), wide[:3], wide[3])
    # a token that reads itself alone has no gradient in q and k: rounding there is measured against that of v
    scales = [slow[0].norm(), *[max(b.norm() for b in slow[1:])] * 3]
    for name, a, b, scale in zip(("out", "dq", "dk", "dv"), fast, slow, scales, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * scale, name


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40], ids=lambda window: f"window {window}")
@pytest.mark.parametrize(
    "rows", [[[64]], [[33, 30, 1], [1, 1, 62]], [[1] * 20], [[16, 17, 15, 16]]], ids=["one", "ragged", "ones", "edges"]
)
def test_equals_masked_attention(rows, window, dtype):
    segment_ids = segments_of(rows)
    assert_equals_reference(segment_ids, operands(segment_ids, 4, 2, 16, dtype), window, dtype)


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1, 8), (3, 3, 5), (6, 2, 24), (4, 1, 64), (2, 1, 80)], ids=str)
def test_any_heads_and_widths(heads, dtype):
    segment_ids = segments_of([[20, 13], [5, 28]])
    assert_equals_reference(segment_ids, operands(segment_ids, *heads, dtype), None, dtype)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5), min_size=1, max_size=3),
    st.sampled_from([None, 1, 3, 16, 25]),
    st.sampled_from([(2, 1, 8), (4, 2, 16), (3, 1, 12)]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_layout(rows, window, heads, dtype):
    longest = max(sum(lengths) for lengths in rows)
    segment_ids = segments_of([[*lengths, longest - sum(lengths)] for lengths in rows])
    assert_equals_reference(segment_ids, operands(segment_ids, *heads, dtype), window, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_each_document_alone_is_plain_causal_attention(dtype):
    """Against torch's own causal attention on each document by itself: no mask of ours is involved."""
    lengths = [40, 1, 23]
    segment_ids = segments_of([lengths])
    q, k, v = operands(segment_ids, 4, 2, 16, dtype)
    out, begin = document_attention(q, k, v, segment_ids), 0
    for length in lengths:
        own = [t[:, begin : begin + length].double().transpose(1, 2) for t in (q, k, v)]
        alone = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True).transpose(1, 2)
        part = out[:, begin : begin + length].double()
        assert (part - alone).norm() <= TOLERANCE[dtype] * alone.norm()
        begin += length


def test_large_scores_neither_overflow_nor_leak():
    segment_ids = segments_of([[30, 34]])
    q, k, v = operands(segment_ids, 2, 2, 16, torch.float32)
    out = document_attention(100 * q, 100 * k, v, segment_ids)
    exact = document_attention_reference(100 * q.double(), 100 * k.double(), v.double(), segment_ids)
    assert out.isfinite().all()
    assert (out - exact).abs().max() < 2e-2  # scores in the thousands: float32 resolves them to about 1e-3


def test_nan_stays_visible_and_in_its_document():
    segment_ids = segments_of([[20, 12]])
    q, k, v = operands(segment_ids, 2, 1, 16, torch.float32)
    q[0, 5] = float("nan")
    out = document_attention(q, k, v, segment_ids)
    assert out[0, 5].isnan().all() and out[0, 20:].isfinite().all()


def test_result_does_not_depend_on_the_number_of_workers():
    """The kernels under different divisions of the work: bit-identical."""
    bounds, sizes = np.array([0, 50, 51, 90, 128]), (4, 2, 16)  # heads, key heads, head_dim
    n_heads, n_kv_heads, head_dim = sizes
    widths = [n_heads * head_dim, n_kv_heads * head_dim, n_kv_heads * head_dim, n_heads * head_dim]
    random = np.random.default_rng(0)
    q, k, v, grad = (random.standard_normal(128 * width, dtype=np.float32) for width in widths)
    results = []
    for n_workers in (1, 2, 5, 16):
        plan = bounds, *attention_cpu.assign(bounds, n_kv_heads, n_workers), *sizes, 0, np.float32(0.25)
        out, lse, dq, dk, dv = (np.zeros_like(t) for t in (q, q[: 128 * n_heads], q, k, v))
        attention_cpu.forward(q, k, v, out, lse, *plan)
        attention_cpu.backward(grad, q, k, v, out, lse, dq, dk, dv, *plan)
        results.append([out, lse, dq, dk, dv])
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 9])
def test_flex_form_agrees_where_it_can_run(window, monkeypatch):
    """The CUDA form, forward only (torch has no backward for it on a CPU)."""
    segment_ids = segments_of([[100, 28], [1, 127]])
    q, k, v = operands(segment_ids, 4, 2, 16, torch.float32)
    monkeypatch.setattr(attention, "uses_flex", lambda device: True)
    with torch.no_grad():
        out = document_attention(q, k, v, segment_ids, window)
        exact = document_attention_reference(q, k, v, segment_ids, window)
    assert (out - exact).norm() <= 1e-6 * exact.norm()


def test_names_its_kernel():
    cpu = torch.device("cpu")
    assert kernel_name(cpu, torch.float32) == kernel_name(cpu, torch.bfloat16) == CPU_KERNEL
    assert kernel_name(cpu, torch.float64) == CPU_DOUBLE_KERNEL
    assert "flex" in kernel_name(torch.device("cuda"), torch.bfloat16)
