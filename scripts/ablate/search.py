"""Searches keys of the config on validation with Optuna; every trial is an arm, its runs are ordinary runs of the grid.

What was suggested and what came of it is in the grid's folder (search.db, SQLite), and suggestions follow from that and
the seed alone. So a search that was killed goes on where it was and ends as an undisturbed one does: what was suggested
is run to its end, and what is finished is never repeated.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console

from errors import InputError
from scripts.ablate.grid import Grid, load_grid
from scripts.ablate.results import check_folder, result_rows, to_csv, write_results
from scripts.ablate.runner import Outcome, run_local
from scripts.ablate.space import Search, Trial, read_trials, trial_rows
from training.config import RunConfig
from training.durable import replace_atomically

DATABASE = "search.db"
# So many trials are drawn at random before Optuna's estimator (TPE) has a say.
RANDOM_TRIALS = 5


class Study:
    """The stored trials of a grid's search. Raises InputError: no Optuna, a broken file, or another search's."""

    def __init__(self, grid: Grid) -> None:
        assert grid.search is not None
        self.search: Search = grid.search
        self.optuna = _optuna()
        path = grid.folder / DATABASE
        direction = "maximize" if self.search.direction == "higher" else "minimize"
        try:
            storage = self.optuna.storages.RDBStorage(f"sqlite:///{path}")
            self.study = self.optuna.create_study(
                storage=storage, study_name=grid.name, direction=direction, load_if_exists=True
            )
            stored = self.study.user_attrs.get("definition")
        except Exception as error:  # of SQLite, SQLAlchemy, Alembic or Optuna
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: no search of Optuna's ({type(error).__name__}: {reason})") from None
        definition = _definition(grid)
        if stored is None:
            self.study.set_user_attr("definition", definition)
        elif stored != definition:
            differing = sorted(key for key in definition if stored.get(key) != definition[key])
            raise InputError(
                f"{path}: holds the trials of another search ({', '.join(differing)}); move {grid.folder} away or "
                f"rename the grid"
            )

    def trials(self) -> list[Trial]:
        """All that were suggested, in order."""
        states = self.optuna.trial.TrialState
        names = {states.COMPLETE: "complete", states.FAIL: "failed"}
        found: list[Trial] = []
        for frozen in self.study.get_trials(deepcopy=False):
            if len(frozen.params) < len(self.search.ranges):
                break  # a kill came between the number and its values
            earlier = (t.number for t in found if t.values == frozen.params and t.same_as is None)
            state = names.get(frozen.state, "running")
            found.append(Trial(frozen.number, dict(frozen.params), state, frozen.value, next(earlier, None)))
        return found

    def suggest(self) -> list[Trial]:
        """The trials to run next, [] when all are done: what is left of the first block of `together` that has some."""
        closed = [trial.state != "running" for trial in self.trials()]
        first = closed.index(False) if False in closed else len(closed)
        end = min(self.search.trials, (first // self.search.together + 1) * self.search.together)
        for number in range(first, end):
            self._suggest(number)
        return [trial for trial in self.trials()[first:end] if trial.state == "running"]

    def _suggest(self, number: int) -> None:
        """Values for a trial that may be there already, with all its values, some, or none."""
        stored = self.study.get_trials(deepcopy=False)
        if number < len(stored):
            if stored[number].state.is_finished():
                return
            trial = self.optuna.trial.Trial(self.study, stored[number]._trial_id)
        else:
            trial = self.study.ask()
        for place, about in enumerate(self.search.ranges):
            # One sampler for each value, so that one that is stored already does not shift the next.
            seed = (self.search.seed * 1_000_003 + number) * 101 + place
            self.study.sampler = self.optuna.samplers.TPESampler(
                n_startup_trials=RANDOM_TRIALS, constant_liar=True, seed=seed % 2**32
            )
            suggest = trial.suggest_int if about.whole else trial.suggest_float
            suggest(about.key, about.low, about.high, log=about.log)

    def tell(self, trial: Trial, value: float | None) -> None:
        """value None: it failed."""
        if value is None:
            self.study.tell(trial.number, state=self.optuna.trial.TrialState.FAIL)
        else:
            self.study.tell(trial.number, value)


def stored_trials(grid: Grid) -> list[Trial]:
    """What a grid's folder knows of its trials. The database is the truth; trials.csv, for people, may be gone or old.

    Raises InputError: a broken file, or another search's."""
    return Study(grid).trials() if (grid.folder / DATABASE).is_file() else read_trials(grid.folder)


def run_search(path: str | Path, threads: int | None, jobs: int, console: Console) -> tuple[Grid, Outcome]:
    """Until all trials are done or a stop is asked for. A trial that fails is reported and counts as one."""
    configs: dict[tuple[str, ...], RunConfig] = {}
    grid = load_grid(path, threads, configs=configs)
    study = Study(grid)
    check_folder(load_grid(path, threads, study.trials(), configs))
    failed: dict[str, str] = {}
    while True:
        batch = study.suggest()
        trials = _write(grid, study)
        grid = load_grid(path, threads, trials, configs)
        lost = {trial.name for trial in trials if trial.state == "failed"}
        cells = tuple(cell for cell in grid.cells if cell.arm not in lost and cell.run_id not in failed)
        for trial in batch:
            values = ", ".join(f"{key}={value:.6g}" for key, value in trial.values.items())
            console.print(f"{trial.name} of {study.search.trials}: {values}", markup=False)
        outcome = run_local(grid, jobs, threads, console, cells)
        write_results(grid)
        failed |= outcome.failed
        if outcome.interrupted or not batch:
            return grid, dataclasses.replace(outcome, failed=failed)
        rows = result_rows(grid)
        seeds = len({cell.seed for cell in grid.cells})
        for trial in batch:
            value = _value(trial, rows, study.search.metric, seeds)
            study.tell(trial, value)
            shown = "failed" if value is None else f"{study.search.metric} {value:.6g}"
            console.print(f"{trial.name}: {shown}", markup=False)
        _write(grid, study)


def _write(grid: Grid, study: Study) -> list[Trial]:
    trials = study.trials()
    replace_atomically(grid.folder / "trials.csv", to_csv(trial_rows(trials)).encode())
    return trials


def _value(trial: Trial, rows: list[dict[str, Any]], metric: str, seeds: int) -> float | None:
    """Mean over the seeds; None unless all of them have one."""
    values = [row.get(metric) for row in rows if row["arm"] == trial.name]
    numbers = [float(value) for value in values if value is not None and math.isfinite(value)]
    return fmean(numbers) if len(numbers) == seeds else None


def _definition(grid: Grid) -> dict[str, str]:
    """What suggestions and values depend on, beside the settings of runs (which are compared run by run)."""
    assert grid.search is not None
    search = grid.search
    return {
        "ranges": json.dumps([dataclasses.asdict(about) for about in search.ranges]),
        "metric": f"{search.metric}, {search.direction} is better, answers: {grid.evaluate.answers}",
        "seeds": str(sorted({cell.seed for cell in grid.cells})),
        "search.seed": str(search.seed),
        "runs": _runs(grid),
    }


def _runs(grid: Grid) -> str:
    """The config that trials change, threads left out (a machine's, kept by the runs that are there)."""
    config = dataclasses.replace(grid.cells[0].config, threads=None)
    return config.sha256


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError("search: needs Optuna, which is in requirements.lock (make setup)") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
