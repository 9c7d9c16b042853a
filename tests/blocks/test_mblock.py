"""The M mixer: golden numbers, isolation of documents, causality, decoding, initialisation, bad configs."""

import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mamba2_cases import context_of, random_segments, segments_of

from blocks.mblock import Mamba2, Mamba2Config
from errors import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "oracles" / "mamba2_mixer.npz"
D_MODEL = 16
CONFIG = Mamba2Config(d_state=8, head_dim=8, n_groups=2, chunk_size=16)


def make_mixer(dtype=torch.float64, d_model=D_MODEL, config=CONFIG):
    mixer = Mamba2(d_model, config)
    mixer.init_weights(depth=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in (mixer.A_log, mixer.dt_bias, mixer.D):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return mixer.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_golden_numbers_of_transformers(dtype):
    """Both sides computed in float32 there; here float64 also runs, as plain torch."""
    golden = {name: torch.from_numpy(array).to(dtype) for name, array in np.load(GOLDEN).items()}
    mixer = Mamba2(32, Mamba2Config(d_state=8, head_dim=16, n_groups=2, chunk_size=16)).to(dtype)
    mixer.load_state_dict({name[6:]: t for name, t in golden.items() if name.startswith("param.")}, strict=True)
    x = golden["x"].requires_grad_()
    y = mixer(x, context_of(torch.zeros(2, 45)))
    y.backward(golden["grad_y"])
    assert (y - golden["y"]).abs().max() < 2e-6
    assert (x.grad - golden["grad_x"]).abs().max() < 5e-6
    for name, parameter in mixer.named_parameters():
        expected = golden[f"grad.{name}"]
        assert (parameter.grad - expected).abs().max() < 5e-6 * expected.abs().max(), name


LAYOUTS = [[50], [16, 34], [15, 1, 34], [1, 1, 48], [7, 20, 23], [1] * 50]


@pytest.mark.parametrize("lengths", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_packed_equals_each_document_alone(dtype, lengths):
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-5}[dtype]
    mixer = make_mixer(dtype)
    x, cotangent = torch.randn(2, 2, 50, D_MODEL, dtype=dtype)
    packed = x.clone().requires_grad_()
    y = mixer(packed, context_of(segments_of(lengths, batch=2)))
    gradients = torch.autograd.grad(y, [packed, *mixer.parameters()], cotangent)
    alone = x.clone().requires_grad_()
    documents = [mixer(part, context_of(torch.zeros(part.shape[:2]))) for part in alone.split(lengths, dim=1)]
    y_alone = torch.cat(documents, dim=1)
    expected = torch.autograd.grad(y_alone, [alone, *mixer.parameters()], cotangent)
    for a, b in zip((y, *gradients), (y_alone, *expected), strict=True):
        assert (a - b).norm() <= tolerance * (
            b.norm() + 1e-3
        )  # A_log has no gradient where every document is one token


def test_a_document_longer_than_the_row_is_what_its_beginning_is():
    mixer, x = make_mixer(), torch.randn(1, 80, D_MODEL, dtype=torch.float64)
    whole = mixer(x, context_of(torch.zeros(1, 80)))
    row = mixer(x[:, :50], context_of(torch.zeros(1, 50)))
    assert (whole[:, :50] - row).abs().max() < 1e-12


@pytest.mark.parametrize("token", [0, 15, 16, 30, 49])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_causal(dtype, token):
    """Not a bit before the changed token moves, in the dtypes of the kernels too."""
    mixer = make_mixer(torch.float32 if dtype == torch.bfloat16 else dtype)
    x = torch.randn(1, 50, D_MODEL, dtype=next(mixer.parameters()).dtype)
    other = x.clone()
    other[:, token] += 1
    context = context_of(segments_of([31, 19]))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        y, y_other = mixer(x, context), mixer(other, context)
    moved = (y != y_other).any(dim=-1)[0]
    assert not moved[:token].any() and moved[token]


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.sampled_from([0.0, 0.1, 1.0]), st.integers(2, 4), st.integers(0, 99))
def test_step_equals_forward(length, share, taps, seed):
    """A document boundary in the prompt is a fresh state."""
    config = Mamba2Config(d_state=8, head_dim=8, n_groups=2, chunk_size=16, d_conv=taps)
    mixer = make_mixer(config=config)
    x, segment_ids = torch.randn(1, length, D_MODEL, dtype=torch.float64), random_segments(1, length, share, seed)
    expected = mixer(x, context_of(segment_ids))
    state = mixer.init_state(1, length)
    for t in range(length):
        if t and segment_ids[0, t] != segment_ids[0, t - 1]:
            state = mixer.init_state(1, length)
        y, state = mixer.step(x[:, t], state)
        assert (y - expected[:, t]).abs().max() < 1e-12


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step_equals_the_kernel(precision):
    """To rounding: the fused kernel never rounds inside, the step rounds nothing but the projections."""
    mixer, bf16 = make_mixer(torch.float32), precision == "bfloat16"
    x = torch.randn(2, 37, D_MODEL)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        expected, state, steps = mixer(x, context_of(torch.zeros(2, 37))), mixer.init_state(2, 37), []
        for t in range(37):
            y, state = mixer.step(x[:, t], state)
            steps.append(y.float())
    error = (torch.stack(steps, dim=1) - expected).norm() / expected.norm()
    assert error < (1e-2 if bf16 else 1e-5) and state["ssm"].dtype == torch.float32


def test_bfloat16_autocast_stays_near_float32():
    """Bound: 1% of the norm for the output, 2% for every gradient (measured: 0.5% and 1%)."""
    mixer = make_mixer(torch.float32, d_model=64, config=Mamba2Config(d_state=16, head_dim=16))
    x, cotangent = torch.randn(2, 2, 100, 64)
    context, results = context_of(random_segments(2, 100, 0.02, 0)), []
    for enabled in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mixer(leaf, context)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        results.append([y.float(), *torch.autograd.grad(y, [leaf, *mixer.parameters()], cotangent.to(y.dtype))])
    full, low = results
    bounds = [1e-2] + [2e-2] * (len(full) - 1)
    errors = [float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(low, full, strict=True)]
    assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_no_nan_over_200_steps_at_a_high_learning_rate(precision):
    mixer = make_mixer(torch.float32)
    optimizer = torch.optim.AdamW(mixer.parameters(), lr=2e-2)
    context = context_of(segments_of([20, 28], batch=4))
    for _ in range(200):
        x = torch.randn(4, 48, D_MODEL)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = mixer(x, context)
        loss = F.mse_loss(y.float(), x.roll(1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in mixer.parameters())
        optimizer.step()
    assert loss.isfinite()


def test_initialisation_is_that_of_mamba_ssm():
    mixer = Mamba2(256, Mamba2Config())
    mixer.init_weights(depth=8, generator=torch.Generator().manual_seed(0))
    dt = F.softplus(mixer.dt_bias)
    assert (dt >= 1e-4 * 0.999).all() and (dt <= 0.1001).all() and dt.std() > 0
    assert (mixer.A_log.exp() >= 0.999).all() and (mixer.A_log.exp() <= 16.001).all()
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    std = {"in_proj": 256**-0.5, "out_proj": 512**-0.5 / 16**0.5, "conv1d": 0.5}
    for name, bound in std.items():
        weight = mixer.get_submodule(name).weight
        assert weight.abs().max() <= bound and abs(weight.std() / (bound / 3**0.5) - 1) < 0.05, name


def test_names_shapes_and_weight_decay():
    mixer = Mamba2(64, Mamba2Config(d_state=16, head_dim=32, n_groups=2))
    shapes = {name: tuple(t.shape) for name, t in mixer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (128 + 128 + 4 * 16 + 4, 64),
        "conv1d.weight": (192, 1, 4),
        "conv1d.bias": (192,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "norm.weight": (128,),
        "out_proj.weight": (64, 128),
    }
    spared = {name for name, p in mixer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert spared == {"dt_bias", "A_log", "D"}


def test_flops_by_hand_and_independent_of_the_length():
    mixer = Mamba2(256, Mamba2Config())
    by_hand = 256 * (512 + 512 + 128 + 8) + 512 * 256 + 64 * 64 + 512 * (64 + 2 * 64)
    assert mixer.flops_per_token(512) == mixer.flops_per_token(4096) == 2 * by_hand


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"head_dim": 48},
            r"m\.mamba2\.head_dim: expand \* d_model = 128 is not divisible by head_dim 48; nearest.*32",
        ),
        ({"n_groups": 3, "head_dim": 32}, r"m\.mamba2\.n_groups: expected a divisor .* 4, got 3; nearest is 2"),
        ({"d_state": 0}, r"m\.mamba2\.d_state"),
        ({"d_conv": 5}, r"m\.mamba2\.d_conv.*at most 4"),
        ({"chunk_size": -1}, r"m\.mamba2\.chunk_size"),
        ({"dt_min": float("nan")}, r"m\.mamba2\.dt_min"),
        ({"dt_max": 1e-4}, r"m\.mamba2\.dt_max"),
        ({"a_max": float("inf")}, r"m\.mamba2\.a_max"),
    ],
)
def test_bad_configs_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        Mamba2Config(**changes).validate("m.mamba2", 64)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiles_as_one_graph(precision):
    mixer = make_mixer(torch.float32)
    x, context = torch.randn(2, 40, D_MODEL), context_of(segments_of([10, 30], batch=2))
    results = []
    for module in (mixer, torch.compile(mixer, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            y = module(leaf, context)
        results.append([y.float(), *torch.autograd.grad(y.float().square().sum(), [leaf, *mixer.parameters()])])
    tolerance = 2e-2 if precision == "bfloat16" else 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(*results, strict=True))
