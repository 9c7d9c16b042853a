"""A: grouped-query attention with QK-norm, rotary positions, an optional output gate and an optional window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from blocks.kernels.attention import document_attention
from blocks.kernels.qk_norm_rope import qk_norm_rope, rotary_table
from errors import InputError, require, require_choice, require_number

if TYPE_CHECKING:
    from model.context import SequenceContext

POSITIONS = ("rope", "none")
GATES = ("none", "sigmoid")


@dataclass
class AttentionConfig:
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # key and value heads; a divisor of n_heads
    head_dim: int | None = None  # width of one head; null = d_model // n_heads
    position: str = "rope"  # rope | none (none suits stacks where a recurrent block gives the order)
    rope_theta: float = 10000.0  # base of the rotary frequencies
    gate: str = "none"  # none | sigmoid: attention output times sigmoid(linear(x)) before the output projection
    window: int | None = None  # a token reads itself and the window - 1 tokens before it; null = whole document
    qk_norm_eps: float = 1e-6  # epsilon of the RMS norms on queries and keys

    def validate(self, path: str, d_model: int) -> None:
        """Raises InputError naming the key."""
        require_number(f"{path}.n_heads", self.n_heads, 1)
        require_number(f"{path}.n_kv_heads", self.n_kv_heads, 1)
        require(
            self.n_heads % self.n_kv_heads == 0,
            f"{path}.n_kv_heads",
            f"expected a divisor of n_heads {self.n_heads}, got {self.n_kv_heads}",
        )
        if self.head_dim is None and d_model % self.n_heads:
            divisors = [n for n in range(1, d_model + 1) if d_model % n == 0]
            near = min(divisors, key=lambda n: abs(n - self.n_heads))
            raise InputError(
                f"{path}.n_heads: d_model {d_model} is not divisible by n_heads {self.n_heads};"
                f" nearest n_heads that divides it is {near}, or set {path}.head_dim"
            )
        head_dim = d_model // self.n_heads if self.head_dim is None else self.head_dim
        require_number(f"{path}.head_dim", head_dim, 1)
        require_choice(f"{path}.position", self.position, POSITIONS)
        require(
            self.position != "rope" or head_dim % 2 == 0,
            f"{path}.head_dim",
            f"expected an even number for position rope, got {head_dim}; nearest is {head_dim + 1}",
        )
        require_number(f"{path}.rope_theta", self.rope_theta, 0, exclusive=True)
        require_choice(f"{path}.gate", self.gate, GATES)
        if self.window is not None:
            require_number(f"{path}.window", self.window, 1)
        require_number(f"{path}.qk_norm_eps", self.qk_norm_eps, 0, exclusive=True)


class Attention(nn.Module):
    """Rows of qkv_proj.weight in order: queries, keys, values, then the gate where there is one.

    Norms and rotation are done in float32 (float64 in a float64 model), the products in the projection's dtype.
    """

    def __init__(self, d_model: int, config: AttentionConfig) -> None:
        super().__init__()
        config.validate("attention", d_model)
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim = config.head_dim or d_model // config.n_heads
        self.position, self.rope_theta, self.window = config.position, config.rope_theta, config.window
        self.gate, self.qk_norm_eps = config.gate, config.qk_norm_eps
        inner, inner_kv = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        gate_rows = inner if self.gate == "sigmoid" else 0
        self.qkv_proj = nn.Linear(d_model, inner + 2 * inner_kv + gate_rows, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.qk_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.qk_norm_eps)
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.qkv_proj.weight, std=self.qkv_proj.in_features**-0.5, generator=generator)
        out_std = self.o_proj.in_features**-0.5 / (2 * depth) ** 0.5
        nn.init.normal_(self.o_proj.weight, std=out_std, generator=generator)
        nn.init.ones_(self.q_norm.weight)
        nn.init.ones_(self.k_norm.weight)

    def project(self, x: Tensor, positions: Tensor, table: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """x (..., D) -> q (..., H, d) and k (..., G, d), normed and rotated, v (..., G, d) and the gate (..., R)."""
        weights = self.q_norm.weight, self.k_norm.weight
        return qk_norm_rope(
            self.qkv_proj(x), *weights, positions, table, self.n_heads, self.n_kv_heads, self.qk_norm_eps
        )

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        if self.position == "none":
            return None
        return rotary_table(positions, self.head_dim, self.rope_theta, self.q_norm.weight.dtype)

    def output(self, mixed: Tensor, gate: Tensor) -> Tensor:
        """mixed (..., H d) -> (..., D)."""
        return self.o_proj(mixed if self.gate == "none" else mixed * gate.sigmoid())

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        table = self.rotary(torch.arange(x.shape[1], device=x.device))
        q, k, v, gate = self.project(x, context.positions, table)
        mask = context.block_mask(self.window)
        return self.output(document_attention(q, k, v, context.segment_ids, self.window, mask).flatten(-2), gate)

    def init_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        """k, v (B, max_length, G, d) and position (B,): the next token's index in its document."""
        weight = self.qkv_proj.weight
        cache = torch.zeros(
            batch_size, max_length, self.n_kv_heads, self.head_dim, dtype=weight.dtype, device=weight.device
        )
        return {
            "k": cache,
            "v": cache.clone(),
            "position": torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        }

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, D) -> (B, D). The state is consumed: its tensors are written in place (no gradient through them).

        Raises InputError when the document outgrows max_length.
        """
        position, keys, values = state["position"], state["k"], state["v"]
        max_length = keys.shape[1]
        require(int(position.max()) < max_length, "max_length", f"the cache holds {max_length} tokens; all are used")
        rows = torch.arange(x.shape[0], device=x.device)
        q, k, v, gate = self.project(x, rows, self.rotary(position))
        keys[rows, position] = k.detach().to(keys.dtype)
        values[rows, position] = v.detach().to(values.dtype)
        distance = position[:, None] - torch.arange(max_length, device=x.device)
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        mixed = F.scaled_dot_product_attention(
            q[:, :, None],
            rearrange(keys, "b t g d -> b g t d").to(q.dtype),
            rearrange(values, "b t g d -> b g t d").to(q.dtype),
            attn_mask=visible[:, None, None],
            enable_gqa=True,
        ).flatten(1)
        return self.output(mixed, gate), {"k": keys, "v": values, "position": position + 1}

    def flops_per_token(self, sequence_length: int) -> int:
        """Projections, and scores and mixing over the mean causal context of sequence_length."""
        projections = self.qkv_proj.weight.numel() + self.o_proj.weight.numel()
        context = (sequence_length + 1) / 2
        if self.window is not None and self.window < sequence_length:
            context = self.window - self.window * (self.window - 1) / (2 * sequence_length)
        return int(2 * projections + 4 * self.n_heads * self.head_dim * context)
