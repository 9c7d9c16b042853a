"""The R mixer: documents apart, causal, decoding as it trains, alive at the start, bounded in bfloat16."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.block import Block
from blocks.kernels.m2rnn import m2rnn
from blocks.rblock import M2RNN, M2RNNConfig
from errors import InputError
from model.context import SequenceContext

D_MODEL = 24
CONFIG = M2RNNConfig(n_heads=4, key_dim=5, value_dim=6, n_q_heads=2)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}  # relative to the norm


def make_mixer(dtype=torch.float64, config=CONFIG, d_model=D_MODEL, depth=1, seed=0):
    mixer = M2RNN(d_model, config)
    mixer.init_weights(depth, torch.Generator().manual_seed(seed))
    return mixer.to(dtype)


def context_of(lengths, padding=0):
    """One row of documents of these lengths, then padding."""
    ids = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return SequenceContext.from_document_ids(torch.tensor([ids], dtype=torch.int32))


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


def gradients(mixer, x, context, cotangent):
    x = x.clone().requires_grad_()
    y = mixer(x, context)
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], cotangent)
    return y.detach(), grads[0], grads[1:]


@DTYPES
@pytest.mark.parametrize(
    "lengths", [[16, 16, 8], [15, 1, 1, 1, 22], [3, 37], [1] * 40], ids=lambda lengths: str(lengths)[:12]
)
def test_packed_equals_each_document_alone(lengths, dtype):
    mixer = make_mixer(dtype)
    x, cotangent = torch.randn(2, 1, 40, D_MODEL, dtype=dtype)
    y, dx, dparams = gradients(mixer, x, context_of(lengths), cotangent)
    totals, begin = [torch.zeros_like(p) for p in mixer.parameters()], 0
    for length in lengths:
        piece = slice(begin, begin + length)
        y_alone, dx_alone, d_alone = gradients(mixer, x[:, piece], context_of([length]), cotangent[:, piece])
        assert close(y[:, piece], y_alone, TOLERANCE[dtype]) and close(dx[:, piece], dx_alone, TOLERANCE[dtype])
        totals = [total + d for total, d in zip(totals, d_alone, strict=True)]
        begin += length
    for (name, _), found, expected in zip(mixer.named_parameters(), dparams, totals, strict=True):
        assert close(found, expected, 5 * TOLERANCE[dtype]), name


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    padding=st.integers(0, 5),
    position=st.floats(0, 1, exclude_max=True),
    shape=st.sampled_from([(2, 3, 4, 1, 1), (4, 5, 6, 2, 4), (3, 16, 16, 3, 1)]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_causal_and_isolated(lengths, padding, position, shape, dtype):
    """A changed token changes its own output and later ones of its document, nothing else, bit for bit."""
    n_heads, key_dim, value_dim, n_q, n_k = shape
    config = M2RNNConfig(n_heads=n_heads, key_dim=key_dim, value_dim=value_dim, n_q_heads=n_q, n_k_heads=n_k)
    mixer, context = make_mixer(dtype, config), context_of(lengths, padding)
    length = context.starts.shape[1]
    x = torch.randn(1, length, D_MODEL, dtype=dtype)
    at = int(position * length)
    changed = x.clone()
    changed[0, at] += 1
    with torch.no_grad():
        before, after = mixer(x, context), mixer(changed, context)
    same_segment = context.segment_ids[0] == context.segment_ids[0, at]
    may_change = same_segment & (torch.arange(length) >= at)
    difference = (after - before)[0].abs().amax(dim=-1)
    assert (difference[~may_change] == 0).all()
    assert difference[at] > 0


@DTYPES
@pytest.mark.parametrize("lengths", [[1, 19], [7, 2, 11], [20]], ids=str)
def test_steps_equal_the_parallel_forward(lengths, dtype):
    """With a document boundary in the prompt: decoding starts each document from init_state."""
    mixer, context = make_mixer(dtype), context_of(lengths)
    x = torch.randn(3, sum(lengths), D_MODEL, dtype=dtype)
    rows = SequenceContext.from_document_ids(context.document_ids.expand(3, -1))
    with torch.no_grad():
        parallel, outputs, state = mixer(x, rows), [], {}
        for t in range(x.shape[1]):
            state = mixer.init_state(3, x.shape[1]) if rows.starts[0, t] else state
            kept = {name: tensor.clone() for name, tensor in state.items()}
            y, following = mixer.step(x[:, t], state)
            assert all(torch.equal(state[name], kept[name]) for name in kept)
            outputs.append(y)
            state = following
    assert close(torch.stack(outputs, dim=1), parallel, TOLERANCE[dtype])
    assert all(tensor.shape == kept[name].shape and tensor.dtype == dtype for name, tensor in state.items())


def test_every_parameter_has_a_gradient_at_the_start():
    mixer = make_mixer(torch.float32, M2RNNConfig(), d_model=64, depth=52)
    x, cotangent = torch.randn(2, 2, 32, 64)
    _, dx, dparams = gradients(mixer, x, SequenceContext.single_documents(x[..., 0]), cotangent)
    for (name, parameter), gradient in zip(mixer.named_parameters(), dparams, strict=True):
        assert gradient.isfinite().all() and gradient.norm() > 0, name
        assert parameter.norm() > 0, name
    assert dx.norm() > 0


def test_initial_values():
    """Identity transition, decays in range and never log(0), the output projection scaled by the depth."""
    config = M2RNNConfig(a_min=0.5, a_max=2.0)
    shallow, deep = (make_mixer(torch.float32, config, 64, depth) for depth in (1, 18))
    assert torch.equal(shallow.state_weight, torch.eye(16).expand(4, 16, 16))
    assert shallow.A_log.exp().min() >= 0.5 and shallow.A_log.exp().max() <= 2.0
    dt = torch.nn.functional.softplus(shallow.dt_bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 * 1.001
    assert torch.equal(shallow.D, torch.ones(4, 16))
    assert torch.allclose(deep.out_proj.weight * 18**0.5, shallow.out_proj.weight, rtol=1e-6)
    for name in ("in_proj.weight", "conv1d.weight", "A_log"):
        assert torch.equal(deep.get_parameter(name), shallow.get_parameter(name))
    many = make_mixer(config=M2RNNConfig(n_heads=4096, value_dim=1), d_model=2)
    assert many.A_log.isfinite().all() and many.A_log.exp().min() >= 0.01


def test_parameters_without_weight_decay():
    marked = {n for n, p in make_mixer().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias", "D"}


def test_the_identity_transition_never_enlarges_a_gradient():
    """|dL/dh_0| <= |dL/dh_T|: what the identity is for."""
    q, k, v = torch.randn(1, 60, 1, 8), torch.randn(1, 60, 1, 8), torch.randn(1, 60, 2, 8)
    forget, state = torch.rand(1, 60, 2), torch.zeros(1, 2, 8, 8, requires_grad=True)
    _, last = m2rnn(q, k, v, torch.eye(8).repeat(2, 1, 1), forget, initial_state=state)
    cotangent = torch.randn_like(last)
    (gradient,) = torch.autograd.grad(last, state, cotangent)
    assert 0 < gradient.norm() <= cotangent.norm()


def test_gradient_clip_reaches_the_recurrence():
    x = torch.randn(1, 30, D_MODEL, dtype=torch.float64)
    free = make_mixer()
    clipped = make_mixer(config=M2RNNConfig(n_heads=4, key_dim=5, value_dim=6, n_q_heads=2, gradient_clip=1e-3))
    context, cotangent = context_of([30]), torch.randn_like(x)
    y, _, free_gradients = gradients(free, x, context, cotangent)
    y_clipped, _, clipped_gradients = gradients(clipped, x, context, cotangent)
    assert torch.equal(y, y_clipped)
    index = [name for name, _ in free.named_parameters()].index("state_weight")
    assert clipped_gradients[index].norm() < 0.1 * free_gradients[index].norm()


def test_bfloat16_autocast_stays_close_to_float32():
    """Projections and conv in bfloat16, gates, state and norm in float32: a few roundings of 2^-9 in a row."""
    mixer = make_mixer(torch.float32, M2RNNConfig(), d_model=64)
    x, cotangent = torch.randn(2, 2, 48, 64)
    context = SequenceContext.from_document_ids(torch.arange(48).div(20, rounding_mode="floor").expand(2, -1))
    y, dx, dparams = gradients(mixer, x, context, cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        y_low, dx_low, dparams_low = gradients(mixer, x, context, cotangent)
    assert close(y_low.float(), y, 0.015) and close(dx_low, dx, 0.02)
    for (name, _), low, full in zip(mixer.named_parameters(), dparams_low, dparams, strict=True):
        assert low.dtype == torch.float32 and close(low, full, 0.03), name


def test_bfloat16_decode_equals_bfloat16_forward():
    mixer = make_mixer(torch.float32, M2RNNConfig(), d_model=64)
    x = torch.randn(2, 20, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        parallel, state, outputs = mixer(x, SequenceContext.single_documents(x[..., 0])), mixer.init_state(2, 20), []
        for t in range(20):
            y, state = mixer.step(x[:, t], state)
            outputs.append(y)
    assert state["state"].dtype == state["conv"].dtype == torch.float32
    assert close(torch.stack(outputs, dim=1).float(), parallel.float(), 0.01)


@pytest.mark.parametrize("autocast", [True, False], ids=["bfloat16", "float32"])
def test_no_nan_over_200_steps_at_four_times_the_learning_rate(autocast):
    """A block alone, AdamW 1.2e-2, trained to recall the token before: finite all along, and it learns."""
    block = Block("R", 32, make_mixer(torch.float32, M2RNNConfig(), d_model=32))
    optimizer = torch.optim.AdamW(block.parameters(), lr=1.2e-2, betas=(0.9, 0.95), weight_decay=0.1)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(200):
        x = torch.randn(2, 24, 32, generator=generator)
        context = SequenceContext.single_documents(x[..., 0])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x, context)
        loss = (y[:, 1:] - x[:, :-1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(map(math.isfinite, losses))
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"key_dim": 0}, "key_dim"),
        ({"value_dim": -4}, "value_dim"),
        ({"value_dim": 65}, "value_dim"),
        ({"n_heads": 0}, "n_heads"),
        ({"n_q_heads": 3}, "n_q_heads: expected a divisor of n_heads 4, got 3; nearest is"),
        ({"n_k_heads": 5}, "n_k_heads"),
        ({"d_conv": 7}, "d_conv"),
        ({"a_min": 0.0}, "a_min"),
        ({"a_max": 1e-3}, "a_max"),
        ({"dt_max": float("nan")}, "dt_max"),
        ({"dt_min": float("inf")}, "dt_min"),
        ({"gradient_clip": -1.0}, "gradient_clip"),
        ({"gradient_clip": float("nan")}, "gradient_clip"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_bad_configs_name_their_key_in_one_line(fields, key):
    with pytest.raises(InputError, match=f"^model.m2rnn.{key}") as caught:
        M2RNNConfig(**fields).validate("model.m2rnn", 64)
    assert "\n" not in str(caught.value)


def test_flops_count_the_products():
    """Projections plus h W, k v^T and q^T h of every head, counted by hand."""
    mixer = make_mixer()
    projections = D_MODEL * (2 * 5 + 1 * 5 + 4 * 6 + 4 + 4 * 6) + 4 * 6 * D_MODEL
    state = 4 * (5 * 6 * 6 + 5 * 6 + 5 * 6)
    assert mixer.flops_per_token(1) == mixer.flops_per_token(4096) == 2 * (projections + state)


def test_copies_and_meta_construction():
    mixer = make_mixer()
    assert {n: p.shape for n, p in copy.deepcopy(mixer).named_parameters()} == {
        n: p.shape for n, p in mixer.named_parameters()
    }
    with torch.device("meta"):
        empty = M2RNN(D_MODEL, CONFIG)
    filled = empty.to_empty(device="cpu")
    filled.init_weights(1, torch.Generator().manual_seed(0))
    expected = make_mixer(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), expected.parameters(), strict=True))


@pytest.mark.slow
def test_the_mixer_compiles_without_a_graph_break():
    mixer = make_mixer(torch.float32, M2RNNConfig(), d_model=32)
    x, cotangent = torch.randn(2, 1, 20, 32)
    context = context_of([13, 7])
    y, dx, _ = gradients(mixer, x, context, cotangent)
    y_compiled, dx_compiled, _ = gradients(torch.compile(mixer, fullgraph=True), x, context, cotangent)
    assert close(y_compiled, y, 1e-5) and close(dx_compiled, dx, 1e-5)
