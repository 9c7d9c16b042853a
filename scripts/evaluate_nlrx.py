"""Scores a run's answers on NL-RX or chat rows: `python -m scripts.evaluate_nlrx RUN [--split test] [--limit N]`.

Prints the figures and a few wrong answers, and writes answers-SPLIT.json (every answer) into the run's folder.
"""

from __future__ import annotations

import argparse
import json

from data.prepare import prepare
from data.prepared import SPLITS
from data.progress import show_progress
from errors import InputError, exit_with, nearest, require_number
from model.hybrid import HybridLM
from scripts.trained_data import require_same_data
from training.answers import answer_accuracy
from training.config import load_config
from training.durable import write_durably
from training.hardware import Machine
from training.receipt import run_folder
from training.run import RUNS, find_checkpoint
from training.weights import load_weights


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate_nlrx", description=__doc__.split("\n")[0])
    parser.add_argument("run", help="a run folder, e.g. runs/nlrx, or its id")
    parser.add_argument("--split", default="test", choices=SPLITS)
    parser.add_argument("--limit", type=int, help="score only so many prompts, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=128, help="prompts that are answered side by side")
    parser.add_argument("--show", type=int, default=5, help="how many wrong answers to print")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, nothing else")
    arguments = parser.parse_args()
    for name in ("limit", "batch_size"):
        if (value := getattr(arguments, name)) is not None:
            require_number(f"--{name.replace('_', '-')}", value, 1)

    folder = run_folder(arguments.run, RUNS)
    if not (folder / "config.yaml").is_file():
        known = [path.parent.name for path in RUNS.glob("*/config.yaml")]
        raise InputError(f"{arguments.run}: no run (no config.yaml){nearest(arguments.run, known)}")
    config = load_config(folder / "config.yaml")
    config.validate()
    checkpoint = find_checkpoint(str(folder))
    machine = Machine.resolve(config)
    with show_progress() as progress:
        data = prepare(config.data, progress=progress)
    require_same_data(data, folder, checkpoint)
    model = HybridLM(config.model, data.vocab_size)
    load_weights(checkpoint, model)
    model.to(machine.device).eval()

    report = answer_accuracy(
        model,
        data,
        arguments.split,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        autocast=machine.autocast,
    )
    rows = report.pop("rows")
    report |= {"run": folder.name, "checkpoint": checkpoint.name, "data_manifest_sha256": data.manifest_sha256}
    path = folder / f"answers-{arguments.split}.json"
    write_durably(path, (json.dumps({**report, "rows": rows}, indent=1) + "\n").encode())
    if arguments.json:
        print(json.dumps(report))
        return 0
    n = report["n"]
    print(f"{folder} at {checkpoint.name}: {n:,} {arguments.split} prompts, greedy answers")
    for name, meaning in (
        ("exact", "the same string"),
        ("dfa", "the same lines"),
        ("dfa_letter", "the same lines, \\b read as the letter b, as dk.brics.automaton does"),
    ):
        print(f"  {name:10} {report[name]:7.2%}  {meaning}")
    print(f"  no regex: {report['invalid']}; without an end: {report['unfinished']}; given up: {report['limit']}")
    print(f"  {report['seconds']:.1f} s, {report['tokens_per_second']:,.0f} tokens/s")
    for row in [row for row in rows if row["dfa"] != "equal"][: arguments.show]:
        print(f"  {row['prompt'].strip()}\n    expected {row['expected']}\n    answered {row['answer']}")
    print(f"every answer: {path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
