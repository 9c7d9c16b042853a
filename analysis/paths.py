"""Paths: the hidden states of documents, the steps between neighbouring tokens, and which of them count.

Everything downstream (angles, correlations, tubes, forecasts) reads a Path, so that all of them agree on what a step
is, where a document ends and when a step is too short to have a direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.linalg import vector_norm

from losses.geometry import DEGENERATE_TOLERANCE


@dataclass(frozen=True)
class Path:
    """Rows of states. States are taken as they are: promote and subtract first, round never.

    states (N, T, D): float32 or float64.
    runs (N, T) int64: equal within one document of a row, different between its documents, -1 on padding.
    """

    states: Tensor
    runs: Tensor

    @classmethod
    def of(cls, hidden: Tensor, document_ids: Tensor | None = None) -> Path:
        """hidden (N, T, D) of any floating dtype; document_ids (N, T), negative on padding, None: a row is a document.

        Raises ValueError for another shape or a dtype that is not floating.
        """
        if hidden.dim() != 3 or not hidden.is_floating_point():
            raise ValueError(f"hidden: expected floating (N, T, D), got {tuple(hidden.shape)} {hidden.dtype}")
        if document_ids is not None and document_ids.shape != hidden.shape[:2]:
            raise ValueError(f"document_ids: expected {tuple(hidden.shape[:2])}, got {tuple(document_ids.shape)}")
        states = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32))
        if document_ids is None:
            return cls(states, torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device))
        return cls(states, document_runs(document_ids))

    @property
    def valid(self) -> Tensor:
        """(N, T) bool: a token of a document."""
        return self.runs >= 0

    @cached_property
    def state_norms(self) -> Tensor:
        """(N, T)."""
        return vector_norm(self.states, dim=-1)

    @cached_property
    def steps(self) -> Tensor:
        """v_k = x_{k+1} - x_k, (N, T - 1, D)."""
        return self.states[:, 1:] - self.states[:, :-1]

    @cached_property
    def step_norms(self) -> Tensor:
        """|v_k|, (N, T - 1)."""
        return vector_norm(self.steps, dim=-1)

    @cached_property
    def step_valid(self) -> Tensor:
        """(N, T - 1) bool: both ends lie in one document."""
        return self.connected(1)

    @cached_property
    def degenerate(self) -> Tensor:
        """(N, T - 1) bool: steps so short beside their states that they are rounding, not direction."""
        scale = torch.maximum(self.state_norms[:, 1:], self.state_norms[:, :-1])
        return self.step_valid & (self.step_norms <= DEGENERATE_TOLERANCE * scale)

    @cached_property
    def directions(self) -> Tensor:
        """v_k / |v_k|, (N, T - 1, D); zero where a step is degenerate."""
        inverse = torch.where(self.degenerate, 0.0, 1 / self.step_norms.clamp_min(torch.finfo(self.states.dtype).tiny))
        return self.steps * inverse[..., None]

    def connected(self, distance: int) -> Tensor:
        """(N, T - distance) bool: tokens k and k + distance lie in one document."""
        runs = self.runs
        return (runs[:, distance:] == runs[:, : runs.shape[1] - distance]) & (runs[:, distance:] >= 0)

    def step_pairs(self, lag: int) -> Tensor:
        """(N, T - 1 - lag) bool: steps k and k + lag lie in one document and both have a direction."""
        usable = ~self.degenerate
        return self.connected(lag + 1) & usable[:, lag:] & usable[:, : usable.shape[1] - lag]


def document_runs(document_ids: Tensor) -> Tensor:
    """(N, T) document ids -> (N, T) int64 number of the run of equal ids; -1 on padding (negative ids).

    Runs of equal ids are documents, so an id that comes back later in a row is another document.
    """
    runs = torch.zeros(document_ids.shape, dtype=torch.int64, device=document_ids.device)
    runs[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).cumsum(1)
    return torch.where(document_ids >= 0, runs, -1)


def one_document_per_row(hidden: list[Tensor], document_ids: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Packed rows -> one document a row, padded at the end.

    hidden: tensors (B, T, D); document_ids (B, T). Returns tensors (N, T', D), lengths (N,) int64 and the row that
    each document came from (N,). Rows that hold one document are not copied.
    """
    runs = document_runs(document_ids)
    if bool((runs.max(1).values <= 0).all()) and bool((runs.min(1).values <= 0).all()):
        return list(hidden), (runs >= 0).sum(1), torch.arange(len(runs), device=runs.device)
    places = []
    for row in range(len(runs)):
        numbers, starts, counts = _runs_of_row(runs[row])
        places += [(row, int(s), int(c)) for n, s, c in zip(numbers, starts, counts, strict=True) if n >= 0]
    longest = max((count for _, _, count in places), default=0)
    rows = torch.tensor([row for row, _, _ in places], dtype=torch.int64, device=runs.device)
    lengths = torch.tensor([count for _, _, count in places], dtype=torch.int64, device=runs.device)
    unpacked = []
    for states in hidden:
        out = states.new_zeros(len(places), longest, states.shape[-1])
        for number, (row, start, count) in enumerate(places):
            out[number, :count] = states[row, start : start + count]
        unpacked.append(out)
    return unpacked, lengths, rows


def _runs_of_row(runs: Tensor) -> tuple[list[int], list[int], list[int]]:
    numbers, counts = torch.unique_consecutive(runs, return_counts=True)
    starts = counts.cumsum(0) - counts
    return numbers.tolist(), starts.tolist(), counts.tolist()


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """values, mask (N, K) -> (N,) mean over True, summed in float64; NaN where there is none."""
    total = torch.where(mask, values, 0.0).sum(1, dtype=torch.float64)
    count = mask.sum(1)
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan)
