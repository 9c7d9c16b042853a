"""Starts the runs of a grid, N at a time, and shows them. Everything that matters is on the disk, so it can be killed.

Ctrl-C (or SIGTERM) asks the runs for a save and waits for them; a second one ends them. The next call goes on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.live import Live
from rich.table import Table

from errors import InputError
from scripts.ablate.gpus import least_used, visible_gpus
from scripts.ablate.grid import Cell, Grid
from scripts.ablate.results import is_done, run_folder, write_results
from training.durable import replace_atomically
from training.ownership import OWNER, describe_owner, live_owner
from training.receipt import read_receipt

ROOT = Path(__file__).parents[2]
LOG = "output.log"
POLL_SECONDS = 0.5


@dataclass
class Active:
    cell: Cell
    process: subprocess.Popen[bytes]
    started: float
    gpu: str | None
    # signals that were passed on
    sent: int = 0


@dataclass
class Outcome:
    """failed: run id -> reason. interrupted: stopped before all was done."""

    done: int
    failed: dict[str, str]
    interrupted: bool


def arm_command(grid: Grid, cell: Cell) -> list[str]:
    settings = grid.evaluate
    command = [sys.executable, "-m", "scripts.ablate.arm", str(run_folder(grid, cell)), f"--answers={settings.answers}"]
    command += [f"--limit={settings.limit}"] if settings.limit is not None else []
    return [*command, f"--curvature-rows={settings.curvature_rows}", f"--checkpoints={grid.checkpoints}"]


def prepare_folder(grid: Grid, cell: Cell) -> Path:
    """The run's folder with its config, unless it is there."""
    folder = run_folder(grid, cell)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        replace_atomically(folder / "config.yaml", cell.config.to_yaml().encode())
    return folder


def environment(grid: Grid, threads: int | None, gpu: str | None = None) -> dict[str, str]:
    """For a run's process. Runs of a grid are one group where wandb is on. gpu: the only one that it sees."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    changed = {"PYTHONPATH": os.pathsep.join(paths), "WANDB_RUN_GROUP": grid.name, "PYTHONUNBUFFERED": "1"}
    changed |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    changed |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
    return {**os.environ, **changed}


def start(grid: Grid, cell: Cell, threads: int | None, gpu: str | None) -> Active:
    folder = prepare_folder(grid, cell)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            arm_command(grid, cell),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C is ours to pass on
            preexec_fn=_die_with_parent,
            env=environment(grid, threads, gpu),
        )
    return Active(cell, process, time.monotonic(), gpu)


def _die_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the runner is killed: the run saves and stops, and the next call goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@contextmanager
def only_one(grid: Grid) -> Iterator[None]:
    """Raises InputError if another process runs this grid."""
    lock = FileLock(grid.folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{grid.folder}: another process is running this grid") from None
    try:
        yield
    finally:
        lock.release()


def run_local(
    grid: Grid, jobs: int, threads: int | None, console: Console, cells: Sequence[Cell] | None = None
) -> Outcome:
    """Runs what is missing of `cells` (default: all). A run that fails is reported and the others go on.

    Where there are GPUs, each run has the least used. Result files are those of the whole grid at every moment.
    """
    cells = grid.cells if cells is None else cells
    waiting = [cell for cell in cells if not is_done(grid, cell)]
    total = len(waiting)
    gpus = visible_gpus(grid)
    told: set[str] = set()
    active: list[Active] = []
    failed: dict[str, str] = {}
    laps: list[float] = []
    with _signals() as asked, _live(console) as live:
        while waiting or active:
            if asked and not active:
                break
            for job in active:
                if asked:
                    _pass_on(job, len(asked))
            while not asked and len(active) < jobs:
                # one that a killed runner left behind may still be saving
                free = next((cell for cell in waiting if live_owner(run_folder(grid, cell)) is None), None)
                if free is None:
                    break
                waiting.remove(free)
                if not is_done(grid, free):
                    mine = gpus if free.config.device != "cpu" else ()
                    active.append(start(grid, free, threads, least_used(mine, (job.gpu for job in active))))
            if waiting and not active and not asked:
                _tell_owned(console, grid, waiting, failed, told)
            time.sleep(POLL_SECONDS)
            for job in [job for job in active if job.process.poll() is not None]:
                active.remove(job)
                if is_done(grid, job.cell):
                    laps.append(time.monotonic() - job.started)
                elif not asked:
                    failed[job.cell.run_id] = failure(grid, job)
                if not live:
                    _tell(
                        console,
                        grid,
                        job,
                        failed,
                        total - len(waiting) - len(active),
                        total,
                        _eta(laps, waiting, active, jobs),
                    )
                write_results(grid)
            if live:
                live.update(_table(grid, active, waiting, failed, laps, jobs, total))
    write_results(grid)
    return Outcome(sum(is_done(grid, cell) for cell in cells), failed, bool(asked))


def _tell_owned(console: Console, grid: Grid, waiting: list[Cell], failed: dict[str, str], told: set[str]) -> None:
    """All that is left is owned by other processes. Those of this machine end, and are waited for; whether one of
    another machine lives cannot be known from here, so its run is taken out of `waiting` as failed."""
    for cell in list(waiting):
        folder = run_folder(grid, cell)
        owner = live_owner(folder)
        if owner is None or cell.run_id in told:
            continue
        told.add(cell.run_id)
        if owner.get("host") == socket.gethostname():
            line = f"{cell.run_id}: waiting for {describe_owner(owner)}, which is running it"
        else:
            waiting.remove(cell)
            failed[cell.run_id] = (
                f"{describe_owner(owner)} owns it; if that machine is gone, remove {folder / OWNER} and give the same "
                f"command again"
            )
            line = f"{cell.run_id}: FAILED, {failed[cell.run_id]}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def failure(grid: Grid, job: Active) -> str:
    """The last line that it wrote."""
    log = run_folder(grid, job.cell) / LOG
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {job.process.returncode}: {lines[-1] if lines else 'wrote nothing'} (log {log})"


def _pass_on(job: Active, times: int) -> None:
    """The first wish is a save and a stop, each run once; the second ends it."""
    if job.sent < min(times, 2):
        job.process.send_signal(signal.SIGTERM if job.sent == 0 else signal.SIGKILL)
        job.sent += 1


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that grows with every SIGINT or SIGTERM."""
    asked: list[int] = []
    previous = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _live(console: Console) -> Any:
    return Live(console=console, refresh_per_second=2, transient=True) if console.is_terminal else nullcontext()


def _eta(laps: list[float], waiting: list[Cell], active: list[Active], jobs: int) -> float | None:
    """Seconds until all is done: what is left at the mean lap, over the jobs side by side."""
    if not laps:
        return None
    mean = sum(laps) / len(laps)
    now = time.monotonic()
    left = sum(max(mean - (now - job.started), 0) for job in active) + mean * len(waiting)
    return left / max(1, min(jobs, len(waiting) + len(active)))


def _tell(
    console: Console, grid: Grid, job: Active, failed: dict[str, str], number: int, total: int, eta: float | None
) -> None:
    run_id = job.cell.run_id
    what = (
        f"FAILED, {failed[run_id]}"
        if run_id in failed
        else read_receipt(run_folder(grid, job.cell)).get("status", "stopped before it began")
    )
    left = f", about {clock(eta)} left" if eta else ""
    line = f"{number}/{total} {run_id}: {what} after {time.monotonic() - job.started:.0f} s{left}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(
    grid: Grid,
    active: list[Active],
    waiting: list[Cell],
    failed: dict[str, str],
    laps: list[float],
    jobs: int,
    total: int,
) -> Table:
    eta = _eta(laps, waiting, active, jobs)
    left = f"about {clock(eta)} left" if eta is not None else "time left not known yet"
    table = Table(title=f"{grid.name}: {len(laps)} of {total} done, {len(waiting)} waiting, {left}")
    for column in ("run", "state", "step", "tokens", "time"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right")
    for job in active:
        receipt = read_receipt(run_folder(grid, job.cell))
        tokens = receipt.get("tokens") or 0
        share = f"{tokens:,} ({tokens / job.cell.config.train.tokens:.0%})"
        state = "evaluating" if receipt.get("status") == "finished" else "running" if receipt else "starting"
        table.add_row(
            job.cell.run_id, state, f"{receipt.get('step', 0):,}", share, clock(time.monotonic() - job.started)
        )
    for run_id, reason in failed.items():
        table.add_row(run_id, f"[red]failed[/]: {reason[:80].replace('[', '(')}", "", "", "")
    return table


def clock(seconds: float | None) -> str:
    return "?" if seconds is None else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
