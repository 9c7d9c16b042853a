"""Bad steps: what is not finite, or an outlier, is skipped and counted; too many in a row end the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from data.batch import Batch
from errors import require_choice, require_number
from training.measured import Measured, State


@dataclass
class HealthConfig:
    # keep: every finite step counts; skip: a step whose loss or gradient norm is an outlier is skipped and counted.
    outliers: str = "keep"
    # An outlier lies more than this many standard deviations above the mean of the last `outlier_window` finite steps.
    outlier_sigmas: float = 6.0
    outlier_window: int = 128
    # A step that takes longer ends the process with the stacks of all threads in hung_stacks.txt; 0: never.
    hung_step_seconds: float = 1800.0
    # Warn when training is slower than this share of its best speed, or main memory grew by this share (and 1 GiB).
    slow_share: float = 0.6
    memory_growth: float = 0.3

    def validate(self, path: str = "health") -> None:
        require_choice(f"{path}.outliers", self.outliers, ["keep", "skip"])
        require_number(f"{path}.outlier_sigmas", self.outlier_sigmas, 1.0)
        require_number(f"{path}.outlier_window", self.outlier_window, 8)
        require_number(f"{path}.hung_step_seconds", self.hung_step_seconds, 0.0)
        require_number(f"{path}.slow_share", self.slow_share, 0.0, 1.0)
        require_number(f"{path}.memory_growth", self.memory_growth, 0.0)


class StepGuard:
    """Judges each step before its update.

    limit: steps in a row that are not finite and end the run; this count is no state, a resumed run begins at zero.
    The window of outliers is state (`State.recent`), so that a resumed run skips what the undisturbed one skips.
    """

    def __init__(self, config: HealthConfig, limit: int, folder: Path, rank: int = 0) -> None:
        self.config = config
        self.limit = limit
        name = "offending_batch.safetensors"
        self.path = folder / (name if rank == 0 else f"{name}.{rank}")
        self.in_a_row = 0

    def accepts(self, measured: Measured, grad_norm: Tensor | float, batch: Batch, state: State) -> bool:
        """Whether the loss and the global gradient norm are finite and, if asked for, no outliers.

        Raises FloatingPointError after `limit` steps in a row that are not finite, with the last one's batch saved in
        the run folder.
        """
        loss, norm = float(measured.total), float(grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.in_a_row += 1
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"{self.in_a_row} steps in a row had a loss ({loss:g}) or gradient norm ({norm:g}) "
                    f"that is not finite; {self._save(batch)}"
                )
            return False
        self.in_a_row = 0
        if self.config.outliers == "keep":
            return True
        values = [float(measured.lm), norm]  # the LM loss: the total jumps when the gate opens, as it should
        odd = any(is_outlier(value, column, self.config) for value, column in zip(values, zip(*state.recent)))
        # an outlier enters the window too: a lasting change of level is accepted after a few steps
        state.recent = [*state.recent, values][-self.config.outlier_window :]
        return not odd

    def _save(self, batch: Batch) -> str:
        fields = {name: getattr(batch, name) for name in ("tokens", "labels", "document_ids", "row_ids")}
        try:
            save_file({name: value.cpu().contiguous() for name, value in fields.items()}, self.path)
        except Exception as error:  # a full disk (safetensors has an error of its own) must not hide the finding
            return f"the last batch (rows {batch.row_ids.tolist()}) could not be saved: {error}"
        return f"the last batch is in {self.path}"


def is_outlier(value: float, earlier: tuple[float, ...], config: HealthConfig) -> bool:
    """More than `outlier_sigmas` above the mean of `earlier`, once half the window is full. One-sided."""
    if len(earlier) < config.outlier_window // 2:
        return False
    mean = math.fsum(earlier) / len(earlier)
    variance = math.fsum((x - mean) ** 2 for x in earlier) / (len(earlier) - 1)
    return variance > 0 and value - mean > config.outlier_sigmas * math.sqrt(variance)
