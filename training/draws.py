"""Checks of the sampler as the objective calls it, on layouts that a first batch rarely holds."""

from __future__ import annotations

import torch
from torch import Tensor

from losses.objective import Objective
from losses.triples import Triples

LENGTH = 48
SEGMENTS = ((20, 17, 11), (2, 1, 3, 30), (30,), (1, 2, 1), (48,), (), (24, 24), (3,))  # the rest of a row is padding


def check_draws(objective: Objective, device: torch.device) -> dict[str, str | None]:
    """{check name: None if it holds, else what was seen}."""
    document_ids = torch.full((len(SEGMENTS), LENGTH), -1, dtype=torch.int32)
    for row, lengths in enumerate(SEGMENTS):
        start = 0
        for number, length in enumerate(lengths):
            document_ids[row, start : start + length] = number
            start += length
    document_ids = document_ids.to(device)
    row_ids = torch.arange(100, 100 + len(SEGMENTS), device=device)
    return {
        "triples_of_a_layout": _layout(objective, document_ids, row_ids),
        "triples_repeatable": _repeatable(objective, document_ids, row_ids),
    }


def _layout(objective: Objective, document_ids: Tensor, row_ids: Tensor) -> str | None:
    """Inside documents, off padding, and rows without room neither drawn from nor counted."""
    for step in range(4):
        triples = objective.draw(document_ids, row_ids, step)
        if bad := int(triples.violations(document_ids)):
            return f"{bad} triples of a packed and padded layout cross a document, touch padding or are out of order"
        if not bool(triples.valid[4].any()):
            return f"no triple in a row that is one document of {LENGTH} tokens"
    padding = torch.full_like(document_ids, -1)
    if (divisor := float(objective.divisor(objective.draw(padding, row_ids, 0)))) != 0:
        return f"rows of padding count {divisor:g} in the divisor"
    return None


def _repeatable(objective: Objective, document_ids: Tensor, row_ids: Tensor) -> str | None:
    """A pure function of (seed, step, row): the same again, in any part of the batch, and another at another step."""
    whole = objective.draw(document_ids, row_ids, 7)
    if not _equal(whole, objective.draw(document_ids, row_ids, 7)):
        return "the same step drawn twice gives different triples: a resumed run would see others"
    part = torch.tensor([4, 0], device=document_ids.device)
    if not _equal(whole.select(part), objective.draw(document_ids[part], row_ids[part], 7)):
        return "a part of the batch has other triples than the whole: they depend on micro-batches or ranks"
    if _equal(whole, objective.draw(document_ids, row_ids, 8)):
        return "another step has the same triples"
    return None


def _equal(a: Triples, b: Triples) -> bool:
    return all(torch.equal(x, y) for x, y in ((a.s, b.s), (a.r, b.r), (a.t, b.t), (a.valid, b.valid)))
