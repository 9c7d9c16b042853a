"""Whether two regexes describe the same lines, with intersection, complement and word boundaries.

Derivatives of regular expressions (Brzozowski 1964; Owens, Reppy and Turon 2009 for classes of characters), with
word boundaries as conditions on the place between two characters (Moseley et al. 2023, "Derivative Based
Nonbacktracking Real-World Regex Matching"). Pairs of derivatives are walked until one accepts and the other does not.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from data.nlrx.syntax import ALPHABET, WORD_CHARACTERS, Syntax, parse

EQUAL, DIFFERENT, LIMIT = "equal", "different", "limit"
# The walk is given up after so much work (pieces of expressions put together): a few seconds at most. Pairs of
# published regexes take a few hundred, at most some ten thousand.
MAX_WORK = 2_000_000


class LimitReached(Exception):  # noqa: N818 - not a fault of either regex
    """The walk would take too long."""


@dataclass(frozen=True, eq=False)
class Expression:
    """Made by an `Algebra`, which keeps one of each: equal expressions are the same object.

    kind: empty (no line), set, boundary, sequence, union, intersection, complement, repeat; the empty line is a
    sequence of none.
    nullable: accepts the empty line whatever stands around it. conditional: a boundary inside makes that depend.
    """

    kind: str
    children: tuple[Expression, ...]
    characters: int
    low: int
    high: int | None
    nullable: bool
    conditional: bool
    number: int


# What may follow in each of two, and whether a word character is before.
Place = tuple[Expression, Expression, bool]


class Algebra:
    """Builds expressions in a form so normal that every regex has finitely many derivatives."""

    def __init__(self, max_work: int = MAX_WORK) -> None:
        self.max_work = max_work
        self._known: dict[tuple[object, ...], Expression] = {}
        self._derivatives: dict[tuple[int, int, bool], Expression] = {}
        self.work = 0
        self.nothing = self._make("empty")
        self.blank = self._make("sequence", nullable=True)
        self.anything = self._make("repeat", (self.characters(ALPHABET),), nullable=True)

    def read(self, tree: Syntax, boundary: str) -> Expression:
        """boundary: what \\b means: "assertion" (a word begins or ends here), or "letter" (b, as in brics)."""
        children = [self.read(child, boundary) for child in tree.children]
        if tree.kind == "set":
            return self.characters(tree.characters)
        if tree.kind == "boundary":
            return self.characters(1 << ord("b")) if boundary == "letter" else self._make("boundary", conditional=True)
        if tree.kind == "sequence":
            return self.sequence(children)
        if tree.kind == "union":
            return self.union(children)
        if tree.kind == "intersection":
            return self.intersection(children)
        if tree.kind == "complement":
            return self.complement(children[0])
        return self.repeat(children[0], tree.low, tree.high)

    def characters(self, bits: int) -> Expression:
        return self._make("set", characters=bits) if bits else self.nothing

    def sequence(self, parts: list[Expression]) -> Expression:
        flat: list[Expression] = []
        for part in parts:
            for piece in part.children if part.kind == "sequence" else (part,):
                if piece is self.nothing:
                    return self.nothing
                if not (flat and flat[-1] is piece and _is_star(piece)):
                    flat.append(piece)
        self._spend(len(flat))
        if len(flat) == 1:
            return flat[0]
        return self._make("sequence", tuple(flat), nullable=all(piece.nullable for piece in flat))

    def union(self, parts: list[Expression]) -> Expression:
        flat = _flatten("union", parts)
        self._spend(len(flat))
        bits = 0
        for piece in flat:
            bits |= piece.characters if piece.kind == "set" else 0
        kept = {piece for piece in flat if piece.kind != "set" and piece is not self.nothing}
        if bits:
            kept.add(self.characters(bits))
        if self.anything in kept or any(piece.kind == "complement" and piece.children[0] in kept for piece in kept):
            return self.anything
        if self.blank in kept and any(piece.nullable for piece in kept if piece is not self.blank):
            kept.discard(self.blank)
        return self._set_of("union", kept, self.nothing, any(piece.nullable for piece in kept))

    def intersection(self, parts: list[Expression]) -> Expression:
        flat = _flatten("intersection", parts)
        self._spend(len(flat))
        bits = ALPHABET
        for piece in flat:
            bits &= piece.characters if piece.kind == "set" else ALPHABET
        kept = {piece for piece in flat if piece.kind != "set" and piece is not self.anything}
        if any(piece.kind == "set" for piece in flat):
            kept.add(self.characters(bits))
        if self.nothing in kept or any(piece.kind == "complement" and piece.children[0] in kept for piece in kept):
            return self.nothing
        return self._set_of("intersection", kept, self.anything, all(piece.nullable for piece in kept))

    def complement(self, part: Expression) -> Expression:
        if part.kind == "complement":
            return part.children[0]
        if part is self.nothing:
            return self.anything
        if part is self.anything:
            return self.nothing
        return self._make("complement", (part,), nullable=not part.nullable and not part.conditional)

    def repeat(self, part: Expression, low: int, high: int | None) -> Expression:
        if high == 0 or part is self.blank or (part is self.nothing and low == 0):
            return self.blank
        if (low, high) == (1, 1) or part is self.nothing or (_is_star(part) and high is None):
            return part
        low = 0 if part.nullable else low
        return self._make("repeat", (part,), low=low, high=high, nullable=low == 0)

    def accepts_here(self, expression: Expression, before: bool, after: bool) -> bool:
        """Whether the empty line is accepted between a word character or not, and one or not."""
        if not expression.conditional:
            return expression.nullable
        children = expression.children
        if expression.kind == "boundary":
            return before != after
        if expression.kind == "complement":
            return not self.accepts_here(children[0], before, after)
        if expression.kind == "union":
            return any(self.accepts_here(child, before, after) for child in children)
        if expression.kind == "repeat" and expression.low == 0:
            return True
        return all(self.accepts_here(child, before, after) for child in children)

    def derive(self, expression: Expression, character: int, before: bool) -> Expression:
        """What may follow a character (its code), itself behind a word character or not. Raises LimitReached."""
        if expression.kind in ("empty", "boundary"):
            return self.nothing
        if expression.kind == "set":
            return self.blank if expression.characters >> character & 1 else self.nothing
        key = (expression.number, character, before and expression.conditional)
        if (known := self._derivatives.get(key)) is None:
            known = self._derivatives[key] = self._derive(expression, character, before)
        return known

    def _derive(self, expression: Expression, character: int, before: bool) -> Expression:
        children = expression.children
        self._spend(1 + len(children))
        if expression.kind == "union":
            return self.union([self.derive(child, character, before) for child in children])
        if expression.kind == "intersection":
            return self.intersection([self.derive(child, character, before) for child in children])
        if expression.kind == "complement":
            return self.complement(self.derive(children[0], character, before))
        after = bool(WORD_CHARACTERS >> character & 1)
        if expression.kind == "repeat":
            child, low, high = children[0], expression.low, expression.high
            rest = self.repeat(child, max(0, low - 1), None if high is None else high - 1)
            first = self.sequence([self.derive(child, character, before), rest])
            skips = low > 0 and self.accepts_here(child, before, after)
            return self.union([first, self.derive(rest, character, before)]) if skips else first
        ways = []
        for number, child in enumerate(children):
            ways.append(self.sequence([self.derive(child, character, before), *children[number + 1 :]]))
            if not self.accepts_here(child, before, after):
                break
        return self.union(ways)

    def _set_of(self, kind: str, kept: set[Expression], none: Expression, nullable: bool) -> Expression:
        if not kept:
            return none
        if len(kept) == 1:
            return next(iter(kept))
        return self._make(kind, tuple(sorted(kept, key=lambda piece: piece.number)), nullable=nullable)

    def _make(
        self,
        kind: str,
        children: tuple[Expression, ...] = (),
        characters: int = 0,
        low: int = 0,
        high: int | None = None,
        nullable: bool = False,
        conditional: bool = False,
    ) -> Expression:
        self._spend(1 + len(children))
        key = (kind, tuple(child.number for child in children), characters, low, high)
        if (known := self._known.get(key)) is None:
            conditional = conditional or any(child.conditional for child in children)
            known = Expression(kind, children, characters, low, high, nullable, conditional, len(self._known))
            self._known[key] = known
        return known

    def _spend(self, work: int) -> None:
        self.work += work
        if self.work > self.max_work:
            raise LimitReached


def compare(first: str, second: str, boundary: str = "assertion", max_work: int = MAX_WORK) -> str:
    """EQUAL, DIFFERENT, or LIMIT where it was given up. The same on any machine: work is counted, not time.

    Raises RegexSyntaxError if one is no regex of the dialect (see data/nlrx/syntax.py).
    """
    try:
        return EQUAL if difference(first, second, boundary, max_work) is None else DIFFERENT
    except (LimitReached, RecursionError):
        return LIMIT


def difference(first: str, second: str, boundary: str = "assertion", max_work: int = MAX_WORK) -> str | None:
    """A shortest line that one describes and the other does not; None if there is none.

    Raises RegexSyntaxError, LimitReached.
    """
    trees = parse(first), parse(second)
    algebra = Algebra(max_work)
    return _difference(algebra, algebra.read(trees[0], boundary), algebra.read(trees[1], boundary))


def matches(regex: str, line: str, boundary: str = "assertion") -> bool:
    """Whether a regex describes a line (ASCII, no newline). Raises RegexSyntaxError, LimitReached."""
    algebra = Algebra()
    expression = algebra.read(parse(regex), boundary)
    before = False
    for character in line:
        expression = algebra.derive(expression, ord(character), before)
        before = bool(WORD_CHARACTERS >> ord(character) & 1)
    return algebra.accepts_here(expression, before, False)


def _difference(algebra: Algebra, first: Expression, second: Expression) -> str | None:
    conditional = first.conditional or second.conditional
    letters = _representatives([first, second], conditional)
    start: Place = (first, second, False)
    came_from: dict[Place, tuple[Place, int] | None] = {start: None}
    todo = deque([start])
    while todo:
        place = todo.popleft()
        left, right, before = place
        if left is right:
            continue
        if algebra.accepts_here(left, before, False) != algebra.accepts_here(right, before, False):
            line = ""
            while (step := came_from[place]) is not None:
                place, letter = step
                line = chr(letter) + line
            return line
        for letter in letters:
            is_word = conditional and bool(WORD_CHARACTERS >> letter & 1)
            following = (algebra.derive(left, letter, before), algebra.derive(right, letter, before), is_word)
            if following not in came_from:
                came_from[following] = (place, letter)
                todo.append(following)
    return None


def _representatives(expressions: list[Expression], conditional: bool) -> list[int]:
    """One character of each class that the sets in the expressions can tell apart."""
    sets = {WORD_CHARACTERS & ALPHABET} if conditional else set()
    stack = list(expressions)
    while stack:
        expression = stack.pop()
        if expression.kind == "set":
            sets.add(expression.characters)
        stack += expression.children
    classes = [ALPHABET]
    for bits in sets:
        classes = [part for known in classes for part in (known & bits, known & ~bits) if part]
    return [(bits & -bits).bit_length() - 1 for bits in classes]


def _is_star(expression: Expression) -> bool:
    return expression.kind == "repeat" and expression.low == 0 and expression.high is None


def _flatten(kind: str, parts: list[Expression]) -> list[Expression]:
    return [piece for part in parts for piece in (part.children if part.kind == kind else (part,))]
