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

from losses.controls import GradientNoise
from losses.geometry import (
    DEGENERATE_TOLERANCE,
    close_gaps,
    norm_penalties,
    read_rows,
    row_losses,
    select_points,
    triple_weights,
)
from losses.joined import GradientJoin
from losses.stp_kernel import CosineSums, kernel_name
from losses.triples import Triples, documents_from_positions, draw_with_generator

FORMS = ("triple", "consecutive", "patch_complement")
VARIANTS = ("standard", "detached", "shuffled_order", "negative", "gradient_noise", "norm_penalty")
DISTANCES = ("cosine", "mse")
LENGTH_WEIGHTINGS = ("none", "cosine_like", "jaccard_like")
NORMALIZATIONS = ("none", "rms")
PREDICTORS = ("none", "linear")
GAPS = ("bridge", "close")


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
        gradient_noise: backward, noise of the same norm at the same tokens. norm_penalty: in place of 1 - cos the
        spread of the three states relative to their norm, which asks for no direction. Both: see losses.controls.
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
    Raises ValueError: an empty list, states of different shapes, triples of another batch, an unknown name.
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
    if triples.s.shape[0] != states[0].shape[0]:
        raise ValueError(f"triples: drawn for {triples.s.shape[0]} rows, but the states are {tuple(states[0].shape)}")
    points, valid, lengths = select_points(triples, form, variant)
    weights = triple_weights(valid, lengths, sample_weights, length_weighting)

    if variant == "norm_penalty" and not (distance == "cosine" and normalize == "none" and predictor is None):
        raise ValueError("variant: norm_penalty compares no displacements; no distance, normalize or predictor applies")
    if variant == "gradient_noise" and triples.key is None:
        raise ValueError(
            "variant: gradient_noise needs triples with a key, as the samplers of losses.triples draw them"
        )
    replaced = variant in ("gradient_noise", "norm_penalty")
    plain = distance == "cosine" and normalize == "none" and predictor is None and not replaced
    if join is not None and plain and all(kernel_name(h.device, h.dtype) == "numba" for h in states):
        sums, n_degenerate = CosineSums.apply(
            join, join.sentinel, points, valid, weights, DEGENERATE_TOLERANCE, *states
        )
        return STPTerms(sums, weights.sum(), valid.sum(), n_degenerate)
    # What is not valid is read as zeros, which count as degenerate: no value of it, such as NaN in padding, gets out.
    rows = read_rows(states, points, join)
    if variant == "gradient_noise" and triples.key is not None:
        rows = GradientNoise.apply(rows, points, triples.key)
    rows = torch.where(valid[..., None], rows, 0.0)
    if variant == "norm_penalty":
        losses, degenerate = norm_penalties(rows, form)
    else:
        losses, degenerate = row_losses(rows, form, distance, normalize, predictor)
    return STPTerms((losses * weights).sum((1, 2)), weights.sum(), valid.sum(), (degenerate & valid).sum((1, 2)))


class LinearPredictor(nn.Linear):
    """The reference implementation's learned map of one displacement: d x d, no bias, Xavier."""

    def __init__(self, d_model: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_model, d_model, bias=False)
        nn.init.xavier_uniform_(self.weight, generator=generator)


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
