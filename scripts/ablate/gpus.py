"""The GPUs that runs of a grid are put on: one for each run, as train.py takes the first that it sees."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch

from scripts.ablate.grid import Grid


def visible_gpus(grid: Grid) -> tuple[str, ...]:
    """Entries for CUDA_VISIBLE_DEVICES: numbers, or whatever a list that is there already holds. () where the runs of
    this grid are on the processor."""
    if all(cell.config.device == "cpu" for cell in grid.cells) or not torch.cuda.is_available():
        return ()
    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = [str(number) for number in range(count)] if listed is None else listed.split(",")
    return tuple(entry.strip() for entry in entries[:count])


def least_used(gpus: Sequence[str], used: Iterable[str | None]) -> str | None:
    """The one with the fewest runs, the first of those; None without any."""
    taken = list(used)
    return min(gpus, key=taken.count, default=None)


def placement(gpus: Sequence[str], jobs: int) -> str:
    """For the plan."""
    if not gpus:
        return "on the processor"
    names = ", ".join(gpus)
    return f"on GPUs {names} in turn" if jobs > len(gpus) else f"a GPU for each ({names})"
