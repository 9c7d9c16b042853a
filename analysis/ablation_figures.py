"""Figures of a grid's page, as plain data (see analysis/report/figure.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.ablation import Comparison, Outcomes, is_number
from analysis.report.figure import Figure, Trace, View, clean, escape, family_name

# Colours of arms, light and dark; the baseline is the first. Names may hold letters only.
ARM_COLOURS = {
    f"arm{letter}": pair
    for letter, pair in zip(
        "ABCDEFGHIJKL",
        [
            ("#5c6b73", "#a9b4bb"), ("#d1495b", "#ef6f7f"), ("#2e86ab", "#4fb0d9"), ("#3d8361", "#6cc08b"),
            ("#d9951b", "#f2bd5a"), ("#6c4ab6", "#a58cf0"), ("#0a9396", "#5fd0c5"), ("#8d6e63", "#c7a697"),
            ("#b5179e", "#e36fd2"), ("#588157", "#a3b18a"), ("#bc6c25", "#dda15e"), ("#264653", "#7fa3b3"),
        ],
    )
}  # fmt: skip
GRID_POINTS = 60


def arm_colour(outcomes: Outcomes, arm: str) -> str:
    order = [outcomes.baseline, *(name for name in outcomes.arms if name != outcomes.baseline)]
    names = list(ARM_COLOURS)
    return f"@{names[order.index(arm) % len(names)]}"


def paired_figure(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> Figure | None:
    """Every seed's difference as a dot, mean and Student's interval beside it; one view per metric."""
    views = []
    for metric, direction in outcomes.metrics.items():
        mine = [c for c in comparisons if c.metric == metric and c.kind != "contrast"]
        if mine:
            views.append(_paired_view(outcomes, mine, metric, direction))
    if not views:
        return None
    return Figure(
        "paired",
        "Arm minus baseline, seed by seed",
        f"One small dot is one seed: the arm's run minus the run of {outcomes.baseline} with the same weights at the "
        f"start and the same data in the same order. The diamond is the mean, its bar Student's 95% interval.",
        "Whether it holds for other data, sizes or budgets. Intervals of few seeds lean on normal differences.",
        views,
        height=440,
    )


def _paired_view(outcomes: Outcomes, comparisons: Sequence[Comparison], metric: str, direction: str) -> View:
    places = list(dict.fromkeys(comparison.where for comparison in comparisons))
    arms = list(dict.fromkeys(comparison.arm for comparison in comparisons))
    traces: list[Trace] = []
    for number, arm in enumerate(arms):
        mine = [comparison for comparison in comparisons if comparison.arm == arm]
        shift = (number - (len(arms) - 1) / 2) * 0.8 / max(len(arms), 1)
        x = [places.index(comparison.where) + shift for comparison in mine]
        half = [comparison.result.high - comparison.result.mean for comparison in mine]
        colour = arm_colour(outcomes, arm)
        dots_x, dots_y, texts = [], [], []
        for place, comparison in zip(x, mine):
            for seed, value in seed_differences(outcomes, comparison):
                dots_x.append(place)
                dots_y.append(value)
                texts.append(f"{escape(arm)}, seed {seed}: {value:+.4g}")
        marker = {"color": f"{colour}/0.5", "size": 6}
        traces.append(
            {
                "x": dots_x,
                "y": clean(dots_y),
                "mode": "markers",
                "marker": marker,
                "text": texts,
                "showlegend": False,
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
        traces.append(
            {
                "x": [place + 0.04 for place in x],
                "y": clean([comparison.result.mean for comparison in mine]),
                "error_y": {"type": "data", "array": clean(half), "color": colour, "thickness": 1.5, "width": 4},
                "mode": "markers",
                "name": escape(arm),
                "marker": {"color": colour, "size": 10, "symbol": "diamond", "line": {"color": "@paper", "width": 1}},
            }
        )
    layout = {
        "xaxis": {
            "tickvals": list(range(len(places))),
            "ticktext": [escape(place) for place in places],
            "zeroline": False,
        },
        "yaxis": {"title": {"text": f"{escape(metric)}, difference ({direction} is better)"}, "zeroline": True},
        "shapes": [
            {
                "type": "line",
                "xref": "paper",
                "x0": 0,
                "x1": 1,
                "y0": 0,
                "y1": 0,
                "line": {"color": "@muted", "dash": "dot", "width": 1},
            }
        ],
    }
    return View(metric, traces, layout)


def seed_differences(outcomes: Outcomes, comparison: Comparison) -> list[tuple[int, float]]:
    """(seed, difference) of every pair behind a comparison at a point or over all points."""
    points = [
        point for point in outcomes.points if comparison.kind == "mean" or outcomes.label(point) == comparison.where
    ]
    pairs = []
    for seed in outcomes.seeds:
        gaps = []
        for point in points:
            base = outcomes.values(comparison.metric, outcomes.baseline, point)
            mine = outcomes.values(comparison.metric, comparison.arm, point)
            gaps += [mine[seed] - base[seed]] if seed in mine and seed in base else []
        if gaps and len(gaps) == len(points):
            pairs.append((seed, sum(gaps) / len(gaps)))
    return pairs


def curve_figure(outcomes: Outcomes, key: str, column: str, title: str, unit: str) -> Figure | None:
    """Mean over seeds against loss-bearing tokens, with the range over seeds as a band; one view per point."""
    views = []
    for point in outcomes.points:
        traces: list[Trace] = []
        for arm in outcomes.arms:
            curve = _course(outcomes, arm, point, column)
            if curve is None:
                continue
            x, low, mean, high = curve
            colour = arm_colour(outcomes, arm)
            outline = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
            traces.append(
                {
                    "x": [*x, *x[::-1]],
                    "y": clean([*high, *low[::-1]]),
                    "fill": "toself",
                    "fillcolor": f"{colour}/0.13",
                    **outline,
                }
            )
            traces.append(
                {
                    "x": list(x),
                    "y": clean(mean),
                    "name": escape(arm),
                    "mode": "lines",
                    "line": {"color": colour, "width": 2},
                }
            )
        if traces:
            axes = {"xaxis": {"title": {"text": "loss-bearing tokens"}}, "yaxis": {"title": {"text": unit}}}
            views.append(View(escape(outcomes.label(point)), traces, axes))
    if not views:
        return None
    return Figure(
        key,
        title,
        "Lines are means over seeds at equal tokens, bands reach from the lowest seed to the highest.",
        "Pairs: the band shows how seeds differ, which the paired plot takes out.",
        views,
        width="half",
        height=360,
    )


def _course(outcomes: Outcomes, arm: str, point: tuple[Any, ...], column: str) -> Any:
    """x, lowest, mean, highest over seeds on a common grid of tokens; None without records."""
    runs: dict[int, list[tuple[float, float]]] = {}
    for row in outcomes.curves:
        at = tuple(row[name] for name in outcomes.axes)
        if row["arm"] == arm and at == point and is_number(row.get(column)) and is_number(row.get("tokens")):
            runs.setdefault(row["seed"], []).append((row["tokens"], row[column]))
    if not runs:
        return None
    curves = [np.array(sorted(points), dtype=np.float64).T for points in runs.values()]
    x = np.linspace(max(curve[0, 0] for curve in curves), min(curve[0, -1] for curve in curves), GRID_POINTS)
    y = np.stack([np.interp(x, *curve) for curve in curves])
    return x.tolist(), y.min(0).tolist(), y.mean(0).tolist(), y.max(0).tolist()


def family_figure(
    outcomes: Outcomes, key: str, prefix: str, title: str, read: str, limits: str, unit: str
) -> Figure | None:
    """A curvature or collapse number per family and arm; one view per point."""
    columns = list(dict.fromkeys(name for row in outcomes.rows for name in row if name.startswith(f"{prefix}/")))
    if not columns:
        return None
    families = [column.rsplit("/", 1)[1] for column in columns]
    views = []
    for point in outcomes.points:
        traces = []
        for arm in outcomes.arms:
            values = [list(outcomes.values(column, arm, point).values()) for column in columns]
            if not all(values):
                continue
            means = [float(np.mean(v)) for v in values]
            spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
            traces.append(
                {
                    "type": "bar",
                    "x": [escape(family_name(f)) for f in families],
                    "y": clean(means),
                    "name": escape(arm),
                    "marker": {"color": arm_colour(outcomes, arm)},
                    "error_y": {"type": "data", "array": clean(spread), "width": 2},
                }
            )
        if traces:
            views.append(
                View(escape(outcomes.label(point)), traces, {"yaxis": {"title": {"text": unit}}, "barmode": "group"})
            )
    return Figure(key, title, read, limits, views, width="half", height=340) if views else None


def cost_figure(outcomes: Outcomes) -> Figure | None:
    """Seconds of every run, by arm."""
    traces: list[Trace] = []
    for arm in outcomes.arms:
        seconds = [
            row["seconds"]
            for row in outcomes.costs
            if row["arm"] == arm and is_number(row.get("seconds")) and row.get("starts") == 1
        ]
        if seconds:
            traces.append(
                {
                    "type": "box",
                    "y": clean(seconds),
                    "name": escape(arm),
                    "boxpoints": "all",
                    "marker": {"color": arm_colour(outcomes, arm), "size": 4},
                }
            )
    if not traces:
        return None
    return Figure(
        "cost",
        "Cost per arm",
        "Wall time of each run that was not interrupted, preflight and checkpoints included, evaluation not.",
        "Steady conditions: runs stand side by side and other jobs may share the machine.",
        [
            View(
                "seconds", traces, {"yaxis": {"title": {"text": "seconds"}, "rangemode": "tozero"}, "showlegend": False}
            )
        ],
        width="half",
        height=340,
    )
