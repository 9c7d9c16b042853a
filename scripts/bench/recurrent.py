"""R: the M2RNN kernel against autograd through the literal time loop, and one R in the place of one M."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from blocks.kernels.m2rnn import m2rnn, m2rnn_reference
from model.hybrid import HybridLM, ModelConfig
from scripts.bench.harness import Row, interleave, print_row
from scripts.bench.step import training_step

B, T, N_HEADS, KEY, VALUE = 8, 512, 16, 16, 16
PEER = "autograd through the literal loop"


def saved_mb(forward: Callable[[], Any], inputs: list[Tensor]) -> float:
    """What autograd keeps for the backward pass beyond the inputs themselves, MB (10^6 bytes)."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    del output
    return sum(size for pointer, size in kept.items() if pointer not in own) / 1e6


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 0.7 * torch.randn(*shape, generator=generator)

    inputs = [
        random(B, T, 1, KEY),
        random(B, T, 1, KEY),
        random(B, T, N_HEADS, VALUE),
        torch.eye(VALUE).repeat(N_HEADS, 1, 1) + 0.05 * random(N_HEADS, VALUE, VALUE),
        torch.rand(B, T, N_HEADS, generator=generator),
        random(N_HEADS, VALUE),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    starts = torch.rand(B, T, generator=generator) < 0.02
    gradient = random(B, T, N_HEADS, VALUE)

    def step(function: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(*inputs, starts=starts)[0], inputs, gradient)

    for own, theirs in zip(step(m2rnn)(), step(m2rnn_reference)(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
    timing = interleave({"ours": step(m2rnn), "peer": step(m2rnn_reference)}, rounds=5, warmup=1)
    print_row(Row("R M2RNN T 512", PEER, timing.ratio("peer", "ours"), 8.0, 20.0, figures=timing.figures()))
    forwards: list[Callable[..., Any]] = [m2rnn, m2rnn_reference]
    memory = [saved_mb(partial(forward, *inputs, starts=starts), [*inputs, starts]) for forward in forwards]
    figures = {"ours MB": round(memory[0], 2), "peer MB": round(memory[1], 2)}
    print_row(Row("R activations kept, share of", PEER, memory[0] / memory[1], 1 / 8, None, True, figures))

    steps = {}
    for letter in "RM":
        model = HybridLM(ModelConfig(pattern="AEMEAEMEAEM" + letter, d_model=256), 4096)
        model.init_weights(generator)
        steps[letter] = training_step(model, bf16=False)
    timing = interleave(steps, rounds=9)
    name = "step with one R in twelve, fp32"
    print_row(Row(name, "M in its place", timing.ratio("R", "M"), 1.12, 1.02, True, timing.figures()))
