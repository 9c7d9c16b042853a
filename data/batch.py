"""Batch: packed rows of tokens, what the training step consumes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_LABEL = -100
PADDING_DOCUMENT = -1


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    tokens:       (B, T) int64 inputs.
    labels:       (B, T) int64 next token of the same document; -100 where there is none (not loss-bearing).
    document_ids: (B, T) int32; 0, 1, 2, ... along the row, -1 on padding (at the end of a row only).
    row_ids:      (B,) int64 index of each row in the run's order: the same whatever the world size.
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor
    row_ids: Tensor

    def to(self, device: torch.device | str) -> Batch:
        fields = (self.tokens, self.labels, self.document_ids, self.row_ids)
        return Batch(*(field.to(device, non_blocking=True) for field in fields))

    def pin_memory(self) -> Batch:
        """Page-locked copies, so that `.to("cuda")` runs beside the computation. Needs CUDA."""
        fields = (self.tokens, self.labels, self.document_ids, self.row_ids)
        return Batch(*(field.pin_memory() for field in fields))

    @property
    def loss_tokens(self) -> int:
        """Number of loss-bearing labels (waits for the device that holds them)."""
        return int((self.labels != IGNORE_LABEL).sum())
