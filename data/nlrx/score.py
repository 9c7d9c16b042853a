"""How right an answer is: the same string, or another regex for the same lines."""

from __future__ import annotations

from dataclasses import dataclass

from data.nlrx.language import EQUAL, LIMIT, compare
from data.nlrx.syntax import RegexSyntaxError

INVALID = "invalid"


@dataclass(frozen=True)
class Score:
    """exact: the same string, spaces at the ends aside, as the STP paper counts.

    dfa: equal | different | limit (given up, counts as wrong) | invalid (not a regex). With \\b as a word boundary.
    dfa_letter: the same with \\b read as the letter b, as dk.brics.automaton does, on which (as far as we know) the
    scorer of Locascio et al. 2016 is built. The same string is equal even where it is no regex.
    """

    exact: bool
    dfa: str
    dfa_letter: str


def score(answer: str, expected: str) -> Score:
    answer, expected = answer.strip(), expected.strip()
    if answer == expected:
        return Score(True, EQUAL, EQUAL)
    try:
        verdict = compare(answer, expected)
        letter = compare(answer, expected, boundary="letter") if "\\b" in answer + expected else verdict
    except RegexSyntaxError:
        return Score(False, INVALID, INVALID)
    return Score(False, verdict, letter)


def summarise(scores: list[Score]) -> dict[str, float | int]:
    """Shares of all answers, invalid ones and those given up included, and how many these were."""
    n = len(scores)
    return {
        "n": n,
        "exact": sum(one.exact for one in scores) / max(n, 1),
        "dfa": sum(one.dfa == EQUAL for one in scores) / max(n, 1),
        "dfa_letter": sum(one.dfa_letter == EQUAL for one in scores) / max(n, 1),
        "invalid": sum(one.dfa == INVALID for one in scores),
        "limit": sum(LIMIT in (one.dfa, one.dfa_letter) for one in scores),
    }
