"""Patterns, boundaries and their names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import InputError
from model.pattern import (
    boundary_families,
    family_of,
    parse_pattern,
    select_boundaries,
)


def test_once():
    pattern = parse_pattern("AEMEAEMEAEMR")
    assert "".join(pattern.letters) == "AEMEAEMEAEMR" and pattern.depth == 12 and pattern.warnings == ()


def test_tiled_and_partial_last_tile_is_announced():
    assert parse_pattern("AEMR", 8).letters == tuple("AEMRAEMR")
    assert parse_pattern("AEMR", 8).warnings == ()
    pattern = parse_pattern("AEMEAEMEAEMR", 52)
    assert pattern.letters == tuple("AEMEAEMEAEMR" * 4 + "AEME")
    (warning,) = pattern.warnings
    assert "52 = 4 x 12 + 4" in warning and "partial" in warning


def test_no_feed_forward_warns():
    (warning,) = parse_pattern("AMR").warnings
    assert "no E block" in warning
    assert any("no E block" in w for w in parse_pattern("AME", 2).warnings)  # the E is in the part that is cut off


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AEXR", r"model.pattern: 'X' at position 3 of 'AEXR'.* A \(attention\), M \(mamba2\), E \(moe\), R \(m2rnn\)"),
        ("AeM", "'e' at position 2 .*lower case; write 'E'"),
        ("x", "'x' at position 1"),
        ("A|M", r"'\|' at position 2 .*reserved"),
        ("A M", "' ' at position 2"),
        ("A*", r"'\*' at position 2"),
        ("", "at least one letter"),
    ],
)
def test_bad_letters(text, words):
    with pytest.raises(InputError, match=words) as error:
        parse_pattern(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [0, -3, True])
def test_bad_depth(depth):
    with pytest.raises(InputError, match=r"model\.depth: expected at least 1"):
        parse_pattern("AEM", depth)


@given(st.text("AMER", min_size=1, max_size=16), st.integers(1, 70))
def test_tiling_is_cyclic(text, depth):
    letters = parse_pattern(text, depth).letters
    assert len(letters) == depth
    assert all(letters[i] == text[i % len(text)] for i in range(depth))


LETTERS = tuple("AEMEAEMEAEMR")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("all", list(range(13))),
        ("last", [12]),
        ("final", ["final"]),
        ("family:M", [3, 7, 11]),
        ("family:mamba2", [3, 7, 11]),
        ("family:R", [12]),
        ("entering:M", [2, 6, 10]),
        ("entering:A", [0, 4, 8]),
        ("changes", list(range(1, 12))),
        ([3, 7], [3, 7]),
        (["7", "3", 3], [3, 7]),
        (5, [5]),
        ("5", [5]),
        ([0], [0]),
        (["family:R", "entering:A", "final", 3], [0, 3, 4, 8, 12, "final"]),
        (["final", "all"], [*range(13), "final"]),
    ],
)
def test_selections(names, expected):
    assert select_boundaries(names, LETTERS) == expected


def test_changes_are_where_the_letter_changes():
    assert select_boundaries("changes", "AAEEM") == [2, 4]


@given(st.text("AMER", min_size=1, max_size=14))
def test_families_partition_the_outputs(text):
    outputs = [i for x in sorted(set(text)) for i in select_boundaries(f"family:{x}", text)]
    inputs = [i for x in sorted(set(text)) for i in select_boundaries(f"entering:{x}", text)]
    assert sorted(outputs) == list(range(1, len(text) + 1)) and sorted(inputs) == list(range(len(text)))
    families = boundary_families(text)
    assert all(families[i] == text[i - 1] for i in outputs) and families[0] == "embedding"
    assert family_of("final", text) == "final" and family_of(len(text), text) == text[-1]


@pytest.mark.parametrize(
    ("names", "letters", "words"),
    [
        ([], "AEM", "an empty list selects no boundary"),
        ("changes", "AAA", "'changes' selects no boundary"),
        (13, "AEM", "boundary 13 does not exist; a stack of 3 blocks has 0 .. 3"),
        (-1, "AEM", "boundary -1 does not exist"),
        ("-1", "AEM", "boundary -1 does not exist"),
        ("family:R", "AEM", "the stack AEM has no R block; it has A, E, M"),
        ("entering:m2rnn", "AEM", "has no R block"),
        ("family:X", "AEM", "no such family"),
        ("family:mamba", "AEM", "did you mean 'mamba2'"),
        ("family:", "AEM", "unknown boundary selection"),
        ("lst", "AEM", "did you mean 'last'"),
        ("every", "AEM", "unknown boundary selection"),
        (True, "AEM", "no boundary"),
        ([None], "AEM", "no boundary"),
        (None, "AEM", "no boundary"),
        ([1.5], "AEM", "no boundary"),
    ],
)
def test_bad_selections(names, letters, words):
    with pytest.raises(InputError, match=words) as error:
        select_boundaries(names, letters)
    assert str(error.value).startswith("stp.boundaries: ") and "\n" not in str(error.value)
