"""Figures as plain data. Colours are names ("@A", "@muted/0.2" with an opacity) that the page resolves for its "
"theme."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from analysis.accumulate import Curve, FloatArray
from analysis.families import FAMILY_NAMES
from analysis.inspection import About

Trace = dict[str, Any]
# More boundaries than this: not every one has a label.
MAX_TICKS = 32


@dataclass(frozen=True)
class View:
    """One of the states of a figure, chosen by a button (or by a list where there are many)."""

    name: str
    traces: list[Trace]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """read: how to read it; limits: what it cannot show. width: full or half."""

    key: str
    title: str
    read: str
    limits: str
    views: list[View]
    width: str = "full"
    height: int = 400
    # What precedes the choice of a view, such as "states".
    choice: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def escape(text: str) -> str:
    """For HTML and for plotly's labels, which read some of it."""
    return html.escape(text, quote=True)


def visible(token: str) -> str:
    """A token's text with its white space made visible."""
    return escape(token.replace("\n", "\u21b5").replace("\t", "\u2192").replace(" ", "\u2423"))


def clean(values: Sequence[float] | FloatArray) -> list[float | None]:
    """Numbers with six digits; None (a gap) for what is not finite."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]


def family_colour(family: str) -> str:
    """Of one family, or of the first letter of several."""
    return f"@{family}" if family in ("embedding", "final") else f"@{family[0]}"


def family_name(family: str) -> str:
    if family in FAMILY_NAMES:
        return FAMILY_NAMES[family]
    return " + ".join(FAMILY_NAMES.get(letter, letter) for letter in family.split("+"))


def boundary_label(about: About, boundary: int | str) -> str:
    return str(boundary) if boundary == "final" else f"{boundary} {about.family(boundary)}".replace("embedding", "emb")


def depth_axis(about: About, boundaries: Sequence[int | str]) -> dict[str, Any]:
    """x axis over boundaries at 0, 1, 2, ...: "final" stands apart by half a place."""
    step = max(1, math.ceil(len(boundaries) / MAX_TICKS))
    shown = [i for i, b in enumerate(boundaries) if i % step == 0 or b == "final"]
    places = positions(boundaries)
    return {
        "title": {"text": "boundary (residual stream after this block)"},
        "tickvals": [places[i] for i in shown],
        "ticktext": [boundary_label(about, boundaries[i]).replace(" ", "<br>") for i in shown],
        "range": [-0.5, places[-1] + 0.5],
        "showgrid": False,
        "zeroline": False,
    }


def positions(boundaries: Sequence[int | str]) -> list[float]:
    return [i + 0.5 if b == "final" else float(i) for i, b in enumerate(boundaries)]


def band(x: Sequence[float], curve: Curve, colour: str, hidden: Sequence[int] = ()) -> list[Trace]:
    """The 95% interval as a filled band; nothing where there is none. hidden: places that are left out."""
    low, high = curve.interval()
    keep = [i for i in range(len(x)) if i not in hidden and math.isfinite(low[i]) and math.isfinite(high[i])]
    if not keep:
        return []
    outline = [x[i] for i in keep] + [x[i] for i in reversed(keep)]
    edge = clean([high[i] for i in keep] + [low[i] for i in reversed(keep)])
    shared = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    return [{"x": outline, "y": edge, "fill": "toself", "fillcolor": f"{colour}/0.18", **shared}]


def line(x: Sequence[float], y: Sequence[float] | FloatArray, name: str, colour: str, **more: Any) -> Trace:
    style = {"color": colour, "width": more.pop("width", 2), "dash": more.pop("dash", "solid")}
    return {"x": list(x), "y": clean(y), "name": name, "mode": "lines", "line": style, **more}


def family_markers(
    about: About, boundaries: Sequence[int | str], curve: Curve, unit: str, legend: bool = True
) -> list[Trace]:
    """One trace of markers per family, so that the legend names them, with exact numbers on hover."""
    x, (low, high) = positions(boundaries), curve.interval()
    found = []
    for family in dict.fromkeys(about.family(boundary) for boundary in boundaries):
        mine = [i for i, boundary in enumerate(boundaries) if about.family(boundary) == family]
        texts = [
            f"{boundary_label(about, boundaries[i])}: {curve.value[i]:.4g} {unit}".strip()
            + (f"<br>95%: {low[i]:.4g} .. {high[i]:.4g}" if math.isfinite(low[i]) else "")
            for i in mine
        ]
        found.append(
            {
                "x": [x[i] for i in mine],
                "y": clean([curve.value[i] for i in mine]),
                "name": family_name(family),
                "mode": "markers",
                "marker": {
                    "color": family_colour(family),
                    "size": 10,
                    "symbol": "diamond" if family == "final" else "circle",
                    "line": {"color": "@paper", "width": 1.5},
                },
                "text": texts,
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": legend,
            }
        )
    return found


def reference_line(y: float, text: str) -> dict[str, Any]:
    """A value that means something on a y axis; drawn by `with_references`."""
    return {"y": y, "text": text}


def with_references(layout: dict[str, Any], traces: Sequence[Trace], *references: dict[str, Any]) -> dict[str, Any]:
    """layout with dotted lines at the references that lie near the data; those far off would flatten it."""
    values = [y for trace in traces for y in trace["y"] if y is not None]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = max(high - low, 1e-9)
    shapes, annotations = [], []
    for reference in references:
        y = reference["y"]
        if not low - room <= y <= high + room:
            continue
        low, high = min(low, y), max(high, y)
        place = {"xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": y, "y1": y, "layer": "below"}
        shapes.append({"type": "line", **place, "line": {"color": "@muted", "width": 1, "dash": "dot"}})
        label = {"text": reference["text"], "showarrow": False, "font": {"size": 11, "color": "@muted"}}
        annotations.append(
            {**label, "xref": "paper", "yref": "y", "x": 1, "y": y, "xanchor": "right", "yanchor": "bottom"}
        )
    return {**layout, "shapes": shapes, "annotations": annotations}
