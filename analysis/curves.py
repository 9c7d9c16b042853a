"""A run's curves from its metrics: losses, STP per family and its weight, gradients of STP beside the LM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from analysis.families import FAMILY_NAMES

FAMILY_COLOURS = {
    "embedding": "#8c8c8c",
    "A": "#d1495b",
    "M": "#2e86ab",
    "E": "#edae49",
    "R": "#3d8361",
    "final": "#6c4ab6",
}
PANELS = (
    "cross-entropy, nats per token",
    "raw STP by family (random walk 1.0, i.i.d. 1.5)",
    "STP weight",
    "gradient norm, STP : LM (weight 1)",
)


def run_figure(records: Sequence[dict[str, Any]], title: str) -> Any:
    """A plotly figure of four panels against tokens. records: lines of metrics.jsonl."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2, cols=2, subplot_titles=PANELS, horizontal_spacing=0.08, vertical_spacing=0.14)
    _line(figure, records, "loss/lm", "training", "#5c6b73", 1, 1)
    _line(figure, records, "val_loss", "held out", "#d1495b", 1, 1, mode="lines+markers")
    for family, colour in FAMILY_COLOURS.items():
        name = FAMILY_NAMES.get(family, family)
        _line(figure, records, f"stp/raw/{family}", name, colour, 1, 2)
        _line(figure, records, f"stp/grad_ratio/{family}", name, colour, 2, 2, mode="lines+markers", legend=False)
    for reference in (1.0, 1.5):
        figure.add_hline(y=reference, line={"dash": "dot", "width": 1, "color": "#999999"}, row=1, col=2)
    _line(figure, records, "stp/weight", "STP weight", "#6c4ab6", 2, 1, legend=False)
    for row in (1, 2):
        for col in (1, 2):
            figure.update_xaxes(title_text="loss-bearing tokens", row=row, col=col)
    figure.update_yaxes(type="log", row=2, col=2)
    figure.update_layout(title=title, template="plotly_white", height=760, margin={"t": 90, "l": 60, "r": 30, "b": 60})
    return figure


def _line(
    figure: Any,
    records: Sequence[dict[str, Any]],
    key: str,
    name: str,
    colour: str,
    row: int,
    col: int,
    mode: str = "lines",
    legend: bool = True,
) -> None:
    points = [(record["tokens"], record[key]) for record in records if record.get(key) is not None]
    if points:
        x, y = zip(*points, strict=True)
        trace = {"x": x, "y": y, "name": name, "mode": mode, "line": {"color": colour}, "showlegend": legend}
        figure.add_scatter(**trace, legendgroup=name, row=row, col=col)
