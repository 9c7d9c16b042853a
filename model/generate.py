"""Sampling, one token at a time through the blocks' decoding states."""

from __future__ import annotations

from collections.abc import Sequence

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


@torch.no_grad()
def greedy_answers(
    model: HybridLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_token: int, batch_size: int = 128
) -> list[list[int]]:
    """The most likely continuation of each prompt, without it, up to and including stop_token (if it comes).

    Prompts of any lengths (at least one token each) share a batch: every row starts at its own first token and reads
    its own prompt, then its own choices, in step with the others. So nothing is padded, and a row's state is that of
    its document alone. Prompts are sorted by length first, and rows leave the batch once enough have ended.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        _answer_batch(model, prompts, answers, order[start : start + batch_size], max_new_tokens, stop_token)
    model.train(was_training)
    return answers


def _answer_batch(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    answers: list[list[int]],
    numbers: list[int],
    max_new_tokens: int,
    stop_token: int,
) -> None:
    """Fills answers[n] for n in numbers (indices of prompts)."""
    device = model.embedding.weight.device
    states = model.init_state(len(numbers), max(len(prompts[n]) for n in numbers) + max_new_tokens)
    chosen = [0] * len(numbers)
    position = 0
    while numbers:
        fed = [prompts[n][position] if position < len(prompts[n]) else last for n, last in zip(numbers, chosen)]
        logits, states = model.step(torch.tensor(fed, device=device), states)
        chosen = logits.argmax(dim=-1).tolist()
        position += 1
        for number, token in zip(numbers, chosen):
            if position >= len(prompts[number]) and not _ended(answers[number], max_new_tokens, stop_token):
                answers[number].append(token)
        keep = [k for k, n in enumerate(numbers) if not _ended(answers[n], max_new_tokens, stop_token)]
        if len(keep) <= 0.75 * len(numbers):  # copying the states costs about as much as one step
            rows = torch.tensor(keep, dtype=torch.int64, device=device)
            states = [{name: tensor[rows] for name, tensor in state.items()} for state in states]
            numbers, chosen = [numbers[k] for k in keep], [chosen[k] for k in keep]


def _ended(answer: list[int], max_new_tokens: int, stop_token: int) -> bool:
    return len(answer) >= max_new_tokens or (len(answer) > 0 and answer[-1] == stop_token)


def _sample(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """logits: (B, V) -> (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    return torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)[:, 0]
