"""R: M2RNN, a recurrent mixer whose matrix state goes through a nonlinear, learned transition (arXiv 2603.14360)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blocks.kernels.gated_norm import gated_norm
from blocks.kernels.m2rnn import m2rnn
from blocks.kernels.m2rnn_layout import M2RNNShape, forget_gate
from blocks.kernels.m2rnn_mixer import m2rnn_mixer
from errors import require, require_number

if TYPE_CHECKING:
    from model.context import SequenceContext


@dataclass
class M2RNNConfig:
    n_heads: int | None = None  # N: value heads, each with a state; null = d_model // value_dim
    key_dim: int = 16  # K: rows of a head's state (the paper's models: 64)
    value_dim: int = 16  # V: columns of a head's state; the transition weight of a head is V x V
    n_q_heads: int = 1  # query heads, shared by the value heads in equal groups; a divisor of n_heads
    n_k_heads: int = 1  # key heads, likewise
    d_conv: int = 4  # taps of the causal convolution over q, k and v, 2 to 4
    a_min: float = 0.01  # forget gate exp(-A softplus(.)): A starts uniform in [a_min, a_max]; 0 would give log(0)
    a_max: float = 16.0  # see a_min
    dt_min: float = 1e-3  # softplus(dt_bias) starts log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1  # see dt_min
    dt_floor: float = 1e-4  # and never starts below this
    gradient_clip: float | None = None  # bound on every element of dL/dh_t, at every time step; null = none
    norm_eps: float = 1e-5  # epsilon of the RMSNorm after the output gate

    def validate(self, path: str, d_model: int) -> None:
        """Raises InputError naming the key."""
        for name in ("key_dim", "value_dim", "n_q_heads", "n_k_heads"):
            require_number(f"{path}.{name}", getattr(self, name), 1)
        require(
            self.n_heads is not None or self.value_dim <= d_model,
            f"{path}.value_dim",
            f"expected at most d_model {d_model} where n_heads is null, got {self.value_dim}",
        )
        n_heads = d_model // self.value_dim if self.n_heads is None else self.n_heads
        require_number(f"{path}.n_heads", n_heads, 1)
        for name in ("n_q_heads", "n_k_heads"):
            groups = getattr(self, name)
            near = min((n for n in range(1, n_heads + 1) if n_heads % n == 0), key=lambda n: abs(n - groups))
            problem = f"expected a divisor of n_heads {n_heads}, got {groups}; nearest is {near}"
            require(n_heads % groups == 0, f"{path}.{name}", problem)
        require_number(f"{path}.d_conv", self.d_conv, 2, 4)
        for name in ("a_min", "dt_min", "dt_floor", "norm_eps"):
            require_number(f"{path}.{name}", getattr(self, name), 0, exclusive=True)
        require_number(f"{path}.a_max", self.a_max, self.a_min)
        require_number(f"{path}.dt_max", self.dt_max, self.dt_min)
        if self.gradient_clip is not None:
            require_number(f"{path}.gradient_clip", self.gradient_clip, 0, exclusive=True)


class M2RNN(nn.Module):
    """Rows of in_proj.weight in order: output gate, q, k, v (these three through the convolution), forget logits.

    Gates, state and norm are computed in float32 (float64 in a float64 model), whatever the autocast dtype.
    """

    def __init__(self, d_model: int, config: M2RNNConfig) -> None:
        super().__init__()
        config.validate("m2rnn", d_model)
        self.config = config
        self.n_heads = n_heads = config.n_heads or d_model // config.value_dim
        inner = n_heads * config.value_dim
        self.conv_dim = (config.n_q_heads + config.n_k_heads) * config.key_dim + inner
        self.splits = [inner, self.conv_dim, n_heads]
        self.shape = M2RNNShape(
            config.key_dim,
            config.value_dim,
            config.n_q_heads,
            config.n_k_heads,
            config.norm_eps,
            config.gradient_clip,
        )
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, config.d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads, config.value_dim))
        self.state_weight = nn.Parameter(torch.empty(n_heads, config.value_dim, config.value_dim))
        self.norm = nn.RMSNorm(inner, eps=config.norm_eps)
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.init_weights(depth=1)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """state_weight starts as the identity, with which no step can enlarge a gradient."""
        config = self.config
        for weight, fan_in, gain in (
            (self.in_proj.weight, self.in_proj.in_features, 1.0),
            (self.out_proj.weight, self.out_proj.in_features, (2 * depth) ** -0.5),
            (self.conv1d.weight, config.d_conv, 1.0),
            (self.conv1d.bias, config.d_conv, 1.0),
        ):
            bound = gain * fan_in**-0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)  # type: ignore[arg-type]
        with torch.no_grad():
            nn.init.uniform_(self.dt_bias, math.log(config.dt_min), math.log(config.dt_max), generator=generator)
            dt = self.dt_bias.exp().clamp(min=config.dt_floor)
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            nn.init.uniform_(self.A_log, config.a_min, config.a_max, generator=generator)
            self.A_log.log_()
            self.state_weight.copy_(torch.eye(config.value_dim, device=self.state_weight.device))
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        parameters = (self.dt_bias, self.A_log, self.D, self.state_weight, self.norm.weight)
        y = m2rnn_mixer(self.in_proj(x), *self._taps(), *parameters, context.segment_ids, context.starts, self.shape)
        return self.out_proj(y)

    def _taps(self) -> tuple[Tensor, Tensor]:
        """Weight (C, d_conv) and bias (C,) of the convolution."""
        return self.conv1d.weight[:, 0], self.conv1d.bias  # type: ignore[return-value]

    def init_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        """conv (B, C, d_conv - 1): the last inputs of the convolution; state (B, N, K, V). Both zero."""
        weight, config = self.state_weight, self.config
        wide = torch.promote_types(weight.dtype, torch.float32)
        return {
            "conv": torch.zeros(batch_size, self.conv_dim, config.d_conv - 1, dtype=wide, device=weight.device),
            "state": torch.zeros(
                batch_size, self.n_heads, config.key_dim, config.value_dim, dtype=wide, device=weight.device
            ),
        }

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, D) -> (B, D) and the next state; the given one is left as it is."""
        gate, qkv, logits = self.in_proj(x).split(self.splits, dim=-1)
        window = torch.cat([state["conv"], qkv.to(state["conv"].dtype)[..., None]], dim=-1)  # (B, C, d_conv)
        weight, bias = self._taps()
        q, k, v = (t[:, None] for t in self.shape.split(F.silu((window * weight).sum(dim=-1) + bias)))  # one token long
        forget = forget_gate(logits, self.dt_bias, self.A_log)[0][:, None]
        y, hidden = m2rnn(q, k, v, self.state_weight, forget, self.D, initial_state=state["state"])
        y = gated_norm(rearrange(y, "b 1 n v -> b (n v)"), gate, self.norm.weight, 1, self.config.norm_eps)
        return self.out_proj(y), {"conv": window[..., 1:], "state": hidden}

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, and per head h W, k v^T and q^T h: the same at any length."""
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        state = self.n_heads * self.config.key_dim * self.config.value_dim
        return 2 * (projections + state * (self.config.value_dim + 2))
