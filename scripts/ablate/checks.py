"""What the runs of a grid must be to each other: complete pairs, and no experiment twice."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from errors import require
from scripts.ablate.space import is_trial
from training.config import RunConfig, config_sha256

if TYPE_CHECKING:
    from scripts.ablate.grid import Cell, Grid


def check_pairs(grid: Grid) -> None:
    """Every arm has the seeds that the others have at the same point."""
    seeds: dict[tuple[str, str], set[int]] = {}
    for cell in grid.cells:
        seeds.setdefault((str(cell.point), cell.arm), set()).add(cell.seed)
    for (point, arm), mine in seeds.items():
        all_seeds = set().union(*(theirs for (other, _), theirs in seeds.items() if other == point))
        missing = sorted(all_seeds - mine)
        at = f" at {point}" if point != "{}" else ""
        require(
            not missing,
            f"{grid.path}: arm {arm}",
            f"has no run of seed {', '.join(map(str, missing))}{at}; pairs need it",
        )
    present = {arm for _, arm in seeds}
    absent = [arm for arm in grid.arms if arm not in present]
    require(not absent, f"{grid.path}: filters", f"leave no run of arm {', '.join(absent)}")


def check_different(grid: Grid) -> None:
    """No two arms are the same experiment at the same point (a baseline may repeat along an axis of STP alone).

    Trials of a search may hit on an arm that is there: they are suggestions, and none is run twice.
    """
    seen: dict[str, Cell] = {}
    for cell in grid.cells:
        if is_trial(cell.arm):
            continue
        identity = f"{cell.point} {effective_sha256(cell.config)}"
        other = seen.setdefault(identity, cell)
        require(
            other is cell,
            f"{grid.path}",
            f"runs {other.run_id} and {cell.run_id} are equal after merging; drop one of them",
        )


def effective_sha256(config: RunConfig) -> str:
    """Identity of what a run computes: with STP off, none of its other settings counts."""
    merged = dataclasses.asdict(config)
    if not config.stp.enabled:
        merged["stp"] = "off"
    return config_sha256(merged)
