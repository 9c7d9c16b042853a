"""Pairs of description and regex: drawn from the grammar, both sides unique.

The rules of what is drawn are those of the original generator (Locascio et al. 2016): which forms may stand in which,
no form and no class of characters twice, at most one repetition, no list or word beside "containing only", and a
few phrases that read badly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from data.nlrx.grammar import CLASSES, FORMS, REPEATS, WORDS, Node, describe, regex
from errors import InputError

_REPETITIONS = {"plus", "star", "repeat"}
_ANY = tuple(FORMS)
_LOOSE = ("contain", "words", "start", "end", "follow", "plus", "star", "repeat", "only", "or")
# What may stand in a form besides leaves; forms that are not listed take leaves alone.
CHILDREN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("contain", "words", "or", "and", "not", "before"), _ANY),
    **dict.fromkeys(("start", "end"), tuple(kind for kind in _LOOSE if kind not in ("start", "end"))),
    **dict.fromkeys(("plus", "star", "repeat"), tuple(kind for kind in _LOOSE if kind not in _REPETITIONS)),
}
ARITY = {kind: words.count("{") - (kind == "repeat") for kind, (_, words) in FORMS.items()}
_NOT_IN_OR_AND = {"words"}
# Forms that never meet in one tree.
_APART = [("only", "and3"), ("only", "or3"), ("only", "follow"), ("and3", "or3")]
_AWKWARD = ("containing starting", "starting with containing", "before starting")
# A leaf is drawn from ten slots, four of them the next word; any child from these and the forms.
_LEAF_SLOTS = (*CLASSES, *["word"] * 4)
# Shares of pairs by the number of forms in the published rows, which hold nearly all there are of one and two forms.
_SHARES = {1: 0.017, 2: 0.565, 3: 0.418}
# Trees up to this size are all listed and shuffled; larger ones are drawn, until so many draws bring nothing new.
_LISTED_FORMS = 2
_PATIENCE = 20_000
# Share of the listed trees with a list of three that is kept: there are so many that they would be half of all.
_LISTS_KEPT = 0.4


@dataclass(frozen=True)
class Pair:
    """One row of the task."""

    description: str
    regex: str


def generate_pairs(n_pairs: int, seed: int = 0) -> list[Pair]:
    """n_pairs different pairs, no description and no regex twice: the same list for the same seed.

    A longer list begins with the shorter one. Raises InputError if the grammar has fewer.
    """
    rng = random.Random(f"nlrx {seed}")
    sources = {size: _trees(random.Random(f"nlrx {seed} {size}"), size) for size in _SHARES}
    descriptions: set[str] = set()
    regexes: set[str] = set()
    pairs: list[Pair] = []
    while len(pairs) < n_pairs:
        if not sources:
            raise InputError(f"data.nlrx.pairs: the grammar gave {len(pairs):,} different pairs; expected at most that")
        size = rng.choices(list(sources), [_SHARES[size] for size in sources])[0]
        for _ in range(_PATIENCE):
            tree = next(sources[size], None)
            if tree is None:
                del sources[size]
                break
            pair = Pair(describe(tree), regex(tree))
            if pair.description not in descriptions and pair.regex not in regexes:
                descriptions.add(pair.description)
                regexes.add(pair.regex)
                pairs.append(pair)
                break
        else:
            del sources[size]
    return pairs


def _trees(rng: random.Random, n_forms: int) -> Iterator[Node]:
    """Trees of this many forms: all of them in a random order, or drawn for ever."""
    if n_forms <= _LISTED_FORMS:
        listed = [tree for tree in _accepted_trees(n_forms) if not _has_list(tree) or rng.random() < _LISTS_KEPT]
        rng.shuffle(listed)
        yield from listed
        return
    while True:
        tree = _draw(rng, rng.choice(_ANY), n_forms)
        if tree is None or sum(not node.is_leaf for node in tree.walk()) != n_forms:
            continue
        tree = number_words(tree)
        if why_not(tree) is None:
            yield tree


@lru_cache(maxsize=_LISTED_FORMS)
def _accepted_trees(n_forms: int) -> tuple[Node, ...]:
    trees = (number_words(tree) for tree in _all_trees(n_forms))
    return tuple(tree for tree in dict.fromkeys(trees) if why_not(tree) is None)


def _all_trees(n_forms: int) -> Iterator[Node]:
    """Every tree of exactly so many forms, before the rules."""
    if n_forms == 0:
        yield from (Node(kind) for kind in (*CLASSES, "word"))
        return
    for kind in _ANY:
        for counts in product(range(n_forms), repeat=ARITY[kind]):
            if sum(counts) != n_forms - 1 or (n_forms > 1 and kind not in CHILDREN):
                continue
            for children in product(*map(_all_trees, counts)):
                for n in REPEATS if kind == "repeat" else (0,):
                    yield Node(kind, children, n)


def _draw(rng: random.Random, kind: str, depth: int) -> Node | None:
    """A tree of at most `depth` below and with `kind`; None where a child's place takes no form that was drawn."""
    children = []
    for _ in range(ARITY[kind]):
        slot = rng.choice((*_ANY, *_LEAF_SLOTS)) if depth > 1 and kind in CHILDREN else rng.choice(_LEAF_SLOTS)
        if slot not in FORMS:
            children.append(Node(slot))
            continue
        child = _draw(rng, slot, depth - 1) if slot in CHILDREN[kind] and slot != kind else None
        if child is None:
            return None
        children.append(child)
    return Node(kind, tuple(children), rng.choice(REPEATS) if kind == "repeat" else 0)


def number_words(tree: Node) -> Node:
    """The words of a tree in the order in which they are read."""
    counter = iter(range(len(WORDS) * 3))

    def renumber(node: Node) -> Node:
        if node.kind == "word":
            return Node("word", n=next(counter))
        return Node(node.kind, tuple(renumber(child) for child in node.children), node.n)

    return renumber(tree)


def why_not(tree: Node) -> str | None:
    """The rule that forbids a tree; None if it may be drawn."""
    nodes = list(tree.walk())
    kinds = [node.kind for node in nodes if node.kind != "word"]
    words = [node.n for node in nodes if node.kind == "word"]
    forms = {kind for kind in kinds if kind in FORMS}
    if tree.is_leaf:
        return "a leaf alone"
    if len(set(kinds)) < len(kinds):
        return "a form or a class twice"
    if words != list(range(len(words))) or len(words) > len(WORDS):
        return "words out of order, or more than there are"
    if len(forms) > max(_SHARES):
        return "too many forms"
    if len(forms & _REPETITIONS) > 1 or any(first in forms and second in forms for first, second in _APART):
        return "forms that never meet"
    for node in nodes:
        for child in node.children:
            if not child.is_leaf and child.kind not in CHILDREN.get(node.kind, ()):
                return f"{child.kind} in {node.kind}"
            if node.kind in ("or", "and") and child.kind in _NOT_IN_OR_AND:
                return f"{child.kind} in {node.kind}"
            if node.kind == "words" and child.is_leaf:
                return "words that are a leaf"
    if tree.kind in ("and3", "or3") or (tree.kind in ("or", "and") and any(_is_plain(c) for c in tree.children)):
        return "a choice or list of leaves alone"
    if tree.kind != "not" and any(child.kind == "only" for child in tree.children):
        return "only right below the top"
    if tree.kind == "only" and not tree.children[0].is_leaf:
        return "only of a form"
    text = describe(tree)
    return next((phrase for phrase in _AWKWARD if phrase in text), None)


def _is_plain(node: Node) -> bool:
    """A leaf, or a leaf alone ("containing only a number")."""
    return node.is_leaf or node.kind == "only"


def _has_list(tree: Node) -> bool:
    return any(node.kind in ("and3", "or3") for node in tree.walk())
