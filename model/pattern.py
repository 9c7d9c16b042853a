"""Letters -> families. A pattern such as AEMEAEMEAEMR spells the stack; boundaries between its blocks have names.

Boundary i is the residual stream after block i (0 = the embedding); "final" is the last one after the final norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blocks.block import FAMILIES
from errors import InputError, nearest

FINAL = "final"
# What a boundary selection may say, for error messages.
SELECTIONS = "all, last, final, changes, family:X, entering:X, or a list of these and of boundary indices"


@dataclass(frozen=True)
class Pattern:
    """letters: one per block, tiled to depth. warnings: lines that a person should see before the run starts."""

    text: str
    letters: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.letters)


def parse_pattern(text: str, depth: int | None = None, key: str = "model.pattern") -> Pattern:
    """Spells out a pattern, tiled to `depth` blocks (None = once). A partial last tile is allowed and announced.

    Raises InputError naming the position (from 1) and the valid letters.
    """
    valid = ", ".join(f"{letter} ({family})" for letter, family in FAMILIES.items())
    if not isinstance(text, str) or not text:
        raise InputError(f"{key}: expected at least one letter of {valid}, got {text!r}")
    for position, letter in enumerate(text, start=1):
        if letter in FAMILIES:
            continue
        where = f"{key}: {letter!r} at position {position} of {text!r}"
        if letter.upper() in FAMILIES:
            raise InputError(f"{where} is lower case; write {letter.upper()!r} (letters are {valid})")
        if letter == "|":
            raise InputError(f"{where} is reserved for pipeline stages, which are not supported; leave it out")
        raise InputError(f"{where} is no block family; expected one of {valid}")
    if depth is None:
        depth = len(text)
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise InputError(f"{key.rsplit('.', 1)[0]}.depth: expected at least 1 block, got {depth}")
    tiles, rest = divmod(depth, len(text))
    letters = tuple(text[index % len(text)] for index in range(depth))
    warnings = []
    if rest:
        warnings.append(
            f"{key}: depth {depth} = {tiles} x {len(text)} + {rest}: the last tile is partial ({text[:rest]!r})"
        )
    if "E" not in letters:
        warnings.append(f"{key}: {text!r} has no E block, the only feed-forward layer; add E unless this is meant")
    return Pattern(text, letters, tuple(warnings))


def boundary_families(letters: Sequence[str]) -> list[str]:
    """Family of every boundary 0 .. depth: "embedding", then the letter of the block that wrote it."""
    return ["embedding", *letters]


def family_of(boundary: int | str, letters: Sequence[str]) -> str:
    """Family of one boundary; "final" is a family of its own (normed states are not comparable with the others)."""
    return FINAL if boundary == FINAL else boundary_families(letters)[int(boundary)]


def select_boundaries(names: Any, letters: Sequence[str], key: str = "stp.boundaries") -> list[int | str]:
    """Resolves named boundary selections to sorted indices, "final" last.

    names: one name or index, or a list of them. all = 0 .. depth (without final); last = depth; final;
    family:X = outputs of X blocks; entering:X = inputs of X blocks; changes = every i with
    letter(i) != letter(i + 1); X is a letter or a family name.
    Raises InputError: unknown name, a boundary or family that the stack lacks, or an empty selection.
    """
    if isinstance(names, (str, int)) or not isinstance(names, Iterable):
        names = [names]
    chosen: set[int] = set()
    final = False
    entries = list(names)
    for entry in entries:
        if entry == FINAL:
            final = True
        else:
            chosen.update(_resolve(entry, letters, key))
    if not chosen and not final:
        raise InputError(f"{key}: {_spell(entries)} selects no boundary of {''.join(letters)}; expected {SELECTIONS}")
    return [*sorted(chosen), *([FINAL] if final else [])]


def _resolve(entry: Any, letters: Sequence[str], key: str) -> list[int]:
    depth = len(letters)
    if isinstance(entry, int) and not isinstance(entry, bool):
        return [_checked_index(entry, depth, key)]
    if not isinstance(entry, str):
        raise InputError(f"{key}: {entry!r} is no boundary; expected {SELECTIONS}")
    if entry.lstrip("+-").isdigit():
        return [_checked_index(int(entry), depth, key)]
    if entry == "all":
        return list(range(depth + 1))
    if entry == "last":
        return [depth]
    if entry == "changes":
        return [i for i in range(1, depth) if letters[i - 1] != letters[i]]
    kind, _, name = entry.partition(":")
    if kind in ("family", "entering") and name:
        letter = _family_letter(name, letters, f"{key}: {entry!r}")
        shift = 1 if kind == "family" else 0
        return [index + shift for index, other in enumerate(letters) if other == letter]
    known = ["all", "last", FINAL, "changes", *(f"{k}:{x}" for k in ("family", "entering") for x in FAMILIES)]
    raise InputError(f"{key}: unknown boundary selection {entry!r}{nearest(entry, known)}; expected {SELECTIONS}")


def _checked_index(index: int, depth: int, key: str) -> int:
    if not 0 <= index <= depth:
        raise InputError(f"{key}: boundary {index} does not exist; a stack of {depth} blocks has 0 .. {depth}")
    return index


def _family_letter(name: str, letters: Sequence[str], where: str) -> str:
    by_family = {family: letter for letter, family in FAMILIES.items()}
    letter = by_family.get(name, name)
    have = sorted(set(letters))
    if letter not in FAMILIES:
        raise InputError(f"{where}: no such family{nearest(name, [*FAMILIES, *by_family])}; expected {', '.join(have)}")
    if letter not in have:
        raise InputError(f"{where}: the stack {''.join(letters)} has no {letter} block; it has {', '.join(have)}")
    return letter


def _spell(entries: list[Any]) -> str:
    return "an empty list" if not entries else ", ".join(repr(entry) for entry in entries)
