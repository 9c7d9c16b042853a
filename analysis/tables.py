"""An inspection as one JSON document and as one long table: no number of the page is only on the page."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.accumulate import Curve
from analysis.curvature import straightening
from analysis.families import family_changes
from analysis.guards import guards
from analysis.inspection import About, Inspection
from analysis.measure import Measured
from analysis.metrics import CORPUS, document_metrics
from data.plain import strict

FORMAT = 1
COLUMNS = ("source", "kind", "variant", "boundary", "family", "metric", "unit", "value", "low", "high")


def units() -> dict[str, str]:
    return {metric.name: metric.unit for metric in [*document_metrics(), *CORPUS]}


def as_json(inspection: Inspection) -> dict[str, Any]:
    """Everything; NaN becomes null."""
    subject = inspection.subject
    content = {
        "format": FORMAT,
        "command": inspection.command,
        "subject": _about(subject),
        "data": inspection.data,
        "notes": inspection.notes,
        "boundaries": inspection.model.boundaries,
        "metrics": {
            metric.name: {
                "label": metric.label,
                "unit": metric.unit,
                "definition": metric.definition,
                "per": metric.per,
            }
            for metric in [*document_metrics(), *CORPUS]
        },
        "precision": dict(zip(map(str, inspection.model.boundaries), inspection.model.precision, strict=True)),
        "straightening": {
            name: vars(straightening(measured.get("curvature").value[: inspection.depth + 1].tolist()))
            for name, measured in inspection.sources().items()
        },
        "guards": [vars(guard) for guard in guards(inspection.model, *references(inspection))],
        "sources": {name: _curves(measured) for name, measured in inspection.sources().items()},
        "random_rows": {"boundaries": inspection.random.boundaries, **_curves(inspection.random)},
        "families": {name: _families(measured, subject) for name, measured in inspection.sources().items()},
        "timeline": [
            {"about": _about(about), "boundaries": measured.boundaries, **_curves(measured)}
            for about, measured in inspection.timeline
        ],
        "comparisons": [
            {
                "about": _about(comparison.about),
                "boundaries": comparison.measured.boundaries,
                **_curves(comparison.measured),
                "families": _families(comparison.measured, comparison.about),
                "difference": _difference(inspection, comparison.measured, comparison.about),
            }
            for comparison in inspection.comparisons
        ],
    }
    return strict(content)


def references(inspection: Inspection) -> list[Measured]:
    """What guards compare with: the untrained twin, and other runs of the same stack."""
    same = [other for other in inspection.comparisons if other.about.letters == inspection.subject.letters]
    return [inspection.controls["untrained"], *(other.measured for other in same)]


def rows(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Long form, one number a row. kind: boundary (value there), block (its change), family (mean change)."""
    unit = units()
    measured = {**inspection.sources(), "random rows": inspection.random}
    families = {name: inspection.subject for name in inspection.sources()}
    for comparison in inspection.comparisons:
        measured[comparison.about.name], families[comparison.about.name] = comparison.measured, comparison.about
    for about, found in inspection.timeline:
        measured[f"checkpoint: {about.name}"], families[f"checkpoint: {about.name}"] = found, about
    for source, found in measured.items():
        about_or_none = families.get(source)
        for variant, curves in found.curves.items():
            for metric, curve in curves.items():
                head = {"source": source, "variant": variant, "metric": metric, "unit": unit[metric]}
                for boundary, number in zip(found.boundaries, _numbers(curve), strict=True):
                    family = about_or_none.family(boundary) if about_or_none else ""
                    yield {**head, "kind": "boundary", "boundary": str(boundary), "family": family, **number}
                if about_or_none is None:
                    continue
                for letter, change in family_changes(curve, about_or_none.letters).items():
                    number = _numbers(change.change)[0]
                    yield {**head, "kind": "family", "boundary": "", "family": letter, **number}


def write_csv(path: Path, inspection: Inspection) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows(inspection):
            writer.writerow(
                {key: "" if isinstance(row[key], float) and math.isnan(row[key]) else row[key] for key in COLUMNS}
            )


def write_parquet(path: Path, inspection: Inspection) -> None:
    import pyarrow
    import pyarrow.parquet

    found = list(rows(inspection))
    table = pyarrow.table({column: [row[column] for row in found] for column in COLUMNS})
    pyarrow.parquet.write_table(table, path)


def _about(about: About) -> dict[str, Any]:
    return vars(about) | {"pattern": "".join(about.letters)}


def _curves(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {"documents": measured.n_documents, "tokens": measured.n_tokens}
    for variant, curves in measured.curves.items():
        found[variant] = {metric: _spread(curve) for metric, curve in curves.items()}
    return found


def _spread(curve: Curve) -> dict[str, Any]:
    low, high = curve.interval()
    return {"value": curve.value, "low": low, "high": high, "interval": curve.method}


def _numbers(curve: Curve) -> list[dict[str, float]]:
    low, high = curve.interval()
    triples = zip(curve.value.tolist(), low.tolist(), high.tolist(), strict=True)
    return [{"value": value, "low": lowest, "high": highest} for value, lowest, highest in triples]


def _families(measured: Measured, about: About) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for variant, curves in measured.curves.items():
        for metric, curve in curves.items():
            for letter, family in family_changes(curve, about.letters).items():
                entry = found.setdefault(letter, {"blocks": family.blocks}).setdefault(variant, {})
                entry[metric] = {
                    name: {key: values[0] for key, values in _spread(part).items() if key != "interval"}
                    for name, part in (
                        ("entering", family.entering),
                        ("leaving", family.leaving),
                        ("change", family.change),
                    )
                }
    return found


def _difference(inspection: Inspection, other: Measured, about: About) -> dict[str, Any] | None:
    """Subject minus other, paired over documents; only between equal stacks."""
    if about.letters != inspection.subject.letters:
        return None
    return {
        variant: {metric: _spread(curve - other.get(metric, variant)) for metric, curve in curves.items()}
        for variant, curves in inspection.model.curves.items()
    }
