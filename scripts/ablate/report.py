"""CSV files of a grid -> statistics, tables and the page. Needs no run folders: committed results serve as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from analysis.ablation import BROKEN, Comparison, Outcomes, compare, read_rows
from analysis.ablation_page import page
from analysis.ablation_svg import paired_svg
from analysis.ablation_text import comparison_row, markdown
from analysis.tables import strict
from errors import InputError
from scripts.ablate.checks import placebos
from scripts.ablate.grid import Grid
from scripts.ablate.plan import table
from scripts.ablate.results import axis_columns, differences, to_csv
from scripts.ablate.space import read_trials
from scripts.ablate.space import summary as search_summary
from training.durable import replace_atomically

BEGIN, END = "<!-- results: made by the command above -->", "<!-- end of results -->"


def load_outcomes(grid: Grid, folder: Path) -> Outcomes:
    """Raises InputError if there are no results, or they are of another grid."""
    rows = read_rows(folder / "results.csv")
    if not rows:
        raise InputError(f"{folder}/results.csv: no finished run to report")
    known = {cell.run_id for cell in grid.cells}
    for row in rows:
        if row.get("run_id") not in known:
            raise InputError(f"{folder}/results.csv: holds the results of another grid (run {row.get('run_id')})")
    return Outcomes(
        grid.name,
        grid.question,
        grid.baseline,
        grid.arms,
        tuple(axis_columns(grid).values()),
        grid.metrics,
        rows,
        read_rows(folder / "curves.csv"),
        read_rows(folder / "costs.csv"),
        differences(grid),
        len(grid.cells),
        (search_summary(grid.search, read_trials(folder)),) if grid.search is not None else (),
        placebos(grid),
    )


def report(grid: Grid, folder: Path, console: Console) -> bool:
    """Writes comparisons.csv, summary.json, tables.md and paired-*.svg into the folder, and the page.

    The page is report.html in the grid's own folder; that of another folder (small files to be committed) is there too,
    under that folder's name.
    A Markdown file beside the folder with its name (docs/results/x.md for docs/results/x) that has a results part gets
    that part anew. Returns whether pairs are pairs: False if a placebo differs from the baseline. Raises InputError,
    OSError.
    """
    outcomes = load_outcomes(grid, folder)
    comparisons = compare(outcomes)
    command = f"python -m scripts.ablate {grid.path} --report {folder}"
    text = markdown(outcomes, comparisons)
    written = {
        "comparisons.csv": to_csv([c.as_row(grid.metrics[c.metric]) for c in comparisons]),
        "summary.json": json.dumps(summary(outcomes, comparisons), indent=1, allow_nan=False) + "\n",
        "tables.md": text,
    }
    if comparisons:
        for metric in grid.metrics:
            written[f"paired-{metric.replace('/', '-')}.svg"] = paired_svg(outcomes, comparisons, metric)
    for name, content in written.items():
        replace_atomically(folder / name, content.encode())
    own = folder.resolve() == grid.folder.resolve()
    grid.folder.mkdir(parents=True, exist_ok=True)
    page_path = grid.folder / ("report.html" if own else f"report-{folder.resolve().name}.html")
    replace_atomically(page_path, page(outcomes, comparisons, command).encode())
    document = folder.with_suffix(".md")
    if document.is_file():
        old = document.read_text()
        new = with_results(old, text)
        if new != old:
            replace_atomically(document, new.encode())
    for metric, direction in grid.metrics.items():
        rows = [
            {k: str(v).strip("`") for k, v in comparison_row(c, direction).items()}
            for c in comparisons
            if c.metric == metric
        ]
        if rows:
            console.print(table(f"{metric} ({direction} is better)", rows))
    console.print(f"page: {page_path}", markup=False)
    broken = list(dict.fromkeys(c.arm for c in comparisons if c.broken))
    for arm in broken:
        console.print(f"{arm}: {BROKEN}; see the page", markup=False)
    return not broken


def with_results(document: str, text: str) -> str:
    """The document with what stands between its two marks replaced; unchanged without marks."""
    if BEGIN not in document or END not in document:
        return document
    before, rest = document.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{text}\n{END}{rest.split(END, 1)[1]}"


def summary(outcomes: Outcomes, comparisons: list[Comparison]) -> dict[str, Any]:
    return strict(
        {
            "grid": outcomes.name,
            "question": outcomes.question,
            "baseline": outcomes.baseline,
            "metrics": outcomes.metrics,
            "planned": outcomes.planned,
            "finished": len(outcomes.rows),
            "seeds": outcomes.seeds,
            "arms": outcomes.settings,
            "comparisons": [c.as_row(outcomes.metrics[c.metric]) for c in comparisons],
        }
    )
