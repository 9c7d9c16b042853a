"""Fused AdamW in two groups, its state as named tensors, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from errors import require, require_choice, require_number
from training.sharding import full


@dataclass
class OptimizerConfig:
    # The peak, reached after the warmup.
    learning_rate: float = 3e-3
    # AdamW's decay rates of the running mean and of the running square.
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    # Decoupled weight decay, on matrices only: never on norms, biases, A_log, dt_bias, D.
    weight_decay: float = 0.1
    # Whether the embedding (and a head tied to it) is decayed too: none | decay.
    embedding_decay: str = "none"
    # The global gradient norm is scaled down to this; null: measured, never scaled.
    grad_clip: float | None = 1.0

    def validate(self, path: str = "optimizer") -> None:
        require_number(f"{path}.learning_rate", self.learning_rate, 0.0, exclusive=True)
        require(len(self.betas) == 2, f"{path}.betas", f"expected two numbers, got {list(self.betas)}")
        for index, beta in enumerate(self.betas):
            require_number(f"{path}.betas[{index}]", beta, 0.0)
            require(beta < 1.0, f"{path}.betas[{index}]", f"expected less than 1, got {beta}")
        require_number(f"{path}.eps", self.eps, 0.0, exclusive=True)
        require_number(f"{path}.weight_decay", self.weight_decay, 0.0)
        require_choice(f"{path}.embedding_decay", self.embedding_decay, ["none", "decay"])
        if self.grad_clip is not None:
            require_number(f"{path}.grad_clip", self.grad_clip, 0.0, exclusive=True)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters: group 0 decays, group 1 does not.

    Not decayed: fewer than two dimensions (norms, biases, A_log, dt_bias, D), `_no_weight_decay`, and embeddings
    unless asked for.
    """
    decayed, exempt = split_by_decay(model, config.embedding_decay)
    groups = [
        {"params": list(decayed.values()), "weight_decay": config.weight_decay},
        {"params": list(exempt.values()), "weight_decay": 0.0},
    ]
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(first, second), eps=config.eps, fused=True)


def split_by_decay(model: nn.Module, embedding_decay: str = "none") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Trainable parameters by name: (decayed, exempt). A tied parameter appears once, under its first name."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    decayed: dict[str, Tensor] = {}
    exempt: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False)
        spared = spared or (embedding_decay == "none" and id(parameter) in embeddings)
        (exempt if spared else decayed)[name] = parameter
    return decayed, exempt


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales the gradients in place to a global norm of at most max_norm, over all ranks; returns the norm before.

    Look whether the norm is finite before the update: a NaN norm makes every gradient NaN.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if max_norm is not None:
        return full(torch.nn.utils.clip_grad_norm_(with_gradient, max_norm))
    gradients = [parameter.grad for parameter in with_gradient if parameter.grad is not None]
    return full(torch.nn.utils.get_total_norm(gradients))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, dict[str, Tensor]]:
    """AdamW's whole state by parameter name, {"a.weight": {"step", "exp_avg", "exp_avg_sq"}}, as live tensors.

    Goes into a checkpoint as it is, and is what a checkpoint is loaded into. A parameter that had no update yet gets
    the zeros with which AdamW itself begins, so the names are the same before the first step as after it. Learning
    rate, betas and the rest are functions of config and progress and are not state.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors: dict[str, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                # a float32 counter beside the parameter: what fused AdamW makes at its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            tensors[names[id(parameter)]] = dict(state)
    return tensors
