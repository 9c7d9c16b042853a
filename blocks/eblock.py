"""E: dropless token-choice mixture of experts, balanced by a selection bias (no auxiliary loss).

Router as in DeepSeek-V3 (arXiv 2412.19437) and torchtitan: sigmoid scores, the top k by score + bias are chosen,
their weights come from the scores without the bias. `n_experts: 1` is a plain dense MLP without a router.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blocks.kernels.grouped_experts import KINDS, WIDTH_MULTIPLE, dense_expert, grouped_experts, record_routing
from errors import require, require_choice, require_number

if TYPE_CHECKING:
    from model.context import SequenceContext


@dataclass
class MoEConfig:
    n_experts: int = 8  # routed experts; 1 = one dense MLP of width expert_ff, no router
    top_k: int = 2  # experts per token
    expert_ff: int | None = None  # inner width of one expert; null = d_model, dense: 8/3 d_model rounded up to 64
    n_shared_experts: int = 1  # experts that read every token, as one MLP of n_shared_experts * expert_ff
    expert: str = "swiglu"  # swiglu | relu2
    route_scale: float = 1.0  # factor on the normalised routing weights
    bias_update_rate: float = 1e-3  # step of the selection bias per optimizer step

    def validate(self, path: str, d_model: int) -> None:
        """Raises InputError naming the key."""
        require_number(f"{path}.n_experts", self.n_experts, 1)
        require_number(f"{path}.top_k", self.top_k, 1)
        require(
            self.n_experts == 1 or self.top_k <= self.n_experts,
            f"{path}.top_k",
            f"expected at most n_experts {self.n_experts}, got {self.top_k}",
        )
        require_number(f"{path}.n_shared_experts", self.n_shared_experts, 0)
        require_choice(f"{path}.expert", self.expert, KINDS)
        require_number(f"{path}.route_scale", self.route_scale, 0, exclusive=True)
        require_number(f"{path}.bias_update_rate", self.bias_update_rate, 0)
        if self.expert_ff is not None:
            require_number(f"{path}.expert_ff", self.expert_ff, 1)
        for key, width in ((f"{path}.expert_ff", self.width(d_model)), ("d_model", d_model)):
            near = max(WIDTH_MULTIPLE, round(width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE)
            require(
                width % WIDTH_MULTIPLE == 0,
                key,
                f"expected a multiple of {WIDTH_MULTIPLE} (whole vectors), got {width}; nearest is {near}",
            )

    def width(self, d_model: int) -> int:
        """Inner width of one expert."""
        if self.expert_ff is not None:
            return self.expert_ff
        return d_model if self.n_experts > 1 else -(-8 * d_model // (3 * 64)) * 64


class DenseExpert(nn.Module):
    """One MLP for every token. Rows of up_proj.weight for swiglu: gate, then up."""

    def __init__(self, d_model: int, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.up_proj = nn.Linear(d_model, 2 * width if kind == "swiglu" else width, bias=False)
        self.down_proj = nn.Linear(width, d_model, bias=False)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        nn.init.normal_(self.up_proj.weight, std=self.up_proj.in_features**-0.5, generator=generator)
        out_std = self.down_proj.in_features**-0.5 / (2 * depth) ** 0.5
        nn.init.normal_(self.down_proj.weight, std=out_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D)."""
        return dense_expert(x.to(_compute_dtype(x)), self.up_proj.weight, self.down_proj.weight, self.kind)


class MoE(nn.Module):
    """Routed experts plus shared ones; dense for n_experts 1.

    up_proj (E, 2 F or F, D) and down_proj (E, D, F) hold all routed experts. Buffers: expert_bias (E,), in the
    checkpoint; counts (E,) rows processed per expert since the last update_bias and entropy (2,) its router
    entropy sum and token count, both of training passes only and not in the checkpoint.
    """

    expert_bias: Tensor
    counts: Tensor
    entropy: Tensor
    last_counts: Tensor
    last_entropy: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        config.validate("moe", d_model)
        self.n_experts, self.top_k = config.n_experts, config.top_k
        self.kind, self.route_scale, self.bias_update_rate = config.expert, config.route_scale, config.bias_update_rate
        width = config.width(d_model)
        self.dense: DenseExpert | None = None
        self.shared: DenseExpert | None = None
        if self.n_experts == 1:
            self.dense = DenseExpert(d_model, width, config.expert)
            return
        self.router = nn.Linear(d_model, self.n_experts, bias=False)
        rows = 2 * width if config.expert == "swiglu" else width
        self.up_proj = nn.Parameter(torch.empty(self.n_experts, rows, d_model))
        self.down_proj = nn.Parameter(torch.empty(self.n_experts, d_model, width))
        if config.n_shared_experts:
            self.shared = DenseExpert(d_model, config.n_shared_experts * width, config.expert)
        self.register_buffer("expert_bias", torch.zeros(self.n_experts))
        for prefix in ("", "last_"):
            self.register_buffer(prefix + "counts", torch.zeros(self.n_experts, dtype=torch.int64), persistent=False)
            self.register_buffer(prefix + "entropy", torch.zeros(2, dtype=torch.float64), persistent=False)

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        for part in (self.dense, self.shared):
            if part is not None:
                part.init_weights(depth, generator)
        if self.dense is not None:
            return
        nn.init.normal_(self.router.weight, std=self.router.in_features**-0.5, generator=generator)
        nn.init.normal_(self.up_proj, std=self.up_proj.shape[2] ** -0.5, generator=generator)
        out_std = self.down_proj.shape[2] ** -0.5 / (2 * depth) ** 0.5
        nn.init.normal_(self.down_proj, std=out_std, generator=generator)
        for buffer in self.buffers():
            buffer.zero_()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) -> expert_ids (N, K), weights (N, K), scores (N, E); float32 even under autocast."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(x.to(wide), self.router.weight.to(wide)).sigmoid()
            expert_ids = (scores.detach() + self.expert_bias).topk(self.top_k, dim=-1).indices
            weights = scores.gather(-1, expert_ids)
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.route_scale
        return expert_ids, weights, scores

    def mix(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, D)."""
        if self.dense is not None:
            return self.dense(x)
        expert_ids, weights, scores = self.route(x)
        x_products = x.to(_compute_dtype(x))
        y, rows = grouped_experts(x_products, expert_ids, weights, self.up_proj, self.down_proj, self.kind)
        if self.training and torch.is_grad_enabled():
            record_routing(rows, scores.detach(), self.counts, self.entropy)
        return y if self.shared is None else y + self.shared(x)

    def forward(self, x: Tensor, context: SequenceContext) -> Tensor:
        """x (B, T, D) -> (B, T, D); every token by itself, so the context is not read."""
        return self.mix(x.flatten(0, -2)).view(x.shape)

    def init_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        return {}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, D) -> (B, D)."""
        return self.mix(x), state

    @torch.no_grad()
    def update_bias(self) -> None:
        """Once per optimizer step: bias += rate * sign(mean - count), mean-centred; then the counts start anew."""
        if self.dense is not None:
            return
        load = self.counts.to(self.expert_bias.dtype)
        self.expert_bias += self.bias_update_rate * (load.mean() - load).sign()
        self.expert_bias -= self.expert_bias.mean()
        self.start_counting()

    @torch.no_grad()
    def start_counting(self) -> None:
        """The counts start anew, those so far are what `metrics` shows. Alone after a step that is not taken: the bias
        stays, and nothing of it reaches the next update."""
        if self.dense is not None:
            return
        self.last_counts.copy_(self.counts)
        self.last_entropy.copy_(self.entropy)
        self.counts.zero_()
        self.entropy.zero_()

    def metrics(self) -> dict[str, float | list[float]]:
        """Of the tokens before the last update_bias (of those since, where there was none yet); empty if dense.

        load: share of rows per expert (sums to 1); load_max: largest share times E (1 = balanced); router_entropy in
        nats (ln E = uniform); bias_range; dropped: rows that no expert processed, 0 by construction.
        """
        if self.dense is not None:
            return {}
        fresh = bool(self.last_counts.sum() == 0)
        counts, entropy = (self.counts, self.entropy) if fresh else (self.last_counts, self.last_entropy)
        load = counts / counts.sum().clamp(min=1)
        return {
            "load": load.tolist(),
            "load_max": float(load.max()) * self.n_experts,
            "router_entropy": float(entropy[0] / entropy[1].clamp(min=1)),
            "bias_range": float(self.expert_bias.max() - self.expert_bias.min()),
            "dropped": float(entropy[1]) * self.top_k - float(counts.sum()),
        }

    def flops_per_token(self, sequence_length: int) -> int:
        dense = [p for part in (self.dense, self.shared) if part is not None for p in part.parameters()]
        active = float(sum(p.numel() for p in dense))
        if self.dense is None:
            routed = self.up_proj.numel() + self.down_proj.numel()
            active += self.router.weight.numel() + routed * self.top_k / self.n_experts
        return int(2 * active)


@torch.no_grad()
def balance(mixers: Sequence[MoE], reduce: Callable[[Tensor], Any]) -> None:
    """`update_bias` of routed mixers of one config, by the counts of all data-parallel ranks.

    reduce: sums a tensor over ranks in place. It is called once, for all mixers: float64 holds their counts exactly.
    """
    if not mixers:
        return
    sums = torch.stack([torch.cat([mixer.counts, mixer.entropy]) for mixer in mixers])  # (mixers, E + 2)
    reduce(sums)
    for mixer, of_all in zip(mixers, sums, strict=True):
        mixer.counts.copy_(of_all[:-2])
        mixer.entropy.copy_(of_all[-2:])
        mixer.update_bias()


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
