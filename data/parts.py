"""Parts: stretches of a corpus that are tokenised one by one, by any process, and kept until all of them are there.

The stream of documents is cut by the documents alone. So the parts, and the shards that they are joined to, are the
same for any number of processes and however often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.documents import Document, Segment
from data.tokenizer import Tokenizer

PART_BYTES = 16 << 20
_BATCH_CHARACTERS = 4 << 20

# The split that a document goes to, and its stretches of text, each with whether it is learned.
Item = tuple[str, list[tuple[str, bool]]]


@dataclass(frozen=True)
class Part:
    """number: its place in the corpus. n_bytes: of UTF-8 text."""

    number: int
    items: list[Item]
    n_bytes: int

    @cached_property
    def payload(self) -> bytes:
        """The items as bytes: what a tokenising process reads. A line of JSON, which has the split of each and the
        bytes of its stretches, and the texts behind it."""
        texts = [[text.encode() for text, _ in stretches] for _, stretches in self.items]
        table = [
            (split, [(len(raw), is_learned) for raw, (_, is_learned) in zip(raws, stretches)])
            for raws, (split, stretches) in zip(texts, self.items)
        ]
        return b"".join([json.dumps(table).encode(), b"\n", *(raw for raws in texts for raw in raws)])

    def digest(self, tokenizer: Tokenizer) -> str:
        """Of all that its tokens depend on."""
        return hashlib.blake2b(self.payload, key=tokenizer.sha256[:64].encode(), digest_size=16).hexdigest()


def unpack(payload: bytes) -> list[Item]:
    """The items of a part's payload."""
    begin = payload.index(b"\n") + 1
    items: list[Item] = []
    for split, stretches in json.loads(payload[:begin]):
        texts = []
        for size, is_learned in stretches:
            texts.append((payload[begin : begin + size].decode(), is_learned))
            begin += size
        items.append((split, texts))
    return items


def cut(documents: Iterable[tuple[Document, str]], part_bytes: int = PART_BYTES) -> Iterator[Part]:
    """Parts of about part_bytes of text, in the order of the corpus."""
    items: list[Item] = []
    number = size = 0
    for document, split in documents:
        segments = document.segments or (Segment(document.text, "answer"),)
        items.append((split, [(segment.text, segment.part == "answer") for segment in segments]))
        size += len(document.text.encode())
        if size >= part_bytes:
            yield Part(number, items, size)
            items, number, size = [], number + 1, 0
    if items:
        yield Part(number, items, size)


def tokenise(items: Iterable[Item], tokenizer: Tokenizer, threads: int = 1) -> dict[str, NDArray]:
    """Arrays per split: `X.ids` (all tokens), `X.learned` (one byte a token), `X.tokens` and `X.bytes` (per document);
    and `exact`: whether the tokens' bytes add up to the text's."""
    token_bytes = tokenizer.token_bytes()
    found: dict[str, list[NDArray]] = {}
    exact = True
    for batch in _batches(items):
        texts = [text for _, stretches in batch for text, _ in stretches]
        encoded = iter(tokenizer.encode_batch(texts, threads))
        for split, stretches in batch:
            ids, learned = _join(stretches, encoded, tokenizer)
            size = sum(len(text.encode()) for text, _ in stretches)
            exact = exact and int(token_bytes[ids].sum()) == size
            for name, values in (("ids", ids), ("learned", learned), ("tokens", len(ids)), ("bytes", size)):
                found.setdefault(f"{split}.{name}", []).append(np.atleast_1d(values))
    return {name: np.concatenate(arrays) for name, arrays in found.items()} | {"exact": np.asarray(exact)}


def save(path: Path, arrays: dict[str, NDArray], digest: str) -> None:
    """Whole on the disk, or not there. Raises OSError."""
    data = io.BytesIO()
    np.savez(data, digest=np.asarray(digest), **arrays)  # type: ignore[arg-type] # names, and not allow_pickle
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> dict[str, NDArray]:
    with np.load(path) as arrays:
        return dict(arrays)


def documents(arrays: dict[str, NDArray], split: str) -> Iterator[tuple[NDArray, int, NDArray]]:
    """What a part has for a split: (tokens, bytes of text, which tokens are learned) of each document, in order."""
    if f"{split}.ids" not in arrays:
        return
    ids, learned, sizes = (arrays[f"{split}.{name}"] for name in ("ids", "learned", "bytes"))
    ends = arrays[f"{split}.tokens"].cumsum()
    for begin, end, size in zip([0, *ends[:-1].tolist()], ends.tolist(), sizes.tolist(), strict=True):
        yield ids[begin:end], size, learned[begin:end]


def is_done(path: Path, digest: str) -> bool:
    """Whether a part is there, whole (each array has a checksum) and of this very text and tokenizer."""
    try:
        return str(load(path)["digest"]) == digest
    except Exception:  # numpy and zipfile raise anything at damaged bytes; whatever it is, the part is made again
        return False


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += sum(len(text) for text, _ in item[1])
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(
    stretches: list[tuple[str, bool]], encoded: Iterator[NDArray[np.int32]], tokenizer: Tokenizer
) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """A document's tokens and which of them are learned: answers and the end token behind each."""
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    ids: list[NDArray] = [np.asarray(begin, np.int32)]
    learned: list[NDArray] = [np.zeros(len(begin), np.uint8)]
    for (_, is_learned), tokens in zip(stretches, encoded):
        ids += [tokens, np.asarray([tokenizer.eos_id], np.int32)] if is_learned else [tokens]
        learned.append(np.full(len(tokens) + is_learned, is_learned, np.uint8))
    return np.concatenate(ids), np.concatenate(learned)
