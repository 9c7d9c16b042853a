"""The M2RNN kernels against the authors' numbers, a literal loop, finite differences, and each other.

float32 and bfloat16 run the Numba kernel, float64 the plain torch one with the same hand-written backward pass.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from m2rnn_cases import NAMES, literal_loop, make_inputs, random_starts, relative_errors, run

from blocks.kernels.m2rnn import CHUNKED, NUMBA, kernel_name, m2rnn, m2rnn_reference

GOLDEN = Path(__file__).parents[1] / "oracles" / "m2rnn.npz"
# Frobenius error over norm. float32: rounding over some tens of steps and a tanh that is exact to 4e-7.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])


def literal(q, k, v, weight, forget, skip, starts, initial_state):
    return literal_loop(q, k, v, weight, forget, skip, initial_state, starts)


@pytest.mark.parametrize("kernel", [m2rnn, m2rnn_reference], ids=["kernel", "reference"])
@DTYPES
def test_matches_the_authors_numbers(kernel, dtype):
    golden = {name: torch.from_numpy(array).to(dtype) for name, array in np.load(GOLDEN).items()}
    inputs = [golden[name].clone().requires_grad_() for name in ("q", "k", "v", "W", "f", "h0")]
    y, last = kernel(*inputs[:5], initial_state=inputs[5])
    gradients = torch.autograd.grad((y, last), inputs, (golden["grad_y"], golden["grad_h"]))
    expected = [golden["y"], golden["h"], *(golden[f"grad_{name}"] for name in ("q", "k", "v", "W", "f", "h0"))]
    for found, wanted in zip((y, last, *gradients), expected, strict=True):
        assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    groups=st.sampled_from([(1, 1, 1), (4, 1, 1), (4, 2, 4), (6, 3, 2)]),
    key_dim=st.integers(1, 9),
    value_dim=st.integers(1, 18),
    chunk=st.integers(1, 24),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 1000),
)
def test_matches_the_literal_loop(batch, length, groups, key_dim, value_dim, chunk, share, dtype, seed):
    inputs = make_inputs(batch, length, *groups, key_dim, value_dim, dtype, seed)
    starts = random_starts(batch, length, share, seed)
    found = run(m2rnn, inputs, starts, chunk_size=chunk)
    expected = run(literal, [t.double() for t in inputs], starts)
    errors = relative_errors(found, expected)
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert [t.dtype for t in found] == [dtype] * len(found)


@DTYPES
def test_full_tiles_match_the_literal_loop(dtype):
    """K = V = 16 as in training, nothing padded; V = 32, more than one register wide; only K padded."""
    for key_dim, value_dim in ((16, 16), (64, 32), (1, 16)):
        inputs = make_inputs(2, 35, 2, 1, 1, key_dim, value_dim, dtype)
        starts = random_starts(2, 35, 0.1)
        errors = relative_errors(run(m2rnn, inputs, starts), run(literal, [t.double() for t in inputs], starts))
        assert max(errors.values()) < TOLERANCE[dtype], errors


def test_gradcheck():
    """Finite differences against the hand-written backward pass, resets and both extra inputs included."""
    inputs = [t.requires_grad_() for t in make_inputs(2, 7, 2, 1, 2, 2, 3)]
    starts = torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 3] = starts[1, 0] = starts[1, 4] = starts[1, 5] = True

    def function(*leaves):
        return m2rnn(*leaves[:6], starts, leaves[6], chunk_size=3)

    assert torch.autograd.gradcheck(function, inputs)


@DTYPES
def test_chunk_size_does_not_change_the_result(dtype):
    inputs, starts = make_inputs(2, 37, dtype=dtype), random_starts(2, 37, 0.15)
    results = [run(m2rnn, inputs, starts, chunk_size=chunk) for chunk in (1, 4, 16, 36, 37, 64)]
    for other in results[1:]:
        for name, found, expected in zip(("y", "last", *NAMES), other, results[0], strict=True):
            # Only the order in which the weight's terms are added depends on the chunks.
            tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}[dtype] if name == "weight" else 0.0
            assert (found - expected).norm() <= tolerance * expected.norm(), name


@DTYPES
@pytest.mark.parametrize(
    "lengths",
    [[40], [16, 16, 8], [15, 1, 1, 1, 22], [1] * 40, [17, 23], [32, 8]],
    ids=lambda lengths: str(lengths)[:12],
)
def test_packed_equals_each_document_alone(lengths, dtype):
    """Outputs and gradients; boundaries inside and at the edges of the chunks of 16, one-token documents."""
    *inputs, _ = make_inputs(1, 40, dtype=dtype)
    dy = torch.randn(1, 40, 4, 3, dtype=dtype)

    def gradients(tensors, cotangent, starts):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y, _ = m2rnn(*leaves, starts)
        return y.detach(), torch.autograd.grad(y, leaves, cotangent)

    begins = [sum(lengths[:i]) for i in range(len(lengths))]
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, begins] = True
    packed, packed_gradients = gradients(inputs, dy, starts)
    per_token = [0, 1, 2, 4]
    weight_gradients = [torch.zeros_like(inputs[i]) for i in (3, 5)]
    for begin, length in zip(begins, lengths, strict=True):
        piece = slice(begin, begin + length)
        alone = [t[:, piece] if i in per_token else t for i, t in enumerate(inputs)]
        y, grads = gradients(alone, dy[:, piece], None)
        assert torch.equal(packed[:, piece], y)
        for i in per_token:
            assert torch.equal(packed_gradients[i][:, piece], grads[i]), NAMES[i]
        weight_gradients = [total + grads[i] for total, i in zip(weight_gradients, (3, 5), strict=True)]
    for total, i in zip(weight_gradients, (3, 5), strict=True):
        assert (packed_gradients[i] - total).norm() <= {torch.float64: 1e-13, torch.float32: 1e-6}[dtype] * total.norm()


@DTYPES
def test_a_row_cut_in_two_goes_on_from_the_state(dtype):
    """A document longer than a row: the last state and its gradient carry it across the cut."""
    inputs, starts = make_inputs(length=30, dtype=dtype), random_starts(2, 30, 0.1)

    def in_two(q, k, v, weight, forget, skip, starts, initial_state):
        outputs = []
        for piece in (slice(0, 13), slice(13, 30)):
            y, initial_state = m2rnn(
                q[:, piece], k[:, piece], v[:, piece], weight, forget[:, piece], skip, starts[:, piece], initial_state
            )
            outputs.append(y)
        return torch.cat(outputs, dim=1), initial_state

    errors = relative_errors(run(in_two, inputs, starts), run(m2rnn, inputs, starts))
    assert max(errors.values()) < TOLERANCE[dtype], errors


@DTYPES
def test_gradient_clip_acts_at_every_step_and_alike_everywhere(dtype):
    inputs, starts = make_inputs(length=33, dtype=dtype), random_starts(2, 33, 0.1)
    clipped = run(m2rnn, inputs, starts, gradient_clip=0.3)
    errors = relative_errors(clipped, run(m2rnn_reference, [t.double() for t in inputs], starts, gradient_clip=0.3))
    assert max(errors.values()) < TOLERANCE[dtype], errors
    assert clipped[8].abs().max() <= 0.3 * 2  # dL/dh_0: one clipped gradient times f + (1 - f) |W|, W near the identity
    free = relative_errors(run(m2rnn, inputs, starts), clipped)
    assert free["y"] == 0 and min(free[name] for name in ("q", "k", "weight", "forget") if name != "q") > 0.05


def test_bfloat16_stays_close_to_float32():
    """Inputs and outputs are rounded to bfloat16 (2^-9), nothing between them is."""
    inputs, starts = make_inputs(2, 64, 4, 1, 1, 16, 16, torch.bfloat16), random_starts(2, 64, 0.05)
    found = run(m2rnn, inputs, starts)
    expected = run(m2rnn, [t.float() for t in inputs], starts)
    errors = relative_errors(found, expected)
    assert max(errors.values()) < 4e-3, errors
    assert [t.dtype for t in found] == [t.dtype if t is not found[1] else torch.float32 for t in found]
    assert found[0].dtype == found[2].dtype == torch.bfloat16 and found[1].dtype == found[5].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_two_threads_give_the_same_bits(dtype):
    inputs, starts = make_inputs(3, 50, 6, 2, 3, 16, 16, dtype), random_starts(3, 50, 0.05)
    one = run(m2rnn, inputs, starts)
    torch.set_num_threads(2)
    try:
        two = run(m2rnn, inputs, starts)
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_activation_memory_is_a_small_part_of_the_loops():
    """Bytes saved for the backward pass, against autograd through the literal loop: the bar is 1/8."""
    inputs, starts = make_inputs(2, 64, 4, 1, 1, 16, 16, torch.float32), random_starts(2, 64, 0.05)
    own = {t.untyped_storage().data_ptr() for t in (*inputs, starts)}

    def saved_bytes(kernel):
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes() if storage.data_ptr() not in own else 0
            return tensor

        leaves = [t.requires_grad_() for t in inputs]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = kernel(*leaves[:6], starts, leaves[6])
        assert kept[0].requires_grad
        return sum(seen.values())

    assert saved_bytes(m2rnn) <= saved_bytes(m2rnn_reference) / 8


def test_a_nan_is_not_hidden():
    inputs = make_inputs(dtype=torch.float32)
    inputs[2][0, 3, 1, 0] = float("nan")
    y, last = m2rnn(*inputs[:6])
    assert y[0, 3:, 1].isnan().any(dim=-1).all() and last[0, 1].isnan().any()
    assert y[1].isfinite().all() and y[0, :3].isfinite().all() and y[0, :, [0, 2, 3]].isfinite().all()


@DTYPES
def test_layouts_in_memory_do_not_matter(dtype):
    """Slices of a wider projection, heads stored outside time, an expanded cotangent (what .sum() gives)."""
    inputs, starts = make_inputs(key_dim=16, value_dim=16, dtype=dtype), random_starts(2, 21, 0.1)
    expected = run(m2rnn, inputs, starts)

    def strided(q, k, v, weight, forget, skip, starts, state):
        q = torch.cat([q.flatten(2), k.flatten(2)], dim=-1)[..., :16].unflatten(-1, (1, 16))
        v, forget = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (v, forget))
        weight, state, starts = weight.mT.contiguous().mT, state.mT.contiguous().mT, starts.T.contiguous().T
        return m2rnn(q, k.clone(), v, weight, forget, skip.T.contiguous().T, starts, state)

    assert max(relative_errors(run(strided, inputs, starts), expected).values()) < 1e-13
    leaves = [t.clone().requires_grad_() for t in inputs]
    m2rnn(*leaves[:6], starts, leaves[6])[0].sum().backward()
    assert all(leaf.grad.isfinite().all() and leaf.grad.norm() > 0 for leaf in leaves)


def test_forward_mode_without_gradients_and_defaults():
    """None stands for no skip, no document start and a zero state."""
    q, k, v, weight, forget, skip, state = make_inputs()
    starts = torch.zeros(2, 21, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(
            m2rnn(q, k, v, weight, forget)[0], m2rnn(q, k, v, weight, forget, skip * 0, starts, state * 0)[0]
        )


@pytest.mark.parametrize(
    ("index", "shape", "name"),
    [(1, (2, 21, 2, 4), "k"), (3, (4, 3, 4), "weight"), (4, (2, 20, 4), "forget"), (6, (2, 4, 3, 5), "initial_state")],
)
def test_a_wrong_shape_is_refused(index, shape, name):
    inputs = make_inputs(dtype=torch.float32)
    inputs[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"{name} has shape"):
        m2rnn(*inputs[:6], None, inputs[6])


def test_heads_that_do_not_divide_and_integer_starts_are_refused():
    with pytest.raises(ValueError, match="3 query and 2 key heads must divide 4"):
        m2rnn(*make_inputs(n_q=3)[:5])
    with pytest.raises(ValueError, match="expected bool"):
        m2rnn(*make_inputs()[:5], starts=torch.zeros(2, 21, dtype=torch.int32))


def test_the_kernel_in_use_is_named():
    cpu = torch.device("cpu")
    assert kernel_name(cpu, torch.float32) == kernel_name(cpu, torch.bfloat16) == NUMBA
    assert kernel_name(cpu, torch.float64) == CHUNKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_operator_is_registered_as_it_behaves(dtype):
    """Schema, fake tensors and autograd registration, checked by torch itself."""
    *inputs, state = make_inputs(length=18, dtype=dtype)
    starts = random_starts(2, 18, 0.2)
    arguments = (*(t.requires_grad_() for t in inputs), starts, state.requires_grad_(), float("inf"), 16)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.amer.m2rnn.default, arguments, test_utils=checks)


def test_compiles_without_a_graph_break():
    inputs, starts = make_inputs(length=18, dtype=torch.float32), random_starts(2, 18, 0.2)
    compiled = torch.compile(m2rnn, fullgraph=True, backend="aot_eager")
    errors = relative_errors(run(compiled, inputs, starts), run(m2rnn, inputs, starts))
    assert max(errors.values()) == 0, errors
