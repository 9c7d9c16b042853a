"""Runs a grid of paired experiments and compares its arms: python -m scripts.ablate configs/ablations/X.yaml

    --dry-run       the plan, what differs between arms and what it costs; starts nothing
    --jobs N        runs side by side (default: one per GPU, without any one per core), cores divided among them
    --filter EXPR   only some runs, e.g. 'arm in ["none", "triple"] and seed < 2'; may be given several times
    --launcher slurm  submits one job per run instead, each with as many threads as it gets CPUs
    --report [FOLDER] only compares and writes the page, from the CSV files of FOLDER (default: the grid's)

What is done already is not done again. Results: ablations/<grid>/results.csv, report.html. A grid with a `search`
section goes on suggesting trials until it has all of them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from errors import InputError, exit_with, require_number
from scripts.ablate.gpus import placement, visible_gpus
from scripts.ablate.grid import Grid, load_grid
from scripts.ablate.plan import print_plan, store_plan
from scripts.ablate.report import report
from scripts.ablate.results import check_folder, is_done, stored_threads, write_results
from scripts.ablate.runner import only_one, run_local
from scripts.ablate.search import run_search, stored_trials
from scripts.ablate.slurm import submit_all
from scripts.ablate.space import read_trials, summary
from training.environment import cores


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.ablate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("grid", help="a grid file, e.g. configs/ablations/smoke.yaml")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local")
    parser.add_argument("--sbatch", action="append", default=[], help="Slurm: e.g. --sbatch=--partition=gpu")
    parser.add_argument("--filter", action="append", default=[], metavar="EXPR")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--report", nargs="?", const="", metavar="FOLDER")
    arguments = parser.parse_args()
    console = Console(highlight=False, width=None if os.isatty(1) else 180)

    if arguments.jobs is not None:
        require_number("--jobs", arguments.jobs, 1)
    if arguments.sbatch and arguments.launcher != "slurm":
        raise InputError("--sbatch: needs --launcher slurm")
    local = arguments.launcher == "local"
    grid = load_grid(arguments.grid)
    gpus = visible_gpus(grid) if local else ()
    jobs = arguments.jobs or len(gpus) or cores()
    share = max(1, cores() // jobs) if local else None  # of the cores; those of another machine are not known here
    folder = Path(arguments.report or grid.folder)
    if grid.search is not None:
        for option, given in (("--filter", arguments.filter), ("--launcher slurm", not local)):
            if given:
                raise InputError(f"{option}: a search suggests its runs one after the other, here; leave it out")
        trials = stored_trials(grid) if folder == grid.folder else read_trials(folder)
        grid = load_grid(arguments.grid, trials=trials)
    if arguments.jobs is not None and not local:
        raise InputError("--jobs: Slurm runs as many at a time as it has room for; leave it out")
    if arguments.report is not None:
        if not arguments.report and (grid.folder / "runs").is_dir():
            grid = with_threads(grid, arguments.grid, share)
            check_folder(grid)
            write_results(grid)
        return 0 if report(grid, folder, console) else 1
    grid = with_threads(grid, arguments.grid, share)
    check_folder(grid)
    chosen = grid.select(arguments.filter)
    threads = chosen.cells[0].config.threads or share  # of the environment, where runs that Slurm began leave them open
    where = placement(gpus, jobs) if local else "where Slurm puts it"
    print_plan(chosen, jobs if local else None, threads, where, console)
    if grid.search is not None:
        console.print(f"search: {grid.search}. {summary(grid.search, stored_trials(grid))}", markup=False)
    if arguments.dry_run:
        return 0
    store_plan(grid)
    if not local:
        submit_all(chosen, arguments.sbatch, console)
        return 0
    with only_one(grid):
        if grid.search is None:
            outcome = run_local(grid, jobs, threads, console, chosen.cells)
        else:
            grid, outcome = run_search(arguments.grid, threads, jobs, console)
        write_results(grid)
    for run_id, reason in outcome.failed.items():
        console.print(f"failed: {run_id}: {reason}", markup=False)
    n_done = sum(is_done(grid, cell) for cell in grid.cells)
    store_plan(grid)
    sound = report(grid, grid.folder, console) if n_done else True
    if outcome.interrupted:
        console.print(f"stopped with {n_done} of {len(grid.cells)} runs done; the same command goes on", markup=False)
        return 4
    return 1 if outcome.failed or not sound else 0


def with_threads(grid: Grid, path: str, share: int | None) -> Grid:
    """The grid with the threads of each run: the config's own, or those of the runs that are there, or a share. None:
    left open, for what the run finds where it runs."""
    if any(cell.config.threads is not None for cell in grid.cells):
        return grid
    threads = stored_threads(grid, share)
    return load_grid(path, threads, stored_trials(grid) if grid.search is not None else ())


if __name__ == "__main__":
    exit_with(main)
