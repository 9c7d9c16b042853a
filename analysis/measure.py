"""One pass over batches of hidden states -> every metric at every boundary, with resampled twins.

Tensors in, numbers out: it knows nothing of models. Memory does not depend on the number of documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from analysis.accumulate import REPLICATES, Curve, DocumentMeans, FloatArray
from analysis.collapse import (
    CORPUS_METRICS,
    Moments,
    TokenSample,
    groups_that_fit,
    mean_norms,
    rms_normalised,
    sample_tokens,
)
from analysis.curvature import tangent_correlations, turning_angles
from analysis.forecast import HORIZONS, forecast_errors
from analysis.forms import SharedTriples, draw_triples, stp_forms
from analysis.metrics import CORPUS, LAGS, VARIANTS, bin_name, document_metrics
from analysis.paths import Path, row_mean
from analysis.positions import PositionMeans, centred_curvature
from analysis.rounding import rounding_bias, stored_precision
from analysis.tube import SPAN_BINS, Spans, draw_spans, tube

# States of about this many bytes are worked on at a time: few for a cache, enough for operations that are not tiny.
CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class MeasureSettings:
    """seed decides triples, spans and replicates. window: largest gap of a triple. trained_length: tokens of a
    training row, None = unknown. n_triples, n_spans: per piece (spans also per bin)."""

    seed: int = 0
    window: int | None = 64
    n_triples: int = 16
    n_spans: int = 4
    trained_length: int | None = None
    replicates: int = REPLICATES
    lags: tuple[int, ...] = LAGS
    horizons: tuple[int, ...] = HORIZONS
    bins: tuple[tuple[int, int], ...] = SPAN_BINS


@dataclass(frozen=True)
class Layout:
    """What is drawn once per batch and shared by all boundaries. documents: identity of each row's document."""

    documents: Tensor
    runs: Tensor
    triples: SharedTriples
    spans: Spans
    sample: TokenSample

    def rows(self, rows: Tensor) -> Layout:
        spans, sample = self.spans, self.sample
        return Layout(
            self.documents[rows],
            self.runs[rows],
            SharedTriples(self.triples.anchor.select(rows), self.triples.patch.select(rows)),
            Spans(spans.start[rows], spans.length[rows], spans.valid[rows]),
            TokenSample(sample.index[rows], sample.valid[rows]),
        )


@dataclass
class Measured:
    """curves[variant][metric]: a Curve over the boundaries, in the order of `boundaries`."""

    boundaries: list[int | str]
    n_documents: int
    n_tokens: int
    curves: dict[str, dict[str, Curve]]
    precision: list[str] = field(default_factory=list)

    def get(self, metric: str, variant: str = "raw") -> Curve:
        return self.curves[variant][metric]

    def rounding(self) -> list[float]:
        """Per boundary: 1 - cos that rounding alone gives a straight path there (see analysis.rounding)."""
        norms, steps = self.get("state_norm").value, self.get("step_norm").value
        return [rounding_bias(x, v, p) for x, v, p in zip(norms, steps, self.precision, strict=True)]


class Measurement:
    """Feed it batches of hidden states, then ask for `result`."""

    def __init__(
        self,
        boundaries: Sequence[int | str],
        d_model: int,
        length: int,
        settings: MeasureSettings | None = None,
        position_means: Sequence[tuple[Tensor, Tensor]] | None = None,
        workers: int = 1,
    ) -> None:
        """boundaries: names, one per tensor of a batch. length: longest piece. position_means: per boundary, from
        `PositionMeans.means` of a first pass; None: no position-centred curvature. workers: boundaries that are
        measured side by side; the numbers are the same to the last bit."""
        self.boundaries = list(boundaries)
        self.settings = settings or MeasureSettings()
        self.position_means = position_means
        self.workers = workers
        s = self.settings
        self.names = [metric.name for metric in document_metrics(s.lags, s.bins, s.horizons)]
        S, V = len(self.boundaries), len(VARIANTS)
        self.documents = DocumentMeans((V, S, len(self.names)), s.replicates, s.seed)
        n_groups = groups_that_fit(S * V, d_model)
        self.moments = [[Moments(d_model, n_groups) for _ in self.boundaries] for _ in VARIANTS]
        self.positions = [PositionMeans(length, d_model) for _ in self.boundaries]
        self.precision: list[str] = []
        self.n_tokens = 0

    def update(
        self,
        hidden_states: Sequence[Tensor],
        lengths: Tensor,
        document_index: Tensor,
        piece_index: Tensor | None = None,
    ) -> None:
        """hidden_states: one (N, T, D) per boundary, one document (or piece of one) a row, padded at the end (see
        `paths.one_document_per_row`). lengths (N,). document_index (N,) int64: what is resampled as a whole; rows of
        one document are consecutive, over updates too. piece_index (N,) int64: decides triples and spans; default:
        document_index."""
        if not self.precision:
            self.precision = [stored_precision(states[:, : int(lengths.min())]) for states in hidden_states]
        self.n_tokens += int(lengths.sum())
        piece_index = document_index if piece_index is None else piece_index
        layout = self._layout(lengths, document_index, piece_index, hidden_states[0].shape[1])
        N, T, D = hidden_states[0].shape
        rows = max(1, CHUNK_BYTES // (4 * T * D))
        values = np.full((N, len(VARIANTS), len(self.boundaries), len(self.names)), np.nan)
        for chosen in torch.arange(N, device=lengths.device).split(rows):
            shared = layout.rows(chosen.repeat(len(VARIANTS)))
            part = [states[chosen].detach() for states in hidden_states]
            with ThreadPoolExecutor(self.workers) as pool:  # boundaries write to nothing of each other
                found = pool.map(partial(self._boundary, shared), range(len(part)), part)
                for number, numbers in enumerate(found):
                    values[chosen.cpu(), :, number] = numbers
        self.documents.update(values, document_index.tolist())

    def _boundary(self, shared: Layout, number: int, states: Tensor) -> FloatArray:
        """(rows, variants, metrics): a boundary's numbers per piece; adds to its moments and positions.

        Both variants go through every operation as one tensor, raw rows first: the operations are small.
        """
        states, n = states.to(torch.promote_types(states.dtype, torch.float32)), len(states)
        variants = (states, rms_normalised(states))
        path = Path(torch.cat(variants), shared.runs)
        found = self._document_values(path, shared)
        values = np.full((n, len(VARIANTS), len(self.names)), np.nan)
        for m, name in enumerate(self.names):
            if name in found:
                values[:, :, m] = found[name].view(len(VARIANTS), n).T.cpu().numpy()
        for v, moments in enumerate(self.moments):
            moments[number].update(variants[v], shared.sample.rows(n), shared.documents[:n])
        raw = Path(states, shared.runs[:n])
        self.positions[number].update(raw)
        if self.position_means is not None:
            centred = centred_curvature(raw, self.position_means[number])
            values[:, 0, self.names.index("curvature_centred")] = centred.cpu().numpy()
        return values

    def _layout(self, lengths: Tensor, documents: Tensor, index: Tensor, T: int) -> Layout:
        s = self.settings
        runs = torch.where(torch.arange(T, device=lengths.device) < lengths[:, None], 0, -1)
        return Layout(
            documents,
            runs,
            draw_triples(lengths, T, index, s.n_triples, s.seed, s.window),
            draw_spans(lengths, index, s.n_spans, s.seed, s.bins),
            sample_tokens(lengths),
        )

    def _document_values(self, path: Path, layout: Layout) -> dict[str, Tensor]:
        s = self.settings
        angles, mask = turning_angles(path)
        degrees = torch.rad2deg(angles)
        found = {"curvature": row_mean(degrees, mask), **stp_forms(path, layout.triples)}
        if s.trained_length is not None and s.trained_length < path.states.shape[1]:
            inside = torch.arange(1, 1 + mask.shape[1], device=mask.device) < s.trained_length  # of the middle token
            found["curvature_within"] = row_mean(degrees, mask & inside)
            found["curvature_beyond"] = row_mean(degrees, mask & ~inside)
        correlations = tangent_correlations(path, (1, *s.lags))
        found |= {f"tangent_correlation_{lag}": correlations[lag] for lag in s.lags}
        found["stp_consecutive"] = 1 - correlations[1]
        mean_radius, max_radius, efficiency = tube(path, layout.spans)
        for number, name in enumerate(map(bin_name, s.bins)):
            found[f"tube_radius_mean_{name}"] = mean_radius[:, number]
            found[f"tube_radius_max_{name}"] = max_radius[:, number]
            found[f"path_efficiency_{name}"] = efficiency[:, number]
        found |= {f"forecast_{name}": error for name, error in forecast_errors(path, s.horizons).items()}
        found["state_norm"], found["step_norm"], found["dropped_steps"] = mean_norms(path)
        return found

    def result(self) -> Measured:
        """Raises ValueError if no document was seen."""
        if self.documents.n_documents == 0:
            raise ValueError("no document was measured")
        means = self.documents.means()  # (1 + R, V, S, M)
        curves: dict[str, dict[str, Curve]] = {}
        for v, variant in enumerate(VARIANTS):
            curves[variant] = {name: Curve(means[:, v, :, m], "bootstrap") for m, name in enumerate(self.names)}
            found = [moments.metrics() for moments in self.moments[v]]
            for name in CORPUS_METRICS:
                samples: FloatArray = torch.stack([metrics[name] for metrics in found], 1).numpy()
                curves[variant][name] = Curve(samples, "jackknife" if len(samples) > 2 else "none")
        share = np.array([[positions.explained_share() for positions in self.positions]])
        curves["raw"][CORPUS[-1].name] = Curve(share, "none")
        return Measured(self.boundaries, self.documents.n_documents, self.n_tokens, curves, self.precision)
