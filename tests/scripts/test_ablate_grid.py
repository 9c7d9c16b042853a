"""Grid files: expansion, what differs, and every kind of bad input before anything starts."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import make_place

from analysis.ablation import MIN_PAIRS
from errors import InputError
from scripts.ablate import __main__ as command
from scripts.ablate.checks import placebos
from scripts.ablate.expression import Expression
from scripts.ablate.grid import load_grid
from scripts.ablate.plan import cost
from scripts.ablate.results import check_folder, differences, result_rows, run_folder
from scripts.ablate.runner import arm_command, environment, prepare_folder
from training.config import differing_keys

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))
GRID = {
    "base": "tiny.yaml",
    "overrides": {"train.tokens": 1500},
    "baseline": "none",
    "arms": {"none": {"stp.weight": 0}, "triple": {"stp.weight": 0.1}, "placebo": {"stp.variant": "detached"}},
    "seeds": [0, 1],
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def write(place, name="g", **changes):
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}, sort_keys=False))
    return path


def ablate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scripts.ablate", *map(str, arguments)])
    return command.main()


def test_cells_are_arms_times_axes_times_seeds_with_seeds_outermost(place):
    grid = load_grid(write(place, axes={"stp.n_spans": [2, 3]}, filters=['arm != "placebo" or n_spans == 2']))
    assert len(grid.cells) == 2 * (3 + 2)
    assert [cell.seed for cell in grid.cells] == [0] * 5 + [1] * 5
    assert grid.cells[0].run_id == "none-n_spans=2-s0"
    assert {cell.config.stp.n_spans for cell in grid.cells if cell.point == {"n_spans": 3}} == {3}
    assert all(cell.config.train.tokens == 1500 and cell.config.seed == cell.seed for cell in grid.cells)
    assert len({cell.run_id for cell in grid.cells}) == len(grid.cells)


def test_arms_whose_names_differ_by_a_dash_have_folders_of_their_own(place):
    """In one folder the second would be the first's run, and read "identical, bit for bit"."""
    grid = load_grid(write(place, arms={"no-stp": {"stp.weight": 0}, "no_stp": {}}, baseline="no-stp"))
    assert [cell.run_id for cell in grid.cells[:2]] == ["no-stp-s0", "no_stp-s0"]


def test_an_arm_that_is_called_nought_can_be_the_baseline(place):
    assert load_grid(write(place, arms={"x": {"stp.weight": 0}, 0: {}}, baseline=0)).baseline == "0"


def test_what_differs_is_what_the_arms_change_and_nothing_else(place):
    rows = differences(load_grid(write(place)))
    assert rows == [
        {"arm": "none", "stp.weight": 0.0, "stp.variant": "standard"},
        {"arm": "triple", "stp.weight": 0.1, "stp.variant": "standard"},
        {"arm": "placebo", "stp.weight": 0.1, "stp.variant": "detached"},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"arms": {"none": {"stp.weight": 0}, "odd": {"stp.wieght": 1}}},
            "arm odd: unknown key stp.wieght .did you mean",
        ),
        ({"arms": {"a": {"stp.weight": 0.1}, "b": {}}, "baseline": "a"}, "runs a-s0 and b-s0 are equal after merging"),
        # with STP off nothing else of it counts
        ({"arms": {"none": {"stp.weight": 0}, "b": {"stp.weight": 0, "stp.n_spans": 9}}}, "are equal after merging"),
        # an arm of other data has no pair: refused before hours of training, not by the report after them
        (
            {"arms": {"none": {"stp.weight": 0}, "b": {"data.train_fraction": 0.5}}},
            "arm b: changes data.train_fraction, so its pairs would not share their data; make it an axis",
        ),
        # two experiments that one folder would stand for
        (
            {"axes": {"data.path": ["texts/*.txt", "texts/**.txt"]}},
            r"arm none at path texts/\*\.txt and arm none at path texts/\*\*\.txt: .*none-path=texts_.txt-s0",
        ),
        (
            {
                "baseline": "b",
                "arms": {"b": {}, "b-path=t": {"stp.weight": 0}},
                "axes": {"data.path": ["t", "t-path=t"]},
            },
            "arm b-path=t at path t and arm b at path t-path=t: .*b-path=t-path=t-s0",
        ),
        ({"filters": ["seed > 7"]}, "filters: leave none of the runs"),
        ({"filters": ['arm != "triple"']}, "leave no run of arm triple"),
        ({"filters": ['arm != "triple" or seed == 0']}, "arm triple: has no run of seed 1"),
        ({"filters": ["sead == 1"]}, "unknown name sead .did you mean 'seed'"),
        ({"filters": ["__import__('os')"]}, "cannot stand in a filter"),
        ({"filters": ["seed =="]}, "is no expression"),
        ({"filters": ["arm < 3"]}, "not supported between"),
        ({"arms": {"none": {"stp.weight": -1}, "b": {}}}, "arm none: stp.weight: expected at least 0"),
        ({"arms": {"none": {"seed": 3}, "b": {}}}, "seed is the grid's own"),
        ({"arms": {"none": {}, "a/b": {"stp.n_spans": 5}}}, "expected a plain name"),
        ({"arms": {"none": 3}}, "expected dotted overrides"),
        ({"arms": {}}, "arms is missing"),
        ({"arm": {}}, "unknown key arm .did you mean 'arms'"),
        ({"baseline": "nonne"}, "unknown value 'nonne' .did you mean 'none'"),
        ({"seeds": []}, "seeds is missing"),
        ({"seeds": [0, 0]}, "one is given twice"),
        ({"seeds": [True]}, "seeds: expected a whole number, got True"),
        ({"seeds": ["a"]}, "seeds: expected a whole number, got 'a'"),
        ({"seeds": [-1]}, "expected a finite number at least 0"),
        ({"axes": {"stp.n_spans": 3}}, "expected a list of values"),
        ({"axes": {"stp.n_spans": [3, 3]}}, "a value is given twice"),
        ({"axes": {"train.seed": [3]}}, "the name seed is taken"),
        ({"evaluate": {"answers": "tets"}}, "evaluate.answers: unknown value 'tets'"),
        ({"evaluate": {"anwsers": "test"}}, "unknown value 'anwsers' .did you mean 'answers'"),
        ({"evaluate": {"answers": False}}, "evaluate.answers: unknown value 'False'"),
        ({"evaluate": {"answers": None}}, "evaluate.answers: unknown value 'None'"),
        ({"evaluate": {"limit": "abc"}}, "evaluate.limit: expected a whole number, got 'abc'"),
        ({"evaluate": {"limit": 2.5}}, "evaluate.limit: expected a whole number, got 2.5"),
        ({"evaluate": {"curvature_rows": None}}, "evaluate.curvature_rows: expected a whole number, got None"),
        ({"evaluate": {"curvature_rows": 2.5}}, "evaluate.curvature_rows: expected a whole number, got 2.5"),
        ({"evaluate": {"curvature_rows": True}}, "evaluate.curvature_rows: expected a whole number, got True"),
        ({"filters": 3}, "filters: expected a list of expressions, got 3"),
        ({"filters": [3]}, r"filters: expected a list of expressions, got \[3\]"),
        ({"filters": "seed < 2"}, "filters: expected a list of expressions, got 'seed < 2'"),
        ({"filters": {"arm": 1}}, "filters: expected a list of expressions"),
        # nothing, to Python, and an answer, to whoever wrote it
        ({"checkpoints": False}, "checkpoints: unknown value 'False'"),
        ({"baseline": 0}, "baseline: unknown value '0'"),
        ({"arms": {"x" * 64: {}}, "axes": {"data.path": ["p" * 80]}, "baseline": None}, "x-path=p.*: 153 letters are"),
        ({"metrics": {"x": "up"}}, "metrics.x: unknown value 'up'"),
        ({"checkpoints": "none"}, "checkpoints: unknown value"),
        ({"base": "tinny.yaml"}, "arm none: tinny.yaml: no such config file .did you mean 'tiny.yaml'"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(place, monkeypatch, changes, message):
    path = write(place, **changes)
    with pytest.raises(InputError, match=message) as caught:
        ablate(monkeypatch, path)
    assert "\n" not in str(caught.value)
    assert not (place / "ablations").exists()


def test_files_that_are_no_grid(place, monkeypatch):
    (place / "list.yaml").write_text("- 1\n")
    (place / "broken.yaml").write_text("a: [1\n")
    for name, message in (("list", "expected keys"), ("broken", "not a YAML file"), ("gg", "no such grid file")):
        with pytest.raises(InputError, match=message):
            ablate(monkeypatch, place / f"{name}.yaml")


def test_bad_options(place, monkeypatch):
    path = write(place)
    with pytest.raises(InputError, match="--filter: 'seed == 9' leaves none of the 6 runs"):
        ablate(monkeypatch, path, "--filter", "seed == 9")
    with pytest.raises(InputError, match="--jobs: expected"):
        ablate(monkeypatch, path, "--jobs", 0)
    with pytest.raises(InputError, match="no finished run to report"):
        ablate(monkeypatch, path, "--report")
    with pytest.raises(InputError, match="needs --launcher slurm"):
        ablate(monkeypatch, path, "--sbatch=--partition=x")


def test_results_of_another_grid_in_the_folder(place, monkeypatch):
    grid = load_grid(write(place), threads=1)
    prepare_folder(grid, grid.cells[0])
    check_folder(grid)
    with pytest.raises(InputError, match=r"is a run of another config .train.tokens.*results of another grid"):
        ablate(monkeypatch, write(place, overrides={"train.tokens": 1600}))
    others = {"none": {"stp.weight": 0}, "x": {}}
    with pytest.raises(InputError, match=r"holds the results of another grid .run none-s0"):
        ablate(monkeypatch, write(place, arms=others, axes={"stp.n_spans": [1]}))
    # more seeds or arms are the same grid, grown
    check_folder(load_grid(write(place, seeds=[0, 1, 2]), threads=1))


def test_threads_of_the_runs_that_are_there_are_kept(place):
    path = write(place, overrides={})
    (place / "tiny.yaml").write_text((place / "tiny.yaml").read_text().replace("threads: 1", ""))
    first = command.with_threads(load_grid(path), str(path), share=1)
    assert {cell.config.threads for cell in first.cells} == {1}
    prepare_folder(first, first.cells[0])
    again = command.with_threads(load_grid(path), str(path), share=8)
    assert {cell.config.threads for cell in again.cells} == {1}


def test_a_dry_run_starts_nothing(place, monkeypatch, capsys):
    assert ablate(monkeypatch, write(place), "--dry-run", "--filter", "seed == 0") == 0
    shown = capsys.readouterr().out
    assert "3 runs: 3 arms x seeds [0]" in shown and "stp.variant" in shown and "4,500 loss-bearing tokens" in shown
    assert not (place / "ablations").exists()


def test_the_cost_of_a_grid_is_that_of_its_runs_in_any_order(place):
    """A token costs more in a longer row, and with a larger vocabulary."""
    alone = [
        cost(load_grid(write(place, overrides={"data.sequence_length": length, "data.tokenizer.vocab_size": size})))[1]
        for length in (48, 96)
        for size in (300, 400)
    ]
    assert len(set(alone)) == 4
    for lengths, sizes in (([48, 96], [300, 400]), ([96, 48], [400, 300])):
        axes = {"data.sequence_length": lengths, "data.tokenizer.vocab_size": sizes}
        assert cost(load_grid(write(place, overrides={}, axes=axes)))[1] == pytest.approx(sum(alone))


def test_the_command_and_environment_of_a_run(place):
    overrides = {"data.source": "nlrx", "data.path": None}
    grid = load_grid(write(place, evaluate={"answers": "test", "limit": 7}, overrides=overrides))
    words = arm_command(grid, grid.cells[0])
    assert words[1:4] == ["-m", "scripts.ablate.arm", str(run_folder(grid, grid.cells[0]))]
    assert {"--answers=test", "--limit=7", "--checkpoints=keep"} <= set(words)
    assert environment(grid, 2)["OMP_NUM_THREADS"] == "2" and environment(grid, 2)["WANDB_RUN_GROUP"] == "g"
    assert result_rows(grid) == []


def test_placebos_are_the_arms_that_must_equal_the_baseline(place):
    arms = {**GRID["arms"], "other": {"stp.variant": "detached", "optimizer.learning_rate": 0.1}}
    assert placebos(load_grid(write(place, arms=arms))) == ("placebo",)
    # also where no column of the differences tells
    overrides = {"stp.variant": "detached"}
    arms = {"none": {"stp.weight": 0}, "a": {"stp.weight": 0.1}, "b": {"stp.weight": 0.2, "stp.form": "consecutive"}}
    assert placebos(load_grid(write(place, arms=arms, overrides=overrides))) == ("a", "b")
    assert placebos(load_grid(write(place, arms=arms, overrides=overrides, baseline="b"))) == ("none", "a")
    assert placebos(load_grid(write(place, baseline="triple"))) == ()


def test_expressions():
    names = {"arm": "a", "seed": 2, "x": 0.5}
    for text, expected in {
        'arm == "a" and seed >= 2': True,
        'arm in ["b", "c"] or not seed < 3': False,
        "0 < x <= 0.5": True,
        "seed not in (1, 2)": False,
        "x > -1": True,
    }.items():
        assert Expression(text)(names) is expected
    for text in ("seed + 1", "arm.upper()", "[x for x in y]", "seed is 2", "lambda: 1"):
        with pytest.raises(InputError, match="--filter"):
            Expression(text)(names)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_grids_are_valid_and_paired(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    grid = load_grid(path)
    allowed = {"seed", "threads", *grid.axes.values()}
    for cell in grid.cells:
        base = next(c for c in grid.cells if (c.arm, c.seed, c.point) == (grid.baseline, cell.seed, cell.point))
        # arms differ in STP alone: same order of data, same weights at the start, same budget
        changed = set(differing_keys(base.config, cell.config)) - allowed
        assert all(key.startswith("stp.") for key in changed), changed
    assert grid.question
    header = path.read_text().partition("question:")[0]
    few = len({cell.seed for cell in grid.cells}) < MIN_PAIRS
    assert ("no verdict" in header) is few, "fewer seeds than a verdict needs, and its header does not say so"


def test_seeds_and_run_counts_are_those_that_the_files_and_the_document_claim(monkeypatch):
    root = SHIPPED[0].parents[2]
    monkeypatch.chdir(root)
    grids = {path.stem: load_grid(path) for path in SHIPPED}
    seeds = {name: {cell.seed for cell in grid.cells} for name, grid in grids.items()}
    for name in ("search_weight", "stp_weight"):  # what is chosen is judged with seeds that chose nothing
        assert not any(seeds[name] & other for grid, other in seeds.items() if grid != name), name
    claimed = {}
    for line in (root / "docs/ablations.md").read_text().partition("## Shipped grids")[2].splitlines():
        if cells := re.fullmatch(r"\| (`\w+`(?:, `\w+`)*) \| ([\d, +]+) \| .*", line):
            claimed |= dict(zip(re.findall(r"\w+", cells[1]), cells[2].split(", "), strict=True))
    counts = {name: str(len(grid.cells)) for name, grid in grids.items()}
    search = grids["search_weight"].search
    counts["search_weight"] += f" + {search.trials * len(seeds['search_weight'])}"
    assert claimed == counts
