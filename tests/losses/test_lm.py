"""Next-token cross-entropy without full logits, against torch's own on full logits in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.kernels.linear_cross_entropy import CPU_KERNEL, TORCH_KERNEL, chunk_tokens, kernel_name
from losses.lm import lm_loss_sum, lm_token_losses

# gradients relative to their norm; bfloat16: inputs are rounded first, probabilities are rounded once inside
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype)[6:])


def make(batch, length, n_words, d, dtype, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(batch, length, d, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(n_words, d, generator=generator)).to(dtype)
    labels = torch.randint(0, n_words, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < ignored] = -100
    return final, weight, labels


def exact_sum(final, weight, labels):
    logits = (final.double() @ weight.double().T).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="sum")


def assert_equals_full_logits(final, weight, labels, chunk, dtype):
    leaves = [t.clone().requires_grad_() for t in (final, weight)]
    wide = [t.double().requires_grad_() for t in (final, weight)]
    total, n_tokens = lm_loss_sum(*leaves, labels, chunk)
    exact = exact_sum(*wide, labels)
    assert n_tokens == (labels != -100).sum()
    # the Numba form keeps its logits in float32; plain torch rounds them to bfloat16 (2^-9 of a logit)
    rounded = dtype == torch.bfloat16 and kernel_name(final.device, dtype, final.shape[-1]) == TORCH_KERNEL
    assert (
        abs(total.double() - exact) <= (1e-2 if rounded else 1e-6) * exact + 1e-6 * n_tokens
    )  # float32 logits of size 1
    grads = torch.autograd.grad(3.0 * total, leaves)
    for a, b in zip(grads, torch.autograd.grad(3.0 * exact, wide), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@DTYPES
@pytest.mark.parametrize("n_words", [50, 64, 333], ids=lambda n: f"{n} words")
@pytest.mark.parametrize("d", [16, 48, 20], ids=lambda d: f"width {d}")
@pytest.mark.parametrize("chunk", [0, 16, 37])
def test_equals_full_logits(n_words, d, chunk, dtype):
    assert_equals_full_logits(*make(3, 43, n_words, d, dtype), chunk, dtype)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 50),
    n_words=st.integers(2, 200),
    d=st.sampled_from([16, 32, 24]),
    chunk=st.sampled_from([0, 1, 5, 64]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_any_sizes(batch, length, n_words, d, chunk, ignored, dtype):
    assert_equals_full_logits(*make(batch, length, n_words, d, dtype, ignored), chunk, dtype)


@DTYPES
def test_without_labels_zero_with_a_zero_gradient(dtype):
    final, weight, labels = make(2, 9, 40, 16, dtype)
    leaves = [t.clone().requires_grad_() for t in (final, weight)]
    total, n_tokens = lm_loss_sum(*leaves, torch.full_like(labels, -100))
    assert total == 0 and n_tokens == 0
    assert not any(grad.any() for grad in torch.autograd.grad(total, leaves))


def test_ignored_rows_and_words_beyond_the_vocabulary_get_no_gradient():
    final, weight, labels = make(2, 30, 50, 16, torch.float32)
    labels[0] = -100
    leaf = final.clone().requires_grad_()
    total, _ = lm_loss_sum(leaf, weight, labels)
    assert not torch.autograd.grad(total, leaf)[0][labels == -100].any()


@DTYPES
def test_token_losses_are_the_same_per_token(dtype):
    final, weight, labels = make(2, 30, 50, 16, dtype)
    losses = lm_token_losses(final, weight, labels)
    logits = (final.double() @ weight.double().T).flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(2, 30)
    assert torch.allclose(losses.double(), exact, rtol=1e-5, atol=1e-6)
    assert not losses[labels == -100].any() and not losses.requires_grad


def test_sums_of_micro_batches_add_up():
    final, weight, labels = make(4, 25, 60, 32, torch.float32)
    whole = lm_loss_sum(final, weight, labels)[0]
    parts = sum(lm_loss_sum(f, weight, y)[0] for f, y in zip(final.split(1), labels.split(1), strict=True))
    assert torch.allclose(whole, parts, rtol=1e-6)


def test_large_logits_are_finite():
    final, weight, labels = make(2, 30, 50, 16, torch.float32)
    leaf = (1e4 * final).requires_grad_()
    total, _ = lm_loss_sum(leaf, weight, labels)
    assert total.isfinite() and abs(total.double() - exact_sum(leaf, weight, labels)) <= 1e-5 * total
    assert torch.autograd.grad(total, leaf)[0].isfinite().all()


def test_nan_is_not_hidden():
    final, weight, labels = make(1, 30, 50, 16, torch.float32, ignored=0)
    final[0, 4] = float("nan")
    assert lm_loss_sum(final, weight, labels)[0].isnan()


def test_backward_twice_gives_the_same():
    """Diagnostics take the gradient of the loss before the step does."""
    final, weight, labels = make(2, 30, 50, 16, torch.float32)
    leaf = weight.clone().requires_grad_()
    total, _ = lm_loss_sum(final, leaf, labels)
    first = torch.autograd.grad(0.5 * total, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(0.5 * total, leaf)[0])


def test_only_what_needs_a_gradient_gets_one():
    final, weight, labels = make(2, 30, 50, 16, torch.float32)
    assert not lm_loss_sum(final, weight, labels)[0].requires_grad
    with torch.no_grad():
        assert not lm_loss_sum(final.clone().requires_grad_(), weight, labels)[0].requires_grad
    leaf = final.clone().requires_grad_()
    assert lm_loss_sum(leaf, weight, labels)[0].requires_grad


def test_autocast_runs_the_products_in_bfloat16():
    final, weight, labels = make(2, 60, 90, 32, torch.float32)
    leaf = weight.clone().requires_grad_()
    exact = lm_loss_sum(final, leaf, labels)[0]
    with torch.autocast("cpu", torch.bfloat16):
        rough = lm_loss_sum(final, leaf, labels)[0]
    assert rough.dtype == torch.float32 and rough != exact and abs(rough - exact) < 2e-3 * exact
    grads = [torch.autograd.grad(total, leaf)[0] for total in (rough, exact)]
    assert grads[0].dtype == torch.float32 and (grads[0] - grads[1]).norm() < 0.01 * grads[1].norm()


@pytest.mark.parametrize("label", [50, -1])
def test_a_label_outside_the_vocabulary_is_refused(label):
    final, weight, labels = make(1, 5, 50, 16, torch.float32)
    labels[0, 2] = label
    with pytest.raises(ValueError, match="labels"):
        lm_loss_sum(final, weight, labels)


@pytest.mark.slow
def test_compiles_as_one_graph():
    final, weight, labels = make(2, 30, 50, 16, torch.float32)
    compiled = torch.compile(lm_loss_sum, fullgraph=True)
    leaves = [t.clone().requires_grad_() for t in (final, weight)]
    (plain, count), (total, count_again) = lm_loss_sum(*leaves, labels), compiled(*leaves, labels)
    assert torch.allclose(plain, total) and count == count_again
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(total, leaves), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_names_its_kernel():
    cpu = torch.device("cpu")
    assert kernel_name(cpu, torch.float32, 32) == kernel_name(cpu, torch.bfloat16, 32) == CPU_KERNEL
    assert kernel_name(cpu, torch.float64, 32) == kernel_name(cpu, torch.float32, 20) == TORCH_KERNEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_words", [16384, 32000, 50257, 65536])
def test_a_chunk_fits_the_cache_of_a_cpu_and_fills_a_gpu(n_words, dtype):
    """On a GPU each chunk reads the weight and adds to its gradient, so there are few of them."""
    assert 128 <= chunk_tokens(n_words, dtype, "cpu") <= 512
    assert 2048 <= chunk_tokens(n_words, dtype, "cuda") <= 8192
    assert 0.45 <= 4 * n_words * chunk_tokens(n_words, dtype, "cuda") / 2**30 <= 1
