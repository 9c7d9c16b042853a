"""The grammar of NL-RX (Locascio et al. 2016, arXiv 1608.03000): one tree, worded as English and written as a regex.

The forms and the wording are those of the published rows (the original makes them with a grammar and about 25 textual
clean-ups); tests/data/test_nlrx.py holds them against every row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# kind -> (regex, words). `{0}` is the first child. Regexes are as published: they bracket what the original brackets,
# so `\bX\b` and `.*X.*` bind as loosely as their characters do, not as the tree says.
FORMS: dict[str, tuple[str, str]] = {
    "contain": (".*{0}.*", "containing {0}"),
    "words": (r"\b{0}\b", "words with {0}"),
    "start": ("({0})(.*)", "starting with {0}"),
    "end": ("(.*)({0})", "ending with {0}"),
    "follow": ("{0}.*{1}.*", "{0} followed by {1}"),
    "plus": ("({0})+", "{0} at least once"),
    "star": ("({0})*", "{0}, zero or more times"),
    "repeat": ("({0}){{{n},}}", "{0}, {n} or more times"),
    "only": ("{0}", "containing only {0}"),
    "or": ("({0})|({1})", "{0} or {1}"),
    "and": ("({0})&({1})", "{0} and {1}"),
    "not": ("~({0})", "not {0}"),
    "before": ("({0}).*({1}).*", "{0} before {1}"),
    "and3": ("({0})&({1})&({2})", "{0}, {1}, and {2}"),
    "or3": ("({0})|({1})|({2})", "either {0}, {1}, or {2}"),
}
# What a negation above it does to the wording.
_UNDER_NOT = {"and": "{0} and not {1}", "and3": "{0}, not {1}, and not {2}", "or3": "{0}, {1}, or {2}"}

CLASSES: dict[str, tuple[str, str]] = {
    "number": ("[0-9]", "a number"),
    "capital": ("[A-Z]", "a capital letter"),
    "lower": ("[a-z]", "a lower-case letter"),
    "letter": ("[A-Za-z]", "a letter"),
    "character": (".", "a character"),
    "vowel": ("[AEIOUaeiou]", "a vowel"),
}
# The words of a pair, in the order in which they appear on both sides.
WORDS = ("dog", "truck", "ring", "lake")
REPEATS = range(2, 8)


@dataclass(frozen=True)
class Node:
    """A form with its children, or a leaf. kind: a key of FORMS or CLASSES, or "word".

    n: repetitions of a "repeat"; index in WORDS of a "word".
    """

    kind: str
    children: tuple[Node, ...] = ()
    n: int = 0

    @property
    def is_leaf(self) -> bool:
        return not self.children

    def walk(self) -> Iterator[Node]:
        """This node and all below it, parents first, left to right."""
        yield self
        for child in self.children:
            yield from child.walk()

    def depth(self) -> int:
        """Forms on the longest path; 0 for a leaf."""
        return 1 + max(child.depth() for child in self.children) if self.children else 0


def regex(node: Node) -> str:
    """The tree as a regular expression with & (intersection) and ~ (complement)."""
    if node.kind == "word":
        return WORDS[node.n]
    if node.is_leaf:
        return CLASSES[node.kind][0]
    return FORMS[node.kind][0].format(*map(regex, node.children), n=node.n)


def describe(node: Node) -> str:
    """The tree as a description of lines of text."""
    text = _phrase(node)
    text = re.sub("^words with not (?=a )", "words that don't have ", text)
    text = re.sub("^words with not ", "words that don't ", text)
    if re.match("(a|the) ", text):
        text = f"{'having' if _begins_with_list(node) else 'with'} {text}"
    elif text.startswith("either "):
        text = f"having {text}"
    elif text.startswith("words "):
        text = f"with {text}"
    elif re.match("not (a|the) ", text):
        text = f"not having {text.removeprefix('not ')}"
    return f"lines {text}"


def _phrase(node: Node, negated: bool = False) -> str:
    if node.kind == "word":
        return f"the string '{WORDS[node.n]}'"
    if node.is_leaf:
        return CLASSES[node.kind][1]
    negated = negated or node.kind == "not"
    parts = [_phrase(child, negated) for child in node.children]
    if node.kind == "contain" and parts[0].startswith("not "):
        return f"not containing {parts[0].removeprefix('not ')}"
    if node.kind == "words" and parts[0].startswith("containing "):
        return f"words that contain {parts[0].removeprefix('containing ')}"
    form = _UNDER_NOT.get(node.kind) if negated else None
    return (form or FORMS[node.kind][1]).format(*parts, n=node.n)


def _begins_with_list(node: Node) -> bool:
    while node.kind in ("or", "and", "before", "plus", "star", "repeat"):
        node = node.children[0]
    return node.kind == "and3"
