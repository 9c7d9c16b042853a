"""python -m scripts.inspect_curvature RUN_OR_CHECKPOINT [--data ...] [--compare OTHER ...]
python -m scripts.inspect_curvature --hf FOLDER [--data FILES ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from analysis.inspection import Inspection
from analysis.measure import MeasureSettings
from analysis.report.page import write_page
from analysis.tables import as_json, write_csv, write_parquet
from data.workers import cores
from errors import InputError, exit_with, require_number
from scripts.inspect_curvature.job import Job, check_comparable, run
from scripts.inspect_curvature.native import before_training, load_subject, open_run, untrained_twin
from scripts.inspect_curvature.pieces import MIN_TOKENS, choose_data
from scripts.inspect_curvature.terminal import print_tables, show_stages
from training.durable import replace_atomically
from training.machine import configure_threads, resolve_device, tune_malloc
from training.metrics import read_metrics


def main() -> int:
    arguments = _parse()
    started = time.monotonic()
    configure_threads(arguments.threads or max(1, cores() // 2))
    device = resolve_device(arguments.device)
    job, folder = _hf_job(arguments, device) if arguments.hf else _run_job(arguments, device)
    with show_stages() as stage:
        inspection = run(job, stage)
    print_tables(inspection, Console())
    for path in write(inspection, folder):
        print(path)
    print(
        f"done in {time.monotonic() - started:.0f} s; open {folder / 'report.html'} in a browser (it needs no network)"
    )
    return 0


def write(inspection: Inspection, folder: Path) -> list[Path]:
    """curvature.json, curvature.csv, curvature.parquet and report.html. Raises InputError if the folder refuses."""
    paths = [folder / name for name in ("curvature.json", "curvature.csv", "curvature.parquet", "report.html")]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_atomically(paths[0], (json.dumps(as_json(inspection), allow_nan=False) + "\n").encode())
        write_csv(paths[1], inspection)
        write_parquet(paths[2], inspection)
        write_page(paths[3], inspection)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be written: {error.strerror or error}") from None
    return paths


def _run_job(arguments: argparse.Namespace, device: torch.device) -> tuple[Job, Path]:
    source = open_run(arguments.run)
    pieces = choose_data(
        arguments.data,
        source.trained_on,
        source.prepared,
        source.tokenizer_sha256,
        arguments.tokens,
        arguments.documents,
    )
    subject = load_subject(source, pieces.vocab_size, device)
    others = [open_run(name) for name in arguments.compare]
    for other in others:
        check_comparable(subject, other.folder.name, pieces.vocab_size, other.tokenizer_sha256)
    checkpoints = [] if source.named_checkpoint else source.other_checkpoints()
    job = Job(
        subject=subject,
        twin=partial(untrained_twin, source, pieces.vocab_size, device),
        start=partial(before_training, source, pieces.vocab_size, device),
        pieces=pieces,
        settings=MeasureSettings(arguments.seed, subject.window, trained_length=subject.trained_length),
        skip_first=arguments.skip_first,
        checkpoints=tuple(partial(load_subject, source, pieces.vocab_size, device, path) for path in checkpoints),
        comparisons=tuple(partial(load_subject, other, pieces.vocab_size, device) for other in others),
        records=tuple(read_metrics(source.folder)),
        command=_command(),
    )
    default = source.folder / f"curvature-{source.checkpoint.name}" if source.named_checkpoint else source.folder
    return job, arguments.out or default


def _hf_job(arguments: argparse.Namespace, device: torch.device) -> tuple[Job, Path]:
    from scripts.inspect_curvature.hf import hf_job

    job = hf_job(arguments, device, _command())
    return job, arguments.out or Path("runs") / f"curvature-{Path(arguments.hf).resolve().name}"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_curvature",
        description="Measure how hidden-state trajectories bend, per boundary and block family; write a report.",
    )
    parser.add_argument("run", nargs="?", help="a run id, a run folder or a checkpoint folder")
    parser.add_argument("--hf", metavar="FOLDER", help="instead: a local folder of a Hugging Face causal LM")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="validation (default), train, a prepared folder of the same tokenizer, or text files, folders, globs",
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="other runs of the same tokenizer")
    parser.add_argument("--documents", type=int, default=256, help="pieces of documents to measure (default 256)")
    parser.add_argument("--tokens", type=int, default=512, help="longest piece, in tokens (default 512)")
    parser.add_argument(
        "--skip-first", type=int, default=1, help="first tokens of each piece that are left out (default 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of triples, spans, shuffles and resampling")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, help="of the model and of the metrics, which run side by side")
    parser.add_argument("--out", type=Path, help="folder for the files (default: the run folder)")
    arguments = parser.parse_args()
    if (arguments.run is None) == (arguments.hf is None):
        raise InputError("expected a run, or --hf FOLDER (one of the two)")
    require_number("--documents", arguments.documents, 1)
    require_number("--skip-first", arguments.skip_first, 0)
    require_number("--tokens", arguments.tokens, MIN_TOKENS + arguments.skip_first)
    require_number("--seed", arguments.seed, 0, 2**31)
    return arguments


def _command() -> str:
    return shlex.join(["python", "-m", "scripts.inspect_curvature", *sys.argv[1:]])


if __name__ == "__main__":
    with contextlib.suppress(InputError):  # no glibc: slower, and nothing else
        tune_malloc("tuned")  # many short-lived tensors of a few megabytes: their pages are kept
    exit_with(main)
