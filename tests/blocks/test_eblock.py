"""The E mixer: routing, balance and what is counted when; causal and independent of its neighbours."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from blocks.eblock import MoE, MoEConfig, balance
from errors import InputError
from model.context import SequenceContext

D_MODEL = 32
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
CONTEXT = None  # every token is processed by itself: the context is never read


def make_mixer(dtype=torch.float32, seed=0, **config):
    mixer = MoE(D_MODEL, MoEConfig(**{"n_experts": 6, "expert_ff": 48, **config}))
    mixer.init_weights(1, torch.Generator().manual_seed(seed))
    return mixer.to(dtype)


def mlp(x, up, down, kind):
    h = x @ up.T
    if kind == "relu2":
        return F.relu(h) ** 2 @ down.T
    gate, value = h.chunk(2, dim=-1)
    return (F.silu(gate) * value) @ down.T


def literal(mixer, x):
    """(N, D), token by token: the k experts with the largest score + bias, weighted by their scores alone."""
    rows = []
    for token in x:
        scores = torch.sigmoid(mixer.router.weight @ token)
        chosen = sorted(range(mixer.n_experts), key=lambda e: -(scores[e] + mixer.expert_bias[e]).item())[: mixer.top_k]
        total = sum(scores[e] for e in chosen)
        y = sum(scores[e] / total * mlp(token, mixer.up_proj[e], mixer.down_proj[e], mixer.kind) for e in chosen)
        y = y * mixer.route_scale
        if mixer.shared is not None:
            y = y + mlp(token, mixer.shared.up_proj.weight, mixer.shared.down_proj.weight, mixer.kind)
        rows.append(y)
    return torch.stack(rows)


@DTYPES
@pytest.mark.parametrize(
    "config",
    [{}, {"expert": "relu2"}, {"top_k": 3, "n_shared_experts": 0}, {"n_shared_experts": 2, "route_scale": 2.5}],
    ids=str,
)
def test_equals_the_formula_token_by_token(config, dtype):
    mixer, x = make_mixer(dtype, **config), torch.randn(2, 20, D_MODEL, dtype=dtype)
    mixer.expert_bias += torch.linspace(-0.3, 0.3, 6)  # large enough to change choices
    leaf, cotangent = x.clone().requires_grad_(), torch.randn(2, 20, D_MODEL, dtype=dtype)
    y = mixer(leaf, CONTEXT)
    exact = literal(mixer, leaf.flatten(0, 1)).view_as(y)
    assert (y - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    leaves = [leaf, *mixer.parameters()]
    for a, b in zip(torch.autograd.grad(y, leaves, cotangent), torch.autograd.grad(exact, leaves, cotangent)):
        assert (a - b).norm() <= TOLERANCE[dtype] * b.norm()


def test_bias_moves_the_choice_but_not_the_weights():
    mixer, x = make_mixer(torch.float64, top_k=1), torch.randn(50, D_MODEL, dtype=torch.float64)
    ids, weights, scores = mixer.route(x)
    assert torch.equal(ids[:, 0], scores.argmax(-1)) and torch.allclose(weights, torch.ones(50, 1).double())
    mixer.expert_bias[2] = 10
    ids, _, scores_again = mixer.route(x)
    assert (ids == 2).all() and torch.equal(scores, scores_again)
    pair = make_mixer(torch.float64, top_k=2)
    pair.expert_bias[2] = 10
    ids, weights, scores = pair.route(x)
    expected = scores.gather(1, ids)
    assert torch.allclose(weights, expected / expected.sum(1, keepdim=True))


@DTYPES
def test_tokens_do_not_see_each_other(dtype):
    """With the bias on: causal, isolated and independent of the batch, to the bit."""
    mixer, x = make_mixer(dtype), torch.randn(1, 30, D_MODEL, dtype=dtype)
    mixer.expert_bias += torch.linspace(-0.3, 0.3, 6)
    context = SequenceContext.single_documents(torch.zeros(1, 30))
    with torch.no_grad():
        before, changed = mixer(x, context), x.clone()
        changed[:, 11] += 1
        moved = (mixer(changed, context) != before).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [11]
        alone = torch.cat([mixer(x[:, t : t + 1], context) for t in range(30)], dim=1)
        stepped = torch.stack([mixer.step(x[:, t], mixer.init_state(1, 30))[0] for t in range(30)], dim=1)
    assert (before - alone).norm() <= TOLERANCE[dtype] * before.norm() and torch.equal(alone, stepped)


def test_counts_only_in_training_with_gradients():
    mixer, x = make_mixer(), torch.randn(2, 9, D_MODEL)
    mixer.eval()(x, CONTEXT)
    mixer.train()
    with torch.no_grad():
        mixer(x, CONTEXT)
        mixer.step(x[:, 0], {})
    assert not mixer.counts.any() and not mixer.entropy.any()
    mixer(x, CONTEXT)
    mixer(x, CONTEXT)  # accumulation
    assert mixer.counts.sum() == 2 * 18 * mixer.top_k


def test_recomputation_counts_once():
    mixer, x = make_mixer(), torch.randn(2, 9, D_MODEL, requires_grad=True)
    mixer(x, CONTEXT).sum().backward()
    once, plain = mixer.counts.clone(), x.grad.clone()
    mixer.update_bias()
    mixer.expert_bias.zero_()
    x.grad = None
    checkpoint(mixer, x, CONTEXT, use_reentrant=False).sum().backward()
    assert torch.equal(mixer.counts, once) and torch.equal(x.grad, plain)


def test_one_update_per_optimizer_step():
    mixer, x = make_mixer(bias_update_rate=0.25), torch.randn(4, 9, D_MODEL)
    for part in x.split(2):
        mixer(part, CONTEXT)
    counts = mixer.counts.clone()
    assert not mixer.expert_bias.any()  # forward passes leave it alone
    mixer.update_bias()
    expected = 0.25 * (counts.float().mean() - counts).sign()
    assert torch.allclose(mixer.expert_bias, expected - expected.mean())
    assert abs(mixer.expert_bias.mean()) < 1e-6 and not mixer.counts.any()


def test_one_reduction_sums_the_counts_of_all_blocks_and_ranks():
    mixers, x = [make_mixer(bias_update_rate=0.25) for _ in range(3)], torch.randn(4, 9, D_MODEL)
    for mixer in mixers:
        mixer(x, CONTEXT)
    others = torch.tensor([1000.0, 0, 0, 0, 0, 0, 2.5, 36], dtype=torch.float64)  # of another rank: counts, entropy
    loads, entropies = [m.counts + others[:6].long() for m in mixers], [m.entropy + others[6:] for m in mixers]
    calls = []
    balance(mixers, lambda t: calls.append(t.add_(others)))
    assert len(calls) == 1
    for mixer, load, entropy in zip(mixers, loads, entropies, strict=True):
        expected = 0.25 * (load.float().mean() - load).sign()
        assert torch.allclose(mixer.expert_bias, expected - expected.mean())
        assert torch.equal(mixer.last_counts, load) and torch.equal(mixer.last_entropy, entropy)
        assert not mixer.counts.any() and not mixer.entropy.any()
    balance([], None)  # a stack without routed experts


def test_bias_is_in_the_checkpoint_and_counts_are_not():
    mixer = make_mixer()
    names = set(mixer.state_dict())
    assert "expert_bias" in names and not {"counts", "entropy", "last_counts", "last_entropy"} & names
    assert not [name for name, _ in mixer.named_parameters() if "bias" in name]


def test_balance_improves_on_skewed_tokens():
    torch.manual_seed(0)
    mixer = make_mixer(bias_update_rate=0.02)
    x = torch.randn(1, 600, D_MODEL) + 2 * torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)

    def largest_share():
        mixer(x, CONTEXT)
        mixer.update_bias()
        return mixer.metrics()["load_max"]

    first, *_, last = (largest_share() for _ in range(200))
    assert first > 1.6 and last < 1.15  # 1 = balanced


def test_metrics():
    mixer, x = make_mixer(), torch.randn(2, 9, D_MODEL)
    mixer(x, CONTEXT)
    before = mixer.metrics()
    mixer.update_bias()
    after = mixer.metrics()
    p = mixer.route(x.flatten(0, 1))[2].detach()
    entropy = torch.distributions.Categorical(probs=p / p.sum(-1, keepdim=True)).entropy().mean()
    for found in (before, after):
        assert found["dropped"] == 0
        assert sum(found["load"]) == pytest.approx(1) and len(found["load"]) == 6
        assert found["router_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert before["load"] == after["load"] and after["bias_range"] > 0


def test_router_is_float32_under_autocast():
    mixer, x = make_mixer(), torch.randn(40, D_MODEL)
    ids, weights, scores = mixer.route(x)
    with torch.autocast("cpu", torch.bfloat16):
        again = mixer.route(x)
        y = mixer(x[None], CONTEXT)
    assert all(torch.equal(a, b) for a, b in zip((ids, weights, scores), again, strict=True))
    assert y.dtype == torch.bfloat16
    exact = mixer(x[None], CONTEXT)
    assert (y.float() - exact).norm() <= 0.01 * exact.norm()  # bfloat16 rounds to 2^-9


@DTYPES
@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_one_expert_is_a_dense_mlp(kind, dtype):
    mixer, x = make_mixer(dtype, n_experts=1, expert=kind), torch.randn(2, 7, D_MODEL, dtype=dtype)
    exact = mlp(x, mixer.dense.up_proj.weight, mixer.dense.down_proj.weight, kind)
    assert (mixer(x, CONTEXT) - exact).norm() <= TOLERANCE[dtype] * exact.norm()
    assert [name for name, _ in mixer.named_parameters()] == ["dense.up_proj.weight", "dense.down_proj.weight"]
    assert not list(mixer.buffers()) and mixer.metrics() == {}
    mixer.update_bias()
    weights = sum(p.numel() for p in mixer.parameters())
    assert mixer.flops_per_token(7) == 2 * weights


def test_flops_count_the_active_experts():
    mixer = make_mixer(top_k=2, n_shared_experts=1)
    one = mixer.up_proj[0].numel() + mixer.down_proj[0].numel()
    assert mixer.flops_per_token(7) == 2 * (6 * D_MODEL + 3 * one)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiles_as_one_graph_and_counts(precision):
    mixer, x = make_mixer(), torch.randn(2, 9, D_MODEL)
    compiled = torch.compile(mixer, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        plain, leaf = mixer(x, CONTEXT), x.clone().requires_grad_()
        mixer.counts.zero_()
        y = compiled(leaf, CONTEXT)
        assert torch.allclose(y, plain, atol=1e-5 if precision == "float32" else 2e-2)
        y.float().sum().backward()
        assert mixer.counts.sum() == 36
        checkpoint(compiled, leaf, CONTEXT, use_reentrant=False).float().sum().backward()
    assert mixer.counts.sum() == 72


@pytest.mark.parametrize(
    "change, words",
    [
        ({"expert_ff": 50}, ["moe.expert_ff", "multiple of 16", "50", "nearest is 48"]),
        ({"top_k": 7}, ["moe.top_k", "at most n_experts 6", "7"]),
        ({"expert": "swigloo"}, ["moe.expert", "did you mean 'swiglu'"]),
        ({"bias_update_rate": float("inf")}, ["moe.bias_update_rate", "inf"]),
        ({"n_experts": 0}, ["moe.n_experts", "at least 1"]),
        ({"route_scale": -1.0}, ["moe.route_scale", "-1"]),
    ],
)
def test_bad_settings_name_the_key(change, words):
    with pytest.raises(InputError) as caught:
        make_mixer(**change)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_model_width_must_be_whole_vectors():
    with pytest.raises(InputError, match=r"d_model: expected a multiple of 16.*got 40"):
        MoE(40, MoEConfig(expert_ff=48))
