"""What the runs of a grid must be to each other: told apart, complete pairs, and no experiment twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.config import ANSWER_SOURCES
from data.split import TEST
from errors import require, require_choice
from model.pattern import parse_pattern
from scripts.ablate.space import ANSWERS, CURVATURE, RECEIPT_METRICS, is_trial
from training.config import RunConfig, config_sha256, differing_keys

if TYPE_CHECKING:
    from scripts.ablate.grid import Cell, Grid

# The one key of `data` that does not change what is stored, only how it is cut.
ROWS = "data.sequence_length"
# Letters of a run_id (training/config.py).
LONGEST = 128


def check_axes(arms: Mapping[str, Mapping[str, Any]], axes: Iterable[str], path: Path) -> None:
    """No arm says anything about the key of an axis: the axis would win, and "none" could train with STP on."""
    for key in axes:
        for arm, changes in arms.items():
            require(key not in changes, f"{path}: arm {arm}", f"{key} is an axis; an arm cannot set it")


def check_answers(grid: Grid) -> None:
    """Every run has prompts of the split whose answers are asked for: it would be trained to its end to fail then."""
    split = grid.evaluate.answers
    where = f"{grid.path}: evaluate.answers"
    for cell in grid.cells if split != "none" else ():
        data = cell.config.data
        sources = [spec.source for spec in data.corpora()]
        asked = [source for source in sources if source in ANSWER_SOURCES]
        require(
            bool(asked),
            where,
            f"{split}, but the data of run {cell.run_id}, {', '.join(sources)}, hold no prompts and answers; expected "
            f"none, or data.source={' or '.join(ANSWER_SOURCES)}",
        )
        kept = data.test_fraction > 0 or (data.test_path is not None and "jsonl" in asked)
        require(
            split != TEST or kept,
            where,
            f"test, but run {cell.run_id} keeps none; expected data.test_fraction above 0, or rows in data.test_path",
        )


def check_metrics(grid: Grid) -> None:
    """Every metric will have a column: the comparison, which needs it, comes after the last run."""
    for name in grid.metrics:
        require_choice(f"{grid.path}: metrics", name, comparable(grid))


def comparable(grid: Grid) -> list[str]:
    """Measured columns of its results.csv."""
    found = [*RECEIPT_METRICS, *(ANSWERS if grid.evaluate.answers != "none" else ())]
    if grid.evaluate.curvature_rows:
        stacks = dict.fromkeys((cell.config.model.pattern, cell.config.model.depth) for cell in grid.cells)
        letters = dict.fromkeys(letter for stack in stacks for letter in parse_pattern(*stack).letters)
        families = ("embedding", *letters, "final")
        found += [f"curvature/{name}/{family}" for name in CURVATURE for family in families]
    return found


def check_run_ids(grid: Grid) -> None:
    """Every run has a folder of its own: what a folder's name cannot hold is "_" there, whatever it was."""
    seen: dict[str, Cell] = {}
    for cell in grid.cells:
        n = len(cell.run_id)
        require(n <= LONGEST, f"{grid.path}: run {cell.run_id}", f"{n} letters are too many for a folder of {LONGEST}")
        other = seen.setdefault(cell.run_id, cell)
        both = " and ".join(
            f"arm {one.arm}" + (f" at {', '.join(f'{k} {v}' for k, v in one.point.items())}" if one.point else "")
            for one in (other, cell)
        )
        require(other is cell, f"{grid.path}: {both}", f"both would be run {cell.run_id}; rename one of them")


def check_pairs(grid: Grid) -> None:
    """Every arm has the seeds that the others have at the same point, and the data of the baseline."""
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
    for cell, base in _pairs(grid):
        keys = [key for key in differing_keys(base.config, cell.config) if key.startswith("data.") and key != ROWS]
        changes = f"changes {', '.join(keys)}, so its pairs would not share their data; make it an axis"
        require(not keys, f"{grid.path}: arm {cell.arm}", changes)
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


def placebos(grid: Grid) -> tuple[str, ...]:
    """Arms that differ from the baseline in nothing that reaches the weights: no STP, or one that sends no gradient, on
    both sides, and all else equal. They must end with the baseline's weights, bit for bit."""
    same: dict[str, bool] = {}
    for cell, base in _pairs(grid):
        same[cell.arm] = same.get(cell.arm, True) and _equal_but_for_silent_stp(cell.config, base.config)
    return tuple(arm for arm in grid.arms if same.get(arm))


def _pairs(grid: Grid) -> Iterator[tuple[Cell, Cell]]:
    """Each run of an arm with the baseline's of the same point and seed, where there is one."""
    bases = {(str(cell.point), cell.seed): cell for cell in grid.cells if cell.arm == grid.baseline}
    for cell in grid.cells:
        base = bases.get((str(cell.point), cell.seed))
        if base is not None and base is not cell:
            yield cell, base


def _equal_but_for_silent_stp(one: RunConfig, other: RunConfig) -> bool:
    silent = all(not config.stp.enabled or config.stp.variant == "detached" for config in (one, other))
    return silent and all(key.startswith("stp.") for key in differing_keys(one, other))


def effective_sha256(config: RunConfig) -> str:
    """Identity of what a run computes: with STP off, none of its other settings counts."""
    merged = dataclasses.asdict(config)
    if not config.stp.enabled:
        merged["stp"] = "off"
    return config_sha256(merged)
