"""What a grid file may not ask for, although each of its runs would be valid alone: found before anything starts."""

import pytest
import yaml
from tiny_run import make_place

from errors import InputError
from scripts.ablate.grid import load_grid

GRID = {"base": "tiny.yaml", "arms": {"none": {"stp.weight": 0}, "stp": {}}, "seeds": [0]}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(changes of GRID) -> the grid."""
    make_place(tmp_path, monkeypatch)

    def load(**changes):
        (tmp_path / "g.yaml").write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
        return load_grid("g.yaml")

    return load


def test_an_arm_keeps_what_it_says_of_itself(load):
    """The baseline would train with STP on, in a folder that says "none"."""
    arms = {"stp": {"stp.form": "consecutive"}, "none": {"stp.weight": 0}}
    with pytest.raises(InputError, match=r"g.yaml: arm none: stp.weight is an axis; an arm cannot set it"):
        load(arms=arms, axes={"stp.weight": [0.02, 0.08]})


def test_an_axis_beside_an_arms_key_is_no_clash(load):
    arms = {"none": {"stp.weight": 0}, "stp": {"stp.gate.start_tokens": 0}}
    grid = load(arms=arms, axes={"stp.gate.ramp_tokens": [0, 9]})
    assert [cell.config.stp.weight for cell in grid.cells] == [0, 0.1, 0, 0.1]


ROWS = {"data.source": "jsonl", "data.path": "rows.jsonl"}


@pytest.mark.parametrize(
    ("split", "overrides", "message"),
    [
        (
            "test",
            {},
            "evaluate.answers: test, but the data of run none-s0, files, hold no prompts and answers; expected",
        ),
        (
            "validation",
            {"data.mixture": {"files": 1, "installed_cpp": 1}},
            "validation, but .* files, installed_cpp, hold",
        ),
        (
            "test",
            {"data.path": None, "data.source": "nlrx", "data.test_fraction": 0},
            "test, but run none-s0 keeps none",
        ),
        ("test", ROWS | {"data.test_fraction": 0}, "test, but run none-s0 keeps none"),
    ],
)
def test_answers_that_no_run_could_give_are_not_asked_for(load, split, overrides, message):
    """Otherwise every run trains to its end and fails then."""
    with pytest.raises(InputError, match=message):
        load(evaluate={"answers": split}, overrides=overrides)


@pytest.mark.parametrize(
    ("split", "overrides"),
    [
        ("test", {"data.path": None, "data.source": "nlrx"}),
        ("validation", {"data.path": None, "data.source": "nlrx", "data.test_fraction": 0}),
        ("train", ROWS | {"data.test_fraction": 0}),
        ("test", ROWS | {"data.test_fraction": 0, "data.test_path": "more.jsonl"}),
        ("test", {"data.mixture": {"files": 0.5, "nlrx": 0.5}}),
        ("none", {}),
    ],
)
def test_answers_that_runs_give_are(load, split, overrides):
    assert load(evaluate={"answers": split}, overrides=overrides).evaluate.answers == split


def test_one_arm_without_answers_is_enough(load):
    axes = {"data.mixture": [{"nlrx": 1, "files": 1}, {"files": 1}]}
    with pytest.raises(InputError, match="evaluate.answers: test, but the data of run none-mixture=.*, files, hold no"):
        load(evaluate={"answers": "test"}, axes=axes)
