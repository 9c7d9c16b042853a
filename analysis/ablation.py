"""Results of a grid -> paired comparisons of its arms with the baseline. Takes rows of CSV files, never runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.statistics import PairedResult, holm, paired, smallest_sign_flip_p
from errors import InputError, nearest

Row = dict[str, Any]
ALPHA = 0.05
# Below this many pairs there is no verdict: two or three differences that are alike by chance (shares of 1,000 answers
# take few values) pass a t test.
MIN_PAIRS = 5


@dataclass(frozen=True)
class Outcomes:
    """rows: one per finished run. axes: names of columns. metrics: column -> higher | lower is better, first = primary.

    planned: run ids of the whole grid, finished or not. notes: sentences to be said first.
    """

    name: str
    question: str
    baseline: str
    arms: tuple[str, ...]
    axes: tuple[str, ...]
    metrics: dict[str, str]
    rows: list[Row]
    curves: list[Row] = field(default_factory=list)
    costs: list[Row] = field(default_factory=list)
    settings: list[Row] = field(default_factory=list)
    planned: int = 0
    notes: tuple[str, ...] = ()

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """Values of the axes, in the order of the rows; [()] without axes."""
        return list(dict.fromkeys(tuple(row[name] for name in self.axes) for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({int(row["seed"]) for row in self.rows})

    def values(
        self, metric: str, arm: str, point: tuple[Any, ...], rows: Sequence[Row] | None = None
    ) -> dict[int, float]:
        """Seed -> value, of the runs that are finished and have it."""
        return {
            int(row["seed"]): float(row[metric])
            for row in (self.rows if rows is None else rows)
            if row["arm"] == arm and tuple(row[name] for name in self.axes) == point and is_number(row.get(metric))
        }

    def label(self, point: tuple[Any, ...]) -> str:
        return ", ".join(f"{name} {number(value)}" for name, value in zip(self.axes, point)) or "all"


@dataclass(frozen=True)
class Comparison:
    """where: the label of a point; "mean of all points" (per seed); or "a minus b", whether the effect differs.

    identical: every pair ended with the very same weights. p_holm: of p_t, over comparisons of this metric and kind.
    """

    metric: str
    arm: str
    kind: str
    where: str
    baseline_mean: float
    arm_mean: float
    result: PairedResult
    identical: bool
    p_holm: float = math.nan

    def verdict(self, direction: str) -> str:
        if self.identical:
            return "identical, bit for bit"
        if self.result.n < MIN_PAIRS:
            return f"no verdict: {self.result.n} of {MIN_PAIRS} pairs"
        if not self.p_holm < ALPHA:
            return "no difference shown"
        return "better" if (self.result.mean > 0) == (direction == "higher") else "worse"

    def as_row(self, direction: str) -> Row:
        about = {name: getattr(self, name) for name in ("metric", "kind", "where", "arm", "baseline_mean", "arm_mean")}
        smallest = smallest_sign_flip_p(self.result.n)
        return {
            **about,
            **asdict(self.result),
            "p_holm": self.p_holm,
            "p_flip_smallest": smallest,
            "verdict": self.verdict(direction),
        }


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file; numbers become numbers, empty fields None. [] if there is no such file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: _parsed(text) for name, text in row.items()} for row in csv.DictReader(file)]


def compare(outcomes: Outcomes) -> list[Comparison]:
    """All metrics, arms and points. Raises InputError if a metric is no column, or the baseline has no run."""
    columns = {name for row in outcomes.rows for name in row}
    found: list[Comparison] = []
    for metric in outcomes.metrics:
        if metric not in columns:
            raise InputError(f"metrics: {metric} is no column of the results{nearest(metric, columns)}")
        for kind in (_at_points, _over_points, _between_points):
            found += _corrected(list(kind(outcomes, metric)))
    if not found and outcomes.rows and not any(row["arm"] == outcomes.baseline for row in outcomes.rows):
        raise InputError(f"baseline: no run of arm {outcomes.baseline} is finished, so nothing can be compared")
    return found


def _at_points(outcomes: Outcomes, metric: str) -> Iterable[Comparison]:
    for point in outcomes.points:
        for arm in _treated(outcomes):
            base, mine = (outcomes.values(metric, name, point) for name in (outcomes.baseline, arm))
            yield from _comparison(outcomes, metric, arm, "point", outcomes.label(point), base, mine, [point])


def _over_points(outcomes: Outcomes, metric: str) -> Iterable[Comparison]:
    """Per seed the mean over all points: seeds are independent of each other, points of one seed are not."""
    if len(outcomes.points) < 2:
        return
    for arm in _treated(outcomes):
        base, mine = (_mean_over_points(outcomes, metric, name) for name in (outcomes.baseline, arm))
        yield from _comparison(outcomes, metric, arm, "mean", "mean of all points", base, mine, outcomes.points)


def _between_points(outcomes: Outcomes, metric: str) -> Iterable[Comparison]:
    """Whether the effect grows from the first point to the last: a difference of differences."""
    if len(outcomes.points) < 2:
        return
    first, last = outcomes.points[0], outcomes.points[-1]
    for arm in _treated(outcomes):
        gaps = []
        for name in (outcomes.baseline, arm):
            at_last, at_first = outcomes.values(metric, name, last), outcomes.values(metric, name, first)
            gaps.append({seed: at_last[seed] - at_first[seed] for seed in at_last if seed in at_first})
        where = f"{outcomes.label(last)} minus {outcomes.label(first)}"
        yield from _comparison(outcomes, metric, arm, "contrast", where, gaps[0], gaps[1], [first, last])


def _comparison(
    outcomes: Outcomes,
    metric: str,
    arm: str,
    kind: str,
    where: str,
    base: Mapping[int, float],
    mine: Mapping[int, float],
    points: list[tuple[Any, ...]],
) -> Iterable[Comparison]:
    seeds = [seed for seed in mine if seed in base]
    if seeds:
        means = [sum(values[seed] for seed in seeds) / len(seeds) for values in (base, mine)]
        same = _identical(outcomes, arm, points)
        yield Comparison(metric, arm, kind, where, means[0], means[1], paired(mine, base), same)


def _mean_over_points(outcomes: Outcomes, metric: str, arm: str) -> dict[int, float]:
    values = [outcomes.values(metric, arm, point) for point in outcomes.points]
    complete = set.intersection(*map(set, values))
    return {seed: sum(at[seed] for at in values) / len(values) for seed in sorted(complete)}


def _identical(outcomes: Outcomes, arm: str, points: list[tuple[Any, ...]]) -> bool:
    """Whether every pair there is ended with the same weights."""
    weights: dict[Any, dict[str, Any]] = {}
    for row in outcomes.rows:
        point = tuple(row[name] for name in outcomes.axes)
        if point in points and row["arm"] in (arm, outcomes.baseline):
            weights.setdefault((point, row["seed"]), {})[row["arm"]] = row.get("weights_sha256")
    pairs = [pair for pair in weights.values() if len(pair) == 2]
    return bool(pairs) and all(pair[arm] and pair[arm] == pair[outcomes.baseline] for pair in pairs)


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """Holm over those that could have differed at all."""
    p_values = [math.nan if comparison.identical else comparison.result.p_t for comparison in comparisons]
    return [Comparison(**{**vars(c), "p_holm": p}) for c, p in zip(comparisons, holm(p_values))]


def _treated(outcomes: Outcomes) -> list[str]:
    present = {row["arm"] for row in outcomes.rows}
    return [arm for arm in outcomes.arms if arm != outcomes.baseline and arm in present]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parsed(text: str | None) -> Any:
    if text is None or text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
