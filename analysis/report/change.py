"""Figures of change: by block, by family, between runs and over training."""

from __future__ import annotations

import math

from analysis.accumulate import Curve
from analysis.families import family_changes
from analysis.inspection import Inspection
from analysis.report.depth import depth_layout
from analysis.report.figure import (
    Figure,
    Trace,
    View,
    band,
    clean,
    family_colour,
    family_markers,
    family_name,
    line,
    positions,
    reference_line,
    with_references,
)

METRICS = (
    ("curvature", "raw", "curvature", "degrees"),
    ("curvature", "rms", "curvature, RMS-normalised", "degrees"),
    ("curvature_centred", "raw", "curvature, positions removed", "degrees"),
    ("stp_triple", "raw", "STP triple", "1 - cos"),
    ("tangent_correlation_1", "raw", "C(1)", "cosine"),
    ("tube_radius_mean_9-24", "raw", "tube radius 9-24", "chords"),
    ("effective_rank", "raw", "effective rank", "dimensions"),
    ("step_norm", "raw", "step norm", "|v|"),
)
ZERO = reference_line(0, "")


def family_figure(inspection: Inspection) -> Figure:
    """Mean change by one block of each family, with its blocks as small points, beside the untrained twin."""
    letters = inspection.subject.letters
    families = list(dict.fromkeys(letters))
    views = []
    for metric, variant, label, unit in METRICS:
        traces: list[Trace] = []
        blocks = inspection.changes(metric, variant)
        for source, shift in (("untrained", 0.22), ("model", 0.0)):
            changes = inspection.families(metric, variant, source)
            for place, family in enumerate(families):
                colour = family_colour(family) if source == "model" else "@muted"
                name = family_name(family) if source == "model" else "untrained twin"
                symbol = "square" if source == "model" else "square-open"
                first = source == "model" or place == 0
                traces.append(_point(place + shift, changes[family].change, name, colour, symbol, unit, legend=first))
        for place, family in enumerate(families):
            mine = [number for number, letter in enumerate(letters) if letter == family]
            spread = [place - 0.22 + 0.06 * (i % 3 - 1) for i in range(len(mine))]
            texts = [f"block {number + 1} {family}: {blocks.value[number]:+.3g} {unit}" for number in mine]
            marker = {"color": f"{family_colour(family)}/0.55", "size": 7}
            more = {"mode": "markers", "showlegend": False, "hovertemplate": "%{text}<extra></extra>"}
            values = clean([blocks.value[number] for number in mine])
            traces.append({"x": spread, "y": values, "text": texts, "marker": marker, **more})
        layout = with_references(
            {
                "xaxis": {
                    "tickvals": list(range(len(families))),
                    "ticktext": [f"{family_name(family)}<br>{_blocks(letters.count(family))}" for family in families],
                    "range": [-0.6, len(families) - 0.4],
                    "zeroline": False,
                    "showgrid": False,
                },
                "yaxis": {"title": {"text": f"change by one block, {unit}"}},
            },
            traces,
            ZERO,
        )
        views.append(View(label, traces, layout))
    return Figure(
        "families",
        "Which family bends the path",
        "The change of a metric from the input to the output of a block, averaged over the blocks of a family "
        "(square, with its 95% interval over documents); small points are single blocks, the hollow square is the "
        "untrained twin. Below zero, a family straightens (for curvature and STP). Input and output are resampled "
        "together, so the interval is of the change itself.",
        "A block that writes little changes little: families at different depths meet different streams, so a "
        "family's mean also depends on where its blocks stand in the pattern.",
        views,
        width="half",
        choice="metric",
        height=420,
    )


def block_figure(inspection: Inspection) -> Figure:
    letters = inspection.subject.letters
    views = []
    for metric, variant, label, unit in METRICS[:4]:
        changes = inspection.changes(metric, variant)
        low, high = changes.interval()
        traces: list[Trace] = []
        for family in dict.fromkeys(letters):
            mine = [i for i, letter in enumerate(letters) if letter == family]
            traces.append(
                {
                    "type": "bar",
                    "x": [i + 1 for i in mine],
                    "y": clean([changes.value[i] for i in mine]),
                    "error_y": error_bars(
                        [changes.value[i] for i in mine], [low[i] for i in mine], [high[i] for i in mine]
                    ),
                    "name": family_name(family),
                    "marker": {"color": family_colour(family)},
                    "hovertemplate": f"block %{{x}} {family}: %{{y:+.3g}} {unit}<extra></extra>",
                }
            )
        axis: dict = {"title": {"text": "block"}, "showgrid": False}
        if len(letters) <= 32:
            axis |= {
                "tickvals": list(range(1, len(letters) + 1)),
                "ticktext": [f"{i}<br>{x}" for i, x in enumerate(letters, 1)],
            }
        layout = with_references({"xaxis": axis, "yaxis": {"title": {"text": f"change, {unit}"}}}, traces, ZERO)
        views.append(View(label, traces, layout))
    return Figure(
        "blocks",
        "Block by block",
        "The same changes in the order of the stack, with 95% intervals. Their sum is the difference between the "
        "last boundary and the embedding in the figure above.",
        "Neighbouring blocks can undo each other; a large bar is not by itself an effect on the output.",
        views,
        width="half",
        choice="metric",
        height=420,
    )


def comparison_figure(inspection: Inspection) -> Figure | None:
    """Subject minus each other run of the same stack; None if there is none."""
    others = [c for c in inspection.comparisons if c.about.letters == inspection.subject.letters]
    if not others:
        return None
    boundaries = inspection.model.boundaries
    x = positions(boundaries)
    views = []
    for other in others:
        prefix = f"{other.about.name}: " if len(others) > 1 else ""
        for metric, variant, label, unit in METRICS:
            gap = inspection.model.get(metric, variant) - other.measured.get(metric, variant)
            traces = band(x, gap, "@text", hidden=[len(x) - 1])
            traces.append(line(x[:-1], gap.value[:-1], "difference", "@text", width=1.5, showlegend=False))
            traces += family_markers(inspection.subject, boundaries, gap, unit)
            views.append(
                View(
                    prefix + label,
                    traces,
                    with_references(depth_layout(inspection, f"difference, {unit}"), traces, ZERO),
                )
            )
    names = ", ".join(other.about.name for other in others)
    return Figure(
        "comparison",
        f"Two runs: {inspection.subject.name} minus {names}",
        "The difference at every boundary on the same documents, triples and spans, with a 95% interval that is "
        "paired over documents. Where the band does not touch zero, the two models differ on this text.",
        "The interval is over documents, not over training seeds: two runs of one configuration with different seeds "
        "also differ. To claim an effect of STP, compare several seeds.",
        views,
        choice="metric",
    )


def foreign_comparison_figure(inspection: Inspection) -> Figure | None:
    """Runs with another stack: changes by family, as there are no common boundaries."""
    others = [c for c in inspection.comparisons if c.about.letters != inspection.subject.letters]
    if not others:
        return None
    views = []
    for metric, variant, label, unit in METRICS:
        traces: list[Trace] = []
        names = [inspection.subject.name, *(other.about.name for other in others)]
        everything = [inspection.families(metric, variant)]
        everything += [family_changes(other.measured.get(metric, variant), other.about.letters) for other in others]
        for place, changes in enumerate(everything):
            for number, (letter, change) in enumerate(changes.items()):
                x = place + 0.14 * (number - (len(changes) - 1) / 2)
                traces.append(
                    _point(x, change.change, family_name(letter), family_colour(letter), "square", unit, place == 0)
                )
        axis = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
        layout = with_references(
            {"xaxis": axis, "yaxis": {"title": {"text": f"change by one block, {unit}"}}}, traces, ZERO
        )
        views.append(View(label, traces, layout))
    return Figure(
        "foreign-comparison",
        "Runs of another stack: change by family",
        "Stacks that differ have no boundaries in common, so families are compared: the mean change by one block, "
        "with its 95% interval over the same documents.",
        "Depth, width and position in the pattern differ as well.",
        views,
        choice="metric",
    )


def _point(x: float, curve: Curve, name: str, colour: str, symbol: str, unit: str, legend: bool) -> Trace:
    low, high = curve.interval()
    text = f"{name}: {curve.value[0]:+.3g} {unit}"
    text += f"<br>95%: {low[0]:+.3g} .. {high[0]:+.3g}" if math.isfinite(low[0]) else ""
    return {
        "x": [x],
        "y": clean(curve.value),
        "error_y": error_bars(curve.value, low, high, colour),
        "name": name,
        "mode": "markers",
        "marker": {"color": colour, "size": 12, "symbol": symbol},
        "text": [text],
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": legend,
    }


def _blocks(n: int) -> str:
    return f"{n} block{'' if n == 1 else 's'}"


def error_bars(values, low, high, colour: str = "@muted") -> dict:
    """plotly's error bars from the ends of intervals; none where an end is not finite."""
    above = [h - v if math.isfinite(h) else 0 for v, h in zip(values, high, strict=True)]
    below = [v - x if math.isfinite(x) else 0 for v, x in zip(values, low, strict=True)]
    return {
        "type": "data",
        "color": colour,
        "symmetric": False,
        "array": clean(above),
        "arrayminus": clean(below),
        "thickness": 1.5,
        "width": 4,
    }
