"""M: Mamba-2, with the parameter names, row order and initialisation of mamba_ssm.Mamba2, so weights interchange."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blocks.kernels.gated_norm import gated_norm
from blocks.kernels.mamba2 import Mamba2Shape, mamba2_inner
from errors import InputError, require, require_number

if TYPE_CHECKING:
    from model.context import SequenceContext


@dataclass
class Mamba2Config:
    d_state: int = 64  # N: width of the state of one channel
    d_conv: int = 4  # taps of the causal convolution, 2 to 4
    expand: int = 2  # d_inner = expand * d_model
    head_dim: int = 64  # P: channels that share one decay; a divisor of d_inner
    n_groups: int = 1  # G: groups of heads that share B and C; a divisor of the number of heads
    chunk_size: int = 64  # tokens per chunk of the matmul form: changes the speed, not the result
    a_min: float = 1.0  # A = -exp(A_log) starts uniform in -[a_min, a_max]
    a_max: float = 16.0  # see a_min
    dt_min: float = 1e-3  # softplus(dt_bias) starts log-uniform in [dt_min, dt_max]
    dt_max: float = 0.1  # see dt_min
    dt_floor: float = 1e-4  # and never starts below this
    norm_eps: float = 1e-5  # epsilon of the gated RMSNorm

    def validate(self, path: str, d_model: int) -> None:
        """Raises InputError naming the key."""
        for name in ("d_state", "expand", "head_dim", "n_groups", "chunk_size"):
            require_number(f"{path}.{name}", getattr(self, name), 1)
        require_number(f"{path}.d_conv", self.d_conv, 2, 4)
        for name in ("a_min", "dt_min", "dt_floor", "norm_eps"):
            require_number(f"{path}.{name}", getattr(self, name), 0, exclusive=True)
        require_number(f"{path}.a_max", self.a_max, self.a_min)
        require_number(f"{path}.dt_max", self.dt_max, self.dt_min)
        d_inner = self.expand * d_model
        if d_inner % self.head_dim:
            near = min(_divisors(d_inner), key=lambda n: abs(n - self.head_dim))
            raise InputError(
                f"{path}.head_dim: expand * d_model = {d_inner} is not divisible by head_dim {self.head_dim};"
                f" nearest that divides it is {near}"
            )
        n_heads = d_inner // self.head_dim
        near = min(_divisors(n_heads), key=lambda n: abs(n - self.n_groups))
        require(
            n_heads % self.n_groups == 0,
            f"{path}.n_groups",
            f"expected a divisor of the number of heads, {n_heads}, got {self.n_groups}; nearest is {near}",
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class GatedRMSNorm(nn.Module):
    """Holds `weight` (C,) of RMSNorm(y * silu(z)) under mamba_ssm's name `norm.weight`."""

    def __init__(self, channels: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y and z (..., C) -> (..., C)."""
        return gated_norm(y, z, self.weight, self.n_groups, self.eps)


class Mamba2(nn.Module):
    """Dao and Gu 2024 (arXiv 2405.21060). Rows of in_proj.weight in order: z, x, B, C, dt.

    Decays, dt and the norm are computed in float32 (float64 in a float64 model), whatever the autocast dtype.
    """

    def __init__(self, d_model: int, config: Mamba2Config) -> None:
        super().__init__()
        config.validate("mamba2", d_model)
        self.config = config
        self.d_inner = config.expand * d_model
        self.n_heads = self.d_inner // config.head_dim
        self.conv_dim = self.d_inner + 2 * config.n_groups * config.d_state
        self.shape = Mamba2Shape(config.head_dim, config.d_state, config.n_groups, config.chunk_size, config.norm_eps)
        self.splits = [self.d_inner, self.conv_dim, self.n_heads]
        self.in_proj = nn.Linear(d_model, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, config.d_conv, groups=self.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = GatedRMSNorm(self.d_inner, config.n_groups, config.norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.init_weights(depth=1)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """As mamba_ssm's; out_proj.weight divided by sqrt(2 * depth)."""
        config = self.config
        for weight, fan_in, gain in (
            (self.in_proj.weight, self.in_proj.in_features, 1.0),
            (self.out_proj.weight, self.d_inner, (2 * depth) ** -0.5),
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
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm.weight)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        parameters = (self.dt_bias, self.A_log, self.D, self.norm.weight)
        y = mamba2_inner(self.in_proj(x), *self._taps(), *parameters, context.segment_ids, self.shape)
        return self.out_proj(y)

    def _taps(self) -> tuple[Tensor, Tensor]:
        """Weight (C, K) and bias (C,) of the convolution."""
        assert self.conv1d.bias is not None
        return self.conv1d.weight[:, 0], self.conv1d.bias

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """xBC (..., C) -> x (..., H, P), B (..., G, N), C (..., G, N)."""
        groups = self.config.n_groups * self.config.d_state
        x, B, C = xBC.split([self.d_inner, groups, groups], dim=-1)
        return (
            x.unflatten(-1, (self.n_heads, -1)),
            B.unflatten(-1, (self.config.n_groups, -1)),
            C.unflatten(-1, (self.config.n_groups, -1)),
        )

    def _decay_rates(self) -> tuple[Tensor, Tensor]:
        """A and D (H,), at least float32."""
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return -self.A_log.to(wide).exp(), self.D.to(wide)

    def _step_sizes(self, dt: Tensor) -> Tensor:
        """dt (..., H) as projected -> positive, at least float32."""
        wide = torch.promote_types(dt.dtype, torch.float32)
        return F.softplus(dt.to(wide) + self.dt_bias.to(wide))

    def init_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        """conv (B, C, K - 1): the last inputs of the convolution; ssm (B, H, P, N). Both zero."""
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return {
            "conv": torch.zeros(
                batch_size, self.conv_dim, self.config.d_conv - 1, dtype=wide, device=self.A_log.device
            ),
            "ssm": torch.zeros(
                batch_size,
                self.n_heads,
                self.config.head_dim,
                self.config.d_state,
                dtype=wide,
                device=self.A_log.device,
            ),
        }

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, D) -> (B, D) and the next state; the given one is left as it is."""
        z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        window = torch.cat([state["conv"], xBC.to(state["conv"].dtype)[..., None]], dim=-1)  # (B, C, K)
        weight, bias = self._taps()
        values, keys, queries = self._heads(F.silu((window * weight).sum(dim=-1) + bias))
        heads_per_group = self.n_heads // self.config.n_groups
        keys, queries = (t.repeat_interleave(heads_per_group, dim=-2) for t in (keys, queries))  # (B, H, N)
        A, D = self._decay_rates()
        steps = self._step_sizes(dt)  # (B, H)
        update = (steps[..., None] * values)[..., None] * keys[:, :, None, :]
        ssm = (steps * A).exp()[..., None, None] * state["ssm"] + update
        y = (ssm * queries[:, :, None, :]).sum(dim=-1) + D[:, None] * values  # (B, H, P)
        y = self.norm(rearrange(y, "b h p -> b (h p)"), z.to(y.dtype))
        return self.out_proj(y), {"conv": window[..., 1:], "ssm": ssm}

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections and the matrix products of the chunked form: linear in the length, so the same at any."""
        chunk, state, group = self.config.chunk_size, self.config.d_state, self.config.n_groups
        projections = self.in_proj.weight.numel() + self.out_proj.weight.numel()
        scores = group * chunk * state  # C B^T, shared by the heads of a group
        per_channel = chunk + 2 * state  # inside the chunk, into the state, out of the state
        return 2 * (projections + scores + self.d_inner * per_channel)
