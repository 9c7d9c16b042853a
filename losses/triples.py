"""Samplers of token triples (s, r, t): static shapes, tensors only, never outside a document.

Randomness enters as integers: from a generator, or (training) hashed from (seed, step, row, span), so that resumed,
accumulated and distributed runs see the same triples. A sampler turns three integers into one triple.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errors import require_choice
from losses.keyed import GAMMA, POSITIVE, keyed_bits, mix

SAMPLERS = ("sorted_offset", "uniform", "anchor", "patch")


@dataclass(frozen=True)
class Triples:
    """n triples per row. All (B, n); indices int64 into the row's tokens.

    s < r < t lie in one document. first, last: the ends of that document (of its content where a mask was given).
    valid: False where the row has no room for a triple; its indices are then 0. Depends on the layout alone, never
    on values. kind "patch": [s, t] is a span of one step or more, so s <= r < t; only for form patch_complement.
    key: (B,) int64 or None: what any further randomness of this row and step is hashed from.
    """

    s: Tensor
    r: Tensor
    t: Tensor
    valid: Tensor
    first: Tensor
    last: Tensor
    kind: str = "triple"
    key: Tensor | None = None

    def _map(self, function: Any) -> Triples:
        s, r, t, valid = function(self.s), function(self.r), function(self.t), function(self.valid)
        key = None if self.key is None else function(self.key)
        return Triples(s, r, t, valid, function(self.first), function(self.last), self.kind, key)

    @staticmethod
    def cat(parts: Sequence[Triples]) -> Triples:
        """Several draws for the same rows, side by side."""
        names = ("s", "r", "t", "valid", "first", "last")
        s, r, t, valid, first, last = (torch.cat([getattr(part, name) for part in parts], 1) for name in names)
        return Triples(s, r, t, valid, first, last, parts[0].kind, parts[0].key)

    def select(self, rows: Tensor | slice) -> Triples:
        """Those of some rows: a micro-batch or a rank's share."""
        return self._map(lambda field: field[rows])

    def to(self, device: torch.device | str) -> Triples:
        return self._map(lambda field: field.to(device, non_blocking=True))

    def n_valid(self) -> Tensor:
        """() int64."""
        return self.valid.sum()

    def violations(self, document_ids: Tensor) -> Tensor:
        """() int64: valid triples that are out of order, leave their document or touch padding."""
        s, r, t = (document_ids.gather(1, index) for index in (self.s, self.r, self.t))
        # Runs of equal ids are documents, so an id that comes back later is another document.
        changes = (document_ids[:, 1:] != document_ids[:, :-1]).to(torch.int64).cumsum(1)
        run = torch.nn.functional.pad(changes, (1, 0))
        same = (run.gather(1, self.s) == run.gather(1, self.t)) & (s == r) & (r == t) & (s >= 0)
        ordered = (self.s <= self.r if self.kind == "patch" else self.s < self.r) & (self.r < self.t)
        return (self.valid & ~(ordered & same)).sum()

    def neighbours(self) -> Triples:
        """(r - 1, r, r + 1): the three consecutive tokens around the middle, inside the document since s < r < t."""
        return _make(self.r - 1, self.r, self.r + 1, self.valid, self.first, self.last, "triple", self.key)


def draw(
    sampler: str,
    document_ids: Tensor,
    n_spans: int,
    *,
    seed: int,
    step: int | Tensor,
    row_ids: Tensor,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Triples:
    """The triples of one optimizer step: a pure function of (seed, step, row), whatever the split of the batch.

    document_ids (B, T), -1 on padding; row_ids (B,) int64: global row indices in the run's order; window: largest
    distance on each side of an anchor (None = the whole document). More spans keep the first ones as they are.
    """
    bits = keyed_bits(seed, step, row_ids.to(document_ids.device), n_spans)
    return sample(sampler, bits, content_of(document_ids, mask), window)


def draw_with_generator(
    sampler: str,
    shape: tuple[int, int],
    n_spans: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    window: int | None = None,
) -> Triples:
    """The same from a torch generator, for use outside a training run. shape: (B, T)."""
    where = generator.device if generator is not None else device
    bits = torch.randint(POSITIVE, (shape[0], n_spans, 3), generator=generator, device=where).to(device)
    if document_ids is None and positions is not None:
        document_ids = documents_from_positions(positions)
    if document_ids is None and mask is None:
        return sample(sampler, bits, whole_rows(*shape, device), window)
    if document_ids is None:
        document_ids = torch.zeros(shape, dtype=torch.int64, device=device)
    return sample(sampler, bits, content_of(document_ids.to(device), mask), window)


def spans_per_row(n_spans: int, spans_per_1024_tokens: float | None, sequence_length: int) -> int:
    """n_spans, or the number that keeps the exposure per token when the row length changes (at least 1)."""
    if spans_per_1024_tokens is None:
        return n_spans
    return max(1, round(spans_per_1024_tokens * sequence_length / 1024))


def documents_from_positions(positions: Tensor) -> Tensor:
    """(B, T) token positions that restart in every document (position_ids of packed rows) -> (B, T) document ids."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts.cumsum(1) - 1


# --- layout -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """The content tokens of each row, closed up in order, so that samplers need not know of masks.

    index (B, T): token index of the k-th content token (None = k itself). first, last (B, T): the k range of the
    document that k is in. length (B, 1): content tokens in the row. All int64.
    """

    index: Tensor | None
    first: Tensor
    last: Tensor
    length: Tensor


def whole_rows(batch_size: int, length: int, device: torch.device | str) -> Content:
    """Every row is one document."""
    zeros = torch.zeros(batch_size, length, dtype=torch.int64, device=device)
    return Content(None, zeros, zeros + (length - 1), zeros[:, :1] + length)


def content_of(document_ids: Tensor, mask: Tensor | None = None) -> Content:
    """document_ids (B, T): runs of equal values are documents, negative is padding. mask (B, T): True = content;
    triples are drawn over the content of a document as if the rest were not there."""
    keep = document_ids >= 0
    if mask is not None:
        keep = keep & mask.to(device=keep.device, dtype=torch.bool)
    batch_size, length = document_ids.shape
    k = torch.arange(length, device=document_ids.device).expand(batch_size, length)
    runs = torch.zeros_like(k)
    runs[:, 1:] = (document_ids[:, 1:] != document_ids[:, :-1]).to(torch.int64).cumsum(1)
    # Content token i becomes the (keep.cumsum - 1)-th; the others fall into a slot that is cut off.
    target = torch.where(keep, keep.to(torch.int64).cumsum(1) - 1, length)
    index = torch.zeros(batch_size, length + 1, dtype=torch.int64, device=k.device).scatter(1, target, k)[:, :length]
    n = keep.sum(1, keepdim=True)
    run = torch.where(k < n, runs.gather(1, index), -1)
    changed = run[:, 1:] != run[:, :-1]
    edge = torch.ones_like(changed[:, :1]) if length > 1 else torch.ones_like(keep)
    first = torch.where(torch.cat([edge, changed], 1), k, 0).cummax(1).values
    last = torch.where(torch.cat([changed, edge], 1), k, length - 1).flip(1).cummin(1).values.flip(1)
    return Content(index, first, last, n)


# --- samplers ---------------------------------------------------------------------------------------------------


def sample(sampler: str, bits: Tensor, content: Content, window: int | None = None) -> Triples:
    """bits (B, n, 3), uniform non-negative integers -> triples.

    sorted_offset: sort three draws from [0, L - 2), add 0, 1, 2. Reaches every triple, but not uniformly: 6 : 3 : 1
        for none, one, both gaps equal to 1. The seed's sampler.
    uniform: every triple of the row's content with the same probability.
    anchor: r uniform over the content tokens of the row with room on both sides; the gaps to s and t uniform on
        1 .. min(window, room). Always inside a document: the one for packed rows.
    patch: a document as under anchor; start a uniform, end uniform behind it, the whole document excluded: the draw
        of the released code of the STP paper. [s, t] is the patch.
    The first two ignore document bounds when drawing; what crosses one is not valid. "Uniform" is up to 2^-63 x the
    range (a remainder of 63 bits). L: content tokens in the row; a row with fewer than 3 has no valid triple.
    """
    require_choice("sampler", sampler, SAMPLERS)
    if sampler in ("sorted_offset", "uniform"):
        length = content.length.clamp_min(3)
        points = _sorted_offset(bits, length) if sampler == "sorted_offset" else _uniform(bits, length)
        s, r, t = points.unbind(-1)
        first, last = content.first.gather(1, s), content.last.gather(1, s)
        valid = (content.length >= 3) & (t <= last)
    else:
        r, has_room = _anchor(bits[..., 0], content)
        first, last = content.first.gather(1, r), content.last.gather(1, r)
        if sampler == "anchor":
            s = r - _gap(bits[..., 1], r - first, window)
            t = r + _gap(bits[..., 2], last - r, window)
        else:
            s, t = _patch(bits[..., 1], bits[..., 2], (last - first).clamp_min(2))
            s, t = first + s, first + t
            r = torch.div(s + t, 2, rounding_mode="floor")
        valid = has_room.expand_as(s)
    if content.index is not None:
        s, r, t, first, last = (content.index.gather(1, torch.where(valid, k, 0)) for k in (s, r, t, first, last))
    key = mix(bits[:, 0, 0] ^ GAMMA)  # of the first span's integers, so the same whatever the number of spans
    return _make(s, r, t, valid, first, last, "patch" if sampler == "patch" else "triple", key)


def _make(
    s: Tensor, r: Tensor, t: Tensor, valid: Tensor, first: Tensor, last: Tensor, kind: str, key: Tensor | None
) -> Triples:
    """Points what is not valid at index 0, so that every gather is legal."""
    s, r, t, first, last = (torch.where(valid, k, 0) for k in (s, r, t, first, last))
    return Triples(s, r, t, valid, first, last, kind, key)


def _sorted_offset(bits: Tensor, length: Tensor) -> Tensor:
    base = (bits % (length[..., None] - 2)).sort(-1).values
    return base + torch.arange(3, device=bits.device)


def _uniform(bits: Tensor, length: Tensor) -> Tensor:
    a, b, c = bits[..., 0] % length, bits[..., 1] % (length - 1), bits[..., 2] % (length - 2)
    b = b + (b >= a)
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    c = c + (c >= low)
    c = c + (c >= high)
    return torch.stack([a, b, c], -1).sort(-1).values


def _anchor(bits: Tensor, content: Content) -> tuple[Tensor, Tensor]:
    """A uniform interior token of the row (B, n), and whether there is one (B, 1)."""
    k = torch.arange(content.first.shape[1], device=bits.device)
    interior = (k > content.first) & (k < content.last) & (k < content.length)
    rank = interior.to(torch.int64).cumsum(1)
    count = rank[:, -1:]
    r = torch.searchsorted(rank, bits % count.clamp_min(1) + 1)
    return r.clamp_max(content.first.shape[1] - 1), count > 0


def _gap(bits: Tensor, room: Tensor, window: int | None) -> Tensor:
    limit = room if window is None else room.clamp_max(window)
    return 1 + bits % limit.clamp_min(1)


def _patch(u: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """0 <= a < b <= steps, a uniform and b uniform on a + 1 .. steps, given that (a, b) is not (0, steps)."""
    unit = u % (steps * steps - 1)  # start 0 keeps steps - 1 of its steps ends, every other start weighs steps
    at_zero = unit < steps - 1
    a = torch.where(at_zero, 0, 1 + torch.div(unit - (steps - 1), steps, rounding_mode="floor"))
    ends = torch.where(at_zero, steps - 1, steps - a)
    return a, a + 1 + v % ends
