"""What the tables of a grid hold: a column for each axis, whatever else is measured."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from ablate_runs import GRID, ablate, make_grid, run, use_stand_ins

from analysis.ablation_figures import curve_figure
from scripts.ablate.grid import load_grid
from scripts.ablate.report import load_outcomes
from scripts.ablate.results import COLUMNS, axis_columns, cost_rows, curve_rows, result_rows


@pytest.fixture
def grid(tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    return make_grid(tmp_path, monkeypatch)


def test_an_axis_of_budgets_has_points_and_pairs_though_runs_end_at_other_counts(grid, monkeypatch, capsys):
    """`tokens` is a column of the results already: the budget of the grid has its own, under the key of the config."""
    Path("g.yaml").write_text(yaml.safe_dump({**GRID, "axes": {"train.tokens": [900, 1200]}}))
    assert ablate(monkeypatch, capsys, "--filter", "tokens <= 1200")[0] == 0
    grid = load_grid("g.yaml")
    assert {(row["train.tokens"], row["tokens"]) for row in result_rows(grid)} > {(900, 918), (1200, 919)}
    found = json.loads((grid.folder / "summary.json").read_text())["comparisons"]
    assert [(c["arm"], c["where"], c["n"]) for c in found if c["kind"] == "point"] == [
        (arm, f"train.tokens {budget}", 2) for budget in (900, 1200) for arm in ("placebo", "triple")
    ]
    assert {c["n"] for c in found if c["kind"] in ("mean", "contrast")} == {2}
    figure = curve_figure(load_outcomes(grid, grid.folder), "held", "val_loss", "", "")
    assert [view.name for view in figure.views] == ["train.tokens 900", "train.tokens 1200"]


def test_every_column_of_the_results_is_known_to_axes(grid):
    run(grid)
    written = {name for row in (*result_rows(grid), *cost_rows(grid), *curve_rows(grid)) for name in row}
    assert {name for name in written if "/" not in name} <= COLUMNS  # no config key has a "/"
    grid = dataclasses.replace(grid, axes={"tokens": "train.tokens", "n_spans": "stp.n_spans"})
    assert axis_columns(grid) == {"tokens": "train.tokens", "n_spans": "n_spans"}
