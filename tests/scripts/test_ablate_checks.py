"""What a grid file may not ask for, although each of its runs would be valid alone: found before anything starts."""

import pytest
import torch
import yaml
from tiny_run import make_place

from analysis.cadence import cheap_metrics
from errors import InputError
from scripts.ablate.checks import comparable
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


NLRX = {"data.source": "nlrx", "data.path": None}
ROWS = {"data.source": "jsonl", "data.path": "rows.jsonl"}


@pytest.mark.parametrize(
    ("split", "overrides", "message"),
    [
        (
            "test",
            {},
            "answers: test, but the data of run none-s0, files, hold no prompts and answers; expected",
        ),
        (
            "validation",
            {"data.mixture": {"files": 1, "installed_cpp": 1}},
            "validation, but .* files, installed_cpp, hold",
        ),
        (
            "test",
            NLRX | {"data.test_fraction": 0},
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
        ("test", NLRX),
        ("validation", NLRX | {"data.test_fraction": 0}),
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
    with pytest.raises(InputError, match=r"answers: test, but the data of run none-mixture=.*, files, hold no"):
        load(evaluate={"answers": "test"}, axes=axes)


@pytest.mark.parametrize(
    ("name", "evaluate", "hint"),
    [
        ("val_bits_per_bite", {}, "did you mean 'val_bits_per_byte'"),
        ("curvature/degres/A", {}, "did you mean 'curvature/degrees/A'"),
        ("curvature/degrees/attention", {}, "expected one of .*, curvature/degrees/A, "),
        ("curvature/degrees/A", {"curvature_rows": 0}, "expected one of val_bits_per_byte, val_loss"),
        ("exact", {}, "expected one of val_bits_per_byte, val_loss"),
        ("stp/raw", {}, "expected one of"),  # a curve, in no column of the results
    ],
)
def test_a_metric_that_no_run_will_have_is_found_before_any_starts(load, name, evaluate, hint):
    with pytest.raises(InputError, match=f"g.yaml: metrics: unknown value '{name}'.*{hint}"):
        load(metrics={"val_loss": "lower", name: "lower"}, evaluate=evaluate)


def test_what_a_run_is_measured_by_can_be_compared(load):
    """All that the evaluation writes, of every family of any stack of the grid."""
    axes = {"model.pattern": ["AEM", "AR"]}
    grid = load(overrides=NLRX, axes=axes, evaluate={"answers": "test"}, metrics={"exact": "higher"})
    written: set[str] = set()
    for letters in ("AEM", "AR"):
        states = [torch.randn(1, 8, 4) for _ in range(len(letters) + 2)]
        written |= cheap_metrics(states[:-1], states[-1], torch.zeros(1, 8, dtype=torch.int64), letters).keys()
    curvature = [name for name in comparable(grid) if name.startswith("curvature/")]
    assert len(curvature) == len(written) == 30 and set(curvature) == written
    assert load(metrics=dict.fromkeys(written, "lower"), axes=axes).metrics.keys() == written
