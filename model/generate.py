"""Sampling, one token at a time through the blocks' decoding states."""

from __future__ import annotations

import torch
from torch import Tensor

from model.hybrid import HybridLM


@torch.no_grad()
def generate(
    model: HybridLM,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int | None = 50,
    stop_token: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """prompt: (B, T) -> (B, T + up to max_new_tokens). temperature 0 is greedy; rows end with stop_token once seen."""
    was_training = model.training
    model.eval()
    states = model.init_state(prompt.shape[0], prompt.shape[1] + max_new_tokens)
    for position in range(prompt.shape[1]):
        logits, states = model.step(prompt[:, position], states)
    tokens = [prompt]
    done = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    for _ in range(max_new_tokens):
        token = _sample(logits.float(), temperature, top_k, generator)
        if stop_token is not None:
            token = torch.where(done, stop_token, token)
            done = done | (token == stop_token)
        tokens.append(token[:, None])
        if bool(done.all()):
            break
        logits, states = model.step(token, states)
    model.train(was_training)
    return torch.cat(tokens, dim=1)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits: (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
