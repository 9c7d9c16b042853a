"""Cuts every named wiring fault into the real code and shows what notices it.

python -m tests.mutants [--only NAME ...] [--markdown] [--list]
Exits 0 if every mutant is silent (its LM loss falls as if nothing were wrong), each is killed by the check that it
names, and the unpatched code passes all of the same; else 1.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from errors import InputError, exit_with, nearest
from tests.mutants.mutant import Mutant
from tests.mutants.registry import MUTANTS, controls
from tests.mutants.trial import Trial, try_mutant
from training.machine import configure_threads


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these mutants alone")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--list", action="store_true", help="print names and faults; run nothing")
    arguments = parser.parse_args()
    chosen = pick(arguments.only)
    if arguments.list:
        for mutant in chosen:
            print(f"{mutant.name}: {mutant.fault} [{mutant.check}]")
        return 0
    return run(chosen, markdown=arguments.markdown, all_controls=not arguments.only)


def pick(names: list[str]) -> list[Mutant]:
    """Raises InputError for a name that does not exist."""
    by_name = {mutant.name: mutant for mutant in MUTANTS}
    for name in names:
        if name not in by_name:
            raise InputError(f"--only: no mutant is called {name!r}{nearest(name, by_name)}")
    return [by_name[name] for name in names] if names else list(MUTANTS)


def run(chosen: list[Mutant], *, markdown: bool, all_controls: bool) -> int:
    configure_threads(1)
    rows: list[tuple[str, str, str, str, str]] = []
    killed = survived = 0
    problems: list[str] = []
    progress_console = Console(stderr=True)
    with Trial() as trial, Progress(console=progress_console, transient=True) as progress:
        runs, tests = controls()
        if not all_controls:
            runs, tests = [m.overrides for m in chosen[:1]], []
        task = progress.add_task("", total=len(runs) + len(tests) + len(chosen))

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what[:40])

        for overrides in runs:
            step(f"control {' '.join(overrides)}")
            started = time.perf_counter()
            silence, verdict = trial.silence((), overrides), trial.guarded((), overrides)
            if not silence.ok or verdict.killed_by or verdict.error:
                problems.append(f"control {overrides}: {silence}; {verdict}")
            label = f"control ({overrides[0]})" if overrides else "control"
            passed = "passes everything" if not (verdict.killed_by or verdict.error) else f"FAILS: {verdict}"
            rows.append((label, "unpatched", str(silence), passed, f"{time.perf_counter() - started:.1f}"))
        for test in tests:
            step(f"control {test}")
            verdict = trial.suite(test)
            if verdict.killed_by or verdict.error:
                problems.append(f"control {test}: {verdict}")
        for mutant in chosen:
            step(mutant.name)
            started = time.perf_counter()
            silence, verdict = try_mutant(trial, mutant)
            dead = bool(verdict.killed_by) and verdict.error is None
            killed, survived = killed + dead, survived + (not dead)
            if not silence.ok:
                problems.append(f"{mutant.name}: not silent ({silence})")
            if not dead:
                problems.append(f"{mutant.name}: survived ({verdict.error or 'nothing noticed'})")
            by = ", ".join(verdict.killed_by) if dead else f"SURVIVED: {verdict.error or 'nothing noticed'}"
            rows.append((mutant.name, mutant.fault, str(silence), by, f"{time.perf_counter() - started:.1f}"))
    show(rows, markdown)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(f"mutants: {killed} killed, {survived} survived", flush=True)
    return 1 if problems else 0


def show(rows: list[tuple[str, str, str, str, str]], markdown: bool) -> None:
    head = ("mutant", "fault", "LM loss in 5 steps without guards", "killed by", "s")
    if markdown:
        print("| " + " | ".join(head[:4]) + " |\n|" + " --- |" * 4)
        for row in rows:
            print("| " + " | ".join(cell.replace("|", "\\|") for cell in row[:4]) + " |")
        return
    table = Table(title="wiring faults in the real code")
    for name in head:
        table.add_column(name, justify="right" if name == "s" else "left")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 180).print(table)


if __name__ == "__main__":
    exit_with(main)
