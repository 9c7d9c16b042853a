"""Which documents are held out, and which are dropped as duplicates: decided once, before anything is tokenised.

Every decision is by hash, of a document or of the group that it belongs to: it depends on no seed, order or place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from data.corpora import Corpus
from data.documents import Document, chunks
from errors import InputError

# Up to here a corpus is read once and kept; a larger one is read again for each pass.
_KEEP_BYTES = 512 << 20
# With more groups than this the hash alone decides: by then the law of large numbers balances the split.
_MANY_GROUPS = 100_000
_SALT = b"held out"


TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass
class Survey:
    """A corpus, gone through once: duplicates known, split decided.

    train_bytes, validation_bytes, test_bytes: of UTF-8 text, before train_fraction takes its share of the first.
    """

    corpus: Corpus
    train_fraction: float = 1.0
    duplicates: int = 0
    train_bytes: int = 0
    validation_bytes: int = 0
    test_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    _dropped: set[int] = field(default_factory=set)
    _kept: list[Document] | None = None
    _split_of: Callable[[Document], str] = lambda document: TRAIN

    def documents(self) -> Iterator[tuple[Document, str]]:
        """(document, split) for all that are used, in the order of the corpus."""
        for document, split in self.whole():
            if split != TRAIN or self.train_fraction >= 1 or self._is_in_subset(document):
                yield document, split

    def whole(self) -> Iterator[tuple[Document, str]]:
        """The same with all of the training split, whatever share of it is used."""
        source = self._kept if self._kept is not None else _without(self.corpus.documents(), self._dropped)
        for document in source:
            yield document, self._split_of(document)

    def _is_in_subset(self, document: Document) -> bool:
        """By the document's own hash: a smaller share is part of every larger one."""
        return _rank(f"subset {_content(document)}") < self.train_fraction * 2**64


def survey(
    corpus: Corpus,
    label: str,
    validation_fraction: float,
    progress: Callable[[int], None],
    *,
    test_fraction: float = 0.0,
    train_fraction: float = 1.0,
) -> Survey:
    """Reads a corpus once. Empty documents and repetitions (equal but for white space) are dropped.

    The split is by group (the module or subpackage, or the document itself), by the hash of its name (or content).
    Documents that say themselves that they are for the test are; their groups are then in no other split.
    Raises InputError if no text is left.
    """
    result = Survey(corpus, train_fraction)
    seen: set[bytes] = set()
    tested: set[str] = set()
    kept: list[Document] | None = []
    groups: dict[str, int] = {}
    total = 0
    n_documents = leaks = 0
    for number, document in enumerate(corpus.documents()):
        bare = "".join(document.text.split())
        digest = _hash(bare.encode())
        is_leak = document.group in tested and document.split != TEST
        if not bare or digest in seen or is_leak:
            result.duplicates += bool(bare)
            leaks += is_leak and digest not in seen
            result._dropped.add(number)
            continue
        seen.add(digest)
        size = len(document.text.encode())
        total += size
        n_documents += 1
        document = replace(document, group=_group(document))
        if kept is not None:
            kept.append(document)
            if total > _KEEP_BYTES:
                kept = None
        progress(total)
        if document.split == TEST:
            tested.add(document.group)
        if document.split == TEST or _is_tested(document.group, test_fraction):
            result.test_bytes += size
        elif len(groups) <= _MANY_GROUPS:
            groups[document.group] = groups.get(document.group, 0) + size
    if n_documents == 0:
        raise InputError(f"data.path: {label} holds no text (all its documents are empty)")
    if leaks:
        result.notes.append(f"{label}: {leaks:,} documents left out of training, as their prompts are in the test")
    result._kept = kept

    def by_test(otherwise: Callable[[str], bool]) -> Callable[[Document], str]:
        def split_of(document: Document) -> str:
            group = _group(document)
            if document.split == TEST or _is_tested(group, test_fraction):
                return TEST
            return VALIDATION if otherwise(group) else TRAIN

        return split_of

    rest = total - result.test_bytes
    if n_documents == 1 and test_fraction == 0 and not tested:
        only = kept[0] if kept else next(_without(corpus.documents(), result._dropped))
        result._kept = _cut_one(only, validation_fraction, label)
        result.notes.append(f"{label} is a single document: its last lines are held out")
        groups = {document.group: len(document.text.encode()) for document in result._kept}
        held_out = {"end"}
    elif len(groups) > _MANY_GROUPS:
        limit = int(validation_fraction * 2**64)
        result.train_bytes = int(rest * (1 - validation_fraction))
        result.validation_bytes = rest - result.train_bytes
        result._split_of = by_test(lambda group: _rank(group) < limit)
        return result
    elif not groups:
        raise InputError(f"data.path: {label} holds too few documents to train on some and hold others out")
    else:
        held_out = choose_held_out(groups, validation_fraction)
    result._split_of = by_test(held_out.__contains__)
    result.validation_bytes = sum(size for name, size in groups.items() if name in held_out)
    result.train_bytes = sum(groups.values()) - result.validation_bytes
    return result


def choose_held_out(groups: dict[str, int], fraction: float) -> set[str]:
    """Groups (name -> bytes) in the order of their hashes, until about `fraction` of the bytes is reached.

    A group larger than half of that is left in training, so that the held-out text has several origins; if there is
    none small enough, the smallest group is taken. At least one group stays on either side.
    """
    budget = fraction * sum(groups.values())
    chosen: set[str] = set()
    size = 0.0
    for name in sorted(groups, key=lambda name: (_rank(name), name)):
        if groups[name] <= budget / 2 and size + groups[name] <= budget:
            chosen.add(name)
            size += groups[name]
        if size >= 0.9 * budget:
            break
    return chosen or {min(groups, key=lambda name: (groups[name], _rank(name), name))}


def _cut_one(document: Document, fraction: float, label: str) -> list[Document]:
    """A corpus of one document, cut behind a line (else anywhere) so that its end can be held out."""
    text = document.text
    place = min(max(1, int(len(text) * (1 - fraction))), len(text) - 1)
    newline = text.rfind("\n", int(len(text) * (1 - 2 * fraction)), place)
    place = newline + 1 if newline > 0 else place
    head, tail = text[:place], text[place:]
    if not head.strip() or not tail.strip():
        raise InputError(f"data.path: {label} holds {len(text)} characters, too few to train on and hold some out")
    return [Document(document.key, head, "head"), Document(f"{document.key} (end)", tail, "end")]


def sample(survey: Survey, n_bytes: int) -> list[str]:
    """About n_bytes of training text in pieces of up to 16 KB, drawn by hash: what the vocabulary learns from.

    From the whole training split, so that runs on different shares of it have the same vocabulary.
    """
    share = min(1.0, n_bytes / max(1, survey.train_bytes)) * 2**64
    pieces = []
    for document, split in survey.whole():
        if split == TRAIN:
            pieces += [piece for piece in chunks(document.text, 1 << 14) if _rank(piece) < share]
    return pieces


def _group(document: Document) -> str:
    return document.group or _content(document)


def _content(document: Document) -> str:
    return _hash("".join(document.text.split()).encode()).hex()


def _is_tested(group: str, test_fraction: float) -> bool:
    return test_fraction > 0 and _rank(f"test {group}") < test_fraction * 2**64


def _hash(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16, salt=_SALT).digest()


def _rank(name: str) -> int:
    """64 bits that decide about a name."""
    return int.from_bytes(_hash(name.encode())[:8], "little")


def _without(documents: Iterator[Document], dropped: set[int]) -> Iterator[Document]:
    return (document for number, document in enumerate(documents) if number not in dropped)
