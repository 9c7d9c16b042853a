"""python -m scripts.bench [--only GROUP ...] [--json | --markdown]

Each group runs in a process of its own, in the environment of its one peer (made on first use, see scripts/peers.py),
with nothing else running. Every comparison is interleaved inside that process. Exit code 0 even where a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.workers import cores
from errors import exit_with, require_choice
from scripts.peers import interpreter

ROOT = Path(__file__).resolve().parents[2]
# group -> the environment that it runs in; None: this project's own
GROUPS: dict[str, str | None] = {
    "mamba": "hf",
    "mamba_minimal": "kernels",
    "experts": "hf",
    "recurrent": None,
    "attention": None,
    "head": None,
    "stp": None,
    "step": "hf",
    "growth": None,
    "startup": None,
}


def run_group(name: str) -> None:
    """Inside the group's own process: all cores for torch and for Numba, rows as JSON lines on stdout."""
    from training.machine import configure_threads

    configure_threads(cores())
    importlib.import_module(f"scripts.bench.{name}").main()


def rows_of(name: str) -> Iterator[dict[str, Any]]:
    environment = GROUPS[name]
    python = sys.executable if environment is None else str(interpreter(environment))
    command = [python, "-W", "ignore", "-m", "scripts.bench", "--group", name]
    env = {**os.environ, "OMP_NUM_THREADS": str(cores()), "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the benchmark '{name}' ended with exit code {process.returncode}")


def cells(row: dict[str, Any]) -> list[str]:
    """name, peer, ratio, bar, goal, verdict."""
    sign = "<= " if row["lower_is_better"] else ""
    unit = "" if row["lower_is_better"] or "share of" in row["name"] else "x"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{sign}{value:.3g}{unit}"

    verdict = "-"
    if row["bar"] is not None:
        verdict = "missed" if not row["ok"] else "goal" if row["reaches_goal"] else "bar"
    return [
        row["name"],
        row["peer"],
        f"{row['ratio']:.3g}{unit}",
        number(row["bar"]),
        number(row["goal"]),
        verdict,
        ", ".join(f"{key} {value:g}" for key, value in row["figures"].items()),
    ]


HEADER = ("work, forward + backward", "peer", "ratio", "bar", "goal", "reached", "medians")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description="Speed against named peers.")
    parser.add_argument("--only", nargs="*", default=list(GROUPS), help=f"of: {', '.join(GROUPS)}")
    parser.add_argument("--json", action="store_true", help="print only a JSON list of rows")
    parser.add_argument("--markdown", action="store_true", help="print the table as markdown")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.group:
        run_group(arguments.group)
        return 0
    for name in arguments.only:
        require_choice("--only", name, list(GROUPS))

    console = Console(stderr=True)
    started, rows = time.monotonic(), []
    for name in arguments.only:
        console.print(f"{time.monotonic() - started:5.0f} s  {name} ...")
        for row in rows_of(name):
            rows.append(row)
            console.print(f"         {'  '.join(cells(row)[:6])}", highlight=False)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif arguments.markdown:
        print("| " + " | ".join(HEADER) + " |\n" + "| --- " * len(HEADER) + "|")
        for row in rows:
            print("| " + " | ".join(cells(row)) + " |")
    else:
        table = Table(*HEADER)
        for row in rows:
            table.add_row(*cells(row))
        Console(width=max(Console().width, 180)).print(table)
    missed = [row["name"] for row in rows if not row["ok"]]
    console.print(f"{len(rows)} rows in {time.monotonic() - started:.0f} s; bars missed: {', '.join(missed) or 'none'}")
    return 0


if __name__ == "__main__":
    exit_with(main)
