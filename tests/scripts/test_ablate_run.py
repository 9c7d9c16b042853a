"""The runner with stand-ins for runs (fast), and a whole tiny grid that is killed and goes on (slow)."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ablate_runs import GRID, ablate, make_grid, run, use_stand_ins
from rich.console import Console
from tiny_run import ROOT

import train
from errors import InputError
from scripts.ablate import arm, runner, slurm
from scripts.ablate.grid import load_grid
from scripts.ablate.results import check_folder, is_done, result_rows, run_folder, write_results
from scripts.launch.job import Job
from training.config import TrainConfig


@pytest.fixture
def grid(tmp_path, monkeypatch):
    return make_grid(tmp_path, monkeypatch)


@pytest.fixture
def stand_in(monkeypatch):
    use_stand_ins(monkeypatch)


def test_a_failed_arm_is_reported_and_the_rest_goes_on_and_a_restart_does_what_is_missing(grid, stand_in, monkeypatch):
    monkeypatch.setenv("FAIL", "triple")
    outcome, shown = run(grid)
    assert outcome.done == 4 and not outcome.interrupted
    assert set(outcome.failed) == {"triple-s0", "triple-s1"}
    assert "exit code 1: this arm is broken" in outcome.failed["triple-s0"] and "FAILED" in shown
    rows = result_rows(grid)
    assert [row["run_id"] for row in rows] == ["none-s0", "placebo-s0", "none-s1", "placebo-s1"]
    assert Path("ablations/g/results.csv").read_text().count("\n") == 5

    monkeypatch.delenv("FAIL")
    outcome, _ = run(grid)
    assert outcome.done == 6 and not outcome.failed
    counts = {cell.run_id: (run_folder(grid, cell) / "count").read_text() for cell in grid.cells}
    assert set(counts.values()) == {"x"}  # nothing ran twice


def test_a_placebo_that_differs_fails_the_command_and_its_report(grid, stand_in, monkeypatch, capsys):
    assert ablate(monkeypatch, capsys)[0] == 0
    monkeypatch.setenv("PLACEBO", "other")
    Path("ablations").rename("first")
    code, shown = ablate(monkeypatch, capsys)
    assert code == 1 and "placebo: NOT IDENTICAL: pairs are broken" in shown
    assert ablate(monkeypatch, capsys, "--report")[0] == 1
    assert "- placebo: NOT IDENTICAL: pairs are broken" in (grid.folder / "tables.md").read_text()


def test_the_table_knows_the_code_and_pairs_of_different_data_are_refused(grid, stand_in, monkeypatch, capsys):
    monkeypatch.setenv("DIRTY", "b" * 64)
    ablate(monkeypatch, capsys, "--filter", "seed == 0")
    monkeypatch.delenv("DIRTY")
    assert ablate(monkeypatch, capsys)[0] == 0
    assert {row["seed"]: row["git"] for row in result_rows(grid)} == {
        0: "aaaaaaaaaaaa+dirty.bbbbbbbb",
        1: "aaaaaaaaaaaa",
    }
    assert "2 states of the code" in (grid.folder / "tables.md").read_text()
    receipt = json.loads((grid.folder / "runs/triple-s1/receipt.json").read_text())
    receipt["starts"].append({"git": {"commit": "c" * 40, "dirty_sha256": None}})
    receipt["data"]["manifest_sha256"] = "e" * 64
    (grid.folder / "runs/triple-s1/receipt.json").write_text(json.dumps(receipt))
    assert result_rows(grid)[-1]["git"] == "aaaaaaaaaaaa then cccccccccccc"
    with pytest.raises(InputError, match="none-s1 and triple-s1 are a pair but were trained on different data"):
        ablate(monkeypatch, capsys, "--report")


def test_a_stop_ends_what_runs_starts_nothing_more_and_can_go_on(grid, stand_in, monkeypatch):
    monkeypatch.setenv("SLEEP", "30")
    started = time.monotonic()

    def stop_both(*_):
        if len(list(Path("ablations/g/runs").glob("*/output.log"))) == 2:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGALRM, stop_both)
    signal.setitimer(signal.ITIMER_REAL, 0.5, 0.1)
    outcome, _ = run(grid, jobs=2)
    assert outcome.interrupted and outcome.done == 0 and not outcome.failed
    assert time.monotonic() - started < 10
    assert len(list(Path("ablations/g/runs").iterdir())) == 2
    monkeypatch.setenv("SLEEP", "0")
    assert run(grid)[0].done == 6


def test_on_a_terminal_there_is_a_live_table(grid, stand_in, monkeypatch):
    monkeypatch.setenv("SLEEP", "1")  # two looks at each run: the table is drawn twice a second
    monkeypatch.setenv("FAIL", "triple")
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    runner.run_local(grid, 2, 1, console)
    shown = text.getvalue()
    assert "of 6 done" in shown and "placebo-s0" in shown and "left" in shown and "this arm is broken" in shown


def test_a_run_that_a_killed_runner_left_behind_is_waited_for(grid, stand_in, monkeypatch):
    calls = []
    real = runner.live_owner

    def owner(folder):
        calls.append(folder)
        return (
            {"pid": 1, "host": socket.gethostname()} if folder.name == "none-s0" and len(calls) < 40 else real(folder)
        )

    monkeypatch.setattr(runner, "live_owner", owner)
    outcome, shown = run(grid)
    assert outcome.done == 6 and not outcome.failed
    assert shown.count(f"none-s0: waiting for process 1 on {socket.gethostname()}") == 1


def test_a_run_of_another_machine_is_not_waited_for(grid, stand_in, monkeypatch, capsys):
    """A container that comes back under another name finds the note of the one that is gone."""
    folder = run_folder(grid, grid.cells[0])
    folder.mkdir(parents=True)
    (folder / "owner.json").write_text(json.dumps({"pid": 7, "host": "node17"}))
    code, shown = ablate(monkeypatch, capsys)
    assert code == 1 and sum(is_done(grid, cell) for cell in grid.cells) == 5
    assert f"failed: none-s0: process 7 on node17 owns it; if that machine is gone, remove {folder}/owner.json" in shown
    (folder / "owner.json").unlink()
    assert ablate(monkeypatch, capsys)[0] == 0


def test_the_table_of_a_filtered_run_keeps_the_other_rows(grid, stand_in):
    """At every moment: what a kill leaves behind is what was last written while it ran."""
    run(grid)
    table = Path("ablations/g/results.csv").read_text()
    for folder in grid.folder.glob("runs/*-s1"):
        (folder / "receipt.json").unlink()
    console = Console(file=io.StringIO())
    second = [cell for cell in grid.cells if cell.seed == 1]
    assert runner.run_local(grid, 3, 1, console, second).done == 3
    assert Path("ablations/g/results.csv").read_text() == table


def test_two_runners_of_one_grid(grid):
    grid.folder.mkdir(parents=True)
    with runner.only_one(grid), pytest.raises(InputError, match="another process is running this grid"):
        with runner.only_one(grid):
            pass


def test_results_are_evaluated_again_when_the_evaluation_changes(grid, stand_in):
    run(grid)
    Path("g.yaml").write_text(yaml.safe_dump({**GRID, "evaluate": {"curvature_rows": 16}}))
    assert not any(is_done(load_grid("g.yaml"), cell) for cell in grid.cells)
    for cell in grid.cells:  # with checkpoints, that is
        (run_folder(grid, cell) / "checkpoints/step-00000009").mkdir(parents=True)
    check_folder(load_grid("g.yaml", threads=1))


@pytest.mark.parametrize("option", [[], ["--report"], ["--dry-run"]])
def test_another_evaluation_of_runs_without_checkpoints_is_refused_and_harms_nothing(
    grid, stand_in, monkeypatch, capsys, option
):
    run(grid)
    table = Path("ablations/g/results.csv").read_bytes()
    Path("g.yaml").write_text(yaml.safe_dump({**GRID, "evaluate": {"curvature_rows": 16}}))
    expected = (
        r"g\.yaml: evaluate: .*/none-s0 was evaluated with curvature_rows 8, not 16, and its checkpoints are gone"
    )
    with pytest.raises(InputError, match=expected):
        ablate(monkeypatch, capsys, *option)
    assert Path("ablations/g/results.csv").read_bytes() == table
    assert {(run_folder(grid, cell) / "count").read_text() for cell in grid.cells} == {"x"}
    (run_folder(grid, grid.cells[0]) / "evaluation.json").unlink()
    with pytest.raises(InputError, match="none-s0: is finished, but has neither an evaluation nor a checkpoint"):
        ablate(monkeypatch, capsys, *option)


def test_slurm_gets_one_job_per_run_and_none_twice(grid, monkeypatch):
    calls = []

    def answer(*command):
        calls.append(command)
        return "RUNNING" if command[0] == "squeue" else f"{len(calls)};cluster"

    monkeypatch.setattr(slurm.slurm, "slurm_command", answer)
    console = Console(file=io.StringIO())
    slurm.submit_all(grid, ["--partition=cpu"], console)
    assert [call[0] for call in calls] == ["sbatch"] * 6
    script = (run_folder(grid, grid.cells[0]) / "job.sh").read_text()
    assert "scripts.ablate.arm" in script and "--partition=cpu" in script and f"PYTHONPATH={ROOT}" in script
    assert "WANDB_RUN_GROUP=g" in script  # as in a local grid
    assert Job.read(run_folder(grid, grid.cells[0])).slurm_job == "1"
    slurm.submit_all(grid, ["--partition=cpu"], console)
    assert [call[0] for call in calls[6:]] == ["squeue"] * 6


def test_a_run_of_a_grid_moves_no_other_run(grid, monkeypatch):
    """Where it lives is told to it, not to the process: the next run is in runs/ as ever."""
    cell = replace(grid.cells[0], config=replace(grid.cells[0].config, train=TrainConfig(tokens=100, batch_rows=2)))
    folder = runner.prepare_folder(grid, cell)
    monkeypatch.setattr(sys, "argv", ["scripts.ablate.arm", str(folder), "--curvature-rows=0"])
    assert arm.main() == 0 and (folder / "receipt.json").is_file()
    train.train(replace(cell.config, run_id="mine"), "tiny", [])
    assert Path("runs/mine/receipt.json").is_file()


def start_command(place):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "scripts.ablate", "g.yaml", "--jobs", "2"]
    return subprocess.Popen(
        line, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_grid_that_is_killed_and_goes_on_ends_with_the_same_table(grid, tmp_path):
    whole = start_command(tmp_path)
    shown, _ = whole.communicate(timeout=200)
    assert whole.returncode == 0, shown
    expected = (grid.folder / "results.csv").read_bytes()
    rows = {row["run_id"]: row for row in result_rows(grid)}
    for seed in (0, 1):
        none, placebo, triple = (rows[f"{arm}-s{seed}"] for arm in ("none", "placebo", "triple"))
        assert none["weights_sha256"] == placebo["weights_sha256"] != triple["weights_sha256"]
        assert none["val_loss"] == placebo["val_loss"] and none["manifest_sha256"] == triple["manifest_sha256"]
    assert (grid.folder / "report.html").stat().st_size > 1e6
    summary = json.loads((grid.folder / "summary.json").read_text())
    assert [c["verdict"] for c in summary["comparisons"] if c["arm"] == "placebo"] == ["identical, bit for bit"]

    grid.folder.rename(tmp_path / "first")
    killed = start_command(tmp_path)
    until = time.monotonic() + 100
    while not list(grid.folder.glob("runs/*/checkpoints/step-*")) and time.monotonic() < until:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    again = start_command(tmp_path)
    shown, _ = again.communicate(timeout=200)
    assert again.returncode == 0, shown
    assert (grid.folder / "results.csv").read_bytes() == expected
    write_results(grid)
    assert (grid.folder / "results.csv").read_bytes() == expected
