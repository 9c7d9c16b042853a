"""What a control declares, proven like STP itself: a placebo sends nothing; the controls that act do it as they say.

`gradient_noise` and `norm_penalty` pass every gradient check of STP first. What is looked at here is that they are not
STP under another name, nor something of another size or kind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losses.objective import Objective
from losses.triples import Triples
from training.wiring import BoundaryResult

PLACEBO_CHECKS = ("control_sends_nothing",)
NORM_TOLERANCE = 1e-3
# Two random directions of a boundary's rows (at least 6 tokens x 32 channels) are alike to 0.07 or so.
MOST_ALIKE = 0.5
ORTHOGONAL = 1e-6


def placebo_result(model: Any, output: Any, index: int | str, term: Tensor) -> BoundaryResult:
    """The placebo declares that it sends no gradient; exactly none may arrive."""
    family = {"final": "final", 0: "embedding"}.get(index) or model.blocks[int(index) - 1].letter
    result = BoundaryResult(index, family, 0.0, 0.0)
    if term.requires_grad:
        grads = torch.autograd.grad(term, output.hidden_states, retain_graph=True, allow_unused=True)
        if any(grad is not None and bool(grad.any()) for grad in grads):
            result.problems["control_sends_nothing"] = "a control that declares no gradient sends one"
    return result


def check_control(objective: Objective, output: Any, triples: Triples) -> dict[str, str | None]:
    """{"control_as_declared": None if it holds, else what was seen} for a control that acts; {} for all else."""
    checks = {"gradient_noise": _check_noise, "norm_penalty": _check_penalty}
    check = checks.get(objective.config.variant)
    return {} if check is None else {"control_as_declared": check(objective, output, triples)}


def _check_noise(objective: Objective, output: Any, triples: Triples) -> str | None:
    """At every token the norm of STP's gradient, and not its direction."""
    pairs = (_gradients(objective, output, triples, variant) for variant in ("gradient_noise", "standard"))
    for index, noise, stp in zip(objective.boundaries, *pairs, strict=True):
        norms, expected = noise.norm(dim=-1), stp.norm(dim=-1)
        error = float((norms - expected).norm() / expected.norm().clamp_min(1e-300))
        if not error <= NORM_TOLERANCE:
            return f"boundary {index}: the norms of its noise differ by {error:.1e} from those of STP's gradient"
        alike = abs(float((noise * stp).sum() / stp.square().sum().clamp_min(1e-300)))
        if not alike <= MOST_ALIKE:
            return f"boundary {index}: its noise points where STP's gradient does (cosine {alike:.2f})"
    return None


def _check_penalty(objective: Objective, output: Any, triples: Triples) -> str | None:
    """One triple of every row: the gradient leaves all angles as they are, so it is orthogonal to STP's."""
    one = replace(triples, valid=triples.valid & (triples.valid.to(torch.int64).cumsum(1) == 1))
    pairs = (_gradients(objective, output, one, variant, torch.float64) for variant in ("norm_penalty", "standard"))
    for index, penalty, stp in zip(objective.boundaries, *pairs, strict=True):
        size = (penalty.flatten(1).norm(dim=1) * stp.flatten(1).norm(dim=1)).clamp_min(1e-300)
        alike = float(((penalty * stp).flatten(1).sum(1) / size).abs().max())
        if not alike <= ORTHOGONAL:
            return f"boundary {index}: the penalty changes the angle (cosine {alike:.1e} with STP's gradient)"
    return None


def _gradients(
    objective: Objective, output: Any, triples: Triples, variant: str, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Of the term as `variant` at every selected boundary's state, (B, T, D) each, in float64."""
    states = [h.detach().to(dtype or h.dtype).requires_grad_() for h in output.hidden_states]
    final = output.final.detach().to(dtype or output.final.dtype).requires_grad_()
    with torch.enable_grad():
        sums = objective.measure(states, final, triples, variant=variant).sums
    return [grad.double() for grad in torch.autograd.grad(sums.sum(), objective.select(states, final))]
