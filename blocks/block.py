"""The block protocol: a pre-norm residual block around exactly one mixer, whatever the family.

`forward` is hidden + mixer(norm(hidden)) and nothing else: preflight recomputes that sum from `.norm` and
`.mixer` and compares gradients, so a block that does more or less is caught before the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.context import SequenceContext

FAMILIES = {"A": "attention", "M": "mamba2", "E": "moe", "R": "m2rnn"}


class Mixer(Protocol):
    """What a family implements. x is the normed residual stream, (B, T, D) or (B, D) for one step."""

    def __call__(self, x: Tensor, context: SequenceContext) -> Tensor:
        """(B, T, D) -> (B, T, D). Causal, and isolated between the documents of a row."""
        ...

    def init_weights(self, depth: int, generator: torch.Generator | None = None) -> None:
        """Fills every parameter in place. Output projections are scaled by 1 / sqrt(2 * depth), never zero."""
        ...

    def init_state(self, batch_size: int, max_length: int) -> dict[str, Tensor]:
        """The decoding state before the first token of a document: tensors with a leading batch dimension."""
        ...

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One token: x (B, D) -> y (B, D) and the next state. Equals the parallel forward at that position."""
        ...

    def flops_per_token(self, sequence_length: int) -> int:
        """Matmul FLOPs (2 per multiply-add) of one forward token at this context length; backward is twice that."""
        ...


class Block(nn.Module):
    """One letter of the pattern."""

    def __init__(self, letter: str, d_model: int, mixer: nn.Module, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.letter = letter
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer: Any = mixer

    @property
    def family(self) -> str:
        return FAMILIES[self.letter]

    def forward(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        """hidden: (B, T, D) residual stream (float32, or float64 in a float64 model); the result has its dtype."""
        return hidden + self.mixer(self.norm(hidden), context)

    def step(self, hidden: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """hidden: (B, D), one token."""
        update, state = self.mixer.step(self.norm(hidden), state)
        return hidden + update, state
