"""Probes of the forward pass: causal, isolated between documents, nothing dropped.

One packed row with a geometry chosen so that every known leak is visible (a chunk ends inside the first document,
which ends inside a chunk; the perturbed token is well inside the second document). Whatever may not change is
compared at every boundary, relative to that boundary's root mean square.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from model.context import SequenceContext

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-3, torch.float64: 3e-5}
MUST_CHANGE = 1e-2


def probe_forward(
    model: Any, chunk: int, vocab_size: int, dtype: torch.dtype, autocast: AbstractContextManager, seed: int
) -> dict[str, str | None]:
    """Runs the four probe forwards in eval mode without gradient.

    Returns {check name: None if it holds, else what was seen}. dtype: what matmuls run in (sets the tolerance).
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    lengths = (2 * chunk + chunk // 4, chunk, 3 * chunk // 4)
    first, second = lengths[0], lengths[1]
    document_ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].to(device)
    context = SequenceContext.from_document_ids(document_ids)

    def random_tokens(n: int) -> Tensor:
        return torch.randint(vocab_size, (n,), generator=generator)

    base = random_tokens(sum(lengths))
    position = first + second // 2
    one_token = base.clone()
    one_token[position] = (base[position] + 1 + torch.randint(vocab_size - 1, (), generator=generator)) % vocab_size
    other_document = base.clone()
    other_document[:first] = (base[:first] + 1 + random_tokens(first) % (vocab_size - 1)) % vocab_size
    repeated = base.clone()
    repeated[:first] = (int(base[:first].max()) + 1) % vocab_size

    rows = []
    for tokens in (base, one_token, other_document, repeated):
        with torch.no_grad(), autocast:
            rows.append(model(tokens[None].to(device), context))
    problem = _collector(rows, len(model.blocks) + 1, (1, sum(lengths), model.config.d_model))
    if problem is not None:
        return {"collector_eval": problem}  # and nothing to compare

    tolerance = TOLERANCE[dtype]
    causal = _compare(rows[0], rows[1], slice(0, position), slice(position, position + 1), tolerance)
    later = slice(first, sum(lengths))
    isolated = _compare(rows[0], rows[2], later, slice(0, first), tolerance)
    isolated = isolated or _compare(rows[0], rows[3], later, slice(0, first), tolerance, must_change=False)
    return {"collector_eval": None, "causality": causal, "document_isolation": isolated}


def _collector(rows: list[Any], expected: int, shape: tuple[int, ...]) -> str | None:
    for row in rows:
        if len(row.hidden_states) != expected:
            return f"{len(row.hidden_states)} hidden states in eval mode, expected {expected}"
        for i, state in enumerate([*row.hidden_states, row.final]):
            if tuple(state.shape) != shape:
                return f"boundary {i}: shape {tuple(state.shape)} in eval mode, expected {shape}"
    return None


def _compare(
    base: Any, changed: Any, still: slice, moved: slice, tolerance: float, must_change: bool = True
) -> str | None:
    """Nothing in `still` may change, every token in `moved` must, at every boundary and after the final norm."""
    names = [*(f"boundary {i}" for i in range(len(base.hidden_states))), "final"]
    pairs = zip(names, [*base.hidden_states, base.final], [*changed.hidden_states, changed.final], strict=True)
    for name, a, b in pairs:
        a, b = a.detach(), b.detach()
        scale = a.double().square().mean().sqrt()
        delta = (a.double() - b.double()).abs().amax(dim=-1)[0] / scale
        if not bool(torch.isfinite(delta).all()):
            return f"{name}: not finite"
        leak = float(delta[still].max())
        if leak > tolerance:
            token = int(delta[still].argmax()) + (still.start or 0)
            return (
                f"{name}: token {token} changed by {leak:.1e} of its RMS where nothing may (tolerance {tolerance:.0e})"
            )
        if must_change and float(delta[moved].min()) < MUST_CHANGE:
            return f"{name}: a changed token left its own state unchanged ({float(delta[moved].min()):.1e} of its RMS)"
    return None
