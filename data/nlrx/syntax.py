"""The dialect of the published regexes, read into a syntax tree.

As dk.brics.automaton reads it (as far as we know, what the DFA equality of Locascio et al. 2016 is built on): union
binds loosest, then intersection, concatenation, repetition, and complement tightest. A regex describes whole lines. Not
in the dialect: groups with question marks, anchors, back references, and letters behind a backslash other than \\b.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Bit c is the character with code c; a line has no newline, so `.` and every complement leave it out.
ALPHABET = ((1 << 128) - 1) & ~(1 << 10)
WORD_CHARACTERS = sum(1 << code for code in range(128) if chr(code).isalnum() or chr(code) == "_")
_SPECIAL = set("()[]{}|&~*+?.\\")
_MOST_REPEATS = 1000
_DEEPEST = 100


class RegexSyntaxError(ValueError):
    """Not a regex of the dialect."""


@dataclass(frozen=True)
class Syntax:
    """kind: union, intersection, sequence (children), complement, repeat (one child), set, boundary.

    characters: bits of a set. low, high: bounds of a repeat, high None = any number.
    """

    kind: str
    children: tuple[Syntax, ...] = ()
    characters: int = 0
    low: int = 0
    high: int | None = None


def parse(text: str) -> Syntax:
    """Raises RegexSyntaxError."""
    reader = _Reader(text)
    tree = reader.union()
    if reader.position < len(text):
        raise RegexSyntaxError(f"unexpected {text[reader.position]!r} at {reader.position}")
    return tree


@dataclass
class _Reader:
    text: str
    position: int = field(default=0)
    depth: int = field(default=0)

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def take(self, expected: str = "") -> str:
        found = self.peek()
        if not found or (expected and found != expected):
            raise RegexSyntaxError(f"expected {expected or 'more'} at {self.position}, got {found or 'the end'}")
        self.position += 1
        return found

    def union(self) -> Syntax:
        return self._joined("union", "|", self.intersection)

    def intersection(self) -> Syntax:
        return self._joined("intersection", "&", self.sequence)

    def _joined(self, kind: str, operator: str, part: object) -> Syntax:
        assert callable(part)
        parts = [part()]
        while self.peek() == operator:
            self.take()
            parts.append(part())
        return parts[0] if len(parts) == 1 else Syntax(kind, tuple(parts))

    def sequence(self) -> Syntax:
        parts = []
        while self.peek() and self.peek() not in "|&)":
            parts.append(self.repeat())
        if not parts:
            raise RegexSyntaxError(f"nothing to match at {self.position}")
        return parts[0] if len(parts) == 1 else Syntax("sequence", tuple(parts))

    def repeat(self) -> Syntax:
        tree = self.complement()
        while (mark := self.peek()) and mark in "*+?{":
            self.take()
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(mark) or self._bounds()
            tree = Syntax("repeat", (tree,), low=low, high=high)
        return tree

    def _bounds(self) -> tuple[int, int | None]:
        low = self._number()
        high: int | None = low
        if self.peek() == ",":
            self.take()
            high = None if self.peek() == "}" else self._number()
        self.take("}")
        if high is not None and high < low:
            raise RegexSyntaxError(f"a repeat of {low} to {high} before {self.position}")
        return low, high

    def _number(self) -> int:
        digits = ""
        while self.peek().isdecimal() and self.peek().isascii():
            digits += self.take()
        if not digits or len(digits) > 4 or int(digits) > _MOST_REPEATS:
            raise RegexSyntaxError(f"expected a number up to {_MOST_REPEATS} before {self.position}")
        return int(digits)

    def complement(self) -> Syntax:
        if self.peek() != "~":
            return self.atom()
        self.take()
        self._deeper()
        tree = Syntax("complement", (self.complement(),))
        self.depth -= 1
        return tree

    def _deeper(self) -> None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise RegexSyntaxError(f"nested deeper than {_DEEPEST}")

    def atom(self) -> Syntax:
        first = self.take()
        if first == "(":
            self._deeper()
            tree = self.union()
            self.take(")")
            self.depth -= 1
            return tree
        if first == "[":
            return Syntax("set", characters=self._class())
        if first == ".":
            return Syntax("set", characters=ALPHABET)
        if first == "\\":
            return Syntax("boundary") if self.peek() == "b" and self.take() else self._escaped()
        if first in _SPECIAL:
            raise RegexSyntaxError(f"unexpected {first!r} at {self.position - 1}")
        return Syntax("set", characters=_bit(first))

    def _escaped(self) -> Syntax:
        character = self.take()
        if character.isalnum():
            raise RegexSyntaxError(f"\\{character} before {self.position} has no meaning here")
        return Syntax("set", characters=_bit(character))

    def _class(self) -> int:
        negated = self.peek() == "^"
        if negated:
            self.take()
        bits = 0
        while self.peek() != "]" or not bits:
            first = self._class_character()
            last = first
            if self.peek() == "-" and self.text[self.position + 1 : self.position + 2] not in ("]", ""):
                self.take()
                last = self._class_character()
            if last < first:
                raise RegexSyntaxError(f"a range backwards before {self.position}")
            bits |= (1 << (last + 1)) - (1 << first)
        self.take("]")
        return ALPHABET & ~bits if negated else ALPHABET & bits

    def _class_character(self) -> int:
        character = self.take()
        if character == "\\":
            return self._escaped().characters.bit_length() - 1
        return _bit(character).bit_length() - 1


def _bit(character: str) -> int:
    if not character.isascii() or character == "\n":
        raise RegexSyntaxError(f"{character!r} is not an ASCII character of a line")
    return 1 << ord(character)
