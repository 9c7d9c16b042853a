"""Which parameters decay, what the state is called, and that clipping clips."""

import math

import pytest
import torch
from torch import nn

from errors import InputError
from training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    optimizer_tensors,
    set_learning_rate,
    split_by_decay,
)


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, dtype=dtype)
        self.norm = nn.RMSNorm(4, dtype=dtype)
        self.linear = nn.Linear(4, 4, dtype=dtype)
        self.experts = nn.Parameter(torch.randn(2, 4, 4, dtype=dtype))
        self.A_log = nn.Parameter(torch.randn(3, dtype=dtype))
        self.decay_free = nn.Parameter(torch.randn(4, 4, dtype=dtype))
        self.decay_free._no_weight_decay = True
        self.frozen = nn.Parameter(torch.randn(4, 4, dtype=dtype), requires_grad=False)
        self.head = nn.Linear(4, 7, bias=False, dtype=dtype)


def test_groups():
    decayed, exempt = split_by_decay(Model())
    assert set(decayed) == {"linear.weight", "experts", "head.weight"}
    assert set(exempt) == {"embedding.weight", "norm.weight", "linear.bias", "A_log", "decay_free"}
    assert "embedding.weight" in split_by_decay(Model(), "decay")[0]


def test_a_tied_head_is_one_parameter_and_counts_as_embedding():
    model = Model()
    model.head.weight = model.embedding.weight
    decayed, exempt = split_by_decay(model)
    assert "head.weight" not in decayed | exempt and "embedding.weight" in exempt
    optimizer = build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 7


def test_only_the_first_group_shrinks_without_gradient_signal():
    """With zero gradients AdamW multiplies the decayed by 1 - lr * weight_decay and leaves the rest bit for bit."""
    model = Model(torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    decayed, _ = split_by_decay(model)
    for name, parameter in model.named_parameters():
        expected = before[name] * (0.95 if name in decayed else 1.0)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=0)


def test_the_update_is_adamw():
    """Two steps against the formula of Loshchilov and Hutter (2019), float64, 1e-12."""
    model = Model(torch.float64)
    config = OptimizerConfig(learning_rate=0.01, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    optimizer = build_optimizer(model, config)
    w = model.linear.weight.detach().clone()
    m = v = torch.zeros_like(w)
    for step, rate in ((1, 0.01), (2, 0.004)):
        g = torch.randn_like(w)
        model.linear.weight.grad = g.clone()
        set_learning_rate(optimizer, rate)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w * (1 - rate * 0.3) - rate * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
        torch.testing.assert_close(model.linear.weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_state_before_the_first_step_is_what_adamw_starts_with():
    """Naming the state early must not change what follows, by a single bit."""
    results = []
    for early in (False, True):
        torch.manual_seed(3)
        model = Model()
        optimizer = build_optimizer(model, OptimizerConfig())
        if early:
            optimizer_tensors(model, optimizer)
        for _ in range(3):
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
        state = optimizer_tensors(model, optimizer)
        assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
        assert set(state["A_log"]) == {"step", "exp_avg", "exp_avg_sq"} and state["A_log"]["step"].item() == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_tensors_are_live():
    model = Model()
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer_tensors(model, optimizer)["A_log"]["exp_avg"].fill_(2.0)
    assert optimizer.state[model.A_log]["exp_avg"].eq(2.0).all()


@pytest.mark.parametrize(("limit", "after"), [(1.0, 1.0), (100.0, 13.0), (None, 13.0)])
def test_clipping(limit, after):
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert clip_gradients(parameters, limit).item() == pytest.approx(13.0)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters[:2]))
    assert norm == pytest.approx(after, rel=1e-5)


def test_a_nan_gradient_gives_a_norm_that_is_not_finite():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    assert not clip_gradients([parameter], 1.0).isfinite()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"learning_rate": 0.0}, "optimizer.learning_rate"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate"),
        ({"betas": [0.9]}, "optimizer.betas"),
        ({"betas": [0.9, 1.0]}, r"optimizer.betas\[1\]"),
        ({"betas": [-0.1, 0.5]}, r"optimizer.betas\[0\]"),
        ({"eps": -1e-8}, "optimizer.eps"),
        ({"weight_decay": float("inf")}, "optimizer.weight_decay"),
        ({"embedding_decay": "nope"}, "optimizer.embedding_decay"),
        ({"grad_clip": 0.0}, "optimizer.grad_clip"),
    ],
)
def test_bad_config_names_its_key(values, key):
    with pytest.raises(InputError, match=f"^{key}: "):
        OptimizerConfig(**values).validate()
    OptimizerConfig(grad_clip=None).validate()
