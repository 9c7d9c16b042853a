"""The page: one HTML file that holds everything, plotly's script once, and needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from analysis.curves import FAMILY_COLOURS
from analysis.inspection import Inspection
from analysis.metrics import CORPUS, document_metrics
from analysis.report.change import (
    block_figure,
    comparison_figure,
    family_figure,
    foreign_comparison_figure,
)
from analysis.report.depth import (
    collapse_figures,
    curvature_figure,
    forecast_figure,
    positions_figure,
    stp_figure,
)
from analysis.report.figure import Figure, escape
from analysis.report.path_figure import trajectory_figure
from analysis.report.spans import correlation_figure, tube_figure
from analysis.report.text import cards, findings, guard_table, subtitle
from analysis.report.timeline import timeline_figure
from data.plain import strict

# Names of colours in figures -> (light, dark). Families as in the curves of a run, lighter where the page is dark.
COLOURS = {
    **{name: (colour, colour) for name, colour in FAMILY_COLOURS.items()},
    "A": (FAMILY_COLOURS["A"], "#ef6f7f"),
    "M": (FAMILY_COLOURS["M"], "#4fb0d9"),
    "E": ("#d9951b", "#f2bd5a"),
    "R": (FAMILY_COLOURS["R"], "#6cc08b"),
    "F": ("#8d6e63", "#c7a697"),
    "final": (FAMILY_COLOURS["final"], "#a58cf0"),
    "text": ("#1f2933", "#e6e9ee"),
    "muted": ("#7b8794", "#97a1ad"),
    "grid": ("#e4e7eb", "#323a45"),
    "paper": ("#ffffff", "#1b2027"),
    "other": ("#0a9396", "#5fd0c5"),
}


def write_page(path: Path, inspection: Inspection) -> None:
    """Raises OSError."""
    path.write_text(page(inspection), encoding="utf-8")


def page(inspection: Inspection) -> str:
    """The HTML text. Text of the corpus appears escaped only."""
    import plotly.offline

    sections: list[tuple[str, str, Sequence[Figure | None]]] = [
        ("Where it bends", "bends", [curvature_figure(inspection)]),
        ("Which family bends it", "families", [family_figure(inspection), block_figure(inspection)]),
        (
            "Against other runs",
            "runs",
            [comparison_figure(inspection), foreign_comparison_figure(inspection)],
        ),
        ("Over training", "training", [timeline_figure(inspection)]),
        (
            "How it moves",
            "moves",
            [
                correlation_figure(inspection),
                tube_figure(inspection),
                stp_figure(inspection),
                forecast_figure(inspection),
                positions_figure(inspection),
            ],
        ),
        ("Did it only get smaller? Collapse guards", "collapse", collapse_figures(inspection)),
        ("One document", "document", [trajectory_figure(inspection)]),
    ]
    present = [(title, key, [f for f in figures if f is not None]) for title, key, figures in sections]
    present = [(title, key, figures) for title, key, figures in present if figures]
    figures = [figure for _, _, part in present for figure in part]
    folder = resources.files("analysis.report")
    parts = {
        "TITLE": escape(f"Curvature of {inspection.subject.name}"),
        "STYLE": _variables() + folder.joinpath("page.css").read_text(),
        "NAV": "".join(f'<a href="#{key}">{escape(title.split("?")[0])}</a>' for title, key, _ in present),
        "SUBTITLE": subtitle(inspection),
        "CARDS": "".join(
            f'<div class="card"><div class="label">{escape(label)}</div><div class="number">{escape(number)}</div>'
            f'<div class="muted">{escape(small)}</div></div>'
            for label, number, small in cards(inspection)
        ),
        "FINDINGS": "".join(f"<li>{sentence}</li>" for sentence in findings(inspection)),
        "NOTES": "".join(f'<p class="note">{escape(note)}</p>' for note in inspection.notes),
        "GUARDS": guard_table(inspection),
        "SECTIONS": "".join(_section(title, key, part) for title, key, part in present),
        "DEFINITIONS": _definitions(),
        "COMMAND": escape(inspection.command),
        "DATA": script_json({"figures": [plain(figure) for figure in figures], "colours": COLOURS}),
        "CODE": folder.joinpath("page.js").read_text(),
        "PLOTLY": plotly.offline.get_plotlyjs(),
    }
    text = folder.joinpath("page.html").read_text()
    for name, value in parts.items():  # what comes in is not searched: the corpus and plotly come last
        text = text.replace(f"<!--{name}-->", value)
    return text


def _section(title: str, key: str, figures: list[Figure]) -> str:
    if sum(figure.width == "half" for figure in figures) % 2:  # nothing stands beside the last one
        figures = [*figures[:-1], replace(figures[-1], width="full")]
    grid = "".join(map(figure_html, figures))
    return f'<section id="{key}"><h2>{escape(title)}</h2><div class="grid">{grid}</div></section>'


def figure_html(figure: Figure) -> str:
    choice = f'<div class="choice" data-label="{escape(figure.choice)}"></div>'
    limits = f'<p class="limits"><b>What it cannot show.</b> {escape(figure.limits)}</p>' if figure.limits else ""
    heading = "h4" if figure.width == "third" else "h3"
    return (
        f'<figure class="{figure.width}" id="figure-{figure.key}"><{heading}>{escape(figure.title)}</{heading}>'
        f'<p class="read">{escape(figure.read)}</p>{choice}'
        f'<div class="plot" id="plot-{figure.key}" style="height:{figure.height}px"></div>{limits}</figure>'
    )


def _definitions() -> str:
    rows = "".join(
        f"<tr><td><code>{escape(m.name)}</code></td><td>{escape(m.unit or '')}</td><td>{escape(m.definition)}</td></tr>"
        for m in [*document_metrics(), *CORPUS]
    )
    return (
        f"<table><thead><tr><th>metric</th><th>unit</th><th>definition</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def plain(figure: Figure) -> dict:
    views = [{"name": view.name, "data": view.traces, "layout": view.layout} for view in figure.views]
    return strict({"key": figure.key, "views": views, "width": figure.width, **figure.extra})


def script_json(content: dict) -> str:
    """JSON inside a script element: no text of the corpus can close it."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "")


def _variables() -> str:
    light = "".join(f"--f-{name}:{pair[0]};" for name, pair in COLOURS.items())
    dark = "".join(f"--f-{name}:{pair[1]};" for name, pair in COLOURS.items())
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
