"""Controls: what the same numbers read where there is nothing to find."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CONTROL_ROWS = ("iid", "walk")


def shuffle_tokens(tokens: Tensor, lengths: Tensor, document_index: Tensor, seed: int) -> Tensor:
    """tokens (N, T) with those of each document in a random order: the same words, no text. Padding stays.

    A pure function of (seed, document).
    """
    shuffled = tokens.clone()
    for row, (length, document) in enumerate(zip(lengths.tolist(), document_index.tolist(), strict=True)):
        order = _generator(seed, document, 1).permutation(length)
        shuffled[row, :length] = tokens[row, torch.from_numpy(order).to(tokens.device)]
    return shuffled


def random_rows(lengths: Tensor, document_index: Tensor, length: int, d_model: int, seed: int) -> list[Tensor]:
    """Gaussian rows with the lengths of the documents, in the order of CONTROL_ROWS, each (N, T, D) float32:
    iid: independent states, and walk: their running sum."""
    shape = (length, d_model)
    rows = [
        torch.from_numpy(_generator(seed, document, 2).standard_normal(shape, dtype=np.float32))
        for document in document_index.tolist()
    ]
    iid = torch.stack(rows).to(lengths.device)
    return [iid, iid.cumsum(1)]


def _generator(seed: int, document: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[(purpose << 32) + seed, document]))
