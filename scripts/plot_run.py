"""Draws a run's curves as one page that needs no network: python -m scripts.plot_run runs/<run_id>."""

from __future__ import annotations

import argparse
from pathlib import Path

from analysis.curves import run_figure
from errors import InputError, exit_with
from training.metrics import read_metrics
from training.receipt import read_receipt


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw the curves of a run into its folder (curves.html).")
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/demo-20260101-120000")
    folder = parser.parse_args().run
    records = read_metrics(folder)
    if not records:
        raise InputError(f"{folder}: no metrics.jsonl with records; expected a run folder under runs/")
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
