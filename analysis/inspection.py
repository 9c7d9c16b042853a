"""Inspection: everything that one call of the inspector found, ready for tables, files and the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from analysis.accumulate import Curve
from analysis.families import FamilyChange, block_changes, family_changes
from analysis.measure import Measured
from analysis.trajectory import Trajectory


@dataclass(frozen=True)
class About:
    """A measured model. letters: family of each block. stp: how it was regularised, for people."""

    name: str
    letters: list[str]
    d_model: int
    step: int | None = None
    tokens: int | None = None
    trained_length: int | None = None
    stp: dict[str, Any] = field(default_factory=dict)

    def family(self, boundary: int | str) -> str:
        """embedding, final, or the letters of the block that wrote the boundary."""
        if boundary == "final":
            return "final"
        return "embedding" if boundary == 0 else self.letters[int(boundary) - 1]


@dataclass(frozen=True)
class Comparison:
    """Another model on the same documents, resampled together with the subject."""

    about: About
    measured: Measured


@dataclass(frozen=True)
class Inspection:
    """subject and its numbers; controls by name (untrained, shuffled), each with the same boundaries; random: rows of
    noise and of walks (boundaries iid, walk); timeline: (about, numbers) of checkpoints, oldest first, on fewer
    documents; records: lines of the run's metrics.jsonl; data, command: how it was made."""

    subject: About
    model: Measured
    random: Measured
    controls: dict[str, Measured] = field(default_factory=dict)
    timeline: list[tuple[About, Measured]] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    trajectory: Trajectory | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    command: str = ""

    @property
    def depth(self) -> int:
        return len(self.subject.letters)

    def sources(self) -> dict[str, Measured]:
        """The model and its controls that share its boundaries."""
        return {"model": self.model, **self.controls}

    def changes(self, metric: str, variant: str = "raw", source: str = "model") -> Curve:
        """Change of a metric by each block, 1 .. depth."""
        return block_changes(self.sources()[source].get(metric, variant), self.subject.letters)

    def families(self, metric: str, variant: str = "raw", source: str = "model") -> dict[str, FamilyChange]:
        return family_changes(self.sources()[source].get(metric, variant), self.subject.letters)
