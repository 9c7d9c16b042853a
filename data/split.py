"""Which documents are held out, and which are dropped as duplicates: decided once, before anything is tokenised.

Every decision is by hash, of a document or of the group that it belongs to: it depends on no seed, order or place.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from data.corpora import Corpus
from data.documents import Document, chunks
from data.seen import Seen
from errors import InputError

# Up to here a corpus is read once and kept; a larger one is read again for each pass.
_KEEP_BYTES = 512 << 20
# With more groups than this the hash alone decides: by then the law of large numbers balances the split.
_MANY_GROUPS = 100_000
_SALT = b"held out"
# What `str.split` takes for white space, in ASCII.
_WHITE = bytes(code for code in range(128) if chr(code).isspace())

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_SPLITS = ("", TRAIN, VALIDATION, TEST)
# A byte for each document of a corpus: 0 = dropped, the place of its split in _SPLITS, and a bit for what
# train_fraction leaves out.
_IN_TRAIN, _HELD_OUT, _TESTED, _LEFT_OUT = 1, 2, 3, 4


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
    _codes: bytearray = field(default_factory=bytearray)
    _kept: list[Document] | None = None

    def documents(self) -> Iterator[tuple[Document, str]]:
        """(document, split) for all that are used, in the order of the corpus."""
        for document, code in self._decided():
            if code != _IN_TRAIN | _LEFT_OUT:
                yield document, _SPLITS[code & 3]

    def whole(self) -> Iterator[tuple[Document, str]]:
        """The same with all of the training split, whatever share of it is used."""
        for document, code in self._decided():
            yield document, _SPLITS[code & 3]

    def _decided(self) -> Iterator[tuple[Document, int]]:
        source, codes = self._kept, filter(None, self._codes)
        pairs = zip_longest(self.corpus.documents(), self._codes) if source is None else zip(source, codes)
        for document, code in pairs:
            if document is None or code is None:
                raise InputError("data.path: the text has more or fewer documents than before: it changed meanwhile")
            if code:
                yield document, code


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
    seen = Seen()
    tested: set[str] = set()
    kept: list[Document] | None = []
    sizes: dict[str, int] = {}  # of groups, in bytes
    numbers: dict[str, int] = {}  # of groups
    groups = array("I")  # of the documents that are not tested; no more than the first ones if there are many
    total = 0
    n_documents = leaks = 0
    limit = int(validation_fraction * 2**64)
    for document in corpus.documents():
        bare = _bare(document.text)
        digest = _hash(bare)
        is_leak = document.group in tested and document.split != TEST
        if not bare or is_leak or digest in seen:
            result.duplicates += bool(bare)
            leaks += is_leak and digest not in seen
            result._codes.append(0)
            continue
        seen.add(digest)
        size = len(document.text.encode())
        total += size
        n_documents += 1
        if kept is not None:
            kept.append(document)
            if total > _KEEP_BYTES:
                kept = None
        progress(total)
        group = document.group or digest.hex()
        if document.split == TEST:
            tested.add(group)
        code = _IN_TRAIN
        if document.split == TEST or _is_tested(group, test_fraction):
            code = _TESTED
            result.test_bytes += size
        elif len(numbers) <= _MANY_GROUPS:
            sizes[group] = sizes.get(group, 0) + size
            groups.append(numbers.setdefault(group, len(numbers)))
        elif _rank(group) < limit:
            code = _HELD_OUT
        if train_fraction < 1 and not _is_in_subset(digest, train_fraction):
            code |= _LEFT_OUT
        result._codes.append(code)
        if groups and len(numbers) > _MANY_GROUPS:
            _hold_out(result._codes, groups, [_rank(name) < limit for name in numbers])
            groups = array("I")
    if n_documents == 0:
        raise InputError(f"data.path: {label} holds no text (all its documents are empty)")
    if leaks:
        result.notes.append(f"{label}: {leaks:,} documents left out of training, as their prompts are in the test")
    result._kept = kept
    rest = total - result.test_bytes
    if n_documents == 1 and test_fraction == 0 and not tested:
        only, _ = next(result._decided())
        result._kept = _cut_one(only, validation_fraction, label)
        result.notes.append(f"{label} is a single document: its last lines are held out")
        result.train_bytes, result.validation_bytes = (len(half.text.encode()) for half in result._kept)
        is_used = _is_in_subset(_hash(_bare(result._kept[0].text)), train_fraction)
        result._codes = bytearray([_IN_TRAIN if is_used else _IN_TRAIN | _LEFT_OUT, _HELD_OUT])
    elif len(numbers) > _MANY_GROUPS:
        result.train_bytes = int(rest * (1 - validation_fraction))
        result.validation_bytes = rest - result.train_bytes
    elif not sizes:
        raise InputError(f"data.path: {label} holds too few documents to train on some and hold others out")
    else:
        held_out = choose_held_out(sizes, validation_fraction)
        _hold_out(result._codes, groups, [name in held_out for name in numbers])
        result.validation_bytes = sum(size for name, size in sizes.items() if name in held_out)
        result.train_bytes = sum(sizes.values()) - result.validation_bytes
    return result


def _hold_out(codes: bytearray, groups: array[int], is_held_out: list[bool]) -> None:
    """groups: number of the group of each document so far that is in training."""
    seen = np.frombuffer(codes, np.uint8)
    places = np.flatnonzero(seen & 3 == _IN_TRAIN)
    seen[places[np.asarray(is_held_out)[np.asarray(groups)]]] = _HELD_OUT


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


def _bare(text: str) -> bytes:
    """The text without its white space."""
    if text.isascii():
        return text.encode().translate(None, _WHITE)
    return "".join(text.split()).encode()


def _is_in_subset(digest: bytes, train_fraction: float) -> bool:
    """By the document's own hash: a smaller share is part of every larger one."""
    return train_fraction >= 1 or _rank(f"subset {digest.hex()}") < train_fraction * 2**64


def _is_tested(group: str, test_fraction: float) -> bool:
    return test_fraction > 0 and _rank(f"test {group}") < test_fraction * 2**64


def _hash(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16, salt=_SALT).digest()


def _rank(name: str) -> int:
    """64 bits that decide about a name."""
    return int.from_bytes(_hash(name.encode())[:8], "little")
