"""Figures over depth: a metric at every boundary, with family colours, its band and its controls."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.accumulate import Curve
from analysis.inspection import Inspection
from analysis.report.figure import (
    Figure,
    Trace,
    View,
    band,
    depth_axis,
    family_markers,
    line,
    positions,
    reference_line,
    with_references,
)

STATES = (("raw", "as they are"), ("rms", "RMS-normalised"))
ANGLES = (reference_line(120, "120: i.i.d. noise"), reference_line(90, "90: random walk"))


def curve_traces(
    inspection: Inspection, metric: str, variant: str, unit: str, controls: Sequence[str] = ("untrained", "shuffled")
) -> list[Trace]:
    """Controls behind, then other runs, then the band, the line and the family markers of the model."""
    boundaries = inspection.model.boundaries
    x, body = positions(boundaries), slice(0, inspection.depth + 1)
    styles = {"untrained": ("untrained twin", "dash"), "shuffled": ("shuffled tokens", "dot")}
    traces: list[Trace] = []
    for name in controls:
        label, dash = styles[name]
        curve = inspection.controls[name].get(metric, variant)
        traces += [line(x[body], curve.value[body], label, "@muted", dash=dash, width=1.5)]
        traces += [_lonely(x[-1], curve.value[-1], label)]
    for comparison in inspection.comparisons:
        if comparison.about.letters == inspection.subject.letters:
            curve = comparison.measured.get(metric, variant)
            traces += [line(x[body], curve.value[body], comparison.about.name, "@other", width=1.5)]
    curve = inspection.model.get(metric, variant)
    traces += band(x, curve, "@text", hidden=[len(x) - 1])
    name = inspection.subject.name
    traces.append(line(x[body], curve.value[body], name, "@text", width=1.5, hoverinfo="skip", showlegend=False))
    return traces + family_markers(inspection.subject, boundaries, curve, unit)


def _lonely(x: float, y: float, name: str) -> Trace:
    """A control at "final", which no line leads to: those states are normed."""
    marker = {"color": "@muted", "size": 7, "symbol": "diamond-open"}
    return {"x": [x], "y": [y], "name": name, "mode": "markers", "marker": marker, "showlegend": False}


def depth_layout(inspection: Inspection, unit: str) -> dict:
    return {
        "xaxis": depth_axis(inspection.subject, inspection.model.boundaries),
        "yaxis": {"title": {"text": unit}},
        "hovermode": "closest",
    }


def curvature_figure(inspection: Inspection) -> Figure:
    drawn = [(name, curve_traces(inspection, "curvature", v, "degrees")) for v, name in STATES]
    drawn.append(("positions removed", curve_traces(inspection, "curvature_centred", "raw", "degrees")))
    layout = depth_layout(inspection, "degrees per token")
    views = [View(name, traces, with_references(layout, traces, *ANGLES)) for name, traces in drawn]
    views.append(_straightening_view(inspection))
    return Figure(
        "curvature",
        "Where trajectories bend: curvature against depth",
        "Each point is the mean angle by which the hidden state turns from one token to the next, at one boundary of "
        "the stack; its colour is the family of the block that wrote it, its band the 95% interval over documents. 0 "
        "is a straight line, 90 a random walk, 120 noise around a fixed point. Lower than the first point means that "
        "the blocks so far have straightened the path. The dashed line is the same stack before training, the dotted "
        "one the trained model on the same tokens in a random order. The diamond is the state after the final norm, "
        "which is a different quantity.",
        "A low number does not mean that the model understands: a drift that every document shares, or a norm that "
        "grows along the document, straightens any path. The guards above and two of the buttons look for that. "
        "Bands of neighbouring points move together, since documents differ in level; the last button takes that out.",
        views,
        height=430,
        choice="states",
    )


def _straightening_view(inspection: Inspection) -> View:
    """Curvature minus that of boundary 0, paired over documents: what level the documents have is gone."""
    boundaries = inspection.model.boundaries
    x = positions(boundaries)
    traces: list[Trace] = []
    styles = (("untrained", "untrained twin", "dash"), ("shuffled", "shuffled tokens", "dot"))
    for name, label, dash in styles:
        change = _since_embedding(inspection.controls[name].get("curvature"))
        traces.append(line(x[:-1], change.value[:-1], label, "@muted", dash=dash, width=1.5))
    change = _since_embedding(inspection.model.get("curvature"))
    traces += band(x, change, "@text", hidden=[len(x) - 1])
    traces.append(line(x[:-1], change.value[:-1], "", "@text", width=1.5, hoverinfo="skip", showlegend=False))
    traces += family_markers(inspection.subject, boundaries, change, "degrees")
    return View("change since the embedding", traces, depth_layout(inspection, "degrees, straighter below 0"))


def _since_embedding(curve: Curve) -> Curve:
    return curve.map(lambda samples: samples - samples[:, :1])


def stp_figure(inspection: Inspection) -> Figure:
    forms = (
        ("stp_triple", "triple", reference_line(1.5, "1.5: i.i.d."), reference_line(1.0, "1.0: walk")),
        ("stp_consecutive", "consecutive", reference_line(1.5, "1.5: i.i.d."), reference_line(1.0, "1.0: walk")),
        (
            "stp_patch_complement",
            "patch against rest",
            reference_line(1.7, "1.7: i.i.d."),
            reference_line(1.0, "1.0: walk"),
        ),
    )
    views = []
    for metric, label, *lines in forms:
        traces = curve_traces(inspection, metric, "raw", "")
        views.append(View(label, traces, with_references(depth_layout(inspection, "1 - cos"), traces, *lines)))
    return Figure(
        "stp",
        "The STP loss at every boundary, in its three forms",
        "1 - cos between two displacements of a path: of random triples inside a window (what training minimises by "
        "default), of neighbouring steps, and of a span against the rest of its piece (the form of the paper's "
        "released code). The same triples are used at all boundaries and in all models. 0 is a line.",
        "Values of the three forms cannot be compared with each other, and a lower loss is not a better model.",
        views,
        width="half",
        choice="form",
    )


def forecast_figure(inspection: Inspection) -> Figure:
    kinds = (
        ("transition", "error / step", "@A"),
        ("centred", "error / distance from the mean", "@M"),
        ("plain", "error / state", "@E"),
        ("copy_last", "nothing moves / state", "@muted"),
    )
    boundaries = inspection.model.boundaries
    x = positions(boundaries)
    views = []
    for m in (1, 4, 16):
        traces = []
        for kind, label, colour in kinds:
            curve = inspection.model.get(f"forecast_{kind}_{m}")
            traces += band(x, curve, colour, hidden=[len(x) - 1])
            dash = "dash" if kind == "copy_last" else "solid"
            traces.append(line(x[:-1], curve.value[:-1], label, colour, dash=dash))
        layout = depth_layout(inspection, "squared error, ratio")
        layout["yaxis"]["type"] = "log"
        views.append(View(f"{m} token{'s' if m > 1 else ''} ahead", traces, layout))
    return Figure(
        "forecast",
        "Could one go on in a straight line?",
        "The forecast x + m v continues the last step for m tokens. Its squared error is divided by the squared step "
        "(0 a line, 2 a walk, 3 noise, at one token), by the squared distance of the target from the piece's mean, "
        "and by the squared state, beside the forecast that nothing moves.",
        "The last two are small for free where all states share a large mean; the first two do not see it.",
        views,
        width="half",
        choice="forecast",
    )


def positions_figure(inspection: Inspection) -> Figure | None:
    """Curvature at positions that training rows have, and beyond; None where no piece is longer than a row."""
    inside, beyond = (inspection.model.get(f"curvature_{name}") for name in ("within", "beyond"))
    if _empty(beyond) or _empty(inside):
        return None
    boundaries = inspection.model.boundaries
    x = positions(boundaries)
    length = inspection.subject.trained_length
    traces = []
    for curve, label, colour in (
        (inside, f"positions below {length}", "@M"),
        (beyond, f"positions from {length} on, never trained", "@A"),
    ):
        traces += band(x, curve, colour, hidden=[len(x) - 1])
        traces.append(line(x[:-1], curve.value[:-1], label, colour, mode="lines+markers"))
    return Figure(
        "positions",
        "Positions that were never trained",
        f"Training rows have {length} tokens, so no position from {length} on has ever had a loss, of any kind. If "
        "straightening were tied to trained positions, the two lines would part.",
        "All documents here are held out (unless --data says otherwise); this splits the positions inside them.",
        [View("curvature", traces, depth_layout(inspection, "degrees per token"))],
        width="half",
    )


def _empty(curve: Curve) -> bool:
    return bool((curve.value != curve.value).all())


def collapse_figures(inspection: Inspection) -> list[Figure]:
    """Small ones, three in a row."""
    panels = (
        ("effective_rank", "Effective rank of states", "dimensions", "How many directions the states use (of {d})."),
        ("effective_rank_steps", "Effective rank of steps", "dimensions", "The same of the steps from token to token."),
        ("participation_ratio", "Participation ratio", "dimensions", "How many directions hold the variance."),
        ("mean_direction_energy", "Mean-direction energy", "share", "Share of |x|² that is one common vector."),
        ("anisotropy", "Anisotropy", "cosine", "Mean cosine of tokens of different documents."),
        ("position_explained_share", "Position-explained share", "share", "Variance that position alone predicts."),
        ("state_norm", "State norm", "|x|", "Growth along depth is normal in a pre-norm stack."),
        ("step_norm", "Step norm", "|v|", "Beside the state norm: how far a token moves the state."),
        (
            "path_efficiency_25-64",
            "Path efficiency, 25-64 tokens",
            "chord / walked",
            "1 is straight; noise and walks are low.",
        ),
    )
    found = []
    for metric, title, unit, read in panels:
        views = [View("raw", curve_traces(inspection, metric, "raw", unit), depth_layout(inspection, unit))]
        if metric != "position_explained_share":
            views.append(View("RMS", curve_traces(inspection, metric, "rms", unit), depth_layout(inspection, unit)))
        read = read.format(d=inspection.subject.d_model)
        found.append(Figure(f"collapse-{metric}", title, read, "", views, width="third", height=260))
    return found
