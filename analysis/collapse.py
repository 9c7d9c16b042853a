"""Collapse guards: is the space that states use getting small, so that a straight path means less?

Moments of a sample of tokens are streamed, once per group of documents; every number is a function of them, so leaving
one group out gives intervals (the delete-a-group jackknife).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from analysis.paths import Path, row_mean

SAMPLED_TOKENS = 32
# Beyond this many bytes of second moments over all boundaries there is one group, and no intervals.
GROUP_BYTES = 512 << 20
CORPUS_METRICS = (
    "effective_rank",
    "participation_ratio",
    "effective_rank_steps",
    "participation_ratio_steps",
    "anisotropy",
    "mean_direction_energy",
)


def effective_rank(covariance: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values (Roy and Vetterli 2007; RankMe, Garrido et al. 2023).

    covariance (..., D, D), float64; the singular values of the centred states are the square roots of its eigenvalues.
    Between 1 (a line) and D. Invariant to rotation, translation and scale.
    """
    singular = torch.linalg.eigvalsh(covariance).clamp_min(0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return torch.special.entr(share).sum(-1).exp()


def participation_ratio(covariance: Tensor) -> Tensor:
    """(sum of eigenvalues)^2 / sum of their squares: the number of dimensions that hold the variance. 1 .. D."""
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp_min(0)
    return eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)


@dataclass(frozen=True)
class TokenSample:
    """index (N, n) int64 token positions, evenly spaced over each document; valid (N, n). Each has a next token."""

    index: Tensor
    valid: Tensor

    def rows(self, n: int) -> TokenSample:
        """The first n."""
        return TokenSample(self.index[:n], self.valid[:n])


def sample_tokens(lengths: Tensor, n_tokens: int = SAMPLED_TOKENS) -> TokenSample:
    """lengths (N,): the same tokens at every boundary and in every model. Short documents give fewer."""
    last = (lengths - 2).clamp_min(-1)  # the last token that has a next one
    number = torch.arange(n_tokens, device=lengths.device)
    n_valid = (last + 1).clamp_max(n_tokens)[:, None]
    index = torch.div(number * last[:, None], (n_valid - 1).clamp_min(1), rounding_mode="floor")
    valid = number < n_valid
    return TokenSample(torch.where(valid, index, 0), valid)


class Moments:
    """Streams the moments of sampled states and steps of one boundary; memory does not grow with documents.

    Sums are taken around the mean of the first batch, so that a large shared mean costs no digits.
    """

    def __init__(self, d_model: int, n_groups: int) -> None:
        self.n_groups = n_groups
        zeros = lambda *shape: torch.zeros(n_groups, *shape, dtype=torch.float64)  # noqa: E731
        self.count, self.step_count, self.pairs_within = zeros(), zeros(), zeros()
        self.first, self.second = zeros(d_model), zeros(d_model, d_model)
        self.step_first, self.step_second = zeros(d_model), zeros(d_model, d_model)
        self.direction, self.direction_within = zeros(d_model), zeros()
        self.origin: Tensor | None = None
        # The last document so far, of which the next update may bring more: its identity, tokens and directions' sum.
        self.last: tuple[int, Tensor, Tensor] | None = None

    def update(self, hidden: Tensor, sample: TokenSample, document_index: Tensor) -> None:
        """hidden (N, T, D): one document (or piece of one) a row. document_index (N,): identity, which decides the
        group; pieces of one document are consecutive, over updates too."""
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        states = hidden[row, sample.index]
        steps = hidden[row, (sample.index + 1).clamp_max(hidden.shape[1] - 1)] - states
        if self.origin is None:
            self.origin = states[sample.valid].mean(0)
        directions = torch.nn.functional.normalize(states, dim=-1) * sample.valid[..., None]
        shifted = (states - self.origin) * sample.valid[..., None]
        steps = steps * sample.valid[..., None]
        groups = document_index % self.n_groups
        for group in groups.unique().tolist():
            mine = groups == group
            x, v = shifted[mine].flatten(0, 1), steps[mine].flatten(0, 1)
            self.count[group] += sample.valid[mine].sum().cpu()
            self.first[group] += x.sum(0).double().cpu()
            self.second[group] += (x.T @ x).double().cpu()
            self.step_first[group] += v.sum(0).double().cpu()
            self.step_second[group] += (v.T @ v).double().cpu()
        self._update_pairs(directions.sum(1).double().cpu(), sample.valid.sum(1).double().cpu(), document_index.cpu())

    def _update_pairs(self, directions: Tensor, n_tokens: Tensor, document_index: Tensor) -> None:
        """directions (N, D), n_tokens (N,), document_index (N,): what pairs of tokens need, once per document."""
        documents, row = document_index.unique_consecutive(return_inverse=True)
        count = torch.zeros(len(documents), dtype=torch.float64).index_add_(0, row, n_tokens)
        total = torch.zeros(len(documents), directions.shape[1], dtype=torch.float64).index_add_(0, row, directions)
        groups = documents % self.n_groups
        self.direction.index_add_(0, groups, total)
        if self.last is not None and self.last[0] == int(documents[0]):  # its sum was counted without this piece
            _, before, direction = self.last
            self.pairs_within[groups[0]] -= before.square()
            self.direction_within[groups[0]] -= direction.square().sum()
            count[0] += before
            total[0] += direction
        self.pairs_within.index_add_(0, groups, count.square())
        self.direction_within.index_add_(0, groups, total.square().sum(1))
        self.last = int(documents[-1]), count[-1], total[-1]

    def metrics(self) -> dict[str, Tensor]:
        """CORPUS_METRICS: each (1 + K,) float64, over all documents and then without each group in turn.

        anisotropy: mean cosine of two tokens of different documents (Ethayarajh 2019), over all pairs of the sample.
        mean_direction_energy: |E x|^2 / E |x|^2. K: groups, or 0 with fewer than two.
        """
        kept = self._leave_one_out
        n = kept(self.count)
        mean, second = kept(self.first) / n[:, None], kept(self.second) / n[:, None, None]
        covariance = second - mean[:, :, None] * mean[:, None, :]
        step_mean = kept(self.step_first) / n[:, None]
        step_covariance = kept(self.step_second) / n[:, None, None] - step_mean[:, :, None] * step_mean[:, None, :]
        origin = torch.zeros(1) if self.origin is None else self.origin.double().cpu()
        energy = (mean + origin).square().sum(-1)
        pairs = n.square() - kept(self.pairs_within)
        total = kept(self.direction).square().sum(-1) - kept(self.direction_within)
        return {
            "effective_rank": effective_rank(covariance),
            "participation_ratio": participation_ratio(covariance),
            "effective_rank_steps": effective_rank(step_covariance),
            "participation_ratio_steps": participation_ratio(step_covariance),
            "anisotropy": torch.where(pairs > 0, total / pairs, torch.nan),
            "mean_direction_energy": energy / (energy + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)),
        }

    def _leave_one_out(self, sums: Tensor) -> Tensor:
        total = sums.sum(0, keepdim=True)
        if int((self.count > 0).sum()) < 2:
            return total
        return torch.cat([total, total - sums[self.count > 0]])


def groups_that_fit(n_streams: int, d_model: int, wanted: int = 8) -> int:
    """How many groups of documents the second moments may have: `wanted`, or 1 where that needs too much memory."""
    return wanted if wanted * n_streams * 2 * d_model**2 * 8 <= GROUP_BYTES else 1


def mean_norms(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: mean |x|, mean |v|, share of steps without a direction; each (N,) float64."""
    dropped = row_mean(path.degenerate.double(), path.step_valid)
    return row_mean(path.state_norms, path.valid), row_mean(path.step_norms, path.step_valid), dropped


def rms_normalised(states: Tensor) -> Tensor:
    """states / their root mean square over D: norm growth alone changes nothing. The epsilon of losses.geometry."""
    return states * (vector_norm(states, dim=-1, keepdim=True).square() / states.shape[-1] + 1e-12).rsqrt()
