"""Run folders of a grid -> results.csv, curves.csv and costs.csv: whole at every moment, in the order of the plan.

results.csv holds what a rerun must repeat exactly; wall time, which it cannot, is in costs.csv.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from errors import InputError, require
from scripts.ablate.arm import evaluated_with, read_evaluation
from scripts.ablate.grid import Cell, Grid
from scripts.ablate.space import ANSWERS, RECEIPT_METRICS
from training.checkpoint import Checkpointer
from training.config import differing_keys, load_config
from training.durable import replace_atomically
from training.metrics import read_metrics
from training.receipt import read_receipt

CURVES = ("loss/lm", "val_loss", "val_bits_per_byte", "stp/raw", "stp/weight")
# What has a column of these files without being an axis.
COLUMNS = {
    *("run_id", "arm", "seed", "config_sha256", "manifest_sha256", "git", "step", "tokens", "weights_sha256"),
    *(*RECEIPT_METRICS, *CURVES, *ANSWERS, "answers_split", "answers_n", "answers_limit"),
    *("seconds", "tokens_per_second", "training_flops_per_token", "starts"),
}
Row = dict[str, Any]


def run_folder(grid: Grid, cell: Cell) -> Path:
    return grid.folder / "runs" / cell.run_id


def is_done(grid: Grid, cell: Cell) -> bool:
    folder = run_folder(grid, cell)
    return read_receipt(folder).get("status") == "finished" and read_evaluation(folder, grid.evaluate) is not None


def check_folder(grid: Grid) -> None:
    """Raises InputError if the folder holds runs that are not this grid's, are of other settings, or would have to be
    evaluated anew and have no checkpoint left."""
    expected = {cell.run_id: cell for cell in grid.cells}
    for path in sorted((grid.folder / "runs").glob("*/config.yaml")):
        run_id = path.parent.name
        if run_id not in expected:
            raise InputError(
                f"{grid.folder}: holds the results of another grid (run {run_id}); move it away or rename the grid"
            )
        differing = differing_keys(load_config(path), expected[run_id].config)
        if differing:
            raise InputError(
                f"{path.parent}: is a run of another config ({', '.join(differing[:3])}), so {grid.folder} holds the "
                f"results of another grid; move it away or rename the grid"
            )
        _check_evaluation(grid, expected[run_id])


def _check_evaluation(grid: Grid, cell: Cell) -> None:
    folder = run_folder(grid, cell)
    finished = read_receipt(folder).get("status") == "finished"
    if not finished or is_done(grid, cell) or Checkpointer(folder / "checkpoints").paths():
        return
    stored = evaluated_with(folder)
    if not stored:
        raise InputError(
            f"{folder}: is finished, but has neither an evaluation nor a checkpoint; remove it to run it again"
        )
    wanted = dataclasses.asdict(grid.evaluate)
    changed = ", ".join(
        f"{key} {stored.get(key)}, not {value}" for key, value in wanted.items() if stored.get(key) != value
    )
    raise InputError(
        f"{grid.path}: evaluate: {folder} was evaluated with {changed}, and its checkpoints are gone; put it back, or "
        f"move {grid.folder} away or rename the grid"
    )


def stored_threads(grid: Grid, share: int | None) -> int | None:
    """What the runs that are there were started with, None where Slurm began them: later ones keep it, as sums may
    depend on it. share: where there is none yet."""
    found = {load_config(path).threads for path in (grid.folder / "runs").glob("*/config.yaml")}
    require(
        len(found) < 2, f"{grid.folder}", f"holds runs with different numbers of threads: {sorted(map(str, found))}"
    )
    return found.pop() if found else share


def axis_columns(grid: Grid) -> dict[str, str]:
    """Axis -> its column: its short name, or the config's key where that is the name of something else (train.tokens:
    runs end at the step that reaches the budget, so what they read is another number)."""
    return {name: key if name in COLUMNS else name for name, key in grid.axes.items()}


def _names(grid: Grid, cell: Cell) -> Row:
    columns = axis_columns(grid)
    point = {columns[name]: value for name, value in cell.point.items()}
    return {"run_id": cell.run_id, "arm": cell.arm, **point, "seed": cell.seed}


def result_rows(grid: Grid) -> list[Row]:
    """One row per run that is done."""
    rows = []
    for cell in grid.cells:
        if not is_done(grid, cell):
            continue
        folder = run_folder(grid, cell)
        receipt, evaluation = read_receipt(folder), read_evaluation(folder, grid.evaluate) or {}
        metrics = receipt.get("metrics", {})
        rows.append(
            {
                **_names(grid, cell),
                "config_sha256": cell.sha256[:16],
                "manifest_sha256": _short(receipt.get("data", {}).get("manifest_sha256")),
                "git": _code(receipt),
                "step": receipt.get("step"),
                "tokens": receipt.get("tokens"),
                **{name: metrics.get(name) for name in RECEIPT_METRICS},
                **{name: value for name, value in evaluation.items() if name != "weights_sha256"},
                "weights_sha256": _short(evaluation.get("weights_sha256")),
            }
        )
    return rows


def cost_rows(grid: Grid) -> list[Row]:
    rows = []
    for cell in grid.cells:
        receipt = read_receipt(run_folder(grid, cell))
        if receipt.get("status") == "finished":
            seconds = _seconds(receipt)
            speed = receipt.get("metrics", {}).get("tokens_per_second")
            flops = (receipt.get("model") or {}).get("training_flops_per_token")
            rows.append(
                {
                    **_names(grid, cell),
                    "seconds": seconds,
                    "tokens_per_second": speed,
                    "training_flops_per_token": flops,
                    "starts": len(receipt.get("starts", [])),
                }
            )
    return rows


def curve_rows(grid: Grid) -> list[Row]:
    """Long form: one line per run and point of its course."""
    rows = []
    for cell in grid.cells:
        if is_done(grid, cell):
            for record in read_metrics(run_folder(grid, cell)):
                values = {name: record.get(name) for name in CURVES}
                if any(value is not None for value in values.values()):
                    rows.append({**_names(grid, cell), "tokens": record.get("tokens"), **values})
    return rows


def write_results(grid: Grid) -> None:
    """Raises OSError."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("results", result_rows(grid)), ("costs", cost_rows(grid)), ("curves", curve_rows(grid))):
        replace_atomically(grid.folder / f"{name}.csv", to_csv(rows).encode())


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns or ["run_id"], lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: _cell_text(value) for name, value in row.items()} for row in rows])
    return text.getvalue()


def _cell_text(value: Any) -> Any:
    return repr(value) if isinstance(value, float) else value


def differences(grid: Grid) -> list[Row]:
    """One row per arm: the settings in which arms differ (axes and seeds left out), as merged."""
    flat = {}
    for cell in reversed(grid.cells):
        merged = OmegaConf.create(dataclasses.asdict(cell.config))
        flat[cell.arm] = dict(_flatten(OmegaConf.to_container(merged)))
    varied = {*grid.axes.values(), "seed", "run_id"}
    keys = [
        key
        for key in next(iter(flat.values()))
        if key not in varied and len({str(f.get(key)) for f in flat.values()}) > 1
    ]
    return [{"arm": arm, **{key: flat[arm].get(key) for key in keys}} for arm in grid.arms if arm in flat]


def _flatten(tree: Any, prefix: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(digest: Any) -> str | None:
    return str(digest)[:16] if digest else None


def _code(receipt: dict[str, Any]) -> str | None:
    """The commits that a run was trained with, one after the other; +dirty and a hash where files had been changed."""
    states = []
    for start in receipt.get("starts") or []:
        git = start.get("git") or {}
        changed = git.get("dirty_sha256")
        if git.get("commit"):
            states.append(f"{git['commit'][:12]}{f'+dirty.{changed[:8]}' if changed else ''}")
    return " then ".join(dict.fromkeys(states)) or None


def _seconds(receipt: dict[str, Any]) -> float | None:
    """From the last start to the end."""
    try:
        start = datetime.fromisoformat(receipt["starts"][-1]["time"])
        return (datetime.fromisoformat(receipt["ended"]) - start).total_seconds()
    except (KeyError, IndexError, TypeError, ValueError):
        return None
