from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import split
from data.documents import Document
from data.seen import Seen
from data.split import choose_held_out, sample, survey
from errors import InputError

WHITE = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())


class Listed:
    def __init__(self, documents: list[Document]) -> None:
        self.listed = documents
        self.passes = 0

    def fingerprint(self) -> list[object]:
        return []

    def documents(self) -> Iterator[Document]:
        self.passes += 1
        return iter(self.listed)


def run(documents: list[Document], fraction: float = 0.1) -> split.Survey:
    return survey(Listed(documents), "corpus", fraction, lambda done: None)


def modules(count: int, files: int = 3) -> list[Document]:
    return [Document(f"m{m}/f{f}", f"text {m} {f} " * (5 + m % 7), f"m{m}") for m in range(count) for f in range(files)]


def test_no_module_is_on_both_sides() -> None:
    result = run(modules(200))
    sides: dict[str, set[str]] = {}
    for document, side in result.documents():
        sides.setdefault(document.group, set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    share = result.validation_bytes / (result.validation_bytes + result.train_bytes)
    assert 0.08 < share <= 0.1
    held_out = [document for document, side in result.documents() if side == "validation"]
    assert sum(len(document.text.encode()) for document in held_out) == result.validation_bytes
    assert len({document.group for document in held_out}) > 10


def test_repetitions_and_empty_documents_are_dropped() -> None:
    documents = [
        Document("a", "one two"),
        Document("b", "  one\n\ttwo\n"),  # the same but for white space
        Document("c", "onetwo "),
        Document("d", " \n"),
        Document("e", "three"),
        Document("f", "four"),
    ]
    result = run(documents, 0.4)
    assert [document.key for document, _ in result.documents()] == ["a", "e", "f"]
    assert result.duplicates == 2


def test_split_does_not_depend_on_names_or_order_of_plain_documents() -> None:
    texts = [f"document {number} " * 4 for number in range(60)]
    first = run([Document(f"x{number}", text) for number, text in enumerate(texts)])
    second = run([Document(f"y{number}", text) for number, text in enumerate(reversed(texts))])
    sides = [{d.text for d, side in r.documents() if side == "validation"} for r in (first, second)]
    assert sides[0] == sides[1] and len(sides[0]) >= 3


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 1000), min_size=2, max_size=40),
    st.floats(0.01, 0.5),
)
def test_something_is_on_either_side_and_no_large_group_is_held_out(groups: dict[str, int], fraction: float) -> None:
    held_out = choose_held_out(groups, fraction)
    assert held_out and held_out < groups.keys()
    budget = fraction * sum(groups.values())
    if len(held_out) > 1:
        assert sum(groups[name] for name in held_out) <= budget
        assert all(groups[name] <= budget / 2 for name in held_out)


def test_many_documents_are_split_by_hash_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MANY_GROUPS", 50)
    result = run([Document(str(number), f"text {number}") for number in range(2000)], 0.1)
    held_out = sum(side == "validation" for _, side in result.documents())
    assert 140 < held_out < 260
    assert result.train_bytes > 0


def test_a_corpus_too_large_to_keep_is_read_again_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [*modules(30), Document("again", "text 0 0 " * 5, "m9")]
    kept = list(run(documents).documents())
    monkeypatch.setattr(split, "_KEEP_BYTES", 100)
    corpus = Listed(documents)
    again = survey(corpus, "corpus", 0.1, lambda done: None)
    assert list(again.documents()) == kept
    assert corpus.passes == 2


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text("ab \n\u00a0\u3000é", max_size=6), min_size=3, max_size=40),
    names=st.lists(st.sampled_from(["", "", "g", "h", "i"]), min_size=40, max_size=40),
    many=st.sampled_from([3, 100_000]),
    keep=st.sampled_from([0, 1 << 20]),
    share=st.sampled_from([0.4, 1.0]),
    test_fraction=st.sampled_from([0.0, 0.3]),
)
def test_each_document_is_judged_by_its_hash_and_group_alone(
    texts: list[str], names: list[str], many: int, keep: int, share: float, test_fraction: float
) -> None:
    """Against the rule, worked out for each document by itself: what prepared corpora are made of."""
    documents = [Document(str(n), text, name) for n, (text, name) in enumerate(zip(texts, names))]
    distinct = {"".join(document.text.split()): document for document in reversed(documents)}
    distinct.pop("", None)

    def hashed(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=16, salt=b"held out").digest()

    def rank(text: str) -> float:
        return int.from_bytes(hashed(text)[:8], "little") / 2**64

    expected = []
    sizes: dict[str, int] = {}
    for bare, document in sorted(distinct.items(), key=lambda item: int(item[1].key)):
        group = document.group or hashed(bare).hex()
        expected.append((document, group, rank(f"subset {hashed(bare).hex()}") < share))
        if rank(f"test {group}") >= test_fraction:
            sizes[group] = sizes.get(group, 0) + len(document.text.encode())
    if len(expected) < 2 or not sizes:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "_MANY_GROUPS", many)
        patch.setattr(split, "_KEEP_BYTES", keep)
        result = survey(
            Listed(documents), "c", 0.2, lambda done: None, test_fraction=test_fraction, train_fraction=share
        )
    held_out = choose_held_out(sizes, 0.2) if len(sizes) <= many else {name for name in sizes if rank(name) < 0.2}
    sides = []
    for document, group, is_used in expected:
        side = "test" if group not in sizes else "validation" if group in held_out else "train"
        if side != "train" or is_used:
            sides.append((document, side))
    assert list(result.documents()) == sides
    assert len(list(result.whole())) == len(expected)


def test_a_corpus_that_changes_meanwhile_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_KEEP_BYTES", 0)
    corpus = Listed(modules(9))
    result = survey(corpus, "corpus", 0.1, lambda done: None)
    for listed in (corpus.listed[:-1], [*corpus.listed, corpus.listed[0]]):
        corpus.listed = listed
        with pytest.raises(InputError, match="it changed meanwhile"):
            list(result.documents())
        corpus.listed = modules(9)


@given(st.text())
def test_white_space_is_what_python_takes_for_it(text: str) -> None:
    for one in (text, "".join(char for char in text if char.isascii()), f"a{WHITE}b{WHITE[:10]}c"):
        assert split._bare(one) == "".join(one.split()).encode()


def test_what_was_seen_is_known_in_few_bytes() -> None:
    seen, digests = Seen(), [hashlib.blake2b(bytes([n % 256, n // 256]), digest_size=16).digest() for n in range(30000)]
    for number, digest in enumerate([*digests, bytes(16), b"\xff" * 16]):
        assert digest not in seen, number
        seen.add(digest)
        seen.add(digest)
    assert all(digest in seen for digest in digests)
    assert 30000 * 12 <= seen.n_bytes <= 30000 * 26


@pytest.mark.parametrize("text", ["line\n" * 50, "no line break at all, " * 20, "x" * 99 + "\n", "ab"])
def test_a_single_document_gives_its_end(text: str) -> None:
    result = run([Document("book.txt", text)], 0.1)
    (head, head_split), (tail, tail_split) = result.documents()
    assert (head_split, tail_split) == ("train", "validation")
    assert head.text + tail.text == text
    assert len(tail.text) <= max(1, 0.25 * len(text))
    assert result.notes == ["corpus is a single document: its last lines are held out"]


@pytest.mark.parametrize("texts", [[], ["", " \n"], ["x"]])
def test_too_little_text(texts: list[str]) -> None:
    with pytest.raises(InputError, match=r"^data.path: corpus holds"):
        run([Document(str(number), text) for number, text in enumerate(texts)])


def test_sample_is_bounded_even_and_from_training_text() -> None:
    documents = [Document(f"{n}", f"{n:04d} " + "abc\n" * 500, f"g{n}") for n in range(400)]
    result = run(documents, 0.2)
    held_out = {document.text[:4] for document, side in result.documents() if side == "validation"}
    pieces = sample(result, 200_000)
    assert 120_000 < sum(map(len, pieces)) < 280_000
    numbers = [piece[:4] for piece in pieces]
    assert not held_out & set(numbers)
    assert sum(number < "0200" for number in numbers) > 0.3 * len(numbers)  # not from the beginning alone
    assert sum(number >= "0200" for number in numbers) > 0.3 * len(numbers)
    assert sum(map(len, sample(result, 10**9))) == result.train_bytes
