"""The objective: named, weighted terms -> total. It alone decides which boundaries STP reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from errors import InputError, require, require_choice, require_number
from losses.gate import GateConfig
from losses.geometry import ORDERED, select_points, triple_weights
from losses.joined import GradientJoin, joins
from losses.lm import lm_loss_sum
from losses.stp import (
    DISTANCES,
    FORMS,
    LENGTH_WEIGHTINGS,
    NORMALIZATIONS,
    PREDICTORS,
    VARIANTS,
    LinearPredictor,
    STPTerms,
    stp_terms,
)
from losses.triples import SAMPLERS, Triples, draw, spans_per_row
from model.pattern import family_of, select_boundaries


@dataclass
class STPConfig:
    # Full weight of the STP term. 0 = STP is off. Negative only with variant: negative.
    weight: float = 0.02
    # triple: 1 - cos(h_t - h_r, h_r - h_s); consecutive: three neighbours; patch_complement: a span against the rest.
    form: str = "triple"
    # anchor: inside documents, for packed rows; patch: the released code's spans (patch_complement only); sorted_offset
    # and uniform draw over the whole row and lose the triples that cross documents.
    sampler: str = "anchor"
    # Triples per row and step.
    n_spans: int = 4
    # Instead of n_spans: triples per 1,024 tokens of row length, so that exposure stays when the length changes.
    spans_per_1024_tokens: float | None = None
    # Largest distance in tokens from an anchor to each side; null = up to the ends of the document.
    window: int | None = 64
    # all | last | final | changes | family:X | entering:X, a boundary index, or a list of these.
    boundaries: Any = "all"
    # standard, or a control: detached (placebo without gradient), shuffled_order, negative (a negative weight),
    # gradient_noise (noise of the same norm at the same tokens), norm_penalty (shorter steps, no direction asked).
    variant: str = "standard"
    # cosine, or mse between the two displacements.
    distance: str = "cosine"
    # none | cosine_like | jaccard_like: weight of a triple by how equal its two lengths are.
    length_weighting: str = "none"
    # none, or rms: states are divided by their root mean square first.
    normalize: str = "none"
    # none, or linear: a learned map (d_model x d_model, no bias) on the second displacement, trained with the model.
    predictor: str = "none"
    gate: GateConfig = field(default_factory=GateConfig)

    @property
    def enabled(self) -> bool:
        return self.weight != 0

    def validate(
        self, path: str, letters: Sequence[str], budget_tokens: int | None = None, sequence_length: int | None = None
    ) -> list[str]:
        """Returns warnings. Raises InputError naming the key. What only matters with STP on is checked then."""
        require_number(f"{path}.weight", self.weight)
        require_choice(f"{path}.form", self.form, FORMS)
        require_choice(f"{path}.sampler", self.sampler, SAMPLERS)
        require_choice(f"{path}.variant", self.variant, VARIANTS)
        require_choice(f"{path}.distance", self.distance, DISTANCES)
        require_choice(f"{path}.length_weighting", self.length_weighting, LENGTH_WEIGHTINGS)
        require_choice(f"{path}.normalize", self.normalize, NORMALIZATIONS)
        require_choice(f"{path}.predictor", self.predictor, PREDICTORS)
        require_number(f"{path}.n_spans", self.n_spans, 1)
        if self.spans_per_1024_tokens is not None:
            require_number(f"{path}.spans_per_1024_tokens", self.spans_per_1024_tokens, 0.0, exclusive=True)
        if self.window is not None:
            require_number(f"{path}.window", self.window, 1)
        if self.variant == "negative":
            require(self.weight <= 0, f"{path}.weight", f"variant negative needs a weight below 0, got {self.weight}")
        else:
            require(
                self.weight >= 0,
                f"{path}.weight",
                f"expected at least 0, got {self.weight} (a negative weight is a control: {path}.variant=negative)",
            )
        require(
            self.sampler != "patch" or self.form == "patch_complement",
            f"{path}.sampler",
            f"patch draws spans for form patch_complement; form {self.form} needs anchor, uniform or sorted_offset",
        )
        require(
            self.variant not in ORDERED or self.form != "patch_complement",
            f"{path}.variant",
            f"{self.variant} is defined for forms triple and consecutive",
        )
        for name, needed in (("distance", "cosine"), ("normalize", "none"), ("predictor", "none")):
            require(
                self.variant != "norm_penalty" or getattr(self, name) == needed,
                f"{path}.{name}",
                f"variant norm_penalty compares no displacements; expected {needed}, got {getattr(self, name)}",
            )
        select_boundaries(self.boundaries, letters, f"{path}.boundaries")
        if self.enabled and sequence_length is not None and sequence_length < 3:
            raise InputError(f"data.sequence_length: STP needs at least 3 tokens in a row, got {sequence_length}")
        return self.gate.validate(f"{path}.gate", budget_tokens if self.enabled else None)


class ModelOutput(Protocol):
    """hidden_states: depth + 1 tensors (B, T, D); final: (B, T, D), the last one after the final norm."""

    hidden_states: list[Tensor]
    final: Tensor


@dataclass(frozen=True)
class Term:
    value: Tensor
    weight: Tensor | float


@dataclass(frozen=True)
class ObjectiveOutput:
    """total = sum of weight x value over `terms`. Values are this micro-batch's share of the global means.

    stp: None where it was not asked for; measured without gradient while the gate is closed.
    stp_terms: sums and counts per boundary, in the order of Objective.boundaries. n_tokens: loss-bearing tokens here.
    """

    total: Tensor
    terms: dict[str, Term]
    lm: Tensor
    stp: Tensor | None
    stp_per_boundary: Tensor | None
    stp_terms: STPTerms | None
    n_tokens: Tensor


class Objective:
    """LM cross-entropy + STP weight x mean over the selected boundaries of their STP losses."""

    def __init__(self, config: STPConfig, letters: Sequence[str], seed: int = 0, key: str = "stp") -> None:
        """Raises InputError if the selection names a boundary or family that the stack lacks, or nothing at all."""
        self.config = config
        self.seed = seed
        self.boundaries = select_boundaries(config.boundaries, letters, f"{key}.boundaries")
        self.families = [family_of(boundary, letters) for boundary in self.boundaries]
        self.predictor: LinearPredictor | None = None

    def make_predictor(self, d_model: int) -> LinearPredictor | None:
        """The learned map of `stp.predictor: linear`, from the run's seed; None without one.

        Its owner is the caller: make it a submodule of the model before the optimizer is built, so that it is trained,
        saved and resumed with everything else (`if predictor: model.stp_predictor = predictor`).
        """
        if self.config.predictor == "linear":
            self.predictor = LinearPredictor(d_model, torch.Generator().manual_seed(self.seed))
        return self.predictor

    @property
    def is_control(self) -> bool:
        """A placebo that declares that its term sends no gradient."""
        return self.config.variant == "detached"

    def draw(self, document_ids: Tensor, row_ids: Tensor, step: int) -> Triples:
        """The step's triples for these rows (a micro-batch or all): a pure function of (seed, step, row)."""
        config = self.config
        n_spans = spans_per_row(config.n_spans, config.spans_per_1024_tokens, document_ids.shape[1])
        return draw(
            config.sampler,
            document_ids,
            n_spans,
            seed=self.seed,
            step=step,
            row_ids=row_ids,
            window=config.window,
        )

    def divisor(self, triples: Triples) -> Tensor:
        """() float32: what STP sums are divided by: layout-valid triples (weighted). Sum it over the global batch."""
        _, valid, lengths = select_points(triples, self.config.form, self.config.variant)
        return triple_weights(valid, lengths, None, self.config.length_weighting).sum()

    def select(self, hidden_states: Sequence[Tensor], final: Tensor) -> list[Tensor]:
        """The states at the selected boundaries."""
        return [final if boundary == "final" else hidden_states[int(boundary)] for boundary in self.boundaries]

    def measure(
        self,
        hidden_states: Sequence[Tensor],
        final: Tensor,
        triples: Triples,
        join: GradientJoin | None = None,
        variant: str | None = None,
    ) -> STPTerms:
        """Sums and counts of every selected boundary. variant: in place of the configured one, to compare with it."""
        config = self.config
        if config.predictor != "none" and self.predictor is None:
            raise InputError(f"stp.predictor: {config.predictor} was asked for, but none has been made for this model")
        return stp_terms(
            self.select(hidden_states, final),
            triples,
            form=config.form,
            variant=variant or config.variant,
            distance=config.distance,
            length_weighting=config.length_weighting,
            normalize=config.normalize,
            predictor=self.predictor,
            join=join,
        )

    def join(self, output: ModelOutput) -> GradientJoin | None:
        """The cheap way back for a training step. Compiled graphs have their own, and a placebo has none."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or self.is_control:
            return None
        indices = [int(boundary) for boundary in self.boundaries if boundary != "final"]
        arrives = joins(output.hidden_states, output.final, indices)
        at_final = output.final.requires_grad and output.final.grad_fn is not None
        joined = [at_final if boundary == "final" else arrives[int(boundary)] for boundary in self.boundaries]
        return GradientJoin(self.select(output.hidden_states, output.final), joined)

    def stp_terms(self, hidden_states: Sequence[Tensor], final: Tensor, triples: Triples) -> dict[int | str, Tensor]:
        """Boundary -> its own STP loss (scalar, with gradient), for checks that look at each alone."""
        losses = self.measure(hidden_states, final, triples).per_boundary()
        return dict(zip(self.boundaries, losses.unbind(), strict=True))

    def __call__(
        self,
        output: ModelOutput,
        head_weight: Tensor,
        labels: Tensor,
        triples: Triples | None = None,
        *,
        stp_weight: Tensor | None = None,
        lm_divisor: Tensor | float | None = None,
        stp_divisor: Tensor | float | None = None,
    ) -> ObjectiveOutput:
        """One micro-batch.

        head_weight (V, D); labels (B, T), -100 = not loss-bearing. triples None: no STP in this step at all.
        stp_weight: scalar tensor, the gate's weight; None: STP is measured without gradient and is not in the total.
        lm_divisor, stp_divisor: counts over the global batch (loss-bearing tokens; Objective.divisor), so that
        micro-batches add up; default: this micro-batch's own.
        """
        lm_sum, n_tokens = lm_loss_sum(output.final, head_weight, labels)
        lm = lm_sum / (n_tokens.clamp_min(1) if lm_divisor is None else lm_divisor)
        terms = {"lm": Term(lm, 1.0)}
        total = lm
        if triples is None:
            return ObjectiveOutput(total, terms, lm, None, None, None, n_tokens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and stp_weight is not None):
            join = self.join(output)
            measured = self.measure(output.hidden_states, output.final, triples, join)
            per_boundary = measured.per_boundary(stp_divisor)
            stp = per_boundary.mean()
        if stp_weight is not None:
            terms["stp"] = Term(stp, stp_weight)
            total = lm + stp_weight * stp
            if join is not None:
                join.watch(total)
        return ObjectiveOutput(total, terms, lm, stp, per_boundary, measured, n_tokens)

    def family_means(self, per_boundary: Tensor) -> dict[str, float]:
        """(n_boundaries,) -> family -> mean over its selected boundaries."""
        values: dict[str, list[float]] = {}
        for family, value in zip(self.families, per_boundary.tolist(), strict=True):
            values.setdefault(family, []).append(value)
        return {family: sum(v) / len(v) for family, v in values.items()}
