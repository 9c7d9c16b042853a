"""The figure of one document's path, with its text on hover."""

from __future__ import annotations

from analysis.inspection import Inspection
from analysis.report.figure import Figure, View, boundary_label, clean, visible


def trajectory_figure(inspection: Inspection) -> Figure | None:
    found = inspection.trajectory
    if found is None:
        return None
    tokens = [visible(text) for text in found.texts]
    around = [
        f"position {i}<br>{''.join(tokens[max(0, i - 12) : i])}<b>{token}</b>{''.join(tokens[i + 1 : i + 7])}"
        for i, token in enumerate(tokens)
    ]
    views = []
    for boundary, points, share in zip(found.boundaries, found.points, found.share, strict=True):
        marker = {
            "color": list(range(len(tokens))),
            "colorscale": "Viridis",
            "size": 7,
            "showscale": True,
            "colorbar": {"title": {"text": "position"}, "thickness": 12, "len": 0.8},
        }
        trace = {
            "x": clean([point[0] for point in points]),
            "y": clean([point[1] for point in points]),
            "mode": "lines+markers",
            "line": {"color": "@muted/0.35", "width": 1},
            "marker": marker,
            "textref": "tokens",
            "hovertemplate": "%{text}<extra></extra>",
            "showlegend": False,
        }
        axes = {
            "xaxis": {"title": {"text": "first principal component"}, "zeroline": False},
            "yaxis": {"title": {"text": "second principal component"}, "zeroline": False, "scaleanchor": "x"},
        }
        label = boundary_label(inspection.subject, boundary)
        views.append(View(f"{label} ({share:.0%} of the variance)", [trace], axes))
    return Figure(
        "trajectory",
        "One document as a path",
        f"The first {len(tokens)} tokens of one document, projected on the plane that holds most of the variance of "
        "this boundary (principal components, its own for each boundary). Hover a point for its text; colour is the "
        "position.",
        "Two dimensions of many: the share in the list says how much of the path is seen. Angles and distances in "
        "the projection are not those that the numbers above measure.",
        views,
        choice="boundary",
        height=520,
        extra={"texts": {"tokens": around}, "first": inspection.depth},
    )
