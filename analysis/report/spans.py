"""Figures over distance: tangent correlation by lag, tubes by span length."""

from __future__ import annotations

from collections.abc import Callable

from analysis.inspection import Inspection
from analysis.measure import Measured
from analysis.metrics import LAGS, bin_name
from analysis.report.depth import STATES
from analysis.report.figure import Figure, Trace, View, boundary_label, family_colour, line
from analysis.tube import SPAN_BINS

DASHES = ("dot", "dash", "dashdot", "solid", "solid")


def chosen_boundaries(inspection: Inspection) -> list[int]:
    """Indices of up to five boundaries: both ends, two between, and final."""
    depth = inspection.depth
    return list(dict.fromkeys([0, round(depth / 3), round(2 * depth / 3), depth, depth + 1]))


def correlation_figure(inspection: Inspection) -> Figure:
    views = []
    for variant, name in STATES:
        read = _reader(variant, [f"tangent_correlation_{m}" for m in LAGS])
        layout = {
            "xaxis": {"title": {"text": "distance m in tokens"}, "type": "log", "tickvals": list(LAGS)},
            "yaxis": {"title": {"text": "C(m), cosine"}},
        }
        views.append(View(name, _traces(inspection, list(LAGS), read), layout))
    return Figure(
        "correlation",
        "How long a direction is remembered: tangent correlation C(m)",
        "Mean cosine between steps that are m tokens apart. A line stays at 1. A walk is 0 everywhere. Noise around "
        "a fixed point starts at -0.5 (each step undoes half of the last one) and is 0 from m = 2 on. Positive "
        "values at larger m are coherent motion over many tokens.",
        "A shared drift also gives positive values; see the guards.",
        views,
        width="half",
        choice="states",
    )


def tube_figure(inspection: Inspection) -> Figure:
    names = [bin_name(bounds) for bounds in SPAN_BINS]
    kinds = (
        ("tube_radius_mean", "mean radius", "distance from the chord / its length"),
        ("tube_radius_max", "largest radius", "distance from the chord / its length"),
        ("path_efficiency", "path efficiency", "chord / walked length"),
    )
    views = []
    for prefix, label, unit in kinds:
        read = _reader("raw", [f"{prefix}_{name}" for name in names])
        layout = {
            "xaxis": {"title": {"text": "length of the span in tokens"}, "type": "category"},
            "yaxis": {"title": {"text": unit}, "rangemode": "tozero"},
        }
        views.append(View(label, _traces(inspection, names, read, mode="lines+markers"), layout))
    return Figure(
        "tubes",
        "How wide the tube is: distance from the chord, by span",
        "For spans of a piece: how far the tokens inside stray from the straight line through its ends, in "
        "units of that line's length (noise 0.87, a walk 0.41 whatever the length, a line 0); and how much of the "
        "walked length the chord is. The same spans at all boundaries and in all models.",
        "A narrow tube is what STP asks for, not a sign of a better model: in published studies wider tubes over "
        "long spans went with better prediction.",
        views,
        width="half",
        choice="measure",
    )


def _reader(variant: str, metrics: list[str]) -> Callable[[Measured, int], list[float]]:
    return lambda measured, index: [float(measured.get(metric, variant).value[index]) for metric in metrics]


def _traces(
    inspection: Inspection, x: list, read: Callable[[Measured, int], list[float]], mode: str = "lines+markers"
) -> list[Trace]:
    traces = []
    for dash, name, label in (("dot", "iid", "i.i.d. rows"), ("dash", "walk", "random-walk rows")):
        index = inspection.random.boundaries.index(name)
        traces.append(line(x, read(inspection.random, index), label, "@muted", dash=dash, width=1.5))
    twin = inspection.controls["untrained"]
    traces.append(line(x, read(twin, inspection.depth), "untrained twin, last", "@muted", width=1.5))
    boundaries = inspection.model.boundaries
    for index, dash in zip(chosen_boundaries(inspection), DASHES, strict=False):
        family = inspection.subject.family(boundaries[index])
        label = boundary_label(inspection.subject, boundaries[index])
        values = read(inspection.model, index)
        traces.append(line(x, values, label, family_colour(family), dash=dash, width=2.5, mode=mode))
    return traces
