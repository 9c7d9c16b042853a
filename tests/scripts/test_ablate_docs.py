"""Committed results: every number of the document comes from the committed CSV files."""

from pathlib import Path

import pytest

from analysis.ablation import compare
from analysis.ablation_svg import paired_svg
from analysis.ablation_text import markdown
from scripts.ablate.grid import load_grid
from scripts.ablate.report import BEGIN, END, load_outcomes, with_results

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("grid", "name"), [("nlrx_data_efficiency", "nlrx"), ("nlrx_weight", "nlrx_weight"), ("pretraining", "pretraining")]
)
def test_committed_tables_are_those_of_the_committed_rows(monkeypatch, grid, name):
    monkeypatch.chdir(ROOT)
    folder = Path("docs/results") / name
    outcomes = load_outcomes(load_grid(f"configs/ablations/{grid}.yaml"), folder)
    comparisons = compare(outcomes)
    text = markdown(outcomes, comparisons)
    assert (folder / "tables.md").read_text() == text
    for metric in outcomes.metrics:
        assert (folder / f"paired-{metric}.svg").read_text() == paired_svg(outcomes, comparisons, metric)
    document = folder.with_suffix(".md")
    if document.is_file():
        assert with_results(document.read_text(), text) == document.read_text()


def test_only_what_stands_between_the_marks_is_replaced():
    assert with_results(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n{END}\nb\n"
    assert with_results("no marks", "new") == "no marks"
