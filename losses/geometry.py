"""From states and triples to losses: which tokens a form reads, the two displacements, the angle between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losses.controls import relative_spread
from losses.joined import GradientJoin, ReadRows
from losses.triples import Triples

# A displacement this small against its own states is rounding, not direction.
DEGENERATE_TOLERANCE = 1e-6
# Variants that speak of three tokens, so not of form patch_complement.
ORDERED = ("shuffled_order", "norm_penalty")


# The token lengths of two displacements, each (B, n): as a function, since few ask.
Lengths = Callable[[], tuple[Tensor, Tensor]]


def select_points(triples: Triples, form: str, variant: str = "standard") -> tuple[Tensor, Tensor, Lengths]:
    """Token indices that a form reads (P, B, n), which triples are valid for it (B, n), and the token lengths of its
    two displacements."""
    if form == "patch_complement":
        if variant in ORDERED:
            raise ValueError(f"variant: {variant} is defined for forms triple and consecutive")
        patch = triples.t - triples.s
        rest = (triples.last - triples.first) - patch
        valid = triples.valid & (rest > 0)  # a span that is the whole document has no rest
        points = torch.stack([triples.s, triples.t, triples.first, triples.last])
        return torch.where(triples.valid, points, 0), valid, lambda: (patch, rest)
    if triples.kind == "patch":
        raise ValueError(f"form: {form!r} needs three tokens in order; the patch sampler draws spans")
    if form == "consecutive":
        triples = triples.neighbours()
    s, r, t = triples.s, triples.r, triples.t
    if variant == "shuffled_order":
        r, t = t, r
    return torch.stack([s, r, t]), triples.valid, lambda: (triples.t - triples.r, triples.r - triples.s)


def triple_weights(
    valid: Tensor, lengths: Lengths, sample_weights: Tensor | None = None, length_weighting: str = "none"
) -> Tensor:
    """(B, n) float32 weights of the triples, 0 where not valid; their sum is the divisor."""
    weights = valid.to(torch.float32)
    if length_weighting != "none":
        p, q = (length.to(torch.float32).clamp_min(1) for length in lengths())
        fit = 2 * p * q / (p * p + q * q) if length_weighting == "cosine_like" else 1 - (p - q).abs() / (p + q)
        weights = weights * fit
    if sample_weights is not None:
        given = sample_weights.detach().to(weights)
        weights = weights * (given[:, None] if given.dim() == 1 else given)
    return weights


def flat_index(hidden: Tensor, points: Tensor) -> Tensor:
    """Token indices (P, B, n) -> rows of hidden (B, T, D) seen as (B x T, D)."""
    return points + torch.arange(hidden.shape[0], device=hidden.device)[:, None] * hidden.shape[1]


def read_rows(states: Sequence[Tensor], points: Tensor, join: GradientJoin | None = None) -> Tensor:
    """states (B, T, D) each, points (P, B, n) -> (n_boundaries, P, B, n, D) in float32 or better."""
    flat = flat_index(states[0], points).flatten()
    if join is not None:
        rows = ReadRows.apply(join, join.sentinel, flat, *states)
    else:
        rows = torch.stack([h.reshape(-1, h.shape[-1]).index_select(0, flat) for h in states])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.view(len(states), *points.shape, states[0].shape[-1])


def row_losses(
    rows: Tensor,
    form: str,
    distance: str = "cosine",
    normalize: str = "none",
    predictor: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """rows (n_boundaries, P, B, n, D): the states a form reads -> losses and degenerate, (n_boundaries, B, n)."""
    if normalize == "rms":
        rows = rows * (rows.square().mean(-1, keepdim=True) + 1e-12).rsqrt()
    first, second = _displacements(rows, form)
    if predictor is not None:
        second = _full_precision(predictor, second)
    if distance == "mse":
        losses = (first - second).square().mean(-1)
        return losses, torch.zeros_like(losses, dtype=torch.bool)
    return one_minus_cosine(first, second, rows)


def one_minus_cosine(first: Tensor, second: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(first, second) over the last dimension, and where it is degenerate (then 1, with zero gradient).

    first, second (..., D); states (n_boundaries, P, ..., D): the states that they are differences of, which set the
    scale. The denominator is made safe before the division: a mask after it would still give NaN gradients.
    """
    degenerate = _without_direction(first, second, states)
    norm_first = torch.where(degenerate, 1.0, first.square().sum(-1)).sqrt()
    norm_second = torch.where(degenerate, 1.0, second.square().sum(-1)).sqrt()
    dot = torch.where(degenerate, 0.0, (first * second).sum(-1))
    return 1 - dot / (norm_first * norm_second), degenerate


@torch.no_grad()
def _without_direction(first: Tensor, second: Tensor, states: Tensor) -> Tensor:
    scale = states.square().sum(-1).amax(1).sqrt()
    smallest = torch.minimum(first.square().sum(-1), second.square().sum(-1)).sqrt()
    # Not finite states must reach the loss as such, so they are never degenerate.
    return (smallest <= DEGENERATE_TOLERANCE * scale) & torch.isfinite(scale)


def norm_penalties(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """The control without direction (losses.controls): rows as in `row_losses` -> its values and degenerate.

    Degenerate triples are those of STP, counted all the same (movement that is gone is what this control may cause),
    with the value and the gradient that they have.
    """
    return relative_spread(rows), _without_direction(*_displacements(rows, form), rows)


def _displacements(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """rows (n_boundaries, P, B, n, D) -> the two displacements whose directions are compared."""
    if form == "patch_complement":
        a, b, first, last = rows.unbind(1)
        patch = b - a
        return patch, (last - first) - patch
    s, r, t = rows.unbind(1)
    return t - r, r - s


def close_gaps(hidden: Tensor, mask: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """hidden (B, T, D) with the jumps over tokens outside the mask taken out of every document: differences between
    content tokens are then sums of steps between neighbouring content tokens. float32 or better."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    before = torch.where(mask, index, -1).cummax(1).values
    before = torch.cat([torch.full_like(before[:, :1], -1), before[:, :-1]], 1)  # last content token before this one
    jump = mask & (before >= 0) & (before < index - 1)
    before = before.clamp_min(0)
    if document_ids is not None:
        jump = jump & (document_ids.gather(1, before) == document_ids)
    lost = hidden - hidden.gather(1, before[..., None].expand_as(hidden))
    return hidden - torch.where(jump[..., None], lost, 0.0).cumsum(1)


def _full_precision(predictor: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return predictor(x)
