"""The STP loss in its forms, per document, on triples that every boundary and every model shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.paths import Path, row_mean
from losses.geometry import read_rows, row_losses, select_points
from losses.triples import Triples, draw


@dataclass(frozen=True)
class SharedTriples:
    """anchor: (s, r, t) for form triple; patch: [s, t] against the rest of the document for patch_complement."""

    anchor: Triples
    patch: Triples


def draw_triples(
    lengths: Tensor, length: int, document_index: Tensor, n_triples: int, seed: int, window: int | None
) -> SharedTriples:
    """lengths, document_index (N,); length: T. A pure function of (seed, document)."""
    positions = torch.arange(length, device=lengths.device)
    ids = torch.where(positions < lengths[:, None], 0, -1)
    anchor = draw("anchor", ids, n_triples, seed=seed, step=0, row_ids=document_index, window=window)
    patch = draw("patch", ids, n_triples, seed=seed, step=2, row_ids=document_index)
    return SharedTriples(anchor, patch)


def stp_forms(path: Path, triples: SharedTriples) -> dict[str, Tensor]:
    """Losses 1 - cos of the sampled forms, each (N,) float64: 0 a line, 1.0 a walk, 1.5 i.i.d. (triple).

    A triple without a direction counts as the constant 1, as in training. NaN: a document without a triple.
    (The third form, consecutive, is 1 - C(1) over all tokens: see `tangent_correlation`.)
    """
    found = {}
    for name, form, drawn in (
        ("stp_triple", "triple", triples.anchor),
        ("stp_patch_complement", "patch_complement", triples.patch),
    ):
        points, valid, _ = select_points(drawn, form)
        losses, _ = row_losses(read_rows([path.states], points), form)
        found[name] = row_mean(losses[0], valid)
    return found
