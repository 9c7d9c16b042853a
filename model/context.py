"""SequenceContext: where documents begin and end in a batch of packed rows. Made once, given to every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blocks.kernels import attention


@dataclass(frozen=True)
class SequenceContext:
    """Document layout of one batch.

    document_ids: (B, T) int32. Constant inside a document, different between the documents of a row,
        -1 on padding (which stands at the end of a row only).
    segment_ids:  (B, T) int32. 0, 1, 2, ... along the row, padding counted as a segment of its own
        (what kernels call seq_idx).
    starts:       (B, T) bool. True on the first token of every segment.
    positions:    (B, T) int64. Index of a token inside its segment (RoPE positions restart per document).
    block_masks:  window -> what attention needs besides, see `block_mask`.
    """

    document_ids: Tensor
    segment_ids: Tensor
    starts: Tensor
    positions: Tensor
    block_masks: dict[int | None, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> SequenceContext:
        """document_ids: (B, T) integers as above; runs of equal values are documents."""
        document_ids = document_ids.to(torch.int32)
        starts = torch.ones_like(document_ids, dtype=torch.bool)
        starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
        segment_ids = (starts.cumsum(dim=1) - 1).to(torch.int32)
        index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
        start_index = torch.where(starts, index, 0).cummax(dim=1).values
        return cls(document_ids, segment_ids, starts, index - start_index)

    @classmethod
    def single_documents(cls, tokens: Tensor) -> SequenceContext:
        """Every row of tokens (B, T) is one whole document."""
        return cls.from_document_ids(torch.zeros(tokens.shape, dtype=torch.int32, device=tokens.device))

    @property
    def valid(self) -> Tensor:
        """(B, T) bool: not padding."""
        return self.document_ids >= 0

    def block_mask(self, window: int | None) -> Any:
        """flex attention's mask for this window (None where attention needs none), made at the first call."""
        if window not in self.block_masks:
            self.block_masks[window] = attention.block_mask(self.segment_ids, window)
        return self.block_masks[window]
