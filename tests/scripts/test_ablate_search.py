"""Searching on validation: bad input, and a search that is stopped, killed and goes on, with stand-ins for runs."""

import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tiny_run import make_place

from errors import InputError
from scripts.ablate import __main__ as command
from scripts.ablate import search
from scripts.ablate.grid import load_grid
from scripts.ablate.results import is_done
from scripts.ablate.runner import Outcome, prepare_folder
from scripts.ablate.space import read_trials

GRID = {
    "base": "tiny.yaml",
    "overrides": {"train.tokens": 900, "stp.gate.start_tokens": 0, "stp.gate.ramp_tokens": 0},
    "arms": {"none": {"stp.weight": 0}},
    "search": {"ranges": {"stp.weight": {"low": 0.001, "high": 1.0, "log": True}}, "trials": 7, "together": 2},
    "seeds": [0, 1],
    "checkpoints": "remove",
}


def stand_in(grid, jobs, threads, console, cells):
    """Runs without runs, in the place of run_local: held-out loss is best at a weight of 0.03. Runs of $FAIL fail."""
    failed = {}
    for cell in cells:
        if is_done(grid, cell):
            continue
        folder = prepare_folder(grid, cell)
        if cell.arm == os.environ.get("FAIL"):
            failed[cell.run_id] = "this weight is too much"
            continue
        with (folder / "count").open("a") as file:
            file.write("x")
        weight = cell.config.stp.weight
        value = 2 + cell.seed / 100 + (math.log10(weight / 0.03) ** 2 if weight else 1)
        metrics = {"val_bits_per_byte": value}
        receipt = {"status": "finished", "tokens": 900, "step": 9, "metrics": metrics, "starts": [{}]}
        (folder / "receipt.json").write_text(json.dumps(receipt))
        settings = {"answers": "none", "limit": None, "curvature_rows": 8}
        evaluation = {"settings": settings, "metrics": {"weights_sha256": "a"}}
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return Outcome(sum(is_done(grid, cell) for cell in grid.cells), failed, False)


@pytest.fixture
def place(tmp_path, monkeypatch):
    make_place(tmp_path, monkeypatch)

    monkeypatch.setattr(search, "run_local", stand_in)
    write(tmp_path)
    return tmp_path


def write(place, **changes):
    (place / "g.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))


def start(jobs=4):
    """As the command does it, but without the page."""
    Path("ablations/g").mkdir(parents=True, exist_ok=True)
    console = Console(record=True, width=200, file=io.StringIO())
    grid, outcome = search.run_search("g.yaml", 1, jobs, console)
    return grid, outcome, console.export_text()


@pytest.mark.slow
def test_a_search_finds_the_minimum_and_is_the_same_again_and_never_repeats_a_trial(place):
    grid, outcome, shown = start()
    trials = read_trials(grid.folder)
    assert [trial.number for trial in trials] == list(range(7)) and not outcome.failed and not outcome.interrupted
    assert all(trial.state == "complete" and 0.001 <= trial.values["stp.weight"] <= 1 for trial in trials)
    for trial in trials:  # the mean over the seeds
        runs = [json.loads((grid.folder / f"runs/{trial.name}-s{s}/receipt.json").read_text()) for s in (0, 1)]
        assert trial.value == pytest.approx(sum(run["metrics"]["val_bits_per_byte"] for run in runs) / 2)
    assert min(trial.value for trial in trials) < 2.2 and "trial_006 of 7" in shown
    counts = [path.read_text() for path in grid.folder.glob("runs/*/count")]
    assert counts == ["x"] * (8 * 2)
    assert start()[0].folder == grid.folder and read_trials(grid.folder) == trials
    assert all(path.read_text() == "x" for path in grid.folder.glob("runs/*/count"))
    # more trials are the same search, gone on
    write(place, search={**GRID["search"], "trials": 8})
    assert read_trials(start()[0].folder)[:7] == trials
    assert len(read_trials(grid.folder)) == 8
    grid.folder.rename("first")
    assert start(jobs=1)[0].cells and read_trials(grid.folder)[:7] == trials  # whatever the jobs


@pytest.mark.slow
def test_a_stop_at_any_moment_changes_nothing(place, monkeypatch):
    grid, _, _ = start()
    expected = read_trials(grid.folder)
    table = (grid.folder / "results.csv").read_bytes()
    grid.folder.rename("first")

    # killed after a suggestion, and between two results of one block
    honest = search.Study.tell
    told = []

    def die(self, trial, value):
        told.append(trial.number)
        if len(told) == 4:
            raise KeyboardInterrupt
        honest(self, trial, value)

    monkeypatch.setattr(search.Study, "tell", die)
    with pytest.raises(KeyboardInterrupt):
        start()
    monkeypatch.setattr(search.Study, "tell", honest)
    calls = []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return stand_in(*arguments)

    monkeypatch.setattr(search, "run_local", stopped)
    with pytest.raises(KeyboardInterrupt):
        start()
    # and asked to stop while runs are on
    monkeypatch.setattr(search, "run_local", lambda *arguments: replace(stand_in(*arguments), interrupted=True))
    _, outcome, _ = start()
    assert outcome.interrupted and not outcome.failed
    monkeypatch.setattr(search, "run_local", stand_in)
    assert start()[1].done == 8 * 2
    assert read_trials(grid.folder) == expected and (grid.folder / "results.csv").read_bytes() == table
    assert all(path.read_text() == "x" for path in grid.folder.glob("runs/*/count"))


@pytest.mark.slow
def test_a_trial_whose_values_were_only_half_stored_is_completed(place):
    ranges = {**GRID["search"]["ranges"], "stp.n_spans": {"low": 1, "high": 8}}
    write(place, search={**GRID["search"], "ranges": ranges, "trials": 4})
    grid, _, _ = start()
    expected = read_trials(grid.folder)
    assert all(isinstance(trial.values["stp.n_spans"], int) for trial in expected)
    grid.folder.rename("first")
    grid.folder.mkdir()
    study = search.Study(load_grid("g.yaml"))
    study.search = replace(study.search, ranges=study.search.ranges[:1])
    study._suggest(0)
    assert study.optuna is not None
    start()
    assert read_trials(grid.folder) == expected


def test_equal_suggestions_share_their_runs(place):
    ranges = {"stp.n_spans": {"low": 3, "high": 4}}
    write(place, search={**GRID["search"], "ranges": ranges, "trials": 6}, seeds=[0])
    grid, outcome, _ = start()
    trials = read_trials(grid.folder)
    assert len(trials) == 6 and not outcome.failed and {t.values["stp.n_spans"] for t in trials} == {3, 4}
    assert len(list(grid.folder.glob("runs/trial_*"))) == 2
    for trial in trials:
        first = next(t for t in trials if t.values == trial.values)
        assert trial.value == first.value and trial.name == first.name


@pytest.mark.slow
def test_a_failed_trial_is_reported_and_the_search_goes_on(place, monkeypatch):
    monkeypatch.setenv("FAIL", "trial_001")
    grid, outcome, shown = start()
    assert set(outcome.failed) == {"trial_001-s0", "trial_001-s1"} and "trial_001: failed" in shown
    states = [trial.state for trial in read_trials(grid.folder)]
    assert states == ["complete", "failed", *["complete"] * 5]
    monkeypatch.delenv("FAIL")
    assert not start()[1].failed and [trial.state for trial in read_trials(grid.folder)] == states


def test_the_table_of_trials_may_be_deleted(place, monkeypatch):
    """It is for people: the database knows the trials, and the runs that are there are still this grid's."""
    write(place, search={**GRID["search"], "trials": 2}, seeds=[0])
    grid, _, _ = start()
    table = grid.folder / "trials.csv"
    known = table.read_bytes()
    table.unlink()
    monkeypatch.setattr(sys, "argv", ["scripts.ablate", "g.yaml", "--dry-run"])
    assert command.main() == 0
    assert start()[1].done == 3 and table.read_bytes() == known


@pytest.mark.slow
def test_the_command_plans_runs_and_reports(place, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["scripts.ablate", "g.yaml", "--jobs", "4", *arguments])
        code = command.main()
        return code, " ".join(capsys.readouterr().out.split())

    code, shown = call("--dry-run")
    assert code == 0 and "7 trials of stp.weight in 0.001 .. 1 (log), 2 at a time" in shown
    assert not Path("ablations").exists()
    code, shown = call()
    assert code == 0 and "7 of 7 trials are done" in Path("ablations/g/tables.md").read_text()
    assert "best is trial_" in Path("ablations/g/report.html").read_text()
    copied = Path("kept")
    copied.mkdir()
    for name in ("results.csv", "trials.csv"):
        (copied / name).write_bytes(Path("ablations/g", name).read_bytes())
    assert call("--report", "kept")[0] == 0
    assert (copied / "tables.md").read_text() == Path("ablations/g/tables.md").read_text()
    for option in (["--filter", "seed == 0"], ["--launcher", "slurm"]):
        with pytest.raises(InputError, match="a search suggests its runs"):
            call(*option)
    Path("ablations/g/search.db").write_text("x" * 5000)
    with pytest.raises(InputError, match="no search of Optuna's") as caught:
        call()
    assert "\n" not in str(caught.value)


def ranges(**about):
    return {"search": {**GRID["search"], "ranges": {"stp.weight": {"low": 0.01, "high": 1.0, **about}}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"answers": "test"}}, "may see validation only; expected evaluate.answers: validation, got test"),
        ({"evaluate": {"answers": "train"}}, "may see validation only"),
        ({"metrics": {"exact": "higher"}}, "chooses by exact.*no measure of validation here"),
        ({"metrics": {"unigram_bits_per_byte": "lower"}}, "chooses by unigram_bits_per_byte"),
        ({"axes": {"stp.n_spans": [1, 2]}}, "search: cannot be combined with axes"),
        ({"arms": {"trial_1": {}}}, "names that begin with trial_ belong to the search"),
        ({"search": {**GRID["search"], "trails": 3}}, "unknown key trails .did you mean 'trials'"),
        ({"search": {**GRID["search"], "trials": 0}}, "search.trials: expected a finite number at least 1"),
        ({"search": {**GRID["search"], "trials": 2.5}}, "search.trials: expected a whole number"),
        ({"search": {**GRID["search"], "ranges": {}}}, "search.ranges: expected keys"),
        ({"search": [1]}, "search: expected keys and values"),
        ({"search": {**GRID["search"], "ranges": {"stp.wieght": {"low": 1, "high": 2}}}}, "stp.wieght .did you mean"),
        ({"search": {**GRID["search"], "ranges": {"stp.form": {"low": 1, "high": 2}}}}, "stp.form"),
        ({"search": {**GRID["search"], "ranges": {"stp.n_spans": {"low": 1.5, "high": 2}}}}, "stp.n_spans"),
        (ranges(low=2.0), "low must be below high"),
        (ranges(low=0, log=True), "a logarithmic range begins above 0"),
        (ranges(low=-0.5), "stp.weight: at -0.5: stp.weight: expected at least 0"),
        (ranges(high=float("inf")), "high: expected a finite number"),
        (ranges(log="yes"), "log: expected true or false"),
        (ranges(step=1), "unknown key step"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(place, monkeypatch, changes, message):
    write(place, **changes)
    monkeypatch.setattr(sys, "argv", ["scripts.ablate", "g.yaml"])
    with pytest.raises(InputError, match=message) as caught:
        command.main()
    assert "\n" not in str(caught.value) and not (place / "ablations").exists()


@pytest.mark.slow
def test_another_search_in_the_folder_is_named(place):
    write(place, search={**GRID["search"], "trials": 1}, seeds=[0])
    start()
    for changes, name in (
        ({"seeds": [0, 1]}, "seeds"),
        ({"seeds": [0], **ranges()}, "ranges"),
        ({"seeds": [0], "search": {**GRID["search"], "seed": 9}}, "search.seed"),
        ({"seeds": [0], "overrides": {**GRID["overrides"], "train.tokens": 800}}, "runs"),
    ):
        write(place, **changes)
        with pytest.raises(InputError, match=f"holds the trials of another search .{name}"):
            start()
