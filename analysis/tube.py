"""Tubes: how far a path strays from the chord of a span, and how much longer it is than that chord."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from analysis.paths import Path, row_mean
from losses.geometry import DEGENERATE_TOLERANCE
from losses.keyed import keyed_bits

# Lengths in tokens (first, last) of the spans that are looked at together.
SPAN_BINS = ((4, 8), (9, 24), (25, 64))


@dataclass(frozen=True)
class Spans:
    """n spans per document and bin. start, length (N, bins, n) int64; valid (N, bins): the document has room."""

    start: Tensor
    length: Tensor
    valid: Tensor


def draw_spans(
    lengths: Tensor, document_index: Tensor, n_spans: int, seed: int, bins: Sequence[tuple[int, int]] = SPAN_BINS
) -> Spans:
    """lengths, document_index (N,): a pure function of (seed, document, bin), so all boundaries and models share it.

    A span's length is uniform over its bin (as far as the document reaches), its start uniform over what is left.
    """
    bits = keyed_bits(seed, 1, document_index, len(bins) * n_spans).view(len(lengths), len(bins), n_spans, 3)
    low = torch.tensor([first for first, _ in bins], device=lengths.device)[None, :, None]
    high = torch.tensor([last for _, last in bins], device=lengths.device)[None, :, None]
    room = (lengths[:, None, None] - 1).clamp_min(0)
    valid = room >= low
    length = low + bits[..., 0] % (torch.minimum(high, room) - low + 1).clamp_min(1)
    start = bits[..., 1] % (room - length + 1).clamp_min(1)
    return Spans(torch.where(valid, start, 0), torch.where(valid, length, 1), valid[..., 0])


def tube(path: Path, spans: Spans) -> tuple[Tensor, Tensor, Tensor]:
    """Per document and bin, means over its spans; each (N, bins) float64, NaN where there is no span:

    mean_radius, max_radius: distance of the tokens inside a span from the line through its ends, the mean and the
        largest over the tokens inside, over the length of the chord. Both are summed over the document's spans before
        they are divided: a chord that happens to be short (the same word at both ends) must not decide the number.
    efficiency: |x_t - x_s| / sum of |v_k|, the straightness index: 1 = straight, about 1 / sqrt(n) for a random walk.
    A span whose ends coincide has no chord and is left out.
    """
    found = [_one_bin(path, spans, number) for number in range(spans.start.shape[1])]
    mean_radius, max_radius, efficiency = (torch.stack(values, 1) for values in zip(*found, strict=True))
    return mean_radius, max_radius, efficiency


def _one_bin(path: Path, spans: Spans, number: int) -> tuple[Tensor, Tensor, Tensor]:
    states, D = path.states, path.states.shape[-1]
    start, length = spans.start[:, number], spans.length[:, number]  # (N, n)
    offsets = torch.arange(int(length.max()) + 1, device=states.device)
    index = torch.minimum(start[..., None] + offsets, (start + length)[..., None])  # (N, n, J): s .. t, then t again
    first_row = torch.arange(len(states), device=states.device)[:, None, None] * states.shape[1]
    points = states.reshape(-1, D).index_select(0, (index + first_row).flatten()).view(*index.shape, D)

    relative = points[:, :, 1:] - points[:, :, :1]
    chord = relative[:, :, -1]  # the last point is t
    chord_norm = vector_norm(chord, dim=-1)
    scale = torch.maximum(vector_norm(points[:, :, 0], dim=-1), vector_norm(points[:, :, -1], dim=-1))
    usable = spans.valid[:, number, None] & ~(chord_norm <= DEGENERATE_TOLERANCE * scale)
    safe = torch.where(usable, chord_norm, 1.0)
    direction = chord / safe[..., None]
    along = (relative * direction[:, :, None]).sum(-1, keepdim=True)
    distance = vector_norm(relative.addcmul_(along, direction[:, :, None], value=-1), dim=-1)
    inside = offsets[1:] < length[..., None]
    distance = torch.where(inside, distance, 0.0)
    mean_distance = distance.sum(-1) / inside.sum(-1).clamp_min(1)
    chords = row_mean(chord_norm, usable)

    walked = torch.zeros(states.shape[:2], dtype=torch.float64, device=states.device)
    walked[:, 1:] = torch.where(path.step_valid, path.step_norms, 0.0).cumsum(1, dtype=torch.float64)
    efficiency = chord_norm / (walked.gather(1, start + length) - walked.gather(1, start)).clamp_min(1e-300)
    radii = (row_mean(mean_distance, usable) / chords, row_mean(distance.amax(-1), usable) / chords)
    return *radii, row_mean(efficiency, usable)
