"""One Slurm job per run of a grid. Calling the same command again submits what is neither done nor in the queue."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from scripts.ablate.grid import Cell, Grid
from scripts.ablate.results import is_done
from scripts.ablate.runner import ROOT, arm_command, prepare_folder
from scripts.launch import slurm
from scripts.launch.job import Job


def submit_all(grid: Grid, sbatch: list[str], console: Console) -> None:
    """Raises InputError with sbatch's own words if a job is refused."""
    slurm.check_options(sbatch)
    submitted = 0
    for cell in grid.cells:
        if is_done(grid, cell) or is_queued(grid, cell):
            continue
        job = submit(grid, cell, sbatch)
        console.print(f"{cell.run_id}: Slurm job {job.slurm_job}", markup=False)
        submitted += 1
    console.print(f"{submitted} submitted; the same command with --report compares what is done", markup=False)


def is_queued(grid: Grid, cell: Cell) -> bool:
    job = Job.read(prepare_folder(grid, cell))
    return job is not None and job.slurm_job is not None and slurm.state(job.slurm_job) is not None


def submit(grid: Grid, cell: Cell, sbatch: list[str]) -> Job:
    """A run has the CPUs that a person asks for, else those of its `threads`, else those that `launch` gives one."""
    folder = prepare_folder(grid, cell)
    threads = cell.config.threads
    if threads is None and any(option.startswith(("--gpus", "--gres=gpu")) for option in sbatch):
        threads = slurm.GPU_CPUS
    own = any(option.startswith("--cpus-per-") for option in sbatch)
    command = ["env", f"PYTHONPATH={ROOT}", f"WANDB_RUN_GROUP={grid.name}", *arm_command(grid, cell)]
    job = Job("slurm", sbatch=sbatch, cpus_per_task=None if own else threads, command=command, cwd=str(Path.cwd()))
    script = folder / "job.sh"
    script.write_text(slurm.render(folder, job))
    answer = slurm.slurm_command("sbatch", "--parsable", str(script))
    job.slurm_job = answer.strip().split(";")[0]
    job.write(folder)
    return job
