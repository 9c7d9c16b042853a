"""Prepared: a corpus ready to train on, opened from its manifest. Opening checks sizes; `verify` reads and hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.packing import TokenStream
from data.shards import Shard, bin_path, idx_path
from data.tokenizer import Tokenizer
from errors import InputError

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class PreparedCorpus:
    """One corpus of the run: its share of the training rows, and the token streams of its splits.

    test: documents whose answers are scored after training; None for plain text.
    """

    label: str
    weight: float
    train: TokenStream
    validation: TokenStream
    test: TokenStream | None = None


@dataclass(frozen=True)
class Answer:
    """What a document asks, as the ids that a model reads (begin token included), and the text that it should write.

    n_tokens: of the expected text, end token included.
    """

    prompt: list[int]
    text: str
    n_tokens: int


@dataclass(frozen=True)
class Prepared:
    """What `data.prepare.prepare` returns.

    folder: where it is cached. manifest: counts, hashes and the settings it was made with.
    manifest_sha256: identity of the data; equal text and settings give the same on any machine.
    """

    folder: Path
    manifest: dict[str, Any]
    manifest_sha256: str
    tokenizer: Tokenizer
    corpora: list[PreparedCorpus]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """(V,) original UTF-8 bytes of each token."""
        return self.tokenizer.token_bytes()

    @property
    def train_tokens(self) -> int:
        return sum(corpus.train.n_tokens for corpus in self.corpora)

    def answers(self, split: str = "test") -> list[Answer]:
        """The documents of a split that end with an answer, in order. Raises InputError if there are none."""
        found = []
        for corpus in self.corpora:
            stream = getattr(corpus, split)
            if stream is None or not stream.has_answers:
                continue
            for begin, end in zip(*stream.document_bounds()):
                tokens, learned = stream.tokens(begin, end), stream.loss_mask(begin, end)
                cut = int(np.flatnonzero(~learned)[-1]) + 1
                found.append(Answer(tokens[:cut].tolist(), self.tokenizer.decode(tokens[cut:]), len(tokens) - cut))
        if not found:
            raise InputError(f"{self.name}: has no {split} split with answers; expected data.source=nlrx or jsonl")
        return found

    @property
    def notes(self) -> list[str]:
        """What a person should know about how the data was made (one line each)."""
        return list(self.manifest["notes"])


def open_prepared(folder: str | Path) -> Prepared:
    """Opens a folder that `prepare` made, in milliseconds whatever its size.

    Raises InputError: no manifest, damaged tokenizer (hash), missing or damaged shard (size).
    """
    folder = Path(folder)
    path = folder / MANIFEST
    advice = f"delete {folder} to prepare it again"
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
        if manifest["format"] != FORMAT:
            raise InputError(f"{path}: format {manifest['format']}, expected {FORMAT}; {advice}")
        entry = manifest["tokenizer"]
        corpora = [
            PreparedCorpus(
                part["label"],
                part["weight"],
                *(_open_split(folder, part[split], advice) for split in SPLITS if split in part),
            )
            for part in manifest["corpora"]
        ]
        tokenizer = _load_tokenizer(folder / entry["file"], entry["sha256"], advice)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; {advice}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path}: the manifest is damaged; {advice}") from None
    return Prepared(folder, manifest, hashlib.sha256(raw).hexdigest(), tokenizer, corpora)


def _load_tokenizer(path: Path, sha256: str, advice: str) -> Tokenizer:
    try:
        return Tokenizer.load(path, sha256)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None


def _open_split(folder: Path, split: dict[str, Any], advice: str) -> TokenStream:
    try:
        shards = [_open_shard(folder, entry) for entry in split["shards"]]
        masks = [_open_shard(folder, entry["loss"]) for entry in split["shards"] if "loss" in entry]
        if masks and [mask.n_tokens for mask in masks] != [shard.n_tokens for shard in shards]:
            raise InputError(f"{masks[0].prefix}: the loss shards do not fit the token shards")
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None
    return TokenStream(shards, split["begin"], split["end"], masks)


def _open_shard(folder: Path, entry: dict[str, Any]) -> Shard:
    prefix = folder / entry["prefix"]  # an absolute prefix (a corpus used in place) stays absolute
    for path, size in ((bin_path(prefix), entry["bin_bytes"]), (idx_path(prefix), entry["idx_bytes"])):
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise InputError(f"{path}: the shard is damaged: it {what}, expected {size:,} bytes")
    return Shard(prefix)


def verify(folder: str | Path, progress: Callable[[str, int, int], None] | None = None) -> list[str]:
    """Reads everything and compares sha256. Returns one line per file that could only be checked by size.

    Raises InputError naming the first damaged file.
    """
    prepared = open_prepared(folder)
    entries = {
        entry["prefix"]: entry
        for part in prepared.manifest["corpora"]
        for split in SPLITS
        if split in part
        for shard in part[split]["shards"]
        for entry in (shard, shard.get("loss"))
        if entry is not None
    }
    total = sum(entry["bin_bytes"] + entry["idx_bytes"] for entry in entries.values())
    done, by_size = 0, []
    for name, entry in entries.items():
        prefix = prepared.folder / name
        for path, kind in ((bin_path(prefix), "bin"), (idx_path(prefix), "idx")):
            if f"{kind}_sha256" not in entry:  # a corpus used in place says so by null
                raise InputError(f"{prepared.folder / MANIFEST}: the manifest is damaged: no {kind}_sha256 of {name}")
            expected = entry[f"{kind}_sha256"]
            if expected is None:
                by_size.append(f"{path}: used in place, checked by size alone (no hash was recorded)")
            elif (found := sha256_file(path)) != expected:
                raise InputError(f"{path}: the shard is damaged: sha256 {found[:12]}, expected {expected[:12]}")
            done += entry[f"{kind}_bytes"]
            if progress:
                progress("verify", done, total)
    return by_size


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
