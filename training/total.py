"""Is the STP term in the total that training differentiates, in value and in gradient?

The gradients are taken by a plain `.backward()`, as in a training step: that is where STP's rows join the gradient of
the LM (losses/joined.py), which no `torch.autograd.grad` would show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch
from losses.objective import Objective
from losses.triples import Triples
from training.distributed import World
from training.gradients import by_backward
from training.sharding import full

VALUE_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 3e-2
# STP's share of the gradient is then of the LM's size or above, so that a fault of it is seen.
WEIGHT = 100.0
PIECE = 1 << 20  # elements that are compared at once


@dataclass(frozen=True)
class ForcedTotals:
    """The objective's total with the gate forced open and forced shut, before any backward pass."""

    opened: Tensor
    closed: Tensor

    @classmethod
    def of(
        cls,
        model: Any,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager],
        output: Any,
        batch: Batch,
        triples: Triples,
    ) -> ForcedTotals:
        def total(stp_weight: float) -> Tensor:
            weight = torch.tensor(stp_weight, device=batch.tokens.device)
            with torch.enable_grad(), autocast():
                return objective(output, model.head.weight, batch.labels, triples, stp_weight=weight).total

        return cls(total(WEIGHT), total(0.0))


def check_total(
    model: Any, objective: Objective, totals: ForcedTotals, terms: dict[int | str, Tensor], world: World
) -> str | None:
    """Forced open, the objective's total is LM + weight x STP. A control's has exactly the gradient of the LM.

    The gradient is compared with the one of that sum, and not by what the gate adds to the LM's: bfloat16 rounds what
    flows back as a whole, so a difference of two gradients holds the rounding of both, several percent of STP's in some
    batches. Two backward passes of one sum round alike (measured: 0.05% where the difference had 4%).

    Leaves `.grad` of every parameter as it was. None if all is well, else what was seen.
    """
    opened, closed = totals.opened, totals.closed
    leaves = _leaves(model)
    stp = sum(terms.values(), torch.zeros((), device=opened.device)) / len(terms)
    expected_total = float(closed.detach()) + WEIGHT * float(stp.detach())
    problem = None if opened.requires_grad else "it has no gradient"
    if not abs(float(opened.detach()) - expected_total) <= VALUE_TOLERANCE * (1 + abs(expected_total)):
        problem = f"forced open it is {float(opened.detach()):.6f}, LM + weight x STP is {expected_total:.6f}"
    if world.any(problem is not None):  # one that left alone would leave the others waiting in a collective
        return problem
    seen = _gradients(model, opened, leaves)
    if objective.is_control:
        sent = any(bool(part.any()) for part in _differences(seen, _gradients(model, closed, leaves)))
        return "a control that declares no gradient sends one" if sent else None
    stp_alone = WEIGHT * _norm(_differences(_gradients(model, stp, leaves), [None] * len(leaves)))
    error = _norm(_differences(seen, _gradients(model, closed + WEIGHT * stp, leaves))) / max(stp_alone, 1e-300)
    if not error <= GRADIENT_TOLERANCE:
        return f"its gradient differs by {error:.1e} from LM + weight x STP: the term is not in it as configured"
    return None


def _leaves(model: Any) -> list[Tensor]:
    """The embedding, every block's norm (small, and moved by whatever reaches that block) and the whole last block."""
    norms = [block.norm.weight for block in model.blocks[:-1]]
    leaves = [model.embedding.weight, *norms, *model.blocks[-1].parameters()]
    return [leaf for leaf in leaves if leaf.requires_grad]


def _gradients(model: Any, scalar: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    found = by_backward(model, scalar, parameters=leaves)[1]
    return [None if gradient is None else full(gradient) for gradient in found]


def _differences(some: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> Iterator[Tensor]:
    """Tensor by tensor in pieces of float64: whole copies of an embedding would be the largest thing in memory. None
    is zero."""
    for one, other in zip(some, others, strict=True):
        one, other = (one, other) if one is not None else (other, None)  # the sign is nobody's concern
        if one is None:
            continue
        pieces = one.flatten().split(PIECE)
        against = [None] * len(pieces) if other is None else other.flatten().split(PIECE)
        for piece, minus in zip(pieces, against, strict=True):
            yield piece.double() if minus is None else piece.double() - minus.double()


def _norm(pieces: Iterable[Tensor]) -> float:
    return math.hypot(*(float(piece.norm()) for piece in pieces))
