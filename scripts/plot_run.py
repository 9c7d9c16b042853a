"""Draws a run's curves as one page that needs no network: python -m scripts.plot_run RUN."""

from __future__ import annotations

import argparse

from analysis.curves import run_figure
from errors import InputError, exit_with, nearest
from training.metrics import read_metrics
from training.receipt import read_receipt, run_folder
from training.run import RUNS


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the curves of a run into its folder (curves.html).")
    parser.add_argument("run", help="a run id, or a run folder")
    name = parser.parse_args().run
    folder = run_folder(name, RUNS)
    if not folder.is_dir():
        known = [path.parent.name for path in RUNS.glob("*/receipt.json")]
        raise InputError(f"{name}: no such run under {RUNS}/{nearest(name, known)}")
    records = read_metrics(folder)
    if not records:
        raise InputError(f"{folder}: no metrics.jsonl with records; expected a run that has logged a step")
    receipt = read_receipt(folder)
    letters = receipt.get("model", {}).get("letters", "")
    page = folder / "curves.html"
    run_figure(records, f"{letters}: {folder.name}").write_html(
        page, include_plotlyjs=True, config={"displayModeBar": False}
    )
    print(page)
    return 0


if __name__ == "__main__":
    exit_with(main)
