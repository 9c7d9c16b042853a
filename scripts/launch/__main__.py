"""Starts runs that outlive the terminal, and looks after them: python -m scripts.launch COMMAND.

    start CONFIG [key=value ...] [--nodes N] [--gpus N | --processes N] [--backend local|slurm] [--time LIMIT]
          [--cpus-per-task N] [--sbatch=OPTION]
    list
    status RUN [--json]        logs RUN [-f] [-n LINES]
    stop RUN [--now]           resume RUN [--take-over] [the options of start]
    collect RUN [--json]

Everything it knows lies in runs/RUN as files; nothing of it keeps running.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from errors import InputError, exit_with, nearest, require_number
from scripts.launch import slurm
from scripts.launch.collect import print_collected, verify_run
from scripts.launch.job import LOG, Job, local_processes, start_local, stop_local
from scripts.launch.status import ALIVE, RunStatus, describe, print_list, print_status, state_of
from training.config import RunConfig, load_config
from training.durable import replace_atomically
from training.ownership import OWNER
from training.receipt import read_receipt, run_folder
from training.run import RUNS, new_run_id

STOP_SECONDS = 300


def main() -> int:
    arguments = _parser().parse_intermixed_args() if _starts() else _parser().parse_args()
    return COMMANDS[arguments.command](arguments)


def start(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    if config.resume not in ("auto", "never"):
        raise InputError(f"resume: to continue a run use `python -m scripts.launch resume {config.resume}`")
    config.resume = "auto"
    config.run_id = config.run_id or new_run_id(Path(arguments.config).stem)
    for warning in config.validate():
        print(f"note: {warning}")
    job = Job(arguments.backend)
    _size(job, arguments)
    _check_job(job, config)
    folder = RUNS / config.run_id
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        advice = f"choose another, or `python -m scripts.launch resume {config.run_id}`"
        raise InputError(f"run_id: {folder} exists already; {advice}") from None
    try:
        replace_atomically(folder / "config.yaml", config.to_yaml().encode())
        _begin(folder, job)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # made here, and nothing runs: the id stays free
        raise
    _say_where(folder, job)
    return 0


def resume(arguments: argparse.Namespace) -> int:
    found = _folder(arguments.run)
    folder = RUNS / found.name
    if folder.resolve() != found.resolve():  # a run elsewhere; here may be another one of that name
        raise InputError(f"{arguments.run}: a run is continued from the folder above its {RUNS}/")
    status = describe(folder)
    if arguments.take_over and not local_processes(folder, Job.read(folder)):
        (folder / OWNER).unlink(missing_ok=True)  # the word of a person: that machine is gone
    elif status.is_alive:
        who = status.owner or status.reason
        raise InputError(f"{folder}: is {status.state}" + (f" ({who})" if who else ""))
    if status.state == "finished":
        again = f"python -m scripts.launch start {folder}/config.yaml run_id={folder.name}-more init_from={folder.name}"
        raise InputError(f"{folder}: is finished; to train on from its weights: {again}")
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: no config.yaml, so this is no run that could be continued")
    job = Job.read(folder) or Job("local")
    job.backend = arguments.backend or job.backend
    if job.backend == "local":  # what an earlier start told Slurm is nothing that a person asks for now
        job.nodes, job.sbatch, job.time_limit, job.cpus_per_task = 1, [], None, None
    _size(job, arguments)
    _check_job(job, load_config(folder / "config.yaml"))
    _begin(folder, job)
    _say_where(folder, job)
    return 0


def status(arguments: argparse.Namespace) -> int:
    found = describe(_folder(arguments.run))
    if arguments.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        print_status(found, Console(highlight=False))
    return 0


def list_runs(arguments: argparse.Namespace) -> int:
    folders = sorted(path.parent for path in RUNS.glob("*/config.yaml"))
    found = [describe(folder) for folder in folders]
    if arguments.json:
        print(json.dumps([asdict(one) for one in found], indent=2))
    elif found:
        print_list(found, Console(highlight=False))
    else:
        print(f"no runs under {RUNS}/")
    return 0


def logs(arguments: argparse.Namespace) -> int:
    require_number("--lines", arguments.lines, 0)
    folder = _folder(arguments.run)
    path = folder / LOG
    if not path.is_file():
        raise InputError(f"{path}: no such file; a run that train.py started by hand wrote to its own terminal")
    with path.open(errors="replace") as file:
        lines = file.readlines()
        sys.stdout.write("".join(lines[-arguments.lines :] if arguments.lines else lines))
        sys.stdout.flush()
        while arguments.follow:
            alive = state_of(folder)[0] in ALIVE  # asked before reading: what a dying process wrote is still shown
            while text := file.read():
                sys.stdout.write(text)
                sys.stdout.flush()
            if not alive:
                break
            time.sleep(1.0)
    return 0


def stop(arguments: argparse.Namespace) -> int:
    folder = _folder(arguments.run)
    found, job = describe(folder), Job.read(folder)
    if not found.is_alive:
        print(f"{folder}: is not running ({found.state})")
        return 0
    processes = local_processes(folder, job)
    if processes:
        stop_local(processes, arguments.now)
    elif job is not None and job.slurm_job:
        slurm.stop(job.slurm_job, arguments.now)
    else:
        raise InputError(f"{folder}: {found.owner} is running it; stop it there")
    found = _wait_until_over(folder, job, arguments.wait)
    if found.is_alive:
        print(f"{folder}: still {found.state} after {arguments.wait} s; --now ends it without a save")
        return 1
    print(f"{folder}: {found.state} at step {found.step:,}, last checkpoint {found.last_checkpoint or 'none'}")
    return 0


def collect(arguments: argparse.Namespace) -> int:
    folder = _folder(arguments.run)
    found = describe(folder)
    receipt = read_receipt(folder)
    if not receipt:
        raise InputError(f"{folder}: has no receipt; it is {found.state}: {found.reason or 'nothing ran yet'}")
    checks = verify_run(folder, receipt, found.is_alive)
    wrong = [check for check in checks if check.ok is False]
    if arguments.json:
        print(json.dumps({"receipt": receipt, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        print_collected(receipt, checks, Console(highlight=False))
        if found.is_alive:
            print(f"still {found.state}: this is what there is so far")
        verdict = f"{len(wrong)} of {len(checks)} do not match" if wrong else "everything that was checked matches"
        print(f"{folder}: {verdict}")
    return 1 if wrong else 0


def _begin(folder: Path, job: Job) -> None:
    """Raises InputError or OSError: nothing runs then."""
    if job.backend == "slurm":
        slurm.submit(folder, job)
    else:
        start_local(folder, job)


def _say_where(folder: Path, job: Job) -> None:
    where = f"Slurm job {job.slurm_job}" if job.slurm_job else f"process {job.process['pid']}"
    print(f"{folder.name}  ({where}, log {folder / LOG})")
    print(f"  python -m scripts.launch status {folder.name}")


def _size(job: Job, arguments: argparse.Namespace) -> None:
    """What was asked for; the rest stays as it was. Raises InputError."""
    asked = {name: getattr(arguments, name) for name in ("nodes", "gpus", "processes", "cpus_per_task")}
    asked = {name: number for name, number in asked.items() if number is not None}
    for name, number in asked.items():
        if number < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
    if {"gpus", "processes"} <= asked.keys():
        raise InputError("--gpus, --processes: both say how many processes a node has; give one of them")
    if {"gpus", "processes"} & asked.keys():
        job.gpus = job.processes = 0
    if any(option.startswith("--cpus-per-") for option in arguments.sbatch):
        if arguments.cpus_per_task:
            raise InputError("--cpus-per-task, --sbatch: both say how many CPUs a process has; give one of them")
        job.cpus_per_task = None
    for name, number in asked.items():
        setattr(job, name, number)
    job.sbatch, job.time_limit = arguments.sbatch or job.sbatch, arguments.time or job.time_limit


def _check_job(job: Job, config: RunConfig) -> None:
    if job.backend == "local" and (job.nodes > 1 or job.sbatch or job.time_limit or job.cpus_per_task):
        raise InputError("--nodes, --time, --cpus-per-task, --sbatch: need --backend slurm")
    if job.gpus and config.device == "cpu":
        raise InputError(f"--gpus: device is cpu; --processes {job.gpus} starts as many without a GPU")
    config.require_ranks(job.ranks)
    if job.backend == "local" and config.device != "cpu" and job.per_node > 1:
        seen = torch.cuda.device_count()
        if 0 < seen < job.per_node:
            raise InputError(f"--gpus: {job.per_node} processes need a GPU each, torch sees {seen} here; or device=cpu")
        if job.gpus and seen == 0:
            print(f"note: torch sees no GPU here: {job.gpus} processes on the CPU")
    slurm.check_options([*job.sbatch, *([f"--time={job.time_limit}"] if job.time_limit else [])])


def _folder(name: str) -> Path:
    """A run id, or the path of a run folder. Raises InputError naming the nearest."""
    folder = run_folder(name, RUNS)
    if not folder.is_dir() or folder.resolve() == RUNS.resolve():
        known = [path.parent.name for path in RUNS.glob("*/config.yaml")]
        raise InputError(f"{name}: no such run under {RUNS}/{nearest(name, known)}")
    return folder


def _wait_until_over(folder: Path, job: Job | None, seconds: float) -> RunStatus:
    end = time.monotonic() + seconds
    while (state := state_of(folder)[0]) in ALIVE and time.monotonic() < end:
        if state == "queued" and job is not None and job.slurm_job:
            slurm.stop(job.slurm_job, now=False)  # its time limit came first, and it has queued itself again
        time.sleep(0.2)
    return describe(folder)


COMMANDS = {one.__name__: one for one in (start, resume, status, logs, stop, collect)} | {"list": list_runs}


def _starts() -> bool:
    return "start" in sys.argv[1:2]


def _parser() -> argparse.ArgumentParser:
    if _starts():  # overrides and options may be mixed here, which argparse cannot do below sub-commands
        parser = argparse.ArgumentParser(prog="python -m scripts.launch", description="Start a run that outlives you.")
        parser.add_argument("command", choices=["start"], help=argparse.SUPPRESS)
        parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
        parser.add_argument("overrides", nargs="*", help="dotted overrides, e.g. stp.weight=0.05 run_id=first")
        parser.add_argument("--backend", choices=["local", "slurm"], default="local")
        _add_size(parser)
        return parser
    parser = argparse.ArgumentParser(
        prog="python -m scripts.launch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("start", help="start CONFIG [key=value ...]")
    for name in ("status", "logs", "stop", "resume", "collect", "list"):
        command = commands.add_parser(name)
        if name != "list":
            command.add_argument("run", help="a run id, or a folder")
        if name in ("status", "list", "collect"):
            command.add_argument("--json", action="store_true")
        if name == "logs":
            command.add_argument("-f", "--follow", action="store_true", help="until the run ends")
            command.add_argument("-n", "--lines", type=int, default=0, help="only the last ones (default: all)")
        if name == "stop":
            command.add_argument("--now", action="store_true", help="do not wait for a save: kill")
            command.add_argument("--wait", type=float, default=STOP_SECONDS, help="seconds to wait for the end")
        if name == "resume":
            command.add_argument("--backend", choices=["local", "slurm"])
            _add_size(command)
            command.add_argument("--take-over", action="store_true", help="the machine that ran it is gone")
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, help="machines (default: 1; more need Slurm)")
    parser.add_argument("--gpus", type=int, help="per node, one process each (default: one process)")
    parser.add_argument("--processes", type=int, help="per node, without asking for a GPU: on the CPU, over gloo")
    parser.add_argument("--time", help="Slurm: the limit of one job, e.g. 24:00:00; it requeues itself")
    parser.add_argument("--cpus-per-task", type=int, help="Slurm: of each process (default: 4 with a GPU, else 1)")
    parser.add_argument("--sbatch", action="append", default=[], help="Slurm: e.g. --sbatch=--partition=gpu")


if __name__ == "__main__":
    exit_with(main)
