"""A run's id means the run, in every command, whatever else has that name in the folder that one stands in."""

import json
import sys

import pytest
from launch_cases import launch, write_run

from errors import InputError
from scripts import evaluate_nlrx, plot_run
from scripts.inspect_curvature.native import open_run
from training.run import find_checkpoint


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run called docs, beside a folder docs that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    record = {"tokens": 100, "step": 1, "loss/lm": 5.0}
    (write_run(tmp_path / "runs" / "docs", status="finished") / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def plot(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["plot_run", name])
    return plot_run.main()


@pytest.mark.parametrize("name", ["docs", "runs/docs"])
def test_every_command_finds_the_run(place, monkeypatch, name):
    assert json.loads(launch("status", name, "--json"))["state"] == "finished"
    assert plot(monkeypatch, name) == 0 and (place / "runs" / "docs" / "curves.html").is_file()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        open_run(name)
    monkeypatch.setattr(sys, "argv", ["evaluate_nlrx", name])
    with pytest.raises(InputError, match="runs/docs has no valid checkpoint"):
        evaluate_nlrx.main()
    with pytest.raises(InputError, match="runs/docs has no valid checkpoint"):
        find_checkpoint(name)  # init_from, export


def test_a_path_is_a_path_and_a_name_of_nothing_has_a_nearest(place, monkeypatch):
    (place / "runs" / "docs").rename(place / "docs" / "away")
    assert plot(monkeypatch, "docs/away") == plot(monkeypatch, str(place / "docs" / "away")) == 0
    write_run(place / "runs" / "night")
    with pytest.raises(InputError, match=r"nigth: .*did you mean 'night'"):
        plot(monkeypatch, "nigth")


def test_a_run_elsewhere_is_not_continued_as_its_namesake_here(place):
    """A copy of a run in another folder: the one of that name under runs/ is another run, with an owner of its own."""
    write_run(place / "bak" / "docs", status="stopped")
    owner = place / "runs" / "docs" / "owner.json"
    owner.write_text("{}")
    for options in ([], ["--take-over"]):
        said = launch("resume", "bak/docs", *options, code=2)
        assert said.startswith("bak/docs: a run is continued from the folder above its runs/") and owner.is_file()
    assert "runs/docs: is finished" in launch("resume", str(place / "runs" / "docs"), code=2)
