"""Live evidence: on a training step with the gate open, what STP's gradient is beside the LM's, per family."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from errors import PreflightError
from losses.objective import Objective, ObjectiveOutput
from training.distributed import World

# Fewer may all be degenerate by chance, as where tokens repeat.
ENOUGH_TRIPLES = 48


def gradient_evidence(
    objective: Objective, output: Any, loss: ObjectiveOutput, world: World | None = None
) -> dict[str, float]:
    """Per family: `stp/grad_norm`, `stp/grad_ratio` (STP : LM) and `stp/grad_cosine`, at the selected boundaries.

    STP's gradient is that of the boundary's own unweighted term, direct at the boundary; LM's is the whole
    gradient that arrives there. Of this rank's rows: boundaries where these have no triple, or only degenerate ones,
    are left out. Keeps the graph, leaves `.grad` alone.
    Raises PreflightError (exit code 3) on all ranks if on one a term sends no gradient, or one that is not finite, or
    if its weight in the total is not the one that was given, unless the variant declares that it sends none.
    """
    world = world or World.alone()
    if loss.stp_per_boundary is None or loss.stp_terms is None:
        return {}
    # What follows gathers weights: all ranks do all of it, whatever they find, and judge together at the end.
    n_valid = int(loss.stp_terms.n_valid)
    if not world.any(n_valid > 0):
        return {}
    problem = None if objective.is_control else _share_problem(loss)
    sound = (n_valid - loss.stp_terms.n_degenerate).tolist()
    terms = dict(zip(objective.boundaries, loss.stp_per_boundary.unbind(), strict=True))
    states = dict(zip(terms, objective.select(output.hidden_states, output.final), strict=True))
    stp_grads = {index: _nonzero_rows(_direct(terms[index], state)) for index, state in states.items()}
    beside = _beside(loss.lm, states, stp_grads)
    found: dict[str, list[tuple[float, float, float]]] = {}
    for index, family, n_sound in zip(states, objective.families, sound, strict=True):
        norm, lm_norm, dot = beside[index]
        if n_sound == 0 and norm == 0:
            continue
        if not objective.is_control and not 0 < norm < float("inf"):
            problem = problem or f"the gradient of its term at boundary {index} ({family}) has norm {norm}"
        scale = norm * lm_norm
        found.setdefault(family, []).append((norm, norm / lm_norm if lm_norm else 0.0, dot / scale if scale else 0.0))
    ranks = world.gather({"problem": problem, "n_valid": n_valid, "sound": sound})
    for rank, seen in enumerate(ranks):
        if seen["problem"] is not None:
            raise PreflightError(f"STP died: {seen['problem']}" + (f" on rank {rank}" if world.size > 1 else ""))
    n_all = 0 if objective.is_control else sum(seen["n_valid"] for seen in ranks)
    for place, index in enumerate(objective.boundaries):
        if n_all >= ENOUGH_TRIPLES and not any(seen["sound"][place] for seen in ranks):
            raise PreflightError(
                f"STP died: all {n_all} triples at boundary {index} are degenerate: its states collapsed"
            )
    metrics = {}
    for family, rows in found.items():
        for name, values in zip(("grad_norm", "grad_ratio", "grad_cosine"), zip(*rows, strict=True), strict=True):
            metrics[f"stp/{name}/{family}"] = sum(values) / len(values)
    return metrics


def _beside(
    lm: Tensor, states: dict[int | str, Tensor], stp_grads: dict[int | str, tuple[Tensor, Tensor]]
) -> dict[int | str, tuple[float, float, float]]:
    """Boundary -> norms of its gradients of STP and LM (0 where none arrives) and their inner product.

    stp_grads: their rows, since few tokens have any. The LM's are looked at as they come by, and none is kept: a
    backward pass to the lowest boundary meets all the others on its way. One that it does not meet is asked for alone.
    """
    found: dict[int | str, tuple[float, float, float]] = {}

    def look(index: int | str, lm_grad: Tensor | None) -> None:
        where, rows = stp_grads[index]
        stp_grad = states[index].new_zeros(states[index].shape).flatten(0, 1).index_copy_(0, where, rows)
        stp_grad = stp_grad.view_as(states[index])
        if lm_grad is None:
            found[index] = float(stp_grad.norm()), 0.0, 0.0
        else:
            found[index] = float(stp_grad.norm()), float(lm_grad.norm()), float((stp_grad * lm_grad).sum())

    handles = [state.register_hook(partial(look, index)) for index, state in states.items()]
    try:
        torch.autograd.grad(lm, next(iter(states.values())), retain_graph=True, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    for index, state in states.items():
        if index not in found:
            look(index, torch.autograd.grad(lm, state, retain_graph=True, allow_unused=True)[0])
    return found


def _nonzero_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) -> which of the B x T rows are not zero, and these."""
    rows = grad.flatten(0, 1)
    where = rows.any(dim=1).nonzero().flatten()
    return where, rows[where]


def _share_problem(loss: ObjectiveOutput) -> str | None:
    """d total / d (the term of each boundary) must be weight / number of boundaries."""
    per_boundary, weight = loss.stp_per_boundary, float(loss.terms["stp"].weight)
    assert per_boundary is not None
    (share,) = torch.autograd.grad(loss.total, per_boundary, retain_graph=True, allow_unused=True)
    expected = torch.full_like(per_boundary, weight / len(per_boundary))
    if share is not None and torch.allclose(share, expected, rtol=1e-4, atol=0.0):
        return None
    seen = "absent" if share is None else f"{float(share.sum()):.3g} in all"
    return f"its weight in the total is {seen}, not {weight:.3g} spread over its boundaries"


def _direct(term: Tensor, state: Tensor) -> Tensor:
    """d term / d state, 0 where the term does not reach it. The zero share of the state itself is for the hook there,
    which gathers a sharded block's weights: it runs on every rank or on none."""
    (grad,) = torch.autograd.grad(term + 0.0 * state.sum(), state, retain_graph=True)
    return grad
