"""Expert MLPs: the fused kernels against a loop over tokens in float64, and what must not change the result."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.kernels import expert_rows_cpu, grouped_experts_cpu
from blocks.kernels.grouped_experts import (
    CPU_KERNEL,
    KINDS,
    REFERENCE,
    dense_expert,
    grouped_experts,
    grouped_experts_reference,
    kernel_name,
)

# relative to the norm of the float64 result, from inputs already rounded to the dtype
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def literal(x, expert_ids, weights, up, down, kind):
    """y_n = sum_k w_nk MLP_{e_nk}(x_n), token by token."""
    rows = []
    for token in range(x.shape[0]):
        total = torch.zeros_like(x[token])
        for expert, weight in zip(expert_ids[token].tolist(), weights[token], strict=True):
            h = up[expert] @ x[token]
            if kind == "swiglu":
                gate, value = h[: h.numel() // 2], h[h.numel() // 2 :]
                a = gate / (1 + torch.exp(-gate)) * value
            else:
                a = torch.clamp(h, min=0) ** 2
            total = total + weight * (down[expert] @ a)
        rows.append(total)
    return torch.stack(rows)


def make(n_tokens, top_k, n_experts, d, inner, kind, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    ids = torch.rand(n_tokens, n_experts, generator=generator).topk(top_k).indices
    weights = torch.rand(n_tokens, top_k, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    up = normal(n_experts, 2 * inner if kind == "swiglu" else inner, d) / d**0.5
    weight_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = normal(n_tokens, d).to(dtype), weights, up, normal(n_experts, d, inner) / inner**0.5
    x, weights, up, down = tensors
    if dtype == torch.bfloat16:  # the kernel rounds them: start from rounded ones, so that only its sums are tested
        up, down = up.bfloat16(), down.bfloat16()
    return ids, [x, weights, up.to(weight_dtype), down.to(weight_dtype)]


def with_gradients(form, ids, tensors, kind, cotangent):
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, weights, up, down = leaves
    y = form(x, ids, weights, up, down, kind)
    y, rows = y if isinstance(y, tuple) else (y, None)
    return rows, [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def assert_close(fast, exact, cotangent, tolerance):
    """y, dx, dweights, dup, ddown; dweights are dot products whose terms may cancel: measured against their factors."""
    factors = cotangent.double().norm() * exact[0].norm() / len(cotangent) ** 0.5
    for name, a, b in zip(("y", "dx", "dweights", "dup", "ddown"), fast, exact, strict=True):
        scale = max(b.norm(), factors) if name == "dweights" else b.norm()
        assert (a.double() - b).norm() <= tolerance * scale, name


def assert_equals_literal(ids, tensors, kind, dtype):
    cotangent = torch.randn(tensors[0].shape).to(dtype)
    rows, fast = with_gradients(grouped_experts, ids, tensors, kind, cotangent)
    _, exact = with_gradients(literal, ids, [t.double() for t in tensors], kind, cotangent.double())
    assert rows.tolist() == torch.bincount(ids.flatten(), minlength=tensors[2].shape[0]).tolist()
    assert_close(fast, exact, cotangent, TOLERANCE[dtype])
    idle = rows == 0
    assert not fast[3][idle].any() and not fast[4][idle].any()


@EVERY_KIND
@DTYPES
@pytest.mark.parametrize("sizes", [(70, 2, 8, 32, 16), (150, 1, 3, 48, 80), (200, 4, 6, 16, 112)], ids=str)
def test_equals_a_loop_over_tokens(sizes, kind, dtype):
    assert_equals_literal(*make(*sizes, kind, dtype), kind, dtype)


@EVERY_KIND
@DTYPES
def test_idle_experts_one_token_and_one_expert_for_all(kind, dtype):
    for ids in ([[2, 0]], [[1, 1]] * 3, [[3, 0]] * 131):
        _, tensors = make(len(ids), 2, 5, 32, 32, kind, dtype)
        assert_equals_literal(torch.tensor(ids), tensors, kind, dtype)


@settings(max_examples=20, deadline=None)
@given(
    n_tokens=st.integers(1, 140),
    n_experts=st.integers(2, 9),
    top_k=st.integers(1, 2),
    d=st.sampled_from([16, 48, 80]),
    inner=st.sampled_from([16, 32, 96]),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_any_sizes_equal_the_loop_over_experts(n_tokens, n_experts, top_k, d, inner, kind, dtype, seed):
    ids, tensors = make(n_tokens, top_k, n_experts, d, inner, kind, dtype, seed)
    cotangent = torch.randn(n_tokens, d).to(dtype)
    _, fast = with_gradients(grouped_experts, ids, tensors, kind, cotangent)
    wide = [t.double() for t in tensors]
    _, exact = with_gradients(grouped_experts_reference, ids, wide, kind, cotangent.double())
    assert_close(fast, exact, cotangent, TOLERANCE[dtype])


@EVERY_KIND
@DTYPES
def test_one_dense_expert(kind, dtype):
    _, (x, _, up, down) = make(90, 1, 1, 32, 48, kind, dtype)
    x, up, down = (t.clone().requires_grad_() for t in (x, up[0], down[0]))
    y = dense_expert(x, up, down, kind)
    ids, ones = torch.zeros(90, 1, dtype=torch.int64), torch.ones(90, 1, dtype=torch.float64)
    exact = literal(x.double(), ids, ones, up.double()[None], down.double()[None], kind)
    assert (y.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    for a, b in zip(torch.autograd.grad(y.sum(), (x, up, down)), torch.autograd.grad(exact.sum(), (x, up, down))):
        assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm()


def test_expanded_upstream_gradient():
    """A plain sum sends a gradient of stride 0, at which grouped products stumble."""
    ids, tensors = make(40, 2, 4, 16, 16, "swiglu", torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    x, weights, up, down = leaves
    expanded = torch.autograd.grad(grouped_experts(x, ids, weights, up, down, "swiglu")[0].sum(), leaves)
    _, dense = with_gradients(grouped_experts, ids, tensors, "swiglu", torch.ones(40, 16))
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense[1:], strict=True))


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    ids, (x, weights, up, down) = make(40, 2, 4, 16, 16, "swiglu", torch.float32)
    with_saving = grouped_experts(x.clone().requires_grad_(), ids, weights, up, down, "swiglu")[0]
    *_, h = torch.ops.amer.grouped_experts(x, ids, weights, up, down, "swiglu", False)
    assert h.numel() == 0
    assert torch.equal(grouped_experts(x, ids, weights, up, down, "swiglu")[0], with_saving)


def test_sort_is_stable_and_complete():
    ids = np.random.default_rng(0).integers(0, 7, 500)
    rows, order, position = np.empty(9, np.int64), np.empty(500, np.int64), np.empty(500, np.int64)
    expert_rows_cpu.sort(ids, rows, order, position)
    assert np.array_equal(order, np.argsort(ids, kind="stable"))
    assert np.array_equal(rows, np.bincount(ids, minlength=9)) and np.array_equal(order[position], np.arange(500))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_result_does_not_depend_on_the_division_of_work(dtype, monkeypatch):
    ids, tensors = make(300, 2, 4, 128, 32, "swiglu", dtype)
    cotangent = torch.randn(300, 128).to(dtype)
    results = []
    for n_workers in (1, 3, 8):
        monkeypatch.setattr("numba.get_num_threads", lambda n=n_workers: n)
        results.append(with_gradients(grouped_experts, ids, tensors, "swiglu", cotangent)[1])
    splits = {grouped_experts_cpu.column_split(n, 4, 128) for n in (1, 3, 8)}
    assert len(splits) > 1  # the gradients were cut differently
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_names_its_kernel():
    cpu = torch.device("cpu")
    assert kernel_name(cpu, torch.float32) == kernel_name(cpu, torch.bfloat16) == CPU_KERNEL
    assert kernel_name(cpu, torch.float64) == REFERENCE
    assert "grouped_mm" in kernel_name(torch.device("cuda"), torch.bfloat16)
