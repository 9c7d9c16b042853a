"""Subject: a model as this command sees it, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Subject:
    """forward(tokens (N, T), lengths (N,)) -> states at boundaries 0 .. depth and "final", each (N, T, D).

    name: how people know it. letters: family of each block (one letter, or several joined where one layer of a
    foreign model holds several). trained_length: tokens of a training row. window: of the run's triples.
    """

    name: str
    letters: list[str]
    d_model: int
    vocab_size: int
    forward: Callable[[Tensor, Tensor], list[Tensor]]
    trained_length: int | None = None
    window: int | None = 64
    tokenizer_sha256: str | None = None
    step: int | None = None
    tokens: int | None = None
    stp: dict[str, object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def boundaries(self) -> list[int | str]:
        return [*range(len(self.letters) + 1), "final"]
