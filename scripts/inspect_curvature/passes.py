"""Passes of a subject over pieces: position means first, then every metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from analysis.controls import CONTROL_ROWS, random_rows, shuffle_tokens
from analysis.measure import Measured, Measurement, MeasureSettings
from analysis.paths import Path
from analysis.positions import PositionMeans
from scripts.inspect_curvature.pieces import PieceBatch, Pieces
from scripts.inspect_curvature.subject import Subject

# Position means are read on this many pieces, evenly spaced.
CALIBRATION_PIECES = 128
# Tokens of one forward pass.
BATCH_TOKENS = 4096
# Boundaries that are measured side by side, each by operations too small for threads of their own.
WORKERS = 2
Advance = Callable[[int], None]


def measure(
    subject: Subject,
    pieces: Pieces,
    settings: MeasureSettings,
    *,
    skip_first: int = 1,
    shuffle: bool = False,
    calibrate: bool = True,
    advance: Advance = lambda n_tokens: None,
) -> Measured:
    """Every metric of one subject. The first tokens of each piece are left out: nothing precedes them.

    shuffle: the tokens of each piece in a random order. calibrate: the first pass that position-centred curvature
    needs. advance receives the number of tokens that were done.
    """
    length = pieces.longest - skip_first
    if settings.trained_length is not None:
        settings = replace(settings, trained_length=settings.trained_length - skip_first)
    means = None
    if calibrate:
        positions = [PositionMeans(length, subject.d_model) for _ in subject.boundaries]
        for states, batch in _states(subject, _calibration(pieces), settings, skip_first, shuffle):
            runs = torch.where(torch.arange(states[0].shape[1]) < batch.lengths[:, None] - skip_first, 0, -1)
            for sums, hidden in zip(positions, states, strict=True):
                sums.update(Path(hidden.float(), runs.to(hidden.device)))
            advance(int(batch.lengths.sum()))
        means = [sums.means() for sums in positions]
    measurement = Measurement(subject.boundaries, subject.d_model, length, settings, means, WORKERS)
    for states, batch in _states(subject, pieces, settings, skip_first, shuffle):
        device = states[0].device
        lengths = (batch.lengths - skip_first).to(device)
        measurement.update(states, lengths, batch.documents.to(device), batch.identities.to(device))
        advance(int(batch.lengths.sum()))
    return measurement.result()


def measure_random_rows(
    pieces: Pieces,
    d_model: int,
    settings: MeasureSettings,
    *,
    skip_first: int = 1,
    advance: Advance = lambda n_tokens: None,
) -> Measured:
    """The same numbers of rows of noise and of random walks, of the same lengths."""
    measurement = Measurement(CONTROL_ROWS, d_model, pieces.longest - skip_first, settings, None, WORKERS)
    for batch in pieces.batches(BATCH_TOKENS):
        lengths = batch.lengths - skip_first
        rows = random_rows(lengths, batch.identities, int(lengths.max()), d_model, settings.seed)
        measurement.update(rows, lengths, batch.documents, batch.identities)
        advance(int(batch.lengths.sum()))
    return measurement.result()


def total_tokens(pieces: Pieces, *, calibrate: bool = True) -> int:
    """Tokens that `measure` advances over."""
    return pieces.n_tokens + (_calibration(pieces).n_tokens if calibrate else 0)


def _calibration(pieces: Pieces) -> Pieces:
    return pieces.spread(CALIBRATION_PIECES)


def _states(
    subject: Subject, pieces: Pieces, settings: MeasureSettings, skip_first: int, shuffle: bool
) -> Iterator[tuple[list[Tensor], PieceBatch]]:
    """The states of each batch. A thread runs the model on the next batch while the caller measures this one."""

    def forward(batch: PieceBatch) -> list[Tensor]:
        tokens = batch.tokens
        if shuffle:
            tokens = shuffle_tokens(tokens, batch.lengths, batch.identities, settings.seed)
        return [hidden[:, skip_first:] for hidden in subject.forward(tokens, batch.lengths)]

    with ThreadPoolExecutor(1, thread_name_prefix="forward") as worker:
        waiting: tuple[Future[list[Tensor]], PieceBatch] | None = None
        for batch in pieces.batches(BATCH_TOKENS):
            ahead = worker.submit(forward, batch), batch
            if waiting is not None:
                yield waiting[0].result(), waiting[1]
            waiting = ahead
        if waiting is not None:
            yield waiting[0].result(), waiting[1]
