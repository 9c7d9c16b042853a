"""Committed results: every number of the document comes from the committed CSV files."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from analysis.ablation import compare
from analysis.ablation_svg import paired_svg
from analysis.ablation_text import markdown
from losses.objective import STPConfig
from losses.stp import DISTANCES, FORMS, LENGTH_WEIGHTINGS, NORMALIZATIONS, PREDICTORS, VARIANTS
from losses.triples import SAMPLERS
from model.pattern import SELECTIONS
from scripts.ablate.grid import KEYS, load_grid
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


def test_the_examples_of_the_document_are_grids_that_load(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    document = Path("docs/ablations.md").read_text()
    fences = re.findall(r"^```yaml\n(.*?)^```", document, flags=re.M | re.S)
    assert len(fences) == 2
    for number, text in enumerate(fences):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text if "base:" in text else f"base: configs/demo.yaml\n{text}")  # the second is a part of one
        grid = load_grid(path)
        assert len(grid.cells) > 1 and set(yaml.safe_load(text)) <= set(KEYS)
    commands = re.findall(r"scripts\.ablate (configs/\S+\.yaml).* --filter '(.+)'", document)
    assert commands and all(load_grid(path).select([text]).cells for path, text in commands)


def test_the_table_of_stp_is_its_config():
    """Every key, with its default and, where it is one of several words, all of them."""
    document = (ROOT / "docs/ablations.md").read_text()
    rows = re.findall(r"^\| `(stp\.[\w.]+)` \| `([^`]*)` \| (.+?) \| (.+) \|$", document, flags=re.M)
    told = {key: yaml.safe_load(default) for key, default, _, _ in rows}
    config = {f"stp.{key}": value for key, value in dataclasses.asdict(STPConfig()).items()}
    gate = config.pop("stp.gate")
    assert told == config | {f"stp.gate.{key}": value for key, value in gate.items()} and len(rows) == len(told)
    words = {key: re.findall(r"`([^`]+)`", values) for key, _, values, _ in rows}
    choices = {
        "form": FORMS,
        "sampler": SAMPLERS,
        "variant": VARIANTS,
        "distance": DISTANCES,
        "normalize": NORMALIZATIONS,
    }
    for name, expected in (choices | {"length_weighting": LENGTH_WEIGHTINGS, "predictor": PREDICTORS}).items():
        assert sorted(words[f"stp.{name}"]) == sorted(expected), name
    assert set(words["stp.boundaries"]) <= set(re.split(r", (?:or )?", SELECTIONS))
    assert all(meaning.strip() for *_, meaning in rows)


def test_only_what_stands_between_the_marks_is_replaced():
    assert with_results(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n{END}\nb\n"
    assert with_results("no marks", "new") == "no marks"
