"""Results of a grid -> paired comparisons of its arms with the baseline. Takes rows of CSV files, never runs."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.statistics import PairedResult, holm, minimum_detectable_effect, paired, smallest_sign_flip_p
from errors import InputError, nearest

Row = dict[str, Any]
ALPHA = 0.05
# Below this many pairs there is no verdict: two or three differences that are alike by chance (shares of 1,000 answers
# take few values) pass a t test.
MIN_PAIRS = 5
BROKEN = "NOT IDENTICAL: pairs are broken"


@dataclass(frozen=True)
class Outcomes:
    """rows: one per finished run. axes: names of columns. metrics: column -> higher | lower is better, first = primary.

    planned: run ids of the whole grid, finished or not. notes: sentences to be said first. placebos: arms that must end
    with the baseline's weights.
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
    placebos: tuple[str, ...] = ()

    @property
    def points(self) -> list[tuple[Any, ...]]:
        """Values of the axes, in the order of the rows; [()] without axes."""
        return list(dict.fromkeys(tuple(row[name] for name in self.axes) for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        return sorted({int(row["seed"]) for row in self.rows})

    @property
    def families(self) -> dict[tuple[tuple[Any, ...], int], list[Row]]:
        """(point, seed) -> its runs: those that pairs are made of."""
        found: dict[tuple[tuple[Any, ...], int], list[Row]] = {}
        for row in self.rows:
            found.setdefault((tuple(row[name] for name in self.axes), int(row["seed"])), []).append(row)
        return found

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

    identical: every pair ended with the very same weights. broken: a pair of a placebo did not. p_holm: of p_t, over
    comparisons of this metric and kind. detectable_holm: result.detectable at 5% / their number, Holm's first step.
    """

    metric: str
    arm: str
    kind: str
    where: str
    baseline_mean: float
    arm_mean: float
    result: PairedResult
    identical: bool
    broken: bool
    p_holm: float = math.nan
    detectable_holm: float = math.nan

    def verdict(self, direction: str) -> str:
        if self.broken:
            return BROKEN
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
            "detectable_holm": self.detectable_holm,
            "p_flip_smallest": smallest,
            "verdict": self.verdict(direction),
        }


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file; numbers become numbers, empty fields None. [] if there is no such file.

    Names (of arms and runs), hashes and commits stay text, whatever they look like.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: (text or None) if _is_text(name) else _parsed(text) for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def compare(outcomes: Outcomes) -> list[Comparison]:
    """All metrics, arms and points.

    Raises InputError: a metric is no column, the baseline has no run, or a pair was trained on different data.
    """
    _check_data(outcomes)
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


def _check_data(outcomes: Outcomes) -> None:
    for rows in outcomes.families.values():
        known = [row for row in rows if row.get("manifest_sha256")]
        for row in known:
            if row["manifest_sha256"] != known[0]["manifest_sha256"]:
                raise InputError(
                    f"results: {known[0]['run_id']} and {row['run_id']} are a pair but were trained on different data "
                    f"(manifest_sha256 {known[0]['manifest_sha256']} and {row['manifest_sha256']})"
                )


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
        weights = _weights(outcomes, arm, points)
        same = bool(weights) and all(one and one == other for one, other in weights)
        broken = arm in outcomes.placebos and any(one and other and one != other for one, other in weights)
        yield Comparison(metric, arm, kind, where, means[0], means[1], paired(mine, base), same, broken)


def _mean_over_points(outcomes: Outcomes, metric: str, arm: str) -> dict[int, float]:
    values = [outcomes.values(metric, arm, point) for point in outcomes.points]
    complete = set.intersection(*map(set, values))
    return {seed: sum(at[seed] for at in values) / len(values) for seed in sorted(complete)}


def _weights(outcomes: Outcomes, arm: str, points: list[tuple[Any, ...]]) -> list[tuple[Any, Any]]:
    """Hashes of the last weights of every pair there: the baseline's and the arm's."""
    found = []
    for (point, _), rows in outcomes.families.items():
        hashes = {row["arm"]: row.get("weights_sha256") for row in rows}
        if point in points and arm in hashes and outcomes.baseline in hashes:
            found.append((hashes[outcomes.baseline], hashes[arm]))
    return found


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    """Holm over those that could have differed at all."""
    p_values = [math.nan if c.identical or c.broken else c.result.p_t for c in comparisons]
    level = ALPHA / max(1, sum(not math.isnan(p) for p in p_values))
    return [replace(c, p_holm=p, detectable_holm=_detectable(c, level)) for c, p in zip(comparisons, holm(p_values))]


def _detectable(comparison: Comparison, level: float) -> float:
    result = comparison.result
    if math.isnan(result.detectable):
        return math.nan
    return minimum_detectable_effect(result.sd, result.n, level)


def _treated(outcomes: Outcomes) -> list[str]:
    present = {row["arm"] for row in outcomes.rows}
    return [arm for arm in outcomes.arms if arm != outcomes.baseline and arm in present]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_text(column: str) -> bool:
    return column in ("arm", "run_id", "git") or column.endswith("sha256")


def _parsed(text: str | None) -> Any:
    if text is None or text == "":
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
