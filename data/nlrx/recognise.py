"""The grammar read backwards: from a published regex to the trees that write it, from a pair to its tree."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product

from data.nlrx.grammar import CLASSES, WORDS, Node, describe

_LEAVES = {form: Node(kind) for kind, (form, _) in CLASSES.items()}
_LEAVES |= {word: Node("word", n=number) for number, word in enumerate(WORDS)}
_AFTER_ONE = {"+": "plus", "*": "star", "(.*)": "start"}


def recognise(description: str, regex: str) -> Node | None:
    """The tree that is worded and written exactly so; None if the grammar has none."""
    return next((tree for tree in trees_of(regex) if describe(tree) == description), None)


@lru_cache(maxsize=1 << 16)
def trees_of(text: str) -> tuple[Node, ...]:
    """All trees whose regex is this text (several, as `dog` is both the word and "containing only" it)."""
    found: list[Node] = []
    if (leaf := _LEAVES.get(text)) is not None:
        found += [leaf, Node("only", (leaf,))]
    if text.startswith(".*") and text.endswith(".*") and len(text) > 4:
        found += _parents("contain", text[2:-2])
    if text.startswith("\\b") and text.endswith("\\b") and len(text) > 4:
        found += _parents("words", text[2:-2])
    for cut in (match.start() for match in re.finditer(r"(?=\.\*)", text)):
        first, second = _LEAVES.get(text[:cut]), _LEAVES.get(text[cut + 2 :].removesuffix(".*"))
        if first is not None and second is not None and text.endswith(".*") and cut + 2 < len(text) - 2:
            found.append(Node("follow", (first, second)))
    if text.startswith("~"):
        inner, rest = _bracket(text[1:])
        if inner is not None and not rest:
            found += _parents("not", inner)
    first_group, rest = _bracket(text)
    if first_group is not None:
        found += _after_bracket(first_group, rest)
    return tuple(dict.fromkeys(found))


def _after_bracket(first: str, rest: str) -> list[Node]:
    """Trees of `(first)rest`."""
    found: list[Node] = []
    if rest in _AFTER_ONE:
        found += _parents(_AFTER_ONE[rest], first)
    if repeat := re.fullmatch(r"\{(\d),\}", rest):
        found += _parents("repeat", first, n=int(repeat[1]))
    if first == ".*":
        second, end = _bracket(rest)
        if second is not None and not end:
            found += _parents("end", second)
    if rest.startswith(".*"):
        second, end = _bracket(rest[2:])
        if second is not None and end == ".*":
            found += _parents("before", first, second)
    for operator, kind in (("|", "or"), ("&", "and")):
        if rest.startswith(operator):
            second, end = _bracket(rest[1:])
            third, last = _bracket(end[1:]) if end.startswith(operator) else (None, "")
            if second is not None and not end:
                found += _parents(kind, first, second)
            elif second is not None and third is not None and not last:
                found += [tree for tree in _parents(f"{kind}3", first, second, third) if _all_leaves(tree)]
    return found


def _parents(kind: str, *texts: str, n: int = 0) -> list[Node]:
    return [Node(kind, children, n) for children in product(*map(trees_of, texts))]


def _all_leaves(tree: Node) -> bool:
    return all(child.is_leaf for child in tree.children)


def _bracket(text: str) -> tuple[str | None, str]:
    """`(inside)rest` -> inside, rest; None where the text does not begin with a closed bracket."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return (text[1:position], text[position + 1 :]) if character == ")" else (None, text)
    return None, text
