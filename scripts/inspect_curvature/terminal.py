"""What a person sees in the terminal: progress, the table of families, guards."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from analysis.accumulate import Curve
from analysis.guards import guards
from analysis.inspection import Inspection
from analysis.tables import references
from scripts.inspect_curvature.job import Stage
from scripts.inspect_curvature.passes import Advance


@contextlib.contextmanager
def show_stages() -> Iterator[Stage]:
    """Yields the function that `job.run` announces its passes with: a bar each, or a line where there is no
    terminal."""
    if not sys.stderr.isatty():
        yield _line
        return
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def stage(name: str, n_tokens: int) -> Advance:
            task = bars.add_task(f"{name} (tokens)", total=n_tokens)
            return lambda done: bars.advance(task, done)

        yield stage


def _line(name: str, n_tokens: int) -> Advance:
    print(f"measuring: {name}, {n_tokens:,} tokens", file=sys.stderr, flush=True)
    return lambda done: None


def print_tables(inspection: Inspection, console: Console) -> None:
    subject, data = inspection.subject, inspection.data
    console.print(
        f"{subject.name}: {_pattern(subject.letters)}, {data['pieces']:,} pieces of {data['documents']:,} documents, "
        f"{data['tokens']:,} tokens ({data['source']})",
        highlight=False,
    )
    for table in (_boundaries(inspection), _families(inspection)):
        console.print()
        console.print(table)
    console.print()
    for comparison in inspection.comparisons:
        if comparison.about.letters == subject.letters:
            gap = inspection.model.get("curvature") - comparison.measured.get("curvature")
            last = len(subject.letters)
            console.print(
                f"against {comparison.about.name}: curvature {_signed(gap, last)} at boundary {last}, "
                f"{_signed(gap, last + 1)} at final (degrees, 95% interval, paired over documents)",
                highlight=False,
            )
    console.print()
    console.print(_guards(inspection))
    for note in inspection.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def _table(title: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))


def _boundaries(inspection: Inspection) -> Table:
    table = _table("Curvature in degrees (line 0, walk 90, i.i.d. 120), other metrics")
    columns = ("", "wrote it", "raw, 95%", "RMS", "no pos", "twin", "shuffl", "STP", "rank", "|x|", "|v|")
    for column in columns:
        table.add_column(column, justify="left" if column == "wrote it" else "right", no_wrap=True)
    model, controls = inspection.model, inspection.controls
    raw, rms, centred = model.get("curvature"), model.get("curvature", "rms"), model.get("curvature_centred")
    low, high = raw.interval()
    for i, boundary in enumerate(model.boundaries):
        family = inspection.subject.family(boundary)
        table.add_row(
            str(boundary),
            {"embedding": "emb.", "final": "norm"}.get(family, family),
            f"{raw.value[i]:.1f} \u00b1 {(high[i] - low[i]) / 2:.1f}",
            f"{rms.value[i]:.1f}",
            f"{centred.value[i]:.1f}",
            *(f"{controls[name].get('curvature').value[i]:.1f}" for name in ("untrained", "shuffled")),
            f"{model.get('stp_triple').value[i]:.3f}",
            f"{model.get('effective_rank').value[i]:.0f}",
            f"{model.get('state_norm').value[i]:.3g}",
            f"{model.get('step_norm').value[i]:.3g}",
        )
    return table


def _families(inspection: Inspection) -> Table:
    title = "Mean change by one block, output - input (± half of the 95% interval)"
    table = _table(title)
    table.add_column("")
    for column in ("n", "curvature", "RMS-normed", "untrained", "STP triple", "eff. rank"):
        table.add_column(column, justify="right", no_wrap=True)
    columns = [
        inspection.families("curvature"),
        inspection.families("curvature", "rms"),
        inspection.families("curvature", source="untrained"),
        inspection.families("stp_triple"),
        inspection.families("effective_rank"),
    ]
    for letter, family in columns[0].items():
        table.add_row(letter, str(len(family.blocks)), *(_half(column[letter].change) for column in columns))
    return table


def _guards(inspection: Inspection) -> Table:
    table = _table("Guards: straight for the wrong reason?")
    for column in ("", "cheat", "what is read, worst boundary", "value", "limit", "at"):
        table.add_column(column, no_wrap=column in ("", "at"))
    for guard in guards(inspection.model, *references(inspection)):
        style = {"ok": "green", "look": "bold red", "none": "dim"}[guard.state]
        where = "" if guard.boundary is None else str(guard.boundary)
        table.add_row(guard.state, guard.name, guard.reads, guard.shown, guard.limit, where, style=style)
    return table


def _half(curve: Curve) -> str:
    low, high = curve.interval()
    value, half = float(curve.value[0]), float(high[0] - low[0]) / 2
    digits = 1 if abs(value) >= 1 else 2 if abs(value) >= 0.1 else 3
    return f"{value:+.{digits}f}" + ("" if np.isnan(half) else f" \u00b1{half:.{digits}f}")


def _signed(curve: Curve, index: int) -> str:
    low, high = curve.interval()
    value = curve.value[index]
    digits = 2 if abs(value) >= 0.1 else 3
    text = f"{value:+.{digits}f}"
    return text if np.isnan(low[index]) else f"{text} ({low[index]:+.{digits}f} .. {high[index]:+.{digits}f})"


def _pattern(letters: list[str]) -> str:
    return "".join(letters) if all(len(letter) == 1 for letter in letters) else " ".join(letters)
