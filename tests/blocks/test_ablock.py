"""The A mixer: documents apart, causal, decoding as it trains, bounded in bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.ablock import Attention, AttentionConfig
from errors import InputError
from model.context import SequenceContext

D_MODEL = 32
VARIANTS = {
    "default": AttentionConfig(),
    "no positions": AttentionConfig(position="none"),
    "gate": AttentionConfig(gate="sigmoid"),
    "window": AttentionConfig(window=5),
    "wide heads": AttentionConfig(n_heads=3, n_kv_heads=1, head_dim=20, gate="sigmoid", window=9),
}
EVERY_VARIANT = pytest.mark.parametrize("variant", list(VARIANTS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}  # relative to the norm


def make_mixer(config, dtype=torch.float64, seed=0):
    mixer = Attention(D_MODEL, config)
    generator = torch.Generator().manual_seed(seed)
    mixer.init_weights(1, generator)
    for norm in (mixer.q_norm, mixer.k_norm):  # not ones, so that a forgotten weight shows
        torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
    return mixer.to(dtype)


def context_of(lengths, padding=0):
    ids = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return SequenceContext.from_document_ids(torch.tensor([ids], dtype=torch.int32))


def close(a, b, tolerance):
    return (a - b).norm() <= tolerance * b.norm()


def gradients(mixer, x, context, cotangent):
    x = x.clone().requires_grad_()
    y = mixer(x, context)
    grads = torch.autograd.grad(y, [x, *mixer.parameters()], cotangent)
    return y.detach(), grads[0], grads[1:]


def literal(mixer, x):
    """One document (T, D), written out: project, norm, rotate, one softmax per token and head."""
    d, group = mixer.head_dim, mixer.n_heads // mixer.n_kv_heads
    inner, inner_kv = mixer.n_heads * d, mixer.n_kv_heads * d
    q, k, v, gate = (x @ mixer.qkv_proj.weight.T).split(
        [inner, inner_kv, inner_kv, mixer.qkv_proj.out_features - inner - 2 * inner_kv], dim=-1
    )

    def prepare(row, norm, position):
        row = F.rms_norm(row, (d,), norm.weight, mixer.qk_norm_eps)
        if mixer.position == "none":
            return row
        frequency = mixer.rope_theta ** (-torch.arange(0, d, 2, dtype=x.dtype) / d)
        turned = torch.view_as_complex(torch.stack(row.chunk(2), dim=-1)) * torch.polar(
            torch.ones_like(frequency), position * frequency
        )
        return torch.cat((turned.real, turned.imag))

    rows = []
    for i in range(x.shape[0]):
        heads = []
        for h in range(mixer.n_heads):
            g = h // group
            first = 0 if mixer.window is None else max(0, i - mixer.window + 1)
            query = prepare(q[i, h * d : (h + 1) * d], mixer.q_norm, i)
            keys = [prepare(k[j, g * d : (g + 1) * d], mixer.k_norm, j) for j in range(first, i + 1)]
            weights = torch.stack([query @ key / d**0.5 for key in keys]).softmax(0)
            heads.append(weights @ v[first : i + 1, g * d : (g + 1) * d])
        mixed = torch.cat(heads)
        rows.append(mixed * gate[i].sigmoid() if mixer.gate == "sigmoid" else mixed)
    return torch.stack(rows) @ mixer.o_proj.weight.T


@EVERY_VARIANT
@DTYPES
def test_equals_the_formula_written_out(variant, dtype):
    mixer, x = make_mixer(VARIANTS[variant], dtype), torch.randn(1, 12, D_MODEL, dtype=dtype)
    with torch.no_grad():
        assert close(mixer(x, context_of([12]))[0], literal(mixer, x[0]), TOLERANCE[dtype])


@EVERY_VARIANT
@DTYPES
@pytest.mark.parametrize("lengths", [[16, 16, 8], [15, 1, 1, 1, 22], [3, 37], [1] * 40], ids=lambda n: str(n)[:12])
def test_packed_equals_each_document_alone(lengths, dtype, variant):
    mixer = make_mixer(VARIANTS[variant], dtype)
    x, cotangent = torch.randn(2, 1, 40, D_MODEL, dtype=dtype)
    y, dx, dparams = gradients(mixer, x, context_of(lengths), cotangent)
    totals, begin = [torch.zeros_like(p) for p in mixer.parameters()], 0
    for length in lengths:
        piece = slice(begin, begin + length)
        y_alone, dx_alone, d_alone = gradients(mixer, x[:, piece], context_of([length]), cotangent[:, piece])
        assert close(y[:, piece], y_alone, TOLERANCE[dtype])
        # a document of one token attends to itself whatever q and k are: their gradients are rounding, not signal
        assert (dx[:, piece] - dx_alone).norm() <= TOLERANCE[dtype] * dx.norm()
        totals = [total + d for total, d in zip(totals, d_alone, strict=True)]
        begin += length
    scale = max(d.norm() for d in dparams)
    assert all((a - b).norm() <= TOLERANCE[dtype] * scale for a, b in zip(dparams, totals, strict=True))


@EVERY_VARIANT
@DTYPES
def test_causal_inside_and_blind_across_documents(variant, dtype):
    mixer, context = make_mixer(VARIANTS[variant], dtype), context_of([20, 17], padding=3)
    x = torch.randn(1, 40, D_MODEL, dtype=dtype)
    with torch.no_grad():
        before = mixer(x, context)
        for at in (7, 25):
            changed = x.clone()
            changed[:, at] += 1
            moved = (mixer(changed, context) != before).any(-1)[0]
            assert moved[at] and not moved[:at].any()
            if at == 7:
                assert not moved[20:].any() and moved[8]
            if mixer.window is not None:
                assert not moved[at + mixer.window :].any() and moved[at + mixer.window - 1]


@EVERY_VARIANT
@DTYPES
def test_step_equals_forward(variant, dtype):
    mixer, x = make_mixer(VARIANTS[variant], dtype), torch.randn(3, 21, D_MODEL, dtype=dtype)
    with torch.no_grad():
        y = mixer(x, SequenceContext.single_documents(torch.zeros(3, 21)))
        state, steps = mixer.init_state(3, 21), []
        for t in range(21):
            out, state = mixer.step(x[:, t], state)
            steps.append(out)
    assert close(torch.stack(steps, 1), y, TOLERANCE[dtype])
    with pytest.raises(InputError, match="21 tokens"):
        mixer.step(x[:, 0], state)


def test_bfloat16_autocast_stays_near_float32():
    mixer, context = make_mixer(AttentionConfig(gate="sigmoid"), torch.float32), context_of([40, 1, 23])
    x, cotangent = torch.randn(2, 1, 64, D_MODEL)
    exact = gradients(mixer, x, context, cotangent)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x, context)
        assert y.dtype == torch.bfloat16
        rough = gradients(mixer, x, context, cotangent.bfloat16())
    for a, b in zip((rough[0], rough[1], *rough[2]), (exact[0], exact[1], *exact[2]), strict=True):
        assert (a.float() - b).norm() <= 0.03 * b.norm()  # a few bfloat16 roundings (2^-9 each) in a row


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.integers(0, 5),
    st.sampled_from(["rope", "none"]),
    st.sampled_from([None, 1, 4, 17]),
)
def test_any_layout_equals_each_document_alone(lengths, padding, position, window):
    mixer = make_mixer(AttentionConfig(position=position, window=window), torch.float32)
    x = torch.randn(1, sum(lengths) + padding, D_MODEL)
    with torch.no_grad():
        y, begin = mixer(x, context_of(lengths, padding)), 0
        assert y.isfinite().all()
        for length in lengths:
            alone = mixer(x[:, begin : begin + length], context_of([length]))
            assert close(y[:, begin : begin + length], alone, 3e-6)
            begin += length


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiles_as_one_graph(precision):
    mixer, context = make_mixer(AttentionConfig(gate="sigmoid"), torch.float32), context_of([30, 34])
    x, cotangent = torch.randn(2, 1, 64, D_MODEL)
    compiled = torch.compile(mixer, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        plain = gradients(mixer, x, context, cotangent.to(getattr(torch, precision)))
        leaf = x.clone().requires_grad_()
        y = compiled(leaf, context)
    (dx,) = torch.autograd.grad(y, leaf, cotangent.to(y.dtype))
    tolerance = 1e-5 if precision == "float32" else 2e-2
    assert close(y.float(), plain[0].float(), tolerance) and close(dx, plain[1], tolerance)


def test_output_projection_shrinks_with_depth_and_is_never_zero():
    stds = [Attention(D_MODEL, AttentionConfig()) for _ in range(2)]
    for mixer, depth in zip(stds, (1, 16), strict=True):
        mixer.init_weights(depth, torch.Generator().manual_seed(0))
    assert torch.allclose(stds[0].o_proj.weight, 4 * stds[1].o_proj.weight)
    assert stds[1].o_proj.weight.abs().min() > 0


def test_flops_count_the_mean_context():
    mixer = Attention(D_MODEL, AttentionConfig())
    weights = mixer.qkv_proj.weight.numel() + mixer.o_proj.weight.numel()
    pairs = sum(range(1, 101))  # causal pairs of a row of 100
    assert mixer.flops_per_token(100) == 2 * weights + 4 * D_MODEL * pairs // 100
    windowed = Attention(D_MODEL, AttentionConfig(window=10))
    pairs = sum(min(i, 10) for i in range(1, 101))
    assert windowed.flops_per_token(100) == pytest.approx(2 * weights + 4 * D_MODEL * pairs / 100, abs=1)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"n_heads": 5, "n_kv_heads": 5}, ["attention.n_heads", "d_model 32", "n_heads 5", "nearest", "4"]),
        ({"n_kv_heads": 3}, ["attention.n_kv_heads", "divisor of n_heads 4", "3"]),
        ({"position": "roped"}, ["attention.position", "did you mean 'rope'"]),
        ({"gate": "sigmoidal"}, ["attention.gate", "did you mean 'sigmoid'"]),
        ({"head_dim": 7}, ["attention.head_dim", "even", "7"]),
        ({"window": 0}, ["attention.window", "at least 1"]),
        ({"rope_theta": float("nan")}, ["attention.rope_theta", "nan"]),
        ({"n_heads": -4}, ["attention.n_heads", "-4"]),
    ],
)
def test_bad_settings_name_the_key(change, words):
    with pytest.raises(InputError) as caught:
        Attention(D_MODEL, AttentionConfig(**change))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
