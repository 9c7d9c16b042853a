"""Regexes as sets of lines, held against Python's `re` and against sets of spans, line by line."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.nlrx.language import DIFFERENT, EQUAL, LIMIT, LimitReached, compare, difference, matches
from data.nlrx.score import INVALID, Score, score, summarise
from data.nlrx.syntax import RegexSyntaxError, Syntax, parse

# A letter of the words, one that is not, a digit, and no word character.
LINES = ["".join(letters) for n in range(5) for letters in itertools.product("da1-", repeat=n)]


def spans(tree: Syntax, line: str) -> set[tuple[int, int]]:
    """All (begin, end) of a line at which a regex matches, straight from the meaning of each operator."""
    places = range(len(line) + 1)
    every = {(i, j) for i in places for j in places if i <= j}
    parts = [spans(child, line) for child in tree.children]
    if tree.kind == "set":
        return {(i, i + 1) for i, letter in enumerate(line) if tree.characters >> ord(letter) & 1}
    if tree.kind == "boundary":
        word = [False, *(letter.isalnum() or letter == "_" for letter in line), False]
        return {(i, i) for i in places if word[i] != word[i + 1]}
    if tree.kind == "union":
        return set.union(*parts)
    if tree.kind == "intersection":
        return set.intersection(*parts)
    if tree.kind == "complement":
        return every - parts[0]
    if tree.kind == "sequence":
        result = parts[0]
        for part in parts[1:]:
            result = {(i, k) for i, j in result for j2, k in part if j == j2}
        return result
    assert tree.kind == "repeat"
    blank = {(i, i) for i in places}
    power, result = blank, set(blank) if tree.low == 0 else set()
    for count in range(1, (tree.high or max(tree.low, 1) + len(line) + 1) + 1):
        power = {(i, k) for i, j in power for j2, k in parts[0] if j == j2}
        result |= power if count >= tree.low else set()
    return result


def describes(regex: str, line: str) -> bool:
    return (0, len(line)) in spans(parse(regex), line)


atoms = st.sampled_from(["d", "a", ".", "[a-f]", "[0-9]", "[^d]", "da", r"\b", ".*", r"\-"])


def regexes(operators: bool) -> st.SearchStrategy[str]:
    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        marks = st.sampled_from(["*", "+", "?", "{2,}", "{2}", "{0,2}", "{1,}"])
        ways = [
            st.tuples(inner, inner).map("".join),
            st.tuples(inner, inner).map("|".join).map("({})".format),
            st.tuples(inner, marks).map(lambda two: f"({two[0]}){two[1]}"),
        ]
        if operators:
            ways += [st.tuples(inner, inner).map("&".join).map("({})".format), inner.map("~({})".format)]
        return st.one_of(ways)

    return st.recursive(atoms, extend, max_leaves=6)


@settings(max_examples=50, deadline=None)
@given(regexes(operators=False))
def test_every_short_line_is_judged_as_python_does(regex: str) -> None:
    compiled = re.compile(regex)
    for line in LINES:
        # Python (before 3.14) lets no \B and no \b match on the empty line: the same as here.
        assert matches(regex, line) == (compiled.fullmatch(line) is not None) == describes(regex, line), line


@settings(max_examples=150, deadline=None)
@given(regexes(operators=True))
def test_intersection_and_complement_are_those_of_sets_of_spans(regex: str) -> None:
    for line in LINES[:90]:
        assert matches(regex, line) == describes(regex, line), line


@pytest.mark.parametrize(
    "regex",
    [
        r"(\b|d){2,}1?",
        r"(\b|a){2}-?",
        r"(\ba|\b){2,}1",
        r"-(~(\b))+d",
        r"(~(\b)|d){2,}-?",
        r"(\b.*){2,}",
        r"\b(d|-)*\b",
        r"([ad-]|\bd1)*",
        r"~(\b)d~(\b)",
        r"(.*\b)&(~(\bd.*))",
        r"~(.*\b.*\b.*)",
        r"(-?\b){3,}a*",
    ],
)
def test_boundaries_inside_repeats_and_complements(regex: str) -> None:
    """Whether the empty line is accepted then depends on the place, and a repeat may use that once and not again."""
    judged = [matches(regex, line) for line in LINES]
    assert judged == [describes(regex, line) for line in LINES]
    assert True in judged and False in judged


@settings(max_examples=150, deadline=None)
@given(regexes(operators=True), regexes(operators=True))
def test_a_difference_is_a_line_that_one_alone_describes(first: str, second: str) -> None:
    line = difference(first, second)
    if line is None:
        assert all(describes(first, other) == describes(second, other) for other in LINES[:90])
    else:
        assert describes(first, line) != describes(second, line)
        shorter = [other for other in LINES[:90] if len(other) < len(line)]
        assert all(describes(first, other) == describes(second, other) for other in shorter)


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ("(.*)(dog)", ".*dog", EQUAL),
        ("dog|truck&dog", "dog", EQUAL),  # & binds tighter than |
        ("dog|(truck&dog)", "(dog|truck)&dog", EQUAL),
        ("~(a)b", "~(ab)", DIFFERENT),  # ~ binds tightest
        ("~(a)*", "(~(a))*", EQUAL),
        ("~(~([0-9]))", "[0-9]", EQUAL),
        ("~((a)|(b))", "(~(a))&(~(b))", EQUAL),
        ("([A-Z]){3,}", "[A-Z][A-Z][A-Z]+", EQUAL),
        ("([A-Z]){3,}", "[A-Z]{4,}", DIFFERENT),
        (r"\b(dog)\b", "dog", EQUAL),  # of whole lines
        (r".*\bdog\b.*", ".*dog.*", DIFFERENT),
        (r"(.*\bdog\b.*)&~(.*dog.*)", "a&b", EQUAL),
        (r"\b.*\b", ".*", DIFFERENT),
        (".", "[^.]|\\.", EQUAL),
        ("(.*[a-c].*){7,}", "(.*[a-c].*){6,}.*[a-c].*", EQUAL),
    ],
)
def test_known_pairs(first: str, second: str, verdict: str) -> None:
    assert compare(first, second) == compare(second, first) == verdict


def test_a_boundary_may_be_read_as_the_letter_b() -> None:
    assert compare(r"\bdog\b", "bdogb", boundary="letter") == EQUAL
    assert compare(r"\bdog\b", "dog", boundary="letter") == DIFFERENT
    assert score("dog", r"\bdog\b") == Score(False, EQUAL, DIFFERENT)


NO_REGEXES = r"( ) a) (a () a| |a a& ~ * a*) [ [] [a [z-a] a{ a{2 a{3,2} a{99999} a{,2} (?:a) \ \d [\w] é".split()  # noqa: SIM905


@pytest.mark.parametrize("text", ["", "a\nb", "(" * 200 + "a" + ")" * 200, "~" * 500 + "a", *NO_REGEXES])
def test_what_is_no_regex(text: str) -> None:
    with pytest.raises(RegexSyntaxError):
        parse(text)
    assert score(text, "dog") == Score(False, INVALID, INVALID)


def test_hard_regexes_are_given_up_soon_and_never_called_equal() -> None:
    start = time.perf_counter()
    for first, second in [
        ("(.*dog.*){300,}", "(.*dog.*){299,}"),
        (".*a.{30}", ".*a.{30}&~(.*b.{29})"),
        ("a" * 4000, "a" * 4000 + "b"),
    ]:
        assert compare(first, second, max_work=100_000) == LIMIT
        with pytest.raises((LimitReached, RecursionError)):
            difference(first, second, max_work=100_000)
    assert time.perf_counter() - start < 10


def test_summary_counts_what_was_given_up_and_what_is_no_regex_as_wrong() -> None:
    scores = [score("dog", "dog "), score(".*a.*", "(.*)(a)(.*)"), score("(", "dog"), Score(False, LIMIT, LIMIT)]
    assert summarise(scores) == {"n": 4, "exact": 0.25, "dfa": 0.5, "dfa_letter": 0.5, "invalid": 1, "limit": 1}
    assert summarise([])["exact"] == 0
