"""What a grid will do, before it does it: its runs, what differs between arms, and the cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.ablate.grid import Grid
from scripts.ablate.results import differences, is_done, run_folder, to_csv
from scripts.ablate.runner import clock
from training.durable import replace_atomically
from training.receipt import read_receipt
from training.summary import meta_model


def print_plan(grid: Grid, jobs: int | None, threads: int | None, where: str, console: Console) -> None:
    """jobs: side by side; threads: of each. None: not ours to say. where: what they run on."""
    if grid.question:
        console.print(grid.question, markup=False)
    console.print(table("what differs between arms", differences(grid)))
    done = sum(is_done(grid, cell) for cell in grid.cells)
    points = len({str(cell.point) for cell in grid.cells})
    seeds = sorted({cell.seed for cell in grid.cells})
    each = f"{threads} thread{'s' if threads != 1 else ''} each" if threads else "as many threads as CPUs"
    axes = f" x {points} points of {', '.join(grid.axes)}" if grid.axes else ""
    at_a_time = f"{jobs} at a time" if jobs else "one job per run"
    console.print(
        f"{len(grid.cells)} runs: {len({c.arm for c in grid.cells})} arms{axes} x seeds {seeds}; {done} done already; "
        f"{at_a_time} with {each}, {where}; baseline {grid.baseline}",
        markup=False,
    )
    tokens, flops, seconds = cost(grid)
    left = max(len(grid.cells) - done, 1)
    expected = (
        f"training takes about {clock(seconds / min(jobs or left, left))} (min:s) at the speed so far"
        if seconds is not None
        else "time not known before the first run is done"
    )
    console.print(f"left to do: {tokens:,} loss-bearing tokens, at least {flops:.1e} FLOPs, {expected}", markup=False)
    console.print(f"folder: {grid.folder}", markup=False)


def cost(grid: Grid) -> tuple[int, float, float | None]:
    """Tokens and training FLOPs that are left (prompts and padding not counted), and seconds of one worker."""
    flops_of: dict[tuple[str, int, int], int] = {}
    tokens, flops, laps = 0, 0.0, []
    for cell in grid.cells:
        if is_done(grid, cell):
            receipt = read_receipt(run_folder(grid, cell))
            speed = receipt.get("metrics", {}).get("tokens_per_second")
            laps += [receipt["tokens"] / speed] if speed else []
            continue
        config = cell.config
        vocab_size, length = config.data.tokenizer.vocab_size, config.data.sequence_length
        key = (str(config.model), vocab_size, length)
        if key not in flops_of:
            flops_of[key] = 3 * meta_model(config, vocab_size).flops_per_token(length)
        tokens += config.train.tokens
        flops += flops_of[key] * config.train.tokens
    left = sum(not is_done(grid, cell) for cell in grid.cells)
    return tokens, flops, left * sum(laps) / len(laps) if laps else None


def store_plan(grid: Grid) -> None:
    """plan.json and arms.csv: what was meant, beside what came of it."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    plan = {
        "grid": grid.path.name,
        "question": grid.question,
        "base": grid.base,
        "baseline": grid.baseline,
        "axes": grid.axes,
        "metrics": grid.metrics,
        "runs": [
            {"run_id": c.run_id, "arm": c.arm, "seed": c.seed, "overrides": list(c.overrides)} for c in grid.cells
        ],
    }
    replace_atomically(grid.folder / "plan.json", json.dumps(plan, indent=1).encode() + b"\n")
    replace_atomically(grid.folder / "arms.csv", to_csv(differences(grid)).encode())


def table(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    rows = list(rows)
    shown = Table(title=title)
    for name in rows[0] if rows else ():
        shown.add_column(str(name), overflow="fold")
    for row in rows:
        shown.add_row(*(str(value).replace("[", "\\[") for value in row.values()))
    return shown
