"""Semantic Tube Prediction: hidden states along a sequence should move on locally straight paths.

Huang, LeCun and Balestriero, arXiv 2602.22617: L = 1 - cos(h_t - h_r, h_r - h_s) for tokens s < r < t. Works on any
model's hidden states: tensors in, a scalar out. Reading the number (in high dimension): 0 a straight line,
1.0 a random walk, 1.5 states without any coherence, 2 there and back again.

Give it states in float32. States rounded to bfloat16 bend a straight path whatever happens afterwards: three neighbours
on a line read 0.01, 0.27, 0.77 and 0.97 where the states are 20, 200, 600 and 2000 times as long as the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.joined import GradientJoin, ReadRows
from losses.stp_kernel import CosineSums, kernel_name
from losses.triples import Triples, documents_from_positions, draw_with_generator

FORMS = ("triple", "consecutive", "patch_complement")
VARIANTS = ("standard", "detached", "shuffled_order", "negative")
DISTANCES = ("cosine", "mse")
LENGTH_WEIGHTINGS = ("none", "cosine_like", "jaccard_like")
NORMALIZATIONS = ("none", "rms")
GAPS = ("bridge", "close")
# A displacement this small against its own states is rounding, not direction.
DEGENERATE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class STPTerms:
    """What every boundary contributes. sums / divisor are its STP loss.

    sums (n_boundaries,): sum over layout-valid triples, float32 or better, with gradient.
    divisor (): layout-valid triples, weighted where weights were given. Never depends on the states.
    n_valid () int64: layout-valid triples. n_degenerate (n_boundaries,) int64: those counted as the constant 1.
    """

    sums: Tensor
    divisor: Tensor
    n_valid: Tensor
    n_degenerate: Tensor

    def per_boundary(self, divisor: Tensor | float | None = None) -> Tensor:
        """(n_boundaries,) losses; divisor: that of the global batch (default: this one's own, at least 1 triple)."""
        divisor = torch.as_tensor(self.divisor if divisor is None else divisor, device=self.sums.device)
        return self.sums / divisor.clamp_min(1e-30)  # no triple: 0 / something


def compute_stp_loss(
    hidden_states: Tensor | Sequence[Tensor],
    n_spans: int = 1,
    *,
    form: str = "triple",
    triples: Triples | None = None,
    sampler: str | None = None,
    window: int | None = None,
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    gaps: str = "bridge",
    sample_weights: Tensor | None = None,
    layers: Sequence[int] | None = None,
    variant: str = "standard",
    distance: str = "cosine",
    length_weighting: str = "none",
    normalize: str = "none",
    predictor: Callable[[Tensor], Tensor] | None = None,
    divisor: Tensor | float | None = None,
) -> Tensor:
    """STP loss of one (B, T, D) tensor, or the mean over a list of them (one per layer; the same triples at all).

    n_spans: triples per row.
    form: triple: 1 - cos(h_t - h_r, h_r - h_s) (the paper's equation). consecutive: the same with r - 1, r, r + 1
        (local curvature). patch_complement: 1 - cos(h_t - h_s, (h_last - h_first) - (h_t - h_s)), a span against the
        rest of its document (the paper's released code).
    triples: given ones; else drawn from `generator` by `sampler` (see losses.triples.sample; default: sorted_offset,
        anchor when documents or a mask are given; patch for patch_complement, anchor for consecutive).
    window: the anchor sampler's largest gap. None: up to the document's ends.
    document_ids (B, T): equal within a document, negative on padding. positions (B, T): instead of document_ids,
        position_ids that restart in every document. mask (B, T): True = content; triples use content tokens only.
    gaps: what a displacement over tokens that the mask leaves out contains. bridge: the jump from the last content
        token before them to the first one after; close: nothing, the jump is taken out (the paper, appendix G).
    sample_weights (B,) or (B, n_spans): non-negative weights, per row or triple; the loss is the weighted mean.
    layers: indices into the list (the reference's layer choice; it has one layer at a time).
    variant: detached: the placebo, no gradient. shuffled_order: the middle token is not in the middle.
        negative: the same as standard; it stands for a negative weight, which is up to the caller.
    distance: mse: mean squared difference of the two displacements in place of 1 - cos (reference: jepa_mse).
    length_weighting: weight of a triple from the token lengths p, q of its two displacements: cosine_like
        2pq / (p^2 + q^2), jaccard_like 1 - |p - q| / (p + q) (reference: length_adjustment).
    normalize: rms: states divided by their root mean square first, so norm growth alone changes nothing.
    predictor: applied to the second displacement (reference: linear_predictor), such as a LinearPredictor.
    divisor: in place of the number of layout-valid triples here: that of the global batch under accumulation or
        data parallelism, so that parts add up.

    Differences, norms and cosines are computed in float32 (float64 for float64 states). A triple with a displacement
    of at most 1e-6 x the largest norm of its states counts as the constant 1, in the divisor, with zero gradient.
    T < 3, or no valid triple: a zero that is connected to the graph.
    Raises ValueError: an empty list, states of different shapes, an unknown name.
    """
    states = _as_list(hidden_states, layers)
    batch_size, length, _ = states[0].shape
    if gaps not in GAPS:
        raise ValueError(f"gaps: expected one of {', '.join(GAPS)}, got {gaps!r}")
    if triples is None and length < 3:
        return torch.stack([_connected_zero(h) for h in states]).sum()
    ids = documents_from_positions(positions) if document_ids is None and positions is not None else document_ids
    if gaps == "close" and mask is not None:
        states = [close_gaps(h, mask, ids) for h in states]
    if triples is None:
        anywhere = ids is None and mask is None
        by_form = {"consecutive": "anchor", "patch_complement": "patch"}
        sampler = sampler or by_form.get(form, "sorted_offset" if anywhere else "anchor")
        triples = draw_with_generator(
            sampler,
            (batch_size, length),
            n_spans,
            device=states[0].device,
            generator=generator,
            document_ids=ids,
            mask=mask,
            window=1 if form == "consecutive" else window,
        )
        # With window 1 these are neighbours already: in the content, where a mask leaves gaps.
        form = "triple" if form == "consecutive" and sampler == "anchor" else form
    terms = stp_terms(
        states,
        triples,
        form=form,
        variant=variant,
        sample_weights=sample_weights,
        distance=distance,
        length_weighting=length_weighting,
        normalize=normalize,
        predictor=predictor,
    )
    return terms.per_boundary(divisor).mean()


def stp_terms(
    hidden_states: Sequence[Tensor],
    triples: Triples,
    *,
    form: str = "triple",
    variant: str = "standard",
    sample_weights: Tensor | None = None,
    distance: str = "cosine",
    length_weighting: str = "none",
    normalize: str = "none",
    predictor: Callable[[Tensor], Tensor] | None = None,
    join: GradientJoin | None = None,
) -> STPTerms:
    """Per-boundary sums of `compute_stp_loss`; arguments as there. Raises ValueError like it.

    join: how the gradient reaches the states in a training step (see losses.joined); None: by autograd.
    """
    states = _as_list(hidden_states, None)
    for name, value, choices in (
        ("form", form, FORMS),
        ("variant", variant, VARIANTS),
        ("distance", distance, DISTANCES),
        ("length_weighting", length_weighting, LENGTH_WEIGHTINGS),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    if variant == "detached":
        states = [h.detach() for h in states]
    points, valid, lengths = select_points(triples, form, variant)
    weights = triple_weights(valid, lengths, sample_weights, length_weighting)

    plain = distance == "cosine" and normalize == "none" and predictor is None
    if join is not None and plain and all(kernel_name(h.device, h.dtype) == "numba" for h in states):
        sums, n_degenerate = CosineSums.apply(
            join, join.sentinel, points, valid, weights, DEGENERATE_TOLERANCE, *states
        )
        return STPTerms(sums, weights.sum(), valid.sum(), n_degenerate)
    # What is not valid is read as zeros, which count as degenerate: no value of it, such as NaN in padding, gets out.
    rows = torch.where(valid[..., None], read_rows(states, points, join), 0.0)
    losses, degenerate = row_losses(rows, form, distance, normalize, predictor)
    return STPTerms((losses * weights).sum((1, 2)), weights.sum(), valid.sum(), (degenerate & valid).sum((1, 2)))


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


def select_points(triples: Triples, form: str, variant: str = "standard") -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Token indices that a form reads (P, B, n), which triples are valid for it (B, n), and the token lengths of its
    two displacements (each (B, n))."""
    if form == "patch_complement":
        if variant == "shuffled_order":
            raise ValueError("variant: shuffled_order is defined for forms triple and consecutive")
        patch = triples.t - triples.s
        rest = (triples.last - triples.first) - patch
        valid = triples.valid & (rest > 0)  # a span that is the whole document has no rest
        points = torch.stack([triples.s, triples.t, triples.first, triples.last])
        return torch.where(triples.valid, points, 0), valid, (patch, rest)
    if triples.kind == "patch":
        raise ValueError(f"form: {form!r} needs three tokens in order; the patch sampler draws spans")
    if form == "consecutive":
        triples = triples.neighbours()
    s, r, t = triples.s, triples.r, triples.t
    if variant == "shuffled_order":
        r, t = t, r
    return torch.stack([s, r, t]), triples.valid, ((triples.t - triples.r), (triples.r - triples.s))


def triple_weights(
    valid: Tensor, lengths: tuple[Tensor, ...], sample_weights: Tensor | None = None, length_weighting: str = "none"
) -> Tensor:
    """(B, n) float32 weights of the triples, 0 where not valid; their sum is the divisor."""
    weights = valid.to(torch.float32)
    if length_weighting != "none":
        p, q = (length.to(torch.float32).clamp_min(1) for length in lengths)
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


def one_minus_cosine(first: Tensor, second: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cos(first, second) over the last dimension, and where it is degenerate (then 1, with zero gradient).

    first, second (..., D); states (n_boundaries, P, ..., D): the states that they are differences of, which set the
    scale. The denominator is made safe before the division: a mask after it would still give NaN gradients.
    """
    with torch.no_grad():
        scale = states.square().sum(-1).amax(1).sqrt()
        smallest = torch.minimum(first.square().sum(-1), second.square().sum(-1)).sqrt()
        # Not finite states must reach the loss as such, so they are never degenerate.
        degenerate = (smallest <= DEGENERATE_TOLERANCE * scale) & torch.isfinite(scale)
    norm_first = torch.where(degenerate, 1.0, first.square().sum(-1)).sqrt()
    norm_second = torch.where(degenerate, 1.0, second.square().sum(-1)).sqrt()
    dot = torch.where(degenerate, 0.0, (first * second).sum(-1))
    return 1 - dot / (norm_first * norm_second), degenerate


class LinearPredictor(nn.Linear):
    """The reference implementation's learned map of one displacement: d x d, no bias, Xavier."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, d_model, bias=False)
        nn.init.xavier_uniform_(self.weight)


def _displacements(rows: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """rows (n_boundaries, P, B, n, D) -> the two displacements whose directions are compared."""
    if form == "patch_complement":
        a, b, first, last = rows.unbind(1)
        patch = b - a
        return patch, (last - first) - patch
    s, r, t = rows.unbind(1)
    return t - r, r - s


def _full_precision(predictor: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return predictor(x)


def _as_list(hidden_states: Tensor | Sequence[Tensor], layers: Sequence[int] | None) -> list[Tensor]:
    states = [hidden_states] if isinstance(hidden_states, Tensor) else list(hidden_states)
    if layers is not None:
        for index in layers:
            if not -len(states) <= index < len(states):
                raise ValueError(f"layers: {index} is not among the {len(states)} hidden states")
        states = [states[index] for index in layers]
    if not states:
        raise ValueError("hidden_states: an empty list; STP with no layer selected is an error, not a zero")
    for h in states:
        if h.dim() != 3 or h.shape != states[0].shape or not h.is_floating_point():
            raise ValueError(
                f"hidden_states: expected floating tensors of one shape (B, T, D), got {tuple(h.shape)} {h.dtype} "
                f"beside {tuple(states[0].shape)}"
            )
    return states


def _connected_zero(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1)[:0].sum(dtype=torch.promote_types(hidden.dtype, torch.float32))
