"""What happens when a number is not finite: the step is skipped and counted; too many in a row end the run."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.batch import Batch


class FiniteGuard:
    """Judges each step before its update. The count in a row is no state: a resumed run begins at zero."""

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self.folder = folder
        self.in_a_row = 0

    def accepts(self, loss: Tensor | float, grad_norm: Tensor | float, batch: Batch) -> bool:
        """Whether loss and global gradient norm are finite.

        Raises FloatingPointError after `limit` bad steps in a row, with the last one's batch saved in the run folder.
        """
        if bool(torch.isfinite(torch.as_tensor(loss)).all() and torch.isfinite(torch.as_tensor(grad_norm)).all()):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        if self.in_a_row >= self.limit:
            path = self.folder / "offending_batch.safetensors"
            fields = {name: getattr(batch, name) for name in ("tokens", "labels", "document_ids", "row_ids")}
            save_file({name: value.cpu().contiguous() for name, value in fields.items()}, path)
            raise FloatingPointError(
                f"{self.in_a_row} steps in a row had a loss ({float(loss):g}) or gradient norm ({float(grad_norm):g}) "
                f"that is not finite; the last batch is in {path}"
            )
        return False
