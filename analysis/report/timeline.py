"""Figures over training: what changed since the first step, from kept checkpoints and from the run's own log."""

from __future__ import annotations

import numpy as np

from analysis.accumulate import Curve
from analysis.inspection import Inspection
from analysis.report.change import METRICS, error_bars
from analysis.report.figure import Figure, Trace, View, family_colour, family_name, line

SHOWN = tuple(metric for metric in METRICS if metric[0] != "curvature_centred")  # that needs a second pass


def timeline_figure(inspection: Inspection) -> Figure | None:
    """None where there is one checkpoint only and nothing was logged."""
    views = []
    if len(inspection.timeline) >= 2:
        for metric, variant, label, unit in SHOWN:
            views.append(View(label, _checkpoints(inspection, metric, variant), _layout(f"change, {unit}")))
    measured = (
        f"The change since {inspection.timeline[0][0].name}, at every checkpoint that the run kept, averaged over the "
        "boundaries that a family writes, on a smaller set of the same documents; 95% intervals are of the change, "
        "paired over documents. "
        if views
        else ""
    )
    views += _logged(inspection)
    if not views:
        return None
    return Figure(
        "timeline",
        "What training did, step by step",
        f"{measured}Views named 'logged' are what the run itself measured on its training batches.",
        "A run keeps few checkpoints by default; checkpoint.keep_every=100 keeps one every 100 steps. A curve that "
        "keeps falling while the held-out loss does not is the picture of a cheat.",
        views,
        choice="metric",
    )


def _layout(unit: str) -> dict:
    return {"xaxis": {"title": {"text": "training step"}, "zeroline": False}, "yaxis": {"title": {"text": unit}}}


def _checkpoints(inspection: Inspection, metric: str, variant: str) -> list[Trace]:
    steps = [float(about.step or 0) for about, _ in inspection.timeline]
    about, first = inspection.timeline[0]
    groups: dict[str, list[int]] = {}
    for index, boundary in enumerate(first.boundaries):
        groups.setdefault(about.family(boundary), []).append(index)
    traces: list[Trace] = []
    reach = (steps[-1] - steps[0]) / 150
    for number, (family, indices) in enumerate(groups.items()):
        start = first.get(metric, variant).at(indices).mean()
        changes = [measured.get(metric, variant).at(indices).mean() - start for _, measured in inspection.timeline]
        curve = _side_by_side(changes)
        x = [step + reach * (number - len(groups) / 2) for step in steps]  # aside, so that bars do not hide each other
        error = error_bars(curve.value, *curve.interval(), family_colour(family)) | {"thickness": 1, "width": 0}
        more = {"mode": "lines+markers", "error_y": error}
        traces.append(line(x, curve.value, family_name(family), family_colour(family), width=1.5, **more))
    return traces


def _side_by_side(curves: list[Curve]) -> Curve:
    """Curves of one entry as one curve; without intervals where they were resampled differently."""
    if len({len(curve.samples) for curve in curves}) > 1:
        return Curve(np.concatenate([curve.samples[:1] for curve in curves], 1), "none")
    return Curve(np.concatenate([curve.samples for curve in curves], 1), curves[-1].method)


def _logged(inspection: Inspection) -> list[View]:
    views = []
    families = ["embedding", *dict.fromkeys(inspection.subject.letters), "final"]
    for prefix, label, unit in (
        ("curvature/degrees", "logged curvature", "degrees"),
        ("curvature/effective_rank", "logged effective rank", "dimensions"),
        ("curvature/step_norm", "logged step norm", "|v|"),
        ("stp/raw", "logged STP", "1 - cos"),
    ):
        traces = []
        for family in families:
            points = [(r["step"], r[f"{prefix}/{family}"]) for r in inspection.records if r.get(f"{prefix}/{family}")]
            if points:
                x, y = zip(*points, strict=True)
                traces.append(line(x, y, family_name(family), family_colour(family), width=1.5))
        if traces:
            views.append(View(label, traces, _layout(unit)))
    return views
