"""Slurm: the batch script of a run, its submission, its state.

The training processes get SIGUSR1 before the time limit, save within a step and close the receipt as `preempted`; the
script then puts the job back into the queue, and the next start continues from that very step. `srun` starts one task
per process directly and torchrun's variables are made from srun's: a torchrun in between would be killed by SIGUSR1, or
would give the ranks 30 seconds for a save and hide their exit codes.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from errors import InputError
from scripts.launch.job import LOG, Job, train_command

# Seconds before the limit at which Slurm warns: must cover one step and one save. Slurm may warn a minute earlier.
WARNING_SECONDS = 180
# CPUs of a rank with a GPU: its own thread, the loader's, the checkpoint's, the collectives'. Nodes with GPUs have as
# many for each; a rank without one takes the one that any node has.
GPU_CPUS = 4
LIVING = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING")


class NotInstalledError(InputError):
    """Slurm's commands are not on this machine: nothing can be asked here, and no job of it runs here."""


def render(folder: Path, job: Job) -> str:
    """The batch script, complete: it can be read, changed and submitted by hand."""
    options = [
        f"--job-name={folder.name}",
        f"--output={folder.resolve() / LOG}",
        "--open-mode=append",
        "--requeue",
        f"--signal=USR1@{WARNING_SECONDS}",
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={job.per_node}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
        *([f"--time={job.time_limit}"] if job.time_limit else []),
        *job.sbatch,
        *_cpus(job),
    ]
    command = shlex.join(job.command)
    distributed = ""
    if job.ranks > 1:
        # the variables of torchrun, from those of srun
        distributed = (
            'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"\n'
            'export MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"\n'
            f"export WORLD_SIZE={job.ranks} LOCAL_WORLD_SIZE={job.per_node}\n"
        )
        ranks = 'RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" exec "$@"'
        command = f"bash -c {shlex.quote(ranks)} rank {command}"
    receipt = shlex.quote(str(folder.resolve() / "receipt.json"))
    lines = [f"#SBATCH {option}" for option in options]
    return (
        "#!/bin/bash\n"
        + "\n".join(lines)
        + f"""

cd {shlex.quote(job.cwd)}
export PYTHONUNBUFFERED=1
# srun inherits this name alone (Slurm 22.05 and later): without it each task has one CPU, whatever the job has
if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-${{SLURM_CPUS_PER_TASK:-${{SLURM_CPUS_PER_GPU:-1}}}}}}"
{distributed}now="$(date '+%Y-%m-%d %H:%M:%S')"
echo "--- $now job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restarts: ${{SLURM_RESTART_COUNT:-0}}"
srun --kill-on-bad-exit=1 {command}
code=$?
# A clean stop (4; 0 with several ranks) and preempted: the checkpoint is on the disk, the same job continues it. All
# else is an end.
if {{ [ "$code" -eq 4 ] || [ "$code" -eq 0 ]; }} && grep -q '"status": "preempted"' {receipt}; then
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60
fi
exit "$code"
"""
    )


def _cpus(job: Job) -> list[str]:
    """The option that asks for CPUs, none beside a person's own. Last of all, as Slurm obeys the last of several."""
    if job.cpus_per_task is None and any(option.startswith("--cpus-per-") for option in job.sbatch):
        return []
    return [f"--cpus-per-task={job.cpus_per_task or (GPU_CPUS if job.gpus else 1)}"]


def submit(folder: Path, job: Job) -> None:
    """Writes job.sh and submits it. Raises InputError with sbatch's own words if it is refused, OSError;
    nothing is queued then."""
    job.cwd = str(Path.cwd())
    job.command = train_command(folder.resolve())
    script = folder / "job.sh"
    script.write_text(render(folder, job))
    answer = slurm_command("sbatch", "--parsable", str(script))
    job.slurm_job = answer.strip().split(";")[0]
    job.process = {}
    try:
        job.write(folder)
    except BaseException:
        stop(job.slurm_job, now=True)  # what nobody could find again is not left in the queue
        raise


def state(job_id: str) -> str | None:
    """Slurm's word for a job that it still has (PENDING, RUNNING, ...), or None: it has ended, or there never was one.

    Raises NotInstalledError, and InputError with Slurm's words where it does not answer: that is no end of a job.
    """
    try:
        word = slurm_command("squeue", "--noheader", f"--jobs={job_id}", "--format=%T").strip()
    except InputError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return word if word in LIVING else None


def has_node(host: str) -> bool:
    """Whether a machine is one of the Slurm that answers here, and not of another cluster with the same files.

    Raises like `state`.
    """
    try:
        slurm_command("scontrol", "show", "node", host.split(".")[0])
    except InputError as error:
        if "not found" in str(error):
            return False
        raise
    return True


def stop(job_id: str, now: bool) -> None:
    """Asks the tasks of a running job for a clean save; takes a waiting one out of the queue."""
    if now or state(job_id) == "PENDING":
        slurm_command("scancel", job_id)
    else:
        slurm_command("scancel", "--signal=TERM", job_id)


def check_options(options: list[str]) -> None:
    """Raises InputError for an option that could not stand on an #SBATCH line."""
    for option in options:
        if not re.fullmatch(r"--[a-z][a-z-]*(=[^\s\x00-\x1f]+)?", option):
            raise InputError(f"--sbatch: expected one option of sbatch, e.g. --sbatch=--partition=gpu, got {option!r}")


def slurm_command(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise NotInstalledError(
            f"{command[0]}: not installed here; use --backend local, or start from a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{command[0]}: no answer from Slurm within 60 s") from None
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"{command[0]}: {words[0]}")
    return done.stdout
