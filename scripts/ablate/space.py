"""What a grid file's `search` section says: which keys, in which range, how often; and the trials so far."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from errors import InputError, nearest, require, require_number
from training.config import RunConfig

KEYS = ("ranges", "trials", "together", "seed")
RANGE_KEYS = ("low", "high", "log")
# Columns that hold validation whatever is answered, and those that are measured on the answers of a split.
HELD_OUT = ("val_bits_per_byte", "val_loss")
ANSWERS = ("exact", "dfa", "dfa_letter", "invalid", "unfinished")
# All that the receipt of a run measures, and what `cheap_metrics` measures of every family.
RECEIPT_METRICS = (*HELD_OUT, "unigram_bits_per_byte")
CURVATURE = ("degrees", "stp_consecutive", "state_norm", "step_norm", "effective_rank")
PREFIX = "trial_"


@dataclass(frozen=True)
class Range:
    """Of a dotted config key, both ends included. log: uniform in the logarithm. whole: whole numbers only."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool

    def __str__(self) -> str:
        return f"{self.key} in {self.low:g} .. {self.high:g}{' (log)' if self.log else ''}"


@dataclass(frozen=True)
class Search:
    """metric: the grid's first, of validation; direction: higher | lower is better. trials: in all.

    together: trials that are suggested before any of them is known. seed: of the suggestions.
    """

    ranges: tuple[Range, ...]
    trials: int
    together: int
    seed: int
    metric: str
    direction: str

    def __str__(self) -> str:
        better = "highest" if self.direction == "higher" else "lowest"
        where = ", ".join(map(str, self.ranges))
        return f"{self.trials} trials of {where}, {self.together} at a time, for the {better} {self.metric}"


@dataclass(frozen=True)
class Trial:
    """state: running | complete | failed. value: mean over the seeds, of a complete one. same_as: the number of an
    earlier trial with the same values, whose runs stand for this one's."""

    number: int
    values: dict[str, float]
    state: str = "running"
    value: float | None = None
    same_as: int | None = None

    @property
    def name(self) -> str:
        """Of its arm."""
        return f"{PREFIX}{self.number if self.same_as is None else self.same_as:03d}"


def is_trial(arm: str) -> bool:
    return arm.startswith(PREFIX)


# Settings of a run over the grid's own -> its config, or InputError.
ConfigOf = Callable[[Mapping[str, Any]], RunConfig]


def read_search(
    content: Mapping[str, Any], answers: str, metrics: Mapping[str, str], path: Path, config_of: ConfigOf
) -> Search | None:
    """None without a `search` section. Raises InputError, also where a choice would be made on a test."""
    given = content.get("search")
    if given is None:
        return None
    where = f"{path}: search"
    for key in map(str, given):
        require(key in KEYS, where, f"unknown key {key}{nearest(key, KEYS)}; expected {', '.join(KEYS)}")
    require(not content.get("axes"), where, "cannot be combined with axes; put what is fixed into overrides")
    for arm in map(str, content["arms"]):
        require(not is_trial(arm), f"{path}: arms", f"{arm}: names that begin with {PREFIX} belong to the search")
    metric, direction = next(iter(metrics.items()))
    require(
        answers in ("none", "validation"),
        where,
        f"chooses, so it may see validation only; expected evaluate.answers: validation, got {answers}",
    )
    allowed = HELD_OUT + (ANSWERS if answers == "validation" else ())
    require(
        metric in allowed,
        where,
        f"chooses by {metric}, the first of metrics, which is no measure of validation here; expected one of "
        f"{', '.join(allowed)}{nearest(metric, allowed)}",
    )
    ranges = given.get("ranges")
    require(isinstance(ranges, dict) and bool(ranges), f"{where}.ranges", "expected keys, each with low and high")
    for name, least in (("trials", 1), ("together", 1), ("seed", 0)):
        value = given.get(name, {"together": 1, "seed": 0}.get(name))
        require_whole(f"{where}.{name}", value, least)
    found = tuple(_range(f"{where}.ranges.{key}", str(key), about, config_of) for key, about in ranges.items())
    return Search(found, given["trials"], given.get("together", 1), given.get("seed", 0), metric, direction)


def require_whole(key: str, value: Any, least: int) -> None:
    """Raises InputError unless it is a whole number, and no less."""
    require(isinstance(value, int) and not isinstance(value, bool), key, f"expected a whole number, got {value!r}")
    require_number(key, value, least)


def _range(where: str, key: str, given: Any, config_of: ConfigOf) -> Range:
    require(isinstance(given, dict), where, f"expected low and high, got {given!r}")
    for name in map(str, given):
        require(name in RANGE_KEYS, where, f"unknown key {name}{nearest(name, RANGE_KEYS)}; expected low, high, log")
    low, high, log = given.get("low"), given.get("high"), given.get("log", False)
    for name, value in (("low", low), ("high", high)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        require(number, f"{where}.{name}", f"expected a finite number, got {value!r}")
    require(isinstance(log, bool), f"{where}.log", f"expected true or false, got {log!r}")
    require(low < high, where, f"low must be below high, got {low} and {high}")
    require(not log or low > 0, f"{where}.low", f"a logarithmic range begins above 0, got {low}")
    for value in (low, high):  # both ends must be values that a run takes
        try:
            config = config_of({key: value})
        except InputError as error:
            raise InputError(f"{where}: at {value}: {error}") from None
    now = OmegaConf.select(OmegaConf.structured(config), key)
    require(
        isinstance(now, (int, float)) and not isinstance(now, bool), where, f"is no number in a config, but {now!r}"
    )
    return Range(key, low, high, log, isinstance(now, int))


def trial_rows(trials: list[Trial]) -> list[dict[str, Any]]:
    """For trials.csv."""
    return [
        {"trial": t.number, "arm": t.name, "state": t.state, "value": t.value, "same_as": t.same_as, **t.values}
        for t in trials
    ]


def read_trials(folder: Path) -> list[Trial]:
    """Of trials.csv; [] without one. Raises InputError if it is not one."""
    path = folder / "trials.csv"
    if not path.is_file():
        return []
    fixed = ("trial", "arm", "state", "value", "same_as")
    try:
        with path.open(newline="") as file:
            return [
                Trial(
                    int(row["trial"]),
                    {key: _number(value) for key, value in row.items() if key not in fixed},
                    row["state"],
                    float(row["value"]) if row["value"] else None,
                    int(row["same_as"]) if row["same_as"] else None,
                )
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a table of trials ({type(error).__name__})") from None


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def summary(search: Search, trials: list[Trial]) -> str:
    """One sentence: how far it is, and the best so far."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    failed = sum(trial.state == "failed" for trial in trials)
    text = f"Search: {len(complete)} of {search.trials} trials are done{f', {failed} failed' if failed else ''}"
    if complete:
        sign = -1 if search.direction == "higher" else 1
        best = min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number))
        values = ", ".join(f"{key} {value:.4g}" for key, value in best.values.items())
        text += f"; best is {best.name} with {values}: {search.metric} {best.value:.5g} on validation"
        text += ". The best of many is flattered by chance: confirm it with seeds that were not searched with"
    return f"{text}."
