"""Which family bends the path: each block's change of a metric from its input to its output, grouped by letter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.accumulate import Curve

# For people. Other models have an F and other recurrences too (see analysis.hf_models).
FAMILY_NAMES = {
    "embedding": "embedding",
    "A": "A attention",
    "M": "M Mamba",
    "E": "E experts",
    "R": "R recurrent",
    "F": "F feed-forward",
    "final": "final norm",
}


@dataclass(frozen=True)
class FamilyChange:
    """Means over the blocks of one family, as curves of one entry, with intervals over documents.

    entering: the metric at the inputs of its blocks; leaving: at their outputs; change: leaving - entering.
    blocks: their numbers, from 1.
    """

    letter: str
    blocks: list[int]
    entering: Curve
    leaving: Curve
    change: Curve


def block_changes(curve: Curve, letters: Sequence[str]) -> Curve:
    """curve over boundaries 0 .. depth (more are ignored) -> the change that each block 1 .. depth makes.

    Replicates are paired: the input and the output of a block are resampled with the same documents.
    """
    depth = len(letters)
    return curve.at(range(1, depth + 1)) - curve.at(range(depth))


def family_changes(curve: Curve, letters: Sequence[str]) -> dict[str, FamilyChange]:
    """letter -> its blocks' mean change. curve as in `block_changes`."""
    changes = block_changes(curve, letters)
    found = {}
    for letter in dict.fromkeys(letters):
        blocks = [number for number, other in enumerate(letters, start=1) if other == letter]
        entering = curve.at([number - 1 for number in blocks]).mean()
        leaving = curve.at(blocks).mean()
        change = changes.at([number - 1 for number in blocks]).mean()
        found[letter] = FamilyChange(letter, blocks, entering, leaving, change)
    return found
