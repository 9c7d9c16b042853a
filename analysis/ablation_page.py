"""The page of a grid: one HTML file with everything in it, made of the parts of the curvature page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib import resources
from typing import Any

from analysis.ablation import Comparison, Outcomes, is_number, number
from analysis.ablation_figures import ARM_COLOURS, cost_figure, curve_figure, family_figure, paired_figure
from analysis.ablation_text import comparison_row, findings
from analysis.report.figure import Figure, escape
from analysis.report.page import COLOURS, figure_html, plain, script_json

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none';
 style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; font-src data:">
<title><!--TITLE--></title>
<style><!--STYLE--></style>
</head>
<body>
<header><h1><!--TITLE--></h1><p class="muted"><!--QUESTION--></p><nav><!--NAV--></nav></header>
<main>
<!--BODY-->
<p class="command"><code><!--COMMAND--></code></p>
</main>
<script type="application/json" id="page-data"><!--DATA--></script>
<script>/* plotly.js, MIT licence */
<!--PLOTLY--></script>
<script><!--CODE--></script>
</body>
</html>
"""
EXTRA_STYLE = """
.scroll { overflow-x: auto; background: var(--f-paper); border: 1px solid var(--rule); border-radius: 8px;
  padding: .4rem .7rem; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.better td:last-child { color: var(--ok); font-weight: 650; }
tr.worse td:last-child, tr.NOT td:last-child { color: var(--look); font-weight: 650; }
"""


def page(outcomes: Outcomes, comparisons: Sequence[Comparison], command: str) -> str:
    """The HTML text; every text of the grid file appears escaped."""
    import plotly.offline

    sections: list[tuple[str, str, str, Sequence[Figure | None]]] = [
        ("Result", "result", _result(outcomes, comparisons), [paired_figure(outcomes, comparisons)]),
        ("Arms", "arms", _table(outcomes.settings), []),
        ("Comparisons", "comparisons", _comparisons(outcomes, comparisons), []),
        ("Every run", "runs", _runs(outcomes), []),
        (
            "Over training",
            "training",
            "",
            [
                curve_figure(outcomes, "held", "val_loss", "Held-out loss", "nats per token"),
                curve_figure(outcomes, "train", "loss/lm", "Training loss", "nats per token"),
                curve_figure(
                    outcomes, "raw", "stp/raw", "Raw STP (straight 0, random walk 1, no coherence 1.5)", "raw STP"
                ),
                cost_figure(outcomes),
            ],
        ),
        ("Curvature and collapse", "curvature", "", _family_figures(outcomes)),
    ]
    body, nav, figures = "", "", []
    for title, key, text, candidates in sections:
        present = [figure for figure in candidates if figure is not None]
        if text or present:
            grid = f'<div class="grid">{"".join(map(figure_html, present))}</div>' if present else ""
            body += f'<section id="{key}"><h2>{escape(title)}</h2>{text}{grid}</section>\n'
            nav += f'<a href="#{key}">{escape(title)}</a>'
            figures += present
    folder = resources.files("analysis.report")
    colours = {**COLOURS, **ARM_COLOURS}
    parts = {
        "TITLE": escape(f"Ablation {outcomes.name}"),
        "STYLE": _variables(colours) + folder.joinpath("page.css").read_text() + EXTRA_STYLE,
        "QUESTION": escape(outcomes.question),
        "NAV": nav,
        "BODY": body,
        "COMMAND": escape(command),
        "DATA": script_json({"figures": [plain(figure) for figure in figures], "colours": colours}),
        "CODE": folder.joinpath("page.js").read_text(),
        "PLOTLY": plotly.offline.get_plotlyjs(),
    }
    text = TEMPLATE
    for name, value in parts.items():  # what comes in is not searched: plotly comes last
        text = text.replace(f"<!--{name}-->", value)
    return text


def _result(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> str:
    planned = f" of {outcomes.planned}" if outcomes.planned else ""
    partial = bool(outcomes.planned) and len(outcomes.rows) < outcomes.planned
    note = (
        '<p class="note">This grid is not finished: numbers below are of the runs that are there.</p>'
        if partial
        else ""
    )
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in findings(outcomes, comparisons))
    about = (
        f"{len(outcomes.rows)}{planned} runs, seeds {', '.join(map(str, outcomes.seeds))}, baseline {outcomes.baseline}"
    )
    return f'{note}<p class="muted">{escape(about)}</p><ul class="findings">{items}</ul>'


def _comparisons(outcomes: Outcomes, comparisons: Sequence[Comparison]) -> str:
    text = ""
    for metric, direction in outcomes.metrics.items():
        rows = [comparison_row(c, direction) for c in comparisons if c.metric == metric]
        if rows:
            text += f"<h3>{escape(metric)} ({direction} is better)</h3>" + _table(rows, classes=True)
    return text + (
        '<p class="muted">Intervals and p values: Student, paired; Holm over each kind of comparison. Detectable: the '
        "true difference that this number of pairs finds with 80% probability at 5%, before Holm, and "
        "at the level that Holm's first step asks for.</p>"
    )


def _runs(outcomes: Outcomes) -> str:
    seconds = {row["run_id"]: row.get("seconds") for row in outcomes.costs}
    columns = ["run_id", "step", "tokens", *outcomes.metrics, "invalid", "unfinished", "weights_sha256"]
    present = [name for name in columns if any(name in row for row in outcomes.rows)]
    rows = [
        {**{name: row.get(name) for name in present}, "seconds": seconds.get(row["run_id"])} for row in outcomes.rows
    ]
    return f"<details><summary>{len(rows)} runs</summary>{_table(rows)}</details>"


def _family_figures(outcomes: Outcomes) -> list[Figure | None]:
    few = "A claim: few rows, means over boundaries. `python -m scripts.inspect_curvature` measures it properly."
    return [
        family_figure(
            outcomes, "degrees", "curvature/degrees", "Turning angle per family",
            "Mean angle between one step and the next on held-out rows; 90 is a random walk, 120 no coherence.",
            few, "degrees",
        ),
        family_figure(
            outcomes, "rank", "curvature/effective_rank", "Effective rank per family",
            "Of 128 tokens' states. An arm far below the baseline has got straight by shrinking, not by order.",
            few, "effective rank",
        ),
        family_figure(
            outcomes, "norm", "curvature/state_norm", "Length of states per family",
            "Mean norm. Straight because everything became one large shared direction shows here.", few, "norm",
        ),
        family_figure(
            outcomes, "step", "curvature/step_norm", "Length of steps per family",
            "Mean norm of the difference of neighbouring states. Near 0 nothing moves, so nothing can bend.",
            few, "norm",
        ),
    ]  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], classes: bool = False) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in rows[0])
    lines = ""
    for row in rows:
        kind = f' class="{html.escape(str(row["verdict"]).split()[0], quote=True)}"' if classes else ""
        lines += f"<tr{kind}>" + "".join(map(_cell, row.values())) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    text = "" if value is None else escape(number(value).strip("`"))
    return f'<td class="number">{text}</td>' if is_number(value) else f"<td>{text}</td>"


def _variables(colours: dict[str, tuple[str, str]]) -> str:
    light, dark = ("".join(f"--f-{name}:{pair[i]};" for name, pair in colours.items()) for i in (0, 1))
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}\n"
